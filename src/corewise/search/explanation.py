"""The order of steps from a model and samples to what each of its layers costs and saves in int8."""

import importlib.util
from pathlib import Path
from typing import Any

from corewise.common.errors import EngineError, InputError, MissingExtra, SourceError
from corewise.common.references import guard
from corewise.engines import layer_times, qdq
from corewise.engines.libraries import quiet
from corewise.machine.inspect import inspect_cpu
from corewise.quantize.explanation import Explanation
from corewise.records.events import OnEvent, Stage, StageStarted
from corewise.records.pipeline import Pooling
from corewise.samples import default_calibration, split
from corewise.search.texts import read_samples, tokenized

MEASURED = 16
"""Samples that errors are measured on."""


def explain(
    model: Any,
    samples: Any,
    *,
    calibration: int | None = None,
    measured: int = MEASURED,
    seed: int = 0,
    weight_bits: int | None = None,
    tokenizer: Any = None,
    pooling: Pooling | None = None,
    on_event: OnEvent = lambda event: None,
) -> Explanation:
    """Quantize a model with corewise's own quantizer and show what each layer costs and saves.

    Runs in this process. The work grows with the number of layers times ``measured``.

    Args:
        model: as for ``optimize``; it must be exportable.
        samples: as for ``optimize``.
        calibration: samples to calibrate with, drawn with ``seed``. Default: two of five, at most 200.
        measured: how many of the other samples the errors are measured on, placed for engines with fused kernels.
        seed: seed of the split into calibration samples and the others.
        weight_bits: 7 or 8. Default: 8, or 7 if the CPU adds int8 products in 16 bits.
        tokenizer: as for ``optimize``.
        pooling: as for ``optimize``.
        on_event: called with each event of ``corewise.records.events`` as it happens.

    Returns:
        The error (dB) and the time (ms, OpenVINO's if it is installed) of each layer.

    Raises:
        InputError: something is wrong with an argument, or the model cannot be exported.
        MissingExtra: torch is not installed.
        EngineError: the model has nothing to quantize.

    Example:
        >>> import numpy as np, torch, corewise
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU()).eval()
        >>> samples = list(np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32))
        >>> len(corewise.explain(model, samples).layers)
        1
    """
    _check(measured, weight_bits)
    from corewise import source

    model = str(model) if isinstance(model, Path) else model
    on_event(StageStarted(Stage.READING_SAMPLES))
    gathered = read_samples(model, samples)
    on_event(StageStarted(Stage.EXPORTING))
    loaded, data = tokenized(source.load_with_texts(model, tokenizer=tokenizer, pooling=pooling), gathered)
    count = default_calibration(len(data)) if calibration is None else calibration
    calibrating, others = (part.shuffled(seed) for part in split(data, calibration=count, seed=seed))
    used = others.take(range(min(measured, len(others))))

    exported = source.export(loaded.model, data)
    if exported.program is None:
        raise SourceError(
            f"the model cannot be exported ({exported.why_not})", "only exported models can be quantized layer by layer"
        )
    cpu = inspect_cpu()
    bits = weight_bits or (8 if cpu.int8_dot else 7)

    on_event(StageStarted(Stage.QUANTIZING, samples=len(calibrating)))
    with quiet(), guard(EngineError, "corewise cannot quantize this program", "report it, with the model"):
        from corewise.engines.torch_tools import keep_freed_memory
        from corewise.quantize.placement import place
        from corewise.quantize.ptq import quantize
        from corewise.quantize.quantized import Recipe, batches
        from corewise.quantize.sensitivity import measure_sensitivity, order_of_return

        keep_freed_memory()
        quantized = quantize(exported.program, calibrating, Recipe(weight_bits=bits))
    placement = place(quantized.module, "fused")

    on_event(StageStarted(Stage.QUANTIZING_LAYERS, count=len(placement.layers), samples=len(used)))
    with quiet(), guard(EngineError, "the quantized program cannot be run", "report it, with the model"):
        rows = measure_sensitivity(quantized, batches(used, qdq.ROWS))

    on_event(StageStarted(Stage.TIMING_LAYERS))
    with quiet():
        rows, timing = layer_times.timed(quantized, rows, exported.inputs, calibrating, cpu.usable_cores)
    return Explanation(
        model=model if isinstance(model, str) else type(model).__name__,
        samples=data.source,
        calibration=len(calibrating),
        measured=len(used),
        weight_bits=bits,
        layers=rows,
        returning=order_of_return(rows),
        kept=placement.kept,
        notes=(*(f"warning: {doubt}" for doubt in quantized.warnings), *quantized.notes),
        timing=timing,
    )


def _check(measured: int, weight_bits: int | None) -> None:
    for package in ("torch", "torchao"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "optimize", "explaining a model")
    if measured < 1:
        raise InputError(f"{measured} samples cannot measure anything", "give 1 or more")
    if weight_bits not in (None, 7, 8):
        raise InputError(f"weights in {weight_bits} bits are unknown", "give 7 or 8")
