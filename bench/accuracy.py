"""How accurate int8 is by corewise's quantizer and by those that users know, against fp32 on the same samples.

    python bench/accuracy.py [--model resnet50 ...] [--quantizer 'corewise-*' ...] [--again] [--out FILE.json]

Each quantizer works in a child process of its own on one thread; its model then answers the samples that are measured.
What it answers is the arithmetic of int8 but not this CPU's: values are rounded to their grids and computed on in fp32,
so that CPUs which add int8 products in 16 bits, and saturate, do not blur what the quantizer did. A name's number is
the bits of the weights: 8, or 7 by the tool's option for such CPUs.

- corewise-8, corewise-7: ``corewise.quantize``, simulated for both placements.
- nncf-8, nncf-7: the OpenVINO engine's own int8 (for 7 with ``OverflowFix.ENABLE``), the plugin's low-precision
  transformations off, so that it runs FakeQuantize operations in fp32.
- onnxruntime-8, onnxruntime-7: that engine's own int8 (``quantize_static``; 7 is ``reduce_range``), with
  ``session.disable_quant_qdq``, so that Q and DQ operators run as they stand.
- torchao-8, torchao-7: ``X86InductorQuantizer`` with its default configuration (7: ``reduce_range``, which is for
  activations) on a strict export; the Q/DQ graph runs in eager PyTorch.
- torch.ao-8, torch.ao-7: FX graph mode with the default mappings of the backends onednn and x86 (7 bits for
  activations), converted to its fp32 reference.

``quantize_s`` is the time from the exported fp32 program (torchao, torch.ao: from the module) to a model that answers,
without the ONNX export; ``quantize_cpu_s`` the processor's, which other processes disturb less; ``peak_memory_bytes``
the most that the child had resident until then. That no int8 kernel ran is counted in the compiled models and kept in
the row.

Photo models calibrate on the first 200 photos and are measured on the last 300, ResNet-20 on the first 500 images and
the last 2,500. MiniLM calibrates on 200 sentences drawn with a seed and is measured on all 3,000 of STS-B dev;
``held_out`` has the same without those 200. Each row is written when it is finished; rows that the file has are not
measured again without ``--again``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from subjects import DATA, ROOT, SUBJECTS  # noqa: E402

from corewise import source  # noqa: E402
from corewise.common.errors import CorewiseError, EngineError  # noqa: E402
from corewise.common.references import guard  # noqa: E402
from corewise.engines import BuildInputs, engine  # noqa: E402
from corewise.engines.libraries import quiet  # noqa: E402
from corewise.machine.inspect import inspect_cpu  # noqa: E402
from corewise.records.build import Build  # noqa: E402
from corewise.records.jsonable import to_json  # noqa: E402
from corewise.runtime.worker import (  # noqa: E402
    CALIBRATION,
    HOLDOUT,
    PROGRAM,
    peak_memory_bytes,
    read_build_inputs,
    write_build_inputs,
)
from corewise.samples import Samples, split  # noqa: E402

ANSWER, FP32 = "answer.json", "fp32.npy"
PACKAGES = ("corewise", "torch", "torchao", "openvino", "nncf", "onnxruntime", "onnx", "transformers", "numpy")
CALIBRATE = {"resnet50": 200, "mobilenet_v2": 200, "resnet20": 500, "minilm": 200}
MEASURED_LAST = {"resnet50": 300, "mobilenet_v2": 300, "resnet20": 2500}
BATCH = 10
SEED = 0
THREADS = 1
TIMEOUT_S = 3600.0
REASON = 500

Arrays = Sequence[np.ndarray]
Predict = Callable[[Arrays], np.ndarray]
"""A batch of the model's inputs to its one output."""
Made = dict[str, tuple[Predict, int]]
"""By placement (empty where there is one only): how to answer, and how many int8 kernels that runs."""


