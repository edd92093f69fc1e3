"""How accurate int8 is by corewise's quantizer and by those that users know, against fp32 on the same samples.

    python -m bench accuracy [--model resnet50 ...] [--quantizer 'corewise-*' ...] [--again]

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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import (
    DATA,
    ROOT,
    example,
    export_into,
    machine_facts,
    read_results,
    say,
    temporary_workspace,
    write_results,
)
from bench.subjects import SUBJECTS
from corewise import source
from corewise.common.errors import CorewiseError, EngineError
from corewise.common.references import guard
from corewise.engines import BuildInputs, engine
from corewise.engines.libraries import quiet
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build
from corewise.runtime.worker import peak_memory_bytes
from corewise.runtime.workspace import Workspace
from corewise.samples import Samples, split

ANSWER = "answer.json"
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
Quantized = dict[str, tuple[Predict, int]]
"""By placement (empty if there is only one): how to answer, and how many int8 kernels that runs."""


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
    order = np.argsort(np.concatenate([indices for indices, _ in parts]))
    return np.asarray(np.concatenate([output for _, output in parts])[order])


def torch_predict(module: Any) -> Predict:
    """A module on torch tensors, which may return its output alone or in a tuple."""
    import torch

    def predict(arrays: Arrays) -> np.ndarray:
        with torch.no_grad():
            output = module(*(torch.from_numpy(array) for array in arrays))
        return np.asarray((output if isinstance(output, torch.Tensor) else output[0]).numpy())

    return predict


def corewise(material: BuildInputs, folder: Path, model: str, bits: int) -> Quantized:
    """Ours; what was decided is in the notes that the row keeps."""
    from corewise.engines.torch_tools import keep_freed_memory
    from corewise.quantize.placement import TARGETS
    from corewise.quantize.ptq import Recipe, quantize
    from corewise.quantize.simulate import Simulation

    keep_freed_memory()
    quantized = quantize(source.load_program(material.program), material.calibration, Recipe(weight_bits=bits))
    (folder / "notes.json").write_text(json.dumps(quantized.notes))

    def predict(target: Any) -> Predict:
        module, placement, ranges = quantized.placed(target)
        simulation = Simulation(module, placement.edges, ranges)
        return torch_predict(lambda *batch: simulation.run(batch))

    return {target: (predict(target), 0) for target in TARGETS}


def nncf(material: BuildInputs, folder: Path, model: str, bits: int) -> Quantized:
    """The build of the engine, its FakeQuantize operations run in fp32."""
    engine("openvino").build(material, _build("openvino", bits), folder)
    return {"": _emulated_by_openvino(folder / "model.xml")}


def _emulated_by_openvino(path: Path) -> tuple[Predict, int]:
    import openvino

    from corewise.engines.openvino import RUN_LAYERS

    # Not in the list of supported properties, but read by the CPU plugin (src/plugins/intel_cpu/src/config.cpp).
    config = {
        "LP_TRANSFORMS_MODE": False,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": THREADS,
        "NUM_STREAMS": 1,
    }
    compiled = openvino.Core().compile_model(str(path), "CPU", config)
    layers = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    # Other operations may keep weights in int8 and convert them.
    kernels = [layer["primitiveType"].astype(str) for layer in layers if layer["layerType"].astype(str) in RUN_LAYERS]
    return lambda arrays: compiled(list(arrays))[0], sum(name.endswith("_I8") for name in kernels)


def onnxruntime(material: BuildInputs, folder: Path, model: str, bits: int) -> Quantized:
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


def torchao(material: BuildInputs, folder: Path, model: str, bits: int) -> Quantized:
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


def torch_ao(material: BuildInputs, folder: Path, model: str, bits: int) -> Quantized:
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


QUANTIZERS: dict[str, Callable[[BuildInputs, Path, str], Quantized]] = {
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


def answer_in_child(model: str, quantizer: str, workspace: Workspace) -> None:
    """Quantize and answer; leaves ``answer.json`` and each placement's outputs in the quantizer's folder."""
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    folder = folder_of(workspace, quantizer)
    answer: dict[str, Any] = {"reason": "", "int8_kernels": {}}
    material = workspace.read_build_inputs()
    try:
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        with quiet(), guard(EngineError, "it raises", ""):
            quantized = QUANTIZERS[quantizer](material, folder, model)
        answer["quantize_s"] = time.perf_counter() - start_s
        answer["quantize_cpu_s"] = time.process_time() - start_cpu_s
        answer["peak_memory_bytes"] = peak_memory_bytes()
        measured = Samples.load(workspace.holdout)
        for placement, (predict, kernels) in quantized.items():
            with quiet(), guard(EngineError, "its model raises", ""):
                np.save(folder / f"{placement}.npy", answers(predict, measured))
            answer["int8_kernels"][placement] = kernels
    except CorewiseError as error:
        answer["reason"] = str(error)[:REASON]
    notes = folder / "notes.json"
    answer["notes"] = json.loads(notes.read_text()) if notes.exists() else []
    (folder / ANSWER).write_text(json.dumps(answer))


def folder_of(workspace: Workspace, quantizer: str) -> Path:
    """Where the process of a quantizer leaves its files."""
    return workspace.folder / "quantizers" / quantizer


def prepare(model: str, workspace: Workspace, quantizers: Sequence[str]) -> tuple[Samples, np.ndarray, np.ndarray]:
    """Write what the processes need; returns what is measured, which part was held out, and fp32's outputs."""
    import torch

    calibration, measured, held_out = samples_of(model)
    exported, material = export_into(workspace, _module(model), calibration, measured, inspect_cpu())
    torch.set_num_threads(THREADS)
    expected = answers(torch_predict(exported.module), measured)
    if any(name.startswith("onnxruntime") for name in quantizers):
        # The ONNX export stays in the cache, because it is not part of quantizing.
        fp32 = Build(engine="onnxruntime", precision="fp32")
        engine("onnxruntime").build(material, fp32, workspace.empty_payload(fp32))
    return measured, held_out, expected


