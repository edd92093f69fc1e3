"""What an engine is, and the table of those there are."""

import importlib
import importlib.util
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from corewise.common.errors import EngineError
from corewise.records.build import Build, Plan, Receipt, TensorSpec
from corewise.records.cpu import Cpu
from corewise.samples import Samples

BUILD_RUNS, BUILD_RUNS_S = 3, 0.5
MIXED_ROWS = "a row's answer depends on the rows beside it: one scale rounds the activations of a whole batch"
"""The note of builds with ``mixes_rows``."""
LINEAR = r"aten\.(linear|addmm|matmul|mm|bmm)\b"
CONVOLUTION = r"aten\.\w*conv\w*"

ENGINES = {
    "eager": "corewise.engines.eager:Eager",
    "torch-int8": "corewise.engines.torch_int8:TorchInt8",
    "openvino": "corewise.engines.openvino:OpenVino",
    "inductor": "corewise.engines.inductor:Inductor",
    "onnxruntime": "corewise.engines.onnxruntime:OnnxRuntime",
    "fake": "corewise.engines.fake:Fake",
}
"""Name to ``module:class``. Any other engine is named by its own ``module:class``."""

SUGGESTED = tuple(name for name in ENGINES if name != "fake")
"""Engines that a message may name; ``fake`` is for tests."""


@dataclass(frozen=True, kw_only=True)
class BuildInputs:
    """What a build is made from."""

    program: Path
    """The exported fp32 program (``.pt2``: flat tensors in, flat tensors out, dynamic batch)."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    operators: dict[str, int]
    """How often each operator stands in the program, e.g. ``{"aten.conv2d.default": 53}``."""
    calibration: Samples
    cpu: Cpu
    cache: Path
    """A folder for what several builds of one engine share."""

    def count(self, pattern: str) -> int:
        """How many operators of the program match the regular expression."""
        return count(self.operators, pattern)


def count(operators: Mapping[str, int], pattern: str) -> int:
    """How many of the operators, each named with its number, match the regular expression."""
    return sum(n for name, n in operators.items() if re.search(pattern, name))


def is_mostly_linear(operators: Mapping[str, int]) -> bool:
    """Whether a program has linear layers, and at least as many as convolutions."""
    return count(operators, LINEAR) >= max(1, count(operators, CONVOLUTION))


class Session(Protocol):
    """An opened payload. Not thread-safe: one thread at a time calls ``run``."""

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run any batch of at least one item; inputs and outputs are as the program's specs say."""
        ...

    def close(self) -> None:
        """Give back memory and threads."""
        ...


@runtime_checkable
class Sharing(Session, Protocol):
    """A session on whose weights further instances can run, each in its own thread, at the same time."""

    def another(self) -> Session:
        """One more instance, for the thread that calls; the plan it was opened with counts them all.

        Both stay open until they are closed, in any order.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class PixelScale:
    """How pixels, levels of 0 to 255, become a model's input: ``(level - mean) / std``, by the channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@runtime_checkable
class PixelTaking(Protocol):
    """An engine whose payloads of one float32 input (N, C, H, W) can take pixels in its place, uint8 (N, H, W, C)."""

    def take_pixels(self, folder: Path, scale: PixelScale) -> Path:
        """Have the payload's sessions take pixels too, and normalize them; the file that says so.

        Without that file the payload is as it was.
        """
        ...