def samples_of(model: str) -> tuple[Samples, Samples, np.ndarray]:
    """For calibration, to be measured on, and which of the latter calibration did not see (bool)."""
    data = SUBJECTS[model].data()
    count = CALIBRATE[model]
    if model == "minilm":
        calibrating, _ = split(data, calibration=count, seed=SEED)
        assert data.groups is not None
        assert calibrating.groups is not None
        return calibrating, data, ~np.isin(data.groups, calibrating.groups)
    measured = MEASURED_LAST[model]
    return data.take(range(count)), data.take(range(len(data) - measured, len(data))), np.ones(measured, bool)


def answers(predict: Predict, samples: Samples) -> np.ndarray:
    """The model's output for each sample, in their order."""
    parts = [(indices, predict(arrays)) for indices, arrays in samples.batches(BATCH)]
    found = np.concatenate([output for _, output in parts])
    order = np.argsort(np.concatenate([indices for indices, _ in parts]))
    return np.asarray(found[order])


def torch_predict(module: Any) -> Predict:
    """A module on torch tensors, which may return its output alone or in a tuple."""
    import torch

    def predict(arrays: Arrays) -> np.ndarray:
        with torch.no_grad():
            output = module(*(torch.from_numpy(array) for array in arrays))
        return np.asarray((output if isinstance(output, torch.Tensor) else output[0]).numpy())

    return predict


def corewise(material: BuildInputs, folder: Path, model: str, bits: int) -> Made:
    """Ours; what was decided is in the notes that the row keeps."""
    from corewise.engines.torch_tools import keep_freed_memory
    from corewise.quantize.placement import TARGETS
    from corewise.quantize.ptq import quantize
    from corewise.quantize.quantized import Recipe
    from corewise.quantize.simulate import Simulation

    keep_freed_memory()
    made = quantize(source.load_program(material.program), material.calibration, Recipe(weight_bits=bits))
    (folder / "notes.json").write_text(json.dumps(made.notes))

    def predict(target: Any) -> Predict:
        module, placement, ranges = made.placed(target)
        simulation = Simulation(module, placement.edges, ranges)
        return torch_predict(lambda *batch: simulation.run(batch))

    return {target: (predict(target), 0) for target in TARGETS}


def nncf(material: BuildInputs, folder: Path, model: str, bits: int) -> Made:
    """The build of the engine, its FakeQuantize operations run in fp32."""
    engine("openvino").build(material, _build("openvino", bits), folder)
    return {"": _emulated_by_openvino(folder / "model.xml")}


def _emulated_by_openvino(path: Path) -> tuple[Predict, int]:
    import openvino

    from corewise.engines.openvino_receipt import RUN_LAYERS

    # Not in the list of supported properties, but read by the CPU plugin (src/plugins/intel_cpu/src/config.cpp).
    config = {
        "LP_TRANSFORMS_MODE": False,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": THREADS,
        "NUM_STREAMS": 1,
    }
    compiled = openvino.Core().compile_model(str(path), "CPU", config)
    about = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    # Layers only: their weights may be kept in int8 and converted.
    kernels = [one["primitiveType"].astype(str) for one in about if one["layerType"].astype(str) in RUN_LAYERS]
    return lambda arrays: compiled(list(arrays))[0], sum(name.endswith("_I8") for name in kernels)


def onnxruntime(material: BuildInputs, folder: Path, model: str, bits: int) -> Made:
    """The build of the engine, its Q and DQ operators run as they stand."""
    engine("onnxruntime").build(material, _build("onnxruntime", bits), folder)
    return {"": _emulated_by_onnxruntime(folder / "model.onnx")}


def _emulated_by_onnxruntime(path: Path) -> tuple[Predict, int]:
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.optimized_model_filepath = str(path.with_name("optimized.onnx"))
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    kernels = sum("QLinear" in kind or "Integer" in kind or kind in ("QGemm", "QAttention") for kind in kinds)
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))[0], kernels