def judge(
    model: str, measured: Samples, held_out: np.ndarray, expected: np.ndarray, outputs: np.ndarray
) -> dict[str, Any]:
    """The figures of one row. Raises ``EngineError`` if outputs are NaN or infinite."""
    import torch

    from corewise.quantize.simulate import sqnr_db

    if lost := int((~np.isfinite(outputs)).any(axis=1).sum()):
        raise EngineError(f"{lost} of {len(outputs)} outputs are NaN or infinite")
    figures: dict[str, Any] = {
        "sqnr_db": sqnr_db([(torch.from_numpy(expected),)], [(torch.from_numpy(outputs),)]),
    }
    assert measured.labels is not None
    if model == "minilm":
        return (
            figures
            | _of_sentences(expected, outputs, measured.labels)
            | {"held_out": _of_sentences(expected[held_out], outputs[held_out], measured.labels[held_out])}
        )
    ours, right = outputs.argmax(1), expected.argmax(1)
    return figures | {
        "differing": int((ours != right).sum()),
        "differing_share": float((ours != right).mean()),
        "top1": float((ours == measured.labels).mean()),
        "top1_fp32": float((right == measured.labels).mean()),
    }


def _of_sentences(expected: np.ndarray, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    spearman = example("minilm", "spearman")
    cosines = (expected * outputs).sum(1) / (np.linalg.norm(expected, axis=1) * np.linalg.norm(outputs, axis=1))
    return {
        "spearman": spearman(outputs, labels),
        "spearman_fp32": spearman(expected, labels),
        "cosine": float(cosines.mean()),
        "cosine_lowest": float(cosines.min()),
    }


def measure(model: str, quantizers: Sequence[str], add: Callable[[list[dict[str, Any]]], None]) -> None:
    """Every quantizer on one model; the rows of each go to ``add`` when they are known."""
    with temporary_workspace() as workspace:
        say(f"{model}: preparing")
        measured, held_out, expected = prepare(model, workspace, quantizers)

        def judged(folder: Path, placement: str) -> dict[str, Any]:
            outputs = np.load(folder / f"{placement}.npy")
            return {"measured_on": len(outputs)} | judge(model, measured, held_out, expected, outputs)

        for quantizer in quantizers:
            answer = _ask(model, quantizer, workspace)
            add(list(_rows(model, quantizer, answer, partial(judged, folder_of(workspace, quantizer)))))


def _rows(
    model: str, quantizer: str, answer: Mapping[str, Any], judged: Callable[[str], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The rows of a process's answer: one for each placement, or one with the reason."""
    about: dict[str, Any] = {
        "model": model,
        "quantizer": quantizer,
        "placement": "",
        "reason": answer["reason"],
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "calibrated_on": CALIBRATE[model],
    }
    keys = ("quantize_s", "quantize_cpu_s", "peak_memory_bytes", "notes")
    about |= {key: answer[key] for key in keys if key in answer}
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


def _ask(model: str, quantizer: str, workspace: Workspace) -> dict[str, Any]:
    """What a process for the quantizer leaves; a reason if it left nothing."""
    folder = folder_of(workspace, quantizer)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "bench", "accuracy", "--child", str(workspace.folder)]
    command += ["--model", model, "--quantizer", quantizer]
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "COREWISE_DATA": str(DATA)}
    log = folder / "log"
    with log.open("w") as output:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, timeout=TIMEOUT_S
            ).returncode
        except subprocess.TimeoutExpired:
            return {"reason": f"not finished after {TIMEOUT_S:.0f} s"}
    path = folder / ANSWER
    if path.exists():
        return dict(json.loads(path.read_text()))
    return {"reason": f"the process ended with {code}: {log.read_text().strip()[-REASON:]}"}


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
        figures = " ".join(figure(row, *column) for column in columns)
        memory = f"{row['peak_memory_bytes'] / 2**20:.0f}" if "peak_memory_bytes" in row else "-"
        lines.append(f"{row['model']:13s} {name:26s} {figures} {memory:>5s}  {row['reason'][:100]}".rstrip())
    return "\n".join(lines)