class Engine(Protocol):
    """One way to run a model. Construction is free; heavy imports wait for ``build`` and ``open``."""

    def unavailable(self, opening: bool = False) -> str:
        """Why it cannot be used here, in words with the fix; empty if it can. ``opening`` a payload needs less."""
        ...

    def candidates(self, cpu: Cpu, operators: dict[str, int]) -> tuple[Build, ...]:
        """The builds worth trying for such a program on such a CPU, the most promising first."""
        ...

    def needs(self, build: Build) -> tuple[str, ...]:
        """ISA extensions (``Cpu.isa`` names, or ``int8_dot``, ``bf16``) the payload must find where it runs."""
        ...

    def build(self, build_inputs: BuildInputs, build: Build, folder: Path) -> tuple[str, ...]:
        """Write the payload into the empty ``folder``; returns notes for the report.

        Raises ``EngineError`` if the engine cannot build this program or this build.
        """
        ...

    def open(self, folder: Path, build: Build, plan: Plan) -> Session:
        """Open the first of ``plan.instances``: ``plan.batch`` items a call on ``plan.threads_per_instance`` threads.

        The thread that opens also runs and closes it: OpenMP's and others' threads inherit its affinity. The other
        instances are ``Sharing.another`` where the session has it, else opened alike.
        """
        ...

    def receipt(self, folder: Path, build: Build, plan: Plan, inputs: Sequence[np.ndarray]) -> Receipt | None:
        """What a payload really runs in int8, observed as it is opened under ``plan`` and run on ``inputs``.

        ``None`` for builds in fp32 or bf16, and for engines that cannot say it. The payload stays as it is.
        """
        ...


def engine(name: str) -> Engine:
    """The engine of that name in ``ENGINES``, or of that ``module:class``."""
    reference = ENGINES.get(name, name)
    module, _, attribute = reference.partition(":")
    if not attribute:
        raise EngineError(f"no engine is named {name!r}", f"use one of {', '.join(SUGGESTED)} or module:class")
    try:
        made: Engine = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise EngineError(f"engine {name!r} cannot be loaded: {error}", "check its module:class") from error
    return made


def mixes_rows(opener: Engine, build: Build) -> bool:
    """Whether a row's answer depends on the rows beside it in a batch, so that serving must not batch strangers.

    An engine lists the precisions of which that is so in its attribute ``MIXING``, if there are any: those that round
    the activations of a whole batch by one scale, which they find as the batch comes.
    """
    return build.precision in getattr(opener, "MIXING", ())


def missing(packages: Sequence[str], extra: str) -> str:
    """Why an engine with these packages is unavailable, in words; empty if all are installed."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(absent)}: pip install 'corewise[{extra}]'" if absent else ""


def chunks(rows: int, sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Cut ``rows`` into calls of allowed sizes: (start, stop, size), the last one padded up to its size.

    For runtimes that are fast only with a static batch: the largest size as often as it fits, then
    the smallest one that holds the rest.
    """
    largest = max(sizes)
    cuts = [(start, start + largest, largest) for start in range(0, rows - largest + 1, largest)]
    start = len(cuts) * largest
    if start < rows:
        cuts.append((start, rows, min(size for size in sizes if size >= rows - start)))
    return cuts


def run_cut(
    call: Callable[[list[np.ndarray]], list[np.ndarray]],
    inputs: Sequence[np.ndarray],
    cuts: Sequence[tuple[int, int, int]],
) -> list[np.ndarray]:
    """The outputs of a batch that ``call`` takes in the pieces that ``chunks`` cut, without their padding."""
    parts = [
        [output[: stop - start] for output in call([rows_of(array, start, stop, size) for array in inputs])]
        for start, stop, size in cuts
    ]
    return parts[0] if len(parts) == 1 else [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


def rows_of(array: np.ndarray, start: int, stop: int, size: int) -> np.ndarray:
    """Rows ``start`` to ``stop``, the last one repeated up to ``size`` rows; contiguous."""
    rows = np.ascontiguousarray(array[start:stop])
    return rows if len(rows) == size else np.concatenate([rows, rows[-1:].repeat(size - len(rows), axis=0)])


def fastest_s(session: Session, batch: Sequence[np.ndarray]) -> float:
    """Seconds of the fastest of a few calls, the first one untimed: for choices that an engine makes while building.

    Slow calls vary less, so that fewer of them are timed.
    """
    session.run(batch)
    seconds = []
    for _ in range(BUILD_RUNS):
        start = time.perf_counter()
        session.run(batch)
        seconds.append(time.perf_counter() - start)
        if sum(seconds) >= BUILD_RUNS_S:
            break
    return min(seconds)