def torchao(material: BuildInputs, folder: Path, model: str, bits: int) -> Made:
    """The PT2E flow as its tutorial shows it, exported in strict mode."""
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    example = _batches(material, 2)[0]
    batch = torch.export.Dim("batch")
    exported = torch.export.export(
        _module(model), example, dynamic_shapes=tuple({0: batch} for _ in example), strict=True
    )
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(reduce_range=bits == 7))
    prepared = prepare_pt2e(exported.module(), quantizer)
    with torch.no_grad():
        for inputs in _batches(material, BATCH):
            prepared(*inputs)
    return {"": (torch_predict(convert_pt2e(prepared)), 0)}


def torch_ao(material: BuildInputs, folder: Path, model: str, bits: int) -> Made:
    """FX graph mode quantization; its reference model computes in fp32 between quantize and dequantize."""
    import torch
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_to_reference_fx, prepare_fx

    mapping = get_default_qconfig_mapping("onednn" if bits == 8 else "x86")
    prepared = prepare_fx(_module(model), mapping, _batches(material, 2)[0])
    with torch.no_grad():
        for inputs in _batches(material, BATCH):
            prepared(*inputs)
    return {"": (torch_predict(convert_to_reference_fx(prepared)), 0)}


QUANTIZERS: dict[str, Callable[[BuildInputs, Path, str], Made]] = {
    f"{name}-{bits}": partial(function, bits=bits)
    for name, function in {
        "corewise": corewise,
        "nncf": nncf,
        "onnxruntime": onnxruntime,
        "torchao": torchao,
        "torch.ao": torch_ao,
    }.items()
    for bits in (8, 7)
}


def _build(name: str, bits: int) -> Build:
    return Build(engine=name, precision="int8", options=(("reduce_range", True),) if bits == 7 else ())


def _module(model: str) -> Any:
    return source.load(SUBJECTS[model].model)


def _batches(material: BuildInputs, size: int) -> list[tuple[Any, ...]]:
    import torch

    return [tuple(map(torch.from_numpy, arrays)) for _, arrays in material.calibration.batches(size)]


def child(model: str, quantizer: str, work: Path) -> None:
    """Quantize and answer; leaves ``answer.json`` and each placement's outputs in the folder ``work/quantizer``."""
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    folder = work / quantizer
    answer: dict[str, Any] = {"reason": "", "int8_kernels": {}}
    material = read_build_inputs(work)
    try:
        start, start_cpu = time.perf_counter(), time.process_time()
        with quiet(), guard(EngineError, "it raises", ""):
            made = QUANTIZERS[quantizer](material, folder, model)
        answer["quantize_s"] = time.perf_counter() - start
        answer["quantize_cpu_s"] = time.process_time() - start_cpu
        answer["peak_memory_bytes"] = peak_memory_bytes()
        measured = Samples.load(work / HOLDOUT)
        for placement, (predict, kernels) in made.items():
            with quiet(), guard(EngineError, "its model raises", ""):
                np.save(folder / f"{placement}.npy", answers(predict, measured))
            answer["int8_kernels"][placement] = kernels
    except CorewiseError as error:
        answer["reason"] = str(error)[:REASON]
    notes = folder / "notes.json"
    answer["notes"] = json.loads(notes.read_text()) if notes.exists() else []
    (folder / ANSWER).write_text(json.dumps(answer))


def prepare(model: str, work: Path, quantizers: Sequence[str]) -> tuple[Samples, np.ndarray]:
    """Write what the children need, fp32's outputs among it; returns what is measured, and which part was held out."""
    import torch

    calibrating, measured, held_out = samples_of(model)
    exported = source.export(_module(model), calibrating)
    if exported.program is None:
        raise CorewiseError(exported.why_not)
    source.save_program(exported.program, work / PROGRAM)
    calibrating.save(work / CALIBRATION)
    measured.save(work / HOLDOUT)
    cache = work / "cache"
    cache.mkdir()
    material = BuildInputs(
        program=work / PROGRAM,
        inputs=exported.inputs,
        outputs=exported.outputs,
        operators=source.operators(exported.program),
        calibration=calibrating,
        cpu=inspect_cpu(),
        cache=cache,
    )
    write_build_inputs(work, material)
    torch.set_num_threads(THREADS)
    np.save(work / FP32, answers(torch_predict(exported.module), measured))
    if any(name.startswith("onnxruntime") for name in quantizers):
        # The ONNX export, which stays in the cache: no part of quantizing.
        (work / "onnx").mkdir()
        engine("onnxruntime").build(material, Build(engine="onnxruntime", precision="fp32"), work / "onnx")
    return measured, held_out