class Rows:
    """The rows of ``accuracy.json``, sorted; another run may add to the file at the same time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._facts = machine_facts() | {"threads": THREADS}

    def read(self) -> list[dict[str, Any]]:
        """Every row."""
        return list(read_results(self._path).get("rows", []))

    def add(self, added: list[dict[str, Any]]) -> None:
        """Put the rows of one quantizer and model in place of those that the file has."""
        replaced = {(row["model"], row["quantizer"]) for row in added}
        rows = [row for row in self.read() if (row["model"], row["quantizer"]) not in replaced] + added
        order = {name: place for place, name in enumerate((*CALIBRATE, *QUANTIZERS))}
        rows.sort(key=lambda row: (order[row["model"]], order[row["quantizer"]], row["placement"]))
        write_results(self._path, {**self._facts, "rows": rows})
        say("\n".join(table(added).splitlines()[1:]))


def matching(patterns: Sequence[str]) -> list[str]:
    """The quantizers that the patterns name. Ends the program if one of them names none."""
    if unmatched := [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in QUANTIZERS)]:
        sys.exit(f"no quantizer is named {', '.join(unmatched)}; there are {', '.join(QUANTIZERS)}")
    return [name for name in QUANTIZERS if any(fnmatch(name, pattern) for pattern in patterns)]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("--model", action="append", choices=CALIBRATE, help="may be repeated (default: all)")
    parser.add_argument(
        "--quantizer", action="append", help=f"a name or pattern, may be repeated: {', '.join(QUANTIZERS)}"
    )
    parser.add_argument("--again", action="store_true", help="measure also what the file has")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)


def main(options: argparse.Namespace) -> None:
    """Measure what the command line asks for and the file does not have."""
    models, quantizers = options.model or list(CALIBRATE), matching(options.quantizer or ["*"])
    if options.child:
        answer_in_child(models[0], quantizers[0], Workspace(options.child))
        return
    rows = Rows(options.results / "accuracy.json")
    # Libraries start a thread for each CPU that they may use.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-THREADS:])
    for model in models:
        known = set() if options.again else {row["quantizer"] for row in rows.read() if row["model"] == model}
        if missing := [name for name in quantizers if name not in known]:
            measure(model, missing, rows.add)
    say(f"\n{table(rows.read())}")
