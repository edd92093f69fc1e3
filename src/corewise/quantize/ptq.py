"""Post-training quantization: one program and calibration samples to Q/DQ programs, one for each kind of engine."""

import copy
import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from corewise.errors import EngineError, SamplesError
from corewise.quantize import corrections
from corewise.quantize.convert import with_qdq
from corewise.quantize.graph import channel_axis, compute, execute, folded, layers, weight
from corewise.quantize.graph import output_axis as axis_of
from corewise.quantize.observers import OBSERVERS, Observed, QParams, qparams, round_weight, weight_scales
from corewise.quantize.placement import TARGETS, Placement, Target, place, source
from corewise.quantize.simulate import Batch, Simulation, sqnr_db
from corewise.samples import Samples
from corewise.source import load_program, save_program
from corewise.values import TensorSpec, to_json

CALIBRATION_BATCH = 8
JUDGED = 16
"""Calibration samples, the last ones, that corrections do not learn from: they judge them."""
ROUNDING_SAMPLES = 48
BIAS_SAMPLES = 32
WORTH_DB = 0.1
FEW = 8
CORRECTIONS = ("equalize", "rounding", "bias")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to quantize."""

    weight_bits: int = 8
    """7 for CPUs that add int8 products in 16 bits (``Cpu.int8_dot``)."""
    observer: str = "mse"
    """A name in ``observers.OBSERVERS``."""
    corrections: tuple[str, ...] = CORRECTIONS
    """Those to try; each is kept where it pays."""
    ignored: tuple[str, ...] = ()
    """Layers that stay in floating point: names or regular expressions (``placement.place``)."""

    @property
    def key(self) -> str:
        """A short name for files."""
        return hashlib.sha256(json.dumps(to_json(self)).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantized:
    """A calibrated and corrected graph."""

    module: GraphModule
    """fp32 weights on their int8 grids."""
    reference: GraphModule
    """The same graph before any change."""
    placements: dict[Target, Placement]
    ranges: dict[str, QParams]
    scales: dict[str, Tensor]
    recipe: Recipe
    sqnr_db: float
    """Of the simulated outputs for the judging samples, target ``fused``."""
    notes: tuple[str, ...]
    """What was decided, in words."""


def quantize(program: ExportedProgram, calibration: Samples, recipe: Recipe) -> Quantized:
    """Calibrate, round and correct ``program``.

    Raises ``EngineError`` where nothing can be quantized or an ignored layer matches nothing, and ``SamplesError``
    where a sample makes a layer's input NaN or infinite.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _quantize(folded(program), calibration, recipe)


def lower(quantized: Quantized, target: Target, inputs: Sequence[TensorSpec], example: Batch) -> ExportedProgram:
    """The program with Q/DQ pairs where engines of the kind ``target`` want them; dynamic batch."""
    return with_qdq(
        copy.deepcopy(quantized.module),
        quantized.placements[target],
        quantized.ranges,
        quantized.scales,
        quantized.recipe.weight_bits,
        inputs,
        example,
    )


def quantized_program(
    program: Path, calibration: Samples, inputs: Sequence[TensorSpec], cache: Path, recipe: Recipe, target: Target
) -> tuple[Path, tuple[str, ...]]:
    """The ``.pt2`` of the program quantized for ``target``, and notes; made once for all engines and kept in ``cache``.

    Raises as ``quantize`` does.
    """
    paths = {one: cache / f"quantized-{recipe.key}-{one}.pt2" for one in TARGETS}
    notes = cache / f"quantized-{recipe.key}.json"
    if not notes.exists():
        made = quantize(load_program(program), calibration, recipe)
        example = _example(calibration)
        for one, path in paths.items():
            save_program(lower(made, one, inputs, example), path)
        notes.write_text(json.dumps(made.notes))
    return paths[target], tuple(json.loads(notes.read_text()))


def load_quantized(path: Path) -> ExportedProgram:
    """A program that ``quantized_program`` wrote; the import above registered its operators."""
    return load_program(path)


def batches(samples: Samples, size: int = CALIBRATION_BATCH) -> Iterable[Batch]:
    """The samples as tensors."""
    for _, arrays in samples.batches(size):
        yield tuple(torch.from_numpy(array.copy()) for array in arrays)


