"""TorchInductor: programs compiled ahead of time to machine code, in fp32, bf16 and int8."""

import copy
import json
import re
import shutil
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from corewise.common.errors import EngineError
from corewise.common.references import guard
from corewise.engines import qdq
from corewise.engines.base import BuildInputs, Session, chunks, fastest_s, missing, rows_of, run_cut
from corewise.engines.libraries import quiet
from corewise.machine.torch_features import INT8_PASSES, int8_passes
from corewise.records.build import Build, Plan, Receipt, TensorSpec
from corewise.records.cpu import Cpu
from corewise.records.jsonable import from_json, to_json

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.export import ExportedProgram

SETTINGS = "inductor.json"
ONE, MANY = 1, 16
"""The batches that a program is compiled for; others are cut and padded to them."""
COMPILER = "g++"
X86_64_V3 = ("avx2", "fma", "f16c")
X86_64_V4 = (*X86_64_V3, "avx512")
ISAS = {
    "avx2": X86_64_V3,
    "avx512": X86_64_V4,
    "avx512_vnni": (*X86_64_V4, "avx512_vnni"),
    "amx": (*X86_64_V4, "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
}
"""What the option ``isa`` may be, and what the payload then needs (names of ``Cpu.isa``).

Inductor can be told the width of its vectors but not to leave out what this CPU has of that width
(``torch._inductor.cpu_vec_isa.pick_vec_isa``): beside ``avx2`` it compiles for the last of these that the CPU has.
"""
WEIGHTED = r"aten\.(\w*conv\w*|linear|addmm|mm)\b"
CALL = re.compile(r"CHECK\(aoti_torch_cpu_(\w+)\(")
INT8_KERNEL = r"_q(conv|linear)\w*"
FLOAT_KERNEL = r"(mkldnn__)?convolution\w*|_(mkl_)?linear\w*|(add)?mm_out"
LOOP = "loop"
"""No kernel: the compiler makes linears of up to 16 x 16, or to one output, into loops where the batch is one."""


class Inductor:
    """PyTorch's compiler, ahead of time (AOTInductor, https://docs.pytorch.org: "torch.compiler_aot_inductor").

    The payload is one package of machine code for batches of 1 and one for batches of 16 (see ``InductorSession``), or
    one for any batch where other dimensions are dynamic too. The option ``isa`` is the instruction set it is compiled
    for. int8 programs come from corewise's own quantizer; ``reduce_range`` asks it for weights of 7 bits. oneDNN runs
    convolutions and linears on weights that were packed for the CPU that built them: where oneDNN would pack them
    otherwise, as on a CPU with more extensions, it does so at every call.
    """

    def unavailable(self, opening: bool = False) -> str:
        """Needs torch and, to build, torchao and the compiler g++."""
        if opening:
            return missing(("torch",), "optimize")
        if reason := missing(("torch", "torchao"), "optimize"):
            return reason
        return "" if shutil.which(COMPILER) else f"needs the C++ compiler {COMPILER}: apt-get install {COMPILER}"

    def candidates(self, cpu: Cpu, operators: dict[str, int]) -> tuple[Build, ...]:
        """On x86 only: int8 for convolutions and linears if torch or torchao fuses it, bf16 if the CPU has it, fp32."""
        if not (isas := _isas(cpu)):
            return ()
        options = (("isa", isas[-1]),)
        ours = qdq.int8("inductor", cpu)
        int8 = replace(ours, options=options + ours.options)
        bf16 = Build(engine="inductor", precision="bf16", options=options)
        fp32 = Build(engine="inductor", precision="fp32", options=options)
        quantizable = any(re.search(WEIGHTED, name) for name in operators) and int8_passes()
        return (*((int8,) if quantizable else ()), *((bf16,) if cpu.bf16 else ()), fp32)

    def needs(self, build: Build) -> tuple[str, ...]:
        """The instruction set; bf16 hardware for bf16, 32-bit sums of int8 products for int8 in full range."""
        isa = _needs(str(build.option("isa", "avx2")))
        if build.precision == "int8" and not build.quantization.reduce_range:
            return (*isa, "int8_dot")
        return (*isa, "bf16") if build.precision == "bf16" else isa

    def build(self, build_inputs: BuildInputs, build: Build, folder: Path) -> tuple[str, ...]:
        """Export the program for each batch, compile it, and time the batches.

        Raises ``EngineError`` where the program cannot be quantized or compiled, nothing in it became int8, or this CPU
        cannot be compiled for as the option ``isa`` says.
        """
        from corewise.engines.torch_tools import threads

        isa = str(build.option("isa", "avx2"))
        if isa not in (isas := _isas(build_inputs.cpu)):
            raise EngineError(
                f"inductor cannot compile for isa {isa!r} on this CPU",
                f"use {' or '.join(isas)}" if isas else "use another engine",
            )
        free = any(size is None for spec in build_inputs.inputs for size in spec.shape[1:])
        sizes = () if free else (ONE, MANY)
        with quiet(), threads(build_inputs.cpu.usable_cores):
            program, notes = _program(build_inputs, build)
            module: nn.Module = program.module()
            dims: Any = _dynamic(build_inputs.inputs) if free else None
            if build.precision == "bf16":
                # torch.export wants the shapes of ``*inputs`` as one argument's.
                module, dims = _in_bf16(module), (dims,) if free else None
            for size in sizes or (None,):
                with guard(EngineError, "inductor cannot compile this program", "use another engine"):
                    _compile(module, _example(build_inputs, size or 2), dims, isa, _package(folder, size))
        quantized = 0
        if build.precision == "int8":
            quantized = sum("dequantize_per_channel" in str(node.target) for node in program.graph.nodes)
            notes = (*notes, *_proof(folder, sizes, quantized))
        settings = {
            "inputs": to_json(build_inputs.inputs),
            "sizes": sizes,
            "one_by_one": 0,
            "layers": build_inputs.count(WEIGHTED),
            "quantized": quantized,
        }
        (folder / SETTINGS).write_text(json.dumps(settings))
        if sizes:
            times = {size: _time(self, build_inputs, build, folder, size) for size in sizes}
            # At least one, whatever a noisy machine says: a padded sixteen is no faster than a call of one.
            settings["one_by_one"] = max(1, int(times[MANY] / times[ONE]))
            (folder / SETTINGS).write_text(json.dumps(settings))
            told = ", ".join(f"batch {size} {seconds * 1e3:.1f} ms" for size, seconds in times.items())
            notes = (*notes, f"compiled for batches of {ONE} and {MANY} ({told})")
        return notes

    def open(self, folder: Path, build: Build, plan: Plan) -> Session:
        """Load the package for the plan's batch."""
        del build
        return InductorSession(folder, plan)

    def receipt(self, folder: Path, build: Build, plan: Plan, inputs: Sequence[np.ndarray]) -> Receipt | None:
        """From the source that the package was compiled from, which calls one kernel after the other."""
        del plan
        if build.precision != "int8":
            return None
        settings = json.loads((folder / SETTINGS).read_text())
        size = cuts(len(inputs[0]), settings["one_by_one"])[0][2] if settings["sizes"] else None
        ran = [(name, _is_int8(name)) for name, count in kernels(_package(folder, size)).items() for _ in range(count)]
        ran += [(LOOP, False)] * (settings["layers"] - len(ran))
        lost = settings["quantized"] - sum(is_int8 for _, is_int8 in ran)
        return Receipt.tally(ran, ["a layer that the compiler left in fp32"] * lost)


class InductorSession:
    """Packages for batches of 1 and 16, each loaded when it is first needed; or one for any batch.

    A package of oneDNN's kernels for any batch packs the weights again at every call whose batch is not its example's.
    What remains of a batch after the sixteens runs one by one or as one padded sixteen, whichever took less time while
    building. PyTorch's binding holds Python's lock while a package runs (2.13): instances take turns, so that one with
    all threads serves best.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        from corewise.engines.torch_tools import keep_freed_memory

        keep_freed_memory()
        settings = json.loads((folder / SETTINGS).read_text())
        self._packages = _Packages(folder)
        self._threads = plan.threads_per_instance
        self._inputs = from_json(tuple[TensorSpec, ...], settings["inputs"])
        self._static = bool(settings["sizes"])
        self._one_by_one: int = settings["one_by_one"]
        for _, _, size in self._cuts(plan.batch)[:1]:
            self._for_batch(size)

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run a batch of any size. Raises ``ValueError`` for inputs that do not fit: compiled code does not look."""
        from corewise.engines.torch_tools import threads

        _check(inputs, self._inputs)
        with threads(self._threads):
            return run_cut(self._call, inputs, self._cuts(len(inputs[0])))

    def _cuts(self, rows: int) -> list[tuple[int, int, int]]:
        return cuts(rows, self._one_by_one) if self._static else [(0, rows, rows)]

    def _call(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        from corewise.engines.torch_tools import from_numpy, to_numpy

        outputs = self._for_batch(len(inputs[0]))(*map(from_numpy, inputs))
        return to_numpy(outputs if isinstance(outputs, (tuple, list)) else [outputs])

    def _for_batch(self, rows: int) -> Any:
        return self._packages.loaded(rows if self._static else None)

    def another(self) -> "InductorSession":
        """The same packages: constants and packed weights are theirs."""
        return copy.copy(self)

    def close(self) -> None:
        """Unload the packages, unless other instances run them.

        Their files are gone then; threads that ran them keep the machine code mapped until they end, because it
        registers destructors of thread_local values (dlclose(3)).
        """
        self.__dict__.pop("_packages", None)


class _Packages:
    """A payload's packages, each loaded when it is first needed; several threads may ask."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaded: dict[int | None, Any] = {}
        self._lock = threading.Lock()

    def loaded(self, size: int | None) -> Any:
        """The package for batches of ``size``; ``None``: for any batch."""
        from torch._inductor import aoti_load_package

        with self._lock:
            if size not in self._loaded:
                # Loading imports torch's compiler, parts of which log or warn.
                with quiet():
                    self._loaded[size] = aoti_load_package(str(_package(self._folder, size)))
            return self._loaded[size]


def cuts(rows: int, one_by_one: int) -> list[tuple[int, int, int]]:
    """Cut ``rows`` into calls of ``MANY`` or one: (start, stop, size).

    ``one_by_one`` is how many calls of one take no longer than one of ``MANY``: that many of the last rows run alone,
    and all of them if that is ``MANY`` or more.
    """
    alone = rows if one_by_one >= MANY else rows % MANY
    if one_by_one < min(alone, MANY):
        return chunks(rows, (MANY,))
    return [
        *chunks(rows - alone, (MANY,)),
        *((row, row + 1, ONE) for row in range(rows - alone, rows)),
    ]


def kernels(package: Path) -> dict[str, int]:
    """How often a package calls each kernel for a convolution or linear, by AOTInductor's names.

    For example ``{"_qconv_pointwise_tensor": 52, "mkldnn__linear_pointwise": 1}``. Products of two activations
    (``bmm``) do not count.
    """
    with zipfile.ZipFile(package) as file:
        source = "".join(file.read(name).decode() for name in file.namelist() if name.endswith(".wrapper.cpp"))
    called = Counter(CALL.findall(source))
    return {name: n for name, n in sorted(called.items()) if _is_int8(name) or re.fullmatch(FLOAT_KERNEL, name)}


def _is_int8(kernel: str) -> bool:
    return re.fullmatch(INT8_KERNEL, kernel) is not None


def _needs(isa: str) -> tuple[str, ...]:
    if isa not in ISAS:
        raise EngineError(f"inductor cannot compile for the isa {isa!r}", f"use one of {', '.join(ISAS)}")
    return ISAS[isa]


def _isas(cpu: Cpu) -> tuple[str, ...]:
    """What can be compiled for on this CPU, the best last."""
    names = [name for name, needs in ISAS.items() if all(map(cpu.has, needs))]
    return tuple(dict.fromkeys((*names[:1], *names[-1:])))


def _package(folder: Path, size: int | None) -> Path:
    return folder / ("any.pt2" if size is None else f"batch{size}.pt2")


def _program(build_inputs: BuildInputs, build: Build) -> "tuple[ExportedProgram, tuple[str, ...]]":
    """The program to compile: as it is, or quantized where oneDNN's kernels want it; and notes."""
    if build.precision != "int8":
        from corewise.source import load_program

        return load_program(build_inputs.program), ()
    path, notes = qdq.quantized(build_inputs, build, "fused")
    from corewise.quantize.state import load_quantized

    return load_quantized(path), notes


def _in_bf16(module: "nn.Module") -> "nn.Module":
    """The module in bf16, with inputs and outputs as they were."""
    import torch
    from torch import nn

    from corewise.engines.torch_tools import to_bf16

    class InBf16(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = to_bf16(module)

        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = [tensor.bfloat16() if tensor.dtype == torch.float32 else tensor for tensor in inputs]
            return tuple(tensor.float() if tensor.dtype == torch.bfloat16 else tensor for tensor in self.module(*given))

    return InBf16()


def _compile(module: "nn.Module", example: "tuple[torch.Tensor, ...]", dims: Any, isa: str, package: Path) -> None:
    """Compile for ``example`` and ``dims``, torch.export's dynamic shapes, without a trace in any other folder.

    AOTInductor freezes weights only without gradients; else it leaves quantized layers in fp32 without a word
    (https://github.com/pytorch/ao/issues/4566).
    """
    import torch
    from torch._inductor import aoti_compile_and_package

    _register_int8_passes()
    with torch.no_grad(), _cache(package.parent):
        program = torch.export.export(module, example, dynamic_shapes=dims, strict=False)
        aoti_compile_and_package(
            program,
            package_path=str(package),
            inductor_configs={
                "freezing": True,
                "max_autotune": False,
                # As many as the session says, not as many as there are now.
                "cpp.dynamic_threads": True,
                "cpp.cxx": (None, COMPILER),
                "cpp.march": "x86-64-v3" if isa == "avx2" else "x86-64-v4",
                "cpp.simdlen": 256 if isa == "avx2" else 512,
                # Thousands of lines to compile, for checks that only a debugging variable turns on.
                "size_asserts": False,
                # They would stay in the system's temporary folder, and save 2 of 20 seconds.
                "aot_inductor.precompile_headers": False,
                "compile_threads": 1,
            },
        )


def _register_int8_passes() -> None:
    """Let inductor fuse int8 layers, as it does by itself up to torch 2.13."""
    if int8_passes() == "torchao":
        from torchao.quantization.pt2e.inductor_passes import x86

        getattr(x86, INT8_PASSES)()


@contextmanager
def _cache(folder: Path) -> Iterator[None]:
    """An inductor cache that is empty, and gone afterwards, whatever happens."""
    from torch._inductor.utils import fresh_cache

    with TemporaryDirectory(dir=folder) as cache, fresh_cache(dir=cache):
        yield


def _dynamic(inputs: Sequence[TensorSpec]) -> tuple[dict[int, Any], ...]:
    """``torch.export``'s dynamic shapes: the batch, and what else the specs leave open."""
    from torch.export import Dim

    batch = Dim("batch", min=1)
    return tuple({k: Dim.DYNAMIC if k else batch for k, size in enumerate(spec.shape) if not size} for spec in inputs)


def _example(build_inputs: BuildInputs, size: int) -> "tuple[torch.Tensor, ...]":
    """``size`` rows of one shape, the last one repeated where there are less."""
    from corewise.engines.torch_tools import from_numpy

    _, arrays = next(build_inputs.calibration.batches(size))
    return tuple(from_numpy(rows_of(array, 0, len(array), size)) for array in arrays)


def _proof(folder: Path, sizes: Sequence[int], quantized: int) -> tuple[str, ...]:
    """Warnings of packages with quantized layers in fp32. Raises ``EngineError`` where all of them are in all."""
    made = {
        size: sum(count for name, count in kernels(_package(folder, size)).items() if _is_int8(name))
        for size in sizes or (None,)
    }
    if not any(made.values()):
        raise EngineError("inductor left every layer in fp32", "use another precision or engine")
    return tuple(
        f"warning: only {count} of {quantized} quantized layers run in int8{f' at batch {size}' if size else ''}"
        for size, count in made.items()
        if count < quantized
    )


def _time(engine: Inductor, build_inputs: BuildInputs, build: Build, folder: Path, size: int) -> float:
    """Seconds of a call with ``size`` rows."""
    session = engine.open(folder, build, Plan(threads_per_instance=build_inputs.cpu.usable_cores, batch=size))
    try:
        return fastest_s(session, [tensor.numpy() for tensor in _example(build_inputs, size)])
    finally:
        session.close()


def _check(inputs: Sequence[np.ndarray], specs: Sequence[TensorSpec]) -> None:
    """Raise ``ValueError`` unless number, dtypes and shapes are those of the specs, with at least one row."""
    if len(inputs) != len(specs):
        raise ValueError(f"{len(inputs)} inputs instead of {len(specs)}")
    for array, spec in zip(inputs, specs, strict=True):
        sizes = zip(array.shape[1:], spec.shape[1:], strict=False)
        fits = array.ndim == len(spec.shape) and all(expected in (None, size) for size, expected in sizes)
        if array.dtype.name != spec.dtype or not fits or len(array) != len(inputs[0]):
            given = f"{array.dtype.name} of shape {array.shape}"
            raise ValueError(f"input {spec.name} is {given} instead of {spec.dtype} of {spec.shape}")
    if not len(inputs[0]):
        raise ValueError("a batch needs at least one row")