def judge(
    model: str, measured: Samples, held_out: np.ndarray, expected: np.ndarray, found: np.ndarray
) -> dict[str, Any]:
    """The figures of one row. Raises ``EngineError`` where outputs are NaN or infinite."""
    import torch

    from corewise.quantize.simulate import sqnr_db

    if lost := int((~np.isfinite(found)).any(axis=1).sum()):
        raise EngineError(f"{lost} of {len(found)} outputs are NaN or infinite")
    figures: dict[str, Any] = {
        "sqnr_db": sqnr_db([(torch.from_numpy(expected),)], [(torch.from_numpy(found),)]),
    }
    assert measured.labels is not None
    if model == "minilm":
        return (
            figures
            | _of_sentences(expected, found, measured.labels)
            | {"held_out": _of_sentences(expected[held_out], found[held_out], measured.labels[held_out])}
        )
    ours, right = found.argmax(1), expected.argmax(1)
    return figures | {
        "differing": int((ours != right).sum()),
        "differing_share": float((ours != right).mean()),
        "top1": float((ours == measured.labels).mean()),
        "top1_fp32": float((right == measured.labels).mean()),
    }


def _of_sentences(expected: np.ndarray, found: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from minilm import spearman  # type: ignore[import-not-found]

    cosines = (expected * found).sum(1) / (np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1))
    return {
        "spearman": spearman(found, labels),
        "spearman_fp32": spearman(expected, labels),
        "cosine": float(cosines.mean()),
        "cosine_lowest": float(cosines.min()),
    }


def measure(model: str, quantizers: Sequence[str], add: Callable[[list[dict[str, Any]]], None]) -> None:
    """Every quantizer on one model; the rows of each go to ``add`` when they are known."""
    with tempfile.TemporaryDirectory(prefix="corewise-accuracy-") as name:
        work = Path(name)
        print(f"{model}: preparing", flush=True)
        measured, held_out = prepare(model, work, quantizers)
        expected = np.load(work / FP32)

        def judged(folder: Path, placement: str) -> dict[str, Any]:
            found = np.load(folder / f"{placement}.npy")
            return {"measured_on": len(found)} | judge(model, measured, held_out, expected, found)

        for quantizer in quantizers:
            add(list(_rows(model, quantizer, _ask(model, quantizer, work), partial(judged, work / quantizer))))


