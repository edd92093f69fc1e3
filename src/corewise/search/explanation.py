"""The order of steps from a model and samples to what each of its layers costs and saves in int8."""

import importlib.util
from collections.abc import Callable
from typing import Any

from corewise.common.errors import EngineError, InputError, MissingExtra, SourceError
from corewise.common.references import guard
from corewise.engines import layer_times, qdq
from corewise.engines.libraries import quiet
from corewise.machine.inspect import inspect
from corewise.quantize.explanation import Explanation
from corewise.records.events import OnEvent, StageStarted
from corewise.samples import Samples, default_calibration, from_python, read, split

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
    tell: OnEvent = lambda event: None,
) -> Explanation:
    """Quantize ``model`` with corewise's own quantizer and tell what each layer costs and saves.

    ``model``, ``samples``, ``calibration`` and ``seed`` are as ``optimize.optimize`` takes them. Errors are measured on
    the first ``measured`` samples that did not calibrate, placed for engines with fused kernels; ``weight_bits`` is
    8, or 7 where the CPU adds int8 products in 16 bits, unless given. Times are OpenVINO's, where it is installed. The
    work grows with layers times ``measured``. Runs in this process.

    Raises ``InputError`` for what is wrong with the arguments, a model that cannot be exported among them,
    ``MissingExtra`` where torch is not installed, and ``EngineError`` where the model has nothing to quantize.
    """
    _check(measured, weight_bits)
    from corewise import source

    tell(StageStarted("reading the samples"))
    data = _read(samples)
    wanted = default_calibration(len(data)) if calibration is None else calibration
    calibrating, others = split(data, calibration=wanted, seed=seed)
    used = others.take(range(min(measured, len(others))))

    tell(StageStarted("exporting the model"))
    exported = source.export(source.load(model) if isinstance(model, str) else model, data)
    if exported.program is None:
        raise SourceError(
            f"the model cannot be exported ({exported.why_not})", "only exported models can be quantized layer by layer"
        )
    cpu = inspect()
    bits = weight_bits or (8 if cpu.int8_dot else 7)

    tell(StageStarted(f"quantizing with {len(calibrating)} samples"))
    with quiet(), guard(EngineError, "corewise cannot quantize this program", "report it, with the model"):
        from corewise.engines.torch_tools import keep_freed_memory
        from corewise.quantize.placement import place
        from corewise.quantize.ptq import quantize
        from corewise.quantize.quantized import Recipe, batches
        from corewise.quantize.sensitivity import measure_sensitivity, order_of_return

        keep_freed_memory()
        quantized = quantize(exported.program, calibrating, Recipe(weight_bits=bits))
    placement = place(quantized.module, "fused")

    tell(StageStarted(f"quantizing {len(placement.layers)} layers one by one, {len(used)} samples"))
    with guard(EngineError, "the quantized program cannot be run", "report it, with the model"):
        rows = measure_sensitivity(quantized, batches(used, qdq.ROWS))

    tell(StageStarted("timing the layers"))
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


def _read(samples: Any | Callable[[], Any]) -> Samples:
    return read(samples) if isinstance(samples, str) else from_python(samples() if callable(samples) else samples)