def _quantize(module: GraphModule, calibration: Samples, recipe: Recipe) -> Quantized:
    placements = {target: place(module, target, recipe.ignored) for target in TARGETS}
    fused = placements["fused"]
    if not fused.layers:
        raise EngineError("there is no convolution or linear to quantize", "use another precision")
    reference = copy.deepcopy(module)
    judging = list(batches(calibration.take(range(max(0, len(calibration) - JUDGED), len(calibration)))))
    learning = calibration.take(range(max(1, len(calibration) - JUDGED)))
    expected = [execute(reference, batch, compute) for batch in judging]
    names = tuple(dict.fromkeys(name for placement in placements.values() for name in placement.tensors))
    observed = observe(module, names, batches(calibration))
    notes = list(_doubts(len(calibration), observed))

    def judged(candidate: GraphModule, ranges: Mapping[str, QParams]) -> float:
        simulation = Simulation(candidate, fused.edges, ranges)
        return sqnr_db(expected, [simulation.run(batch) for batch in judging])

    def to_nearest(candidate: GraphModule) -> tuple[GraphModule, dict[str, Tensor]]:
        rounded = copy.deepcopy(candidate)
        return rounded, _round_to_nearest(rounded, fused, recipe.weight_bits)

    ranges = _ranges(module, names, observed, recipe.observer)
    best, scales = to_nearest(module)
    score = judged(best, ranges)
    notes.append(f"{score:.1f} dB without corrections")
    if "equalize" in recipe.corrections:
        equal = copy.deepcopy(module)
        if corrections.equalize(equal, fused, observed, recipe.weight_bits):
            seen = observe(equal, names, batches(calibration))
            new_ranges = _ranges(equal, names, seen, recipe.observer)
            tried, new_scales = to_nearest(equal)
            gained = judged(tried, new_ranges)
            notes.append(_told("channel equalization", score, gained))
            if gained > score + WORTH_DB:
                module, best, scales, ranges, score = equal, tried, new_scales, new_ranges, gained
    if "rounding" in recipe.corrections:
        tried = copy.deepcopy(module)
        few = list(batches(learning.take(range(min(ROUNDING_SAMPLES, len(learning))))))
        new_scales = corrections.round_weights(tried, fused, ranges, few, recipe.weight_bits)
        gained = judged(tried, ranges)
        notes.append(_told("GPTQ rounding", score, gained))
        if gained > score + WORTH_DB:
            best, scales, score = tried, new_scales, gained
    if "bias" in recipe.corrections:
        tried = copy.deepcopy(best)
        one = next(iter(batches(learning, min(BIAS_SAMPLES, len(learning)))))
        corrections.correct_bias(tried, reference, fused, ranges, one)
        gained = judged(tried, ranges)
        notes.append(_told("bias correction", score, gained))
        if gained > score + WORTH_DB:
            best, score = tried, gained
    return Quantized(
        module=best,
        reference=reference,
        placements=placements,
        ranges=ranges,
        scales=scales,
        recipe=recipe,
        sqnr_db=score,
        notes=tuple(notes),
    )


def observe(module: GraphModule, names: Sequence[str], given: Iterable[Batch]) -> dict[str, Observed]:
    """One pass of the samples through the fp32 graph, watching the values ``names``.

    Raises ``SamplesError`` where one of them is NaN or infinite.
    """
    wanted = set(names)
    nodes = {node.name: node for node in module.graph.nodes}
    readers = {name: [user for user in nodes[name].users if user in set(layers(module))] for name in wanted}
    observed: dict[str, Observed] = {}

    def step(node: torch.fx.Node, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        value = compute(node, args, kwargs)
        if node.name in wanted and isinstance(value, Tensor):
            if node.name not in observed:
                axis = channel_axis(value, readers[node.name][0]) if readers[node.name] else min(1, value.dim() - 1)
                observed[node.name] = Observed(axis)
            if not observed[node.name].see(value):
                from corewise.quantize.graph import layer_name

                raise SamplesError(
                    f"a calibration sample makes the value of {layer_name(node)} NaN or infinite",
                    "remove such samples, or repair the model",
                )
        return value

    with torch.no_grad():
        for batch in given:
            execute(module, batch, step)
    return observed


def _ranges(
    module: GraphModule, names: Sequence[str], observed: Mapping[str, Observed], observer: str
) -> dict[str, QParams]:
    """Each value's grid; values behind a max pooling or reshape have that of the one before it."""
    nodes = {node.name: node for node in module.graph.nodes}
    made = {name: qparams(*OBSERVERS[observer](observed[name])) for name in names}
    return {name: made.get(source(nodes[name]).name, made[name]) for name in names}


def _round_to_nearest(module: GraphModule, placement: Placement, bits: int) -> dict[str, Tensor]:
    wanted = {layer.node for layer in placement.layers}
    scales = {}
    for node in layers(module):
        if node.name in wanted:
            own, axis = weight(module, node), axis_of(node)
            scales[node.name] = weight_scales(own, axis, bits)
            own.copy_(round_weight(own, scales[node.name], axis, bits))
    return scales


def _doubts(count: int, observed: Mapping[str, Observed]) -> Iterable[str]:
    if count < FEW:
        yield f"warning: only {count} calibration samples: ranges may be too narrow; give 100 or more"
    for name, seen in observed.items():
        if seen.low == seen.high == 0:
            yield f"warning: calibration saw nothing but zeros in {name}: its range is unknown"


def _told(what: str, before: float, after: float) -> str:
    kept = "kept" if after > before + WORTH_DB else "not kept"
    return f"{what} {after - before:+.1f} dB, {kept}"


def _example(samples: Samples) -> Batch:
    """Two rows of one shape: torch.export takes a batch of one for a constant."""
    first = next(iter(batches(samples, 2)))
    return first if len(first[0]) > 1 else tuple(torch.cat([tensor, tensor]) for tensor in first)