def _rows(
    model: str, quantizer: str, answer: Mapping[str, Any], judged: Callable[[str], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """What becomes of a child's answer: a row for each placement, or one with the reason."""
    about: dict[str, Any] = {
        "model": model,
        "quantizer": quantizer,
        "placement": "",
        "reason": answer["reason"],
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "calibrated_on": CALIBRATE[model],
    }
    told = ("quantize_s", "quantize_cpu_s", "peak_memory_bytes", "notes")
    about |= {key: answer[key] for key in told if key in answer}
    if answer["reason"]:
        yield about
        return
    for placement, kernels in answer["int8_kernels"].items():
        row = about | {"placement": placement, "int8_kernels": kernels}
        try:
            if kernels:
                raise EngineError(f"{kernels} int8 kernels ran: this is no emulation")
            yield row | judged(placement)
        except EngineError as error:
            yield row | {"reason": str(error)}


def _ask(model: str, quantizer: str, work: Path) -> dict[str, Any]:
    """What a child for the quantizer leaves; a reason where it left nothing."""
    (work / quantizer).mkdir()
    command = [sys.executable, str(HERE / "accuracy.py"), "--child", str(work)]
    command += ["--model", model, "--quantizer", quantizer]
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "COREWISE_DATA": str(DATA)}
    log = work / quantizer / "log"
    with log.open("w") as output:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, timeout=TIMEOUT_S
            ).returncode
        except subprocess.TimeoutExpired:
            return {"reason": f"not finished after {TIMEOUT_S:.0f} s"}
    path = work / quantizer / ANSWER
    if path.exists():
        return dict(json.loads(path.read_text()))
    return {"reason": f"the child ended with {code}: {log.read_text().strip()[-REASON:]}"}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each row: what differs from fp32, and what it took."""
    lines = [
        f"{'model':13s} {'quantizer':26s} {'differ':>7s} {'top-1':>6s} {'fp32':>6s} {'dB':>6s} {'spearman':>8s} "
        f"{'fp32':>7s} {'cosine':>8s} {'s':>5s} {'MiB':>5s}"
    ]

    def figure(row: Mapping[str, Any], key: str, form: str, width: int) -> str:
        return f"{form.format(row[key]) if key in row else '-':>{width}s}"

    for row in rows:
        name = "-".join(filter(None, (row["quantizer"], row["placement"])))
        columns = (
            ("differing_share", "{:.2%}", 7),
            ("top1", "{:.2%}", 6),
            ("top1_fp32", "{:.2%}", 6),
            ("sqnr_db", "{:.2f}", 6),
            ("spearman", "{:.4f}", 8),
            ("spearman_fp32", "{:.4f}", 7),
            ("cosine", "{:.5f}", 8),
            ("quantize_s", "{:.0f}", 5),
        )
        told = " ".join(figure(row, *column) for column in columns)
        memory = f"{row['peak_memory_bytes'] / 2**20:.0f}" if "peak_memory_bytes" in row else "-"
        lines.append(f"{row['model']:13s} {name:26s} {told} {memory:>5s}  {row['reason'][:100]}".rstrip())
    return "\n".join(lines)


def main() -> None:
    """Measure what the command line asks for and the file has not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=CALIBRATE, help="may be repeated; all by default")
    parser.add_argument(
        "--quantizer", action="append", help=f"a name or pattern, may be repeated: {', '.join(QUANTIZERS)}"
    )
    parser.add_argument("--again", action="store_true", help="measure also what the file has")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "accuracy.json")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    models = options.model or list(CALIBRATE)
    patterns = options.quantizer or ["*"]
    wanted = [name for name in QUANTIZERS if any(fnmatch(name, pattern) for pattern in patterns)]
    if options.child:
        return child(models[0], wanted[0], options.child)
    if unmatched := [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in QUANTIZERS)]:
        parser.error(f"no quantizer is named {', '.join(unmatched)}; there are {', '.join(QUANTIZERS)}")
    about = {"cpu": to_json(inspect_cpu()), "versions": {name: version(name) for name in PACKAGES}, "threads": THREADS}
    # Libraries start a thread for each CPU that they may use.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-THREADS:])

    def read_rows() -> list[dict[str, Any]]:
        return list(json.loads(options.out.read_text())["rows"]) if options.out.exists() else []

    def add(made: list[dict[str, Any]]) -> None:
        # Read anew: another run may have added to the file.
        done = {(row["model"], row["quantizer"]) for row in made}
        rows = [row for row in read_rows() if (row["model"], row["quantizer"]) not in done] + made
        order = {name: place for place, name in enumerate((*CALIBRATE, *QUANTIZERS))}
        rows.sort(key=lambda row: (order[row["model"]], order[row["quantizer"]], row["placement"]))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        written = options.out.with_suffix(".part")
        written.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
        written.replace(options.out)
        print("\n".join(table(made).splitlines()[1:]), flush=True)

    for model in models:
        known = set() if options.again else {row["quantizer"] for row in read_rows() if row["model"] == model}
        if missing := [name for name in wanted if name not in known]:
            measure(model, missing, add)
    print(f"\n{table(read_rows())}\nin {options.out}")
    return None


if __name__ == "__main__":
    main()
