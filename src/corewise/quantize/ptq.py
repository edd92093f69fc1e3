"""Post-training quantization: one program and calibration samples to Q/DQ programs, one for each kind of engine."""

import copy
import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from corewise.common.errors import EngineError, SamplesError
from corewise.quantize import corrections, streams
from corewise.quantize.balance import Balance
from corewise.quantize.convert import with_qdq
from corewise.quantize.graph import (
    Step,
    attentions,
    bias,
    channel_axis,
    compute,
    execute,
    folded,
    is_float,
    layer_name,
    layers,
    products,
    split_attention,
    weight,
)
from corewise.quantize.graph import output_axis as axis_of
from corewise.quantize.observers import LEVELS, OBSERVERS, Observed, QParams, qparams, round_weight, weight_scales
from corewise.quantize.placement import TARGETS, Placement, Target, place, source
from corewise.quantize.simulate import WORTH_DB, Batch, Simulation, sqnr_db
from corewise.records.build import TensorSpec
from corewise.records.jsonable import from_json, to_json
from corewise.samples import Samples
from corewise.source import load_program, save_program

CALIBRATION_BATCH = 8
TRIED = 32
"""Calibration samples that tell whether a correction that moves channels pays; the ranges kept come from all."""
JUDGED = 16
"""Calibration samples, the last ones, that nothing learns from, for they judge: ranges that have seen them would not
cut off what they hold, as they do with samples to come. At most a quarter."""
ROUNDING_SAMPLES = 32
BIAS_SAMPLES = 48
SMOOTHING_WORTH_DB = 1.0
"""More than of what is free at run time."""
CLOSE_DB = 2.0
"""Ranges so near to the best ones are tried to the end: what is better by itself may gain less from what follows."""
FEW = 8
SHARES = QParams(scale=1 / LEVELS, zero_point=0)
"""What a softmax gives."""
CORRECTIONS = ("equalize", "smooth", "rounding", "bias", "streams")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to quantize."""

    weight_bits: int = 8
    """7 for CPUs that add int8 products in 16 bits (``Cpu.int8_dot``)."""
    observers: tuple[str, ...] = ("mse", "minmax")
    """Names in ``observers.OBSERVERS``; the one with the best outputs is kept."""
    corrections: tuple[str, ...] = CORRECTIONS
    """Those to try; each is kept where it pays."""

    @property
    def key(self) -> str:
        """A short name for files."""
        return _key(to_json(self))


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantized:
    """A calibrated and corrected graph."""

    module: GraphModule
    """fp32 weights on their int8 grids."""
    plain: GraphModule
    """The same graph with weights that are not rounded, for layers that stay in floating point."""
    reference: GraphModule
    """The graph before any change."""
    ranges: dict[Target, dict[str, QParams]]
    scales: dict[str, Tensor]
    """Of the weights, by the layer's node: one for each output channel."""
    smoothed: tuple[str, ...]
    """Values behind which ``corrections.divide`` put a product."""
    recipe: Recipe
    sqnr_db: float
    """Of the simulated outputs for the judging samples, target ``fused``."""
    notes: tuple[str, ...]
    """What was decided, in words."""

    def placed(
        self, target: Target, ignored: Sequence[str] = (), attention: bool = False
    ) -> tuple[GraphModule, Placement, dict[str, QParams]]:
        """A copy of the graph with where its pairs stand and the grids of what goes through them.

        The ``ignored`` layers have their own weights again. With ``attention`` the products in attentions are in the
        graph and placed. Raises as ``placement.place`` does.
        """
        module = copy.deepcopy(self.module)
        operands = split_attention(module) if attention else {}
        placement = place(module, target, ignored, attention)
        ranges = dict(self.ranges[target])
        for name, same in operands.items():
            if same is None or same in ranges:
                ranges[name] = SHARES if same is None else ranges[same]
        rounded = {layer.node for layer in placement.layers}
        twins = {node.name: node for node in layers(self.plain)}
        with torch.no_grad():
            for node in layers(module):
                if node.name not in rounded:
                    weight(module, node).copy_(weight(self.plain, twins[node.name]))
                    bias(module, node).copy_(bias(self.plain, twins[node.name]))
        return module, placement, ranges


def quantize(program: ExportedProgram, calibration: Samples, recipe: Recipe) -> Quantized:
    """Calibrate, round and correct ``program``.

    Raises ``EngineError`` where nothing can be quantized, and ``SamplesError`` where a sample makes a layer's input NaN
    or infinite.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _quantize(folded(program), calibration, recipe)


def lower(
    quantized: Quantized,
    target: Target,
    inputs: Sequence[TensorSpec],
    example: Batch,
    ignored: Sequence[str] = (),
    attention: bool = False,
) -> ExportedProgram:
    """The program with Q/DQ pairs where engines of the kind ``target`` want them; dynamic batch.

    The ``ignored`` layers stay in floating point: names or regular expressions; with ``attention`` products of two
    activations are quantized too (``placement.place``). Raises ``EngineError`` where no layer is left to quantize, or
    one of ``ignored`` matches nothing.
    """
    module, placement, ranges = quantized.placed(target, ignored, attention)
    if not placement.layers:
        raise EngineError("every convolution and linear is ignored", "ignore less, or use another precision")
    if attention and not products(module):
        raise EngineError("there is no attention whose products can be int8", "leave the option attention out")
    return with_qdq(module, placement, ranges, quantized.scales, quantized.recipe.weight_bits, inputs, example)


def quantized_program(
    program: Path,
    calibration: Samples,
    inputs: Sequence[TensorSpec],
    cache: Path,
    recipe: Recipe,
    target: Target,
    ignored: Sequence[str] = (),
    attention: bool = False,
) -> tuple[Path, tuple[str, ...]]:
    """The ``.pt2`` of the program quantized for ``target``, and notes.

    Calibration and corrections are made once for all engines and choices of ``ignored``, and kept in ``cache``. Raises
    as ``quantize`` and ``lower`` do.
    """
    path = cache / f"quantized-{_key([to_json(recipe), target, list(ignored), attention])}.pt2"
    if not path.exists():
        quantized = calibrated(program, calibration, cache, recipe)
        whole = path.with_suffix(".part")
        save_program(lower(quantized, target, inputs, _example(calibration), ignored, attention), whole)
        whole.replace(path)
    with safe_open(_state(cache, recipe), "pt") as state:
        return path, tuple(_found(state)["notes"])


def calibrated(program: Path, calibration: Samples, cache: Path, recipe: Recipe) -> Quantized:
    """``quantize`` the program in a file, or read from ``cache`` what an earlier call made of it."""
    path = _state(cache, recipe)
    if path.exists():
        return load_state(load_program(program), path, recipe)
    made = quantize(load_program(program), calibration, recipe)
    save_state(made, path)
    return made


def save_state(quantized: Quantized, path: Path) -> None:
    """Write what calibration and corrections found, whole or not at all."""
    tensors = {
        f"{part}.{name}": tensor.contiguous().clone()
        for part, module in (("module", quantized.module), ("plain", quantized.plain))
        for name, tensor in module.state_dict().items()
    } | {f"scales.{name}": tensor for name, tensor in quantized.scales.items()}
    found = {
        "ranges": to_json(quantized.ranges),
        "smoothed": quantized.smoothed,
        "sqnr_db": quantized.sqnr_db,
        "notes": quantized.notes,
    }
    whole = path.with_suffix(".part")
    save_file(tensors, whole, {"found": json.dumps(found)})
    whole.replace(path)


def load_state(program: ExportedProgram, path: Path, recipe: Recipe) -> Quantized:
    """What ``save_state`` wrote of ``program``: the graph is made anew, as ``folded`` always makes it."""
    with safe_open(path, "pt") as file:
        found = _found(file)
        parts: dict[str, dict[str, Tensor]] = {"module": {}, "plain": {}, "scales": {}}
        for key in file.keys():  # noqa: SIM118 (it is no dict)
            part, _, name = key.partition(".")
            parts[part][name] = file.get_tensor(key)
    reference = folded(program)
    module = copy.deepcopy(reference)
    nodes = {node.name: node for node in module.graph.nodes}
    for name in found["smoothed"]:
        corrections.divide(module, nodes[name], torch.ones_like(parts["module"][f"{name}_smooth"]))
    plain = copy.deepcopy(module)
    with torch.no_grad():
        for one, state in ((module, parts["module"]), (plain, parts["plain"])):
            for node in layers(one):
                if f"{node.name}_bias" in state:
                    bias(one, node)  # it adds the one that a correction had added
            one.load_state_dict(state)
    return Quantized(
        module=module,
        plain=plain,
        reference=reference,
        ranges=from_json(dict[Target, dict[str, QParams]], found["ranges"]),
        scales=parts["scales"],
        smoothed=tuple(found["smoothed"]),
        recipe=recipe,
        sqnr_db=found["sqnr_db"],
        notes=tuple(found["notes"]),
    )


def _state(cache: Path, recipe: Recipe) -> Path:
    return cache / f"quantized-{recipe.key}.safetensors"


def _found(state: Any) -> dict[str, Any]:
    """What an open file of ``save_state`` holds beside tensors."""
    found: dict[str, Any] = json.loads(state.metadata()["found"])
    return found


def _key(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def load_quantized(path: Path) -> ExportedProgram:
    """A program that ``quantized_program`` wrote; the import above registered its operators."""
    return load_program(path)


def batches(samples: Samples, size: int = CALIBRATION_BATCH) -> Iterable[Batch]:
    """The samples as tensors."""
    for _, arrays in samples.batches(size):
        yield tuple(torch.from_numpy(array.copy()) for array in arrays)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Attempt:
    """A graph with channels as a correction left them, its values on the grids of one observer, its weights rounded."""

    plain: GraphModule
    module: GraphModule
    scales: dict[str, Tensor]
    placement: Placement
    observed: dict[str, Observed]
    ranges: dict[str, QParams]
    observer: str
    sqnr_db: float
    notes: tuple[str, ...] = ()


def _quantize(module: GraphModule, calibration: Samples, recipe: Recipe) -> Quantized:
    if not place(module, "fused").layers:
        raise EngineError("there is no convolution or linear to quantize", "use another precision")
    reference = copy.deepcopy(module)
    doubts = list(_unjudged(module, calibration))
    recipe = replace(recipe, corrections=()) if doubts else recipe
    search = _Search(reference, calibration, recipe)
    brief = search.attempts(module, search.few)
    attempts = search.whole(brief)
    plain_db = f"{brief[0].sqnr_db:.1f} dB without corrections, ranges of {len(search.few)} samples"
    notes = [*doubts, *_doubts(module, attempts[0].observed), plain_db]
    smoothed: tuple[str, ...] = ()
    if "equalize" in recipe.corrections:
        changed = copy.deepcopy(module)
        if corrections.equalize(changed, attempts[0].placement, attempts[0].observed, recipe.weight_bits):
            tried = search.attempts(changed, search.few)
            notes.append(_told("channel equalization", brief[0], tried[0]))
            if _is_better(tried[0], brief[0]):
                brief, attempts = tried, search.whole(tried)
    if "smooth" in recipe.corrections:
        changed = copy.deepcopy(attempts[0].plain)
        if names := corrections.smooth(changed, attempts[0].placement, attempts[0].observed, recipe.weight_bits):
            tried = search.attempts(changed, search.few)
            notes.append(_told(f"SmoothQuant on {len(names)} values", brief[0], tried[0], SMOOTHING_WORTH_DB))
            if _is_better(tried[0], brief[0], SMOOTHING_WORTH_DB):
                attempts, smoothed = search.whole(tried), names
    nearest_db = attempts[0].sqnr_db
    best = search.refined([attempt for attempt in attempts if attempt.sqnr_db > nearest_db - CLOSE_DB])
    tuned, told = search.tuned(best)
    return Quantized(
        module=best.module,
        plain=best.plain,
        reference=reference,
        ranges={target: one.ranges for target, one in tuned.items()},
        scales=best.scales,
        smoothed=smoothed,
        recipe=recipe,
        sqnr_db=tuned["fused"].sqnr_db,
        notes=(*notes, f"ranges by {best.observer}", *best.notes, *told),
    )


class _OutputError:
    """How near simulated outputs for some samples come to those of the fp32 program, in dB, every group alike."""

    def __init__(self, reference: GraphModule, samples: Samples, step: Step = compute) -> None:
        self._batches = list(batches(samples))
        expected = [execute(reference, batch, step) for batch in self._batches]
        self._balance = Balance(expected)
        self._expected = [self._balance(outputs) for outputs in expected]

    def __call__(self, module: GraphModule, placement: Placement, ranges: Mapping[str, QParams]) -> float:
        simulation = Simulation(module, placement.edges, ranges)
        return sqnr_db(self._expected, [self._balance(simulation.run(batch)) for batch in self._batches])


class _Search:
    """Attempts of one program, judged by their simulated outputs for the last calibration samples.

    Without corrections these calibrate too. Raises ``SamplesError`` where one of them makes a value NaN or infinite.
    """

    def __init__(self, reference: GraphModule, calibration: Samples, recipe: Recipe) -> None:
        count = len(calibration)
        learning = max(1, count - min(JUDGED, max(1, count // 4)))
        self._recipe = recipe
        self._learning = calibration.take(range(learning if recipe.corrections else count))
        self.few = self._learning.take(range(min(TRIED if recipe.corrections else count, len(self._learning))))
        self._last = self._learning.take(range(max(0, 2 * learning - count), learning))
        self._reference = reference
        wanted = set(_quantized_values(reference))

        def step(node: Node, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
            value = compute(node, args, kwargs)
            if node.name in wanted and isinstance(value, Tensor) and not bool(value.isfinite().all()):
                raise _not_finite(node)
            return value

        self._output_error = _OutputError(reference, calibration.take(range(min(learning, count - 1), count)), step)

    def whole(self, brief: list[_Attempt]) -> list[_Attempt]:
        """The attempts on the graph of ``brief``, which saw ``few`` samples, with all that calibrate."""
        return brief if len(self.few) == len(self._learning) else self.attempts(brief[0].plain, self._learning)

    def attempts(self, plain: GraphModule, seen: Samples) -> list[_Attempt]:
        """Weights rounded to nearest and values by each observer of what ``seen`` makes them; the best first."""
        placement, names = place(plain, "fused"), _quantized_values(plain)
        observed = observe(plain, names, batches(seen))
        module = copy.deepcopy(plain)
        scales = _round_to_nearest(module, placement, self._recipe.weight_bits)
        found = []
        for observer in self._recipe.observers:
            ranges = _ranges(plain, names, observed, observer)
            found.append(
                _Attempt(
                    plain=plain,
                    module=module,
                    scales=scales,
                    placement=placement,
                    observed=observed,
                    ranges=ranges,
                    observer=observer,
                    sqnr_db=self._output_error(module, placement, ranges),
                )
            )
        return sorted(found, key=lambda attempt: -attempt.sqnr_db)

    def refined(self, attempts: Sequence[_Attempt]) -> _Attempt:
        """The best of attempts on one graph, the first of them best so far, with rounding and biases corrected.

        Each correction stays as far as it pays. Weights are rounded once, for the first one's values.
        """
        if "rounding" in self._recipe.corrections:
            first = attempts[0]
            module = copy.deepcopy(first.plain)
            few = list(batches(self._learning.take(range(min(ROUNDING_SAMPLES, len(self._learning))))))
            scales = corrections.round_weights(module, first.placement, first.ranges, few, self._recipe.weight_bits)
            attempts = [
                self._better("GPTQ rounding", one, replace(one, module=module, scales=scales)) for one in attempts
            ]
        if "bias" in self._recipe.corrections:
            some = next(iter(batches(self._learning, min(BIAS_SAMPLES, len(self._learning)))))
            attempts = [self._with_biases(one, some) for one in attempts]
        return max(attempts, key=lambda attempt: attempt.sqnr_db)

    def tuned(self, best: _Attempt) -> tuple[dict[Target, streams.Tuned], tuple[str, ...]]:
        """The ranges for each placement, with those of residual streams changed where that pays, and notes.

        The last samples that calibrate choose. They are as many as judge what they chose.
        Only ``everywhere`` rounds both operands of an add, so that one scale can gain something.
        """
        everywhere = place(best.module, "everywhere")
        found = streams.streams(best.module, everywhere) if "streams" in self._recipe.corrections else ()
        chooser = _OutputError(self._reference, self._last) if found else self._output_error
        placements: dict[Target, Placement] = {"fused": best.placement, "everywhere": everywhere}
        made, notes = {}, []
        for target, placement in placements.items():
            choose, judge = (partial(one, best.module, placement) for one in (chooser, self._output_error))
            before = best.sqnr_db if target == "fused" else judge(best.ranges)
            rounded = [stream for stream in found if set(stream) & set(placement.tensors)]
            made[target] = streams.tune(best.ranges, rounded, choose, judge, before, shared=target == "everywhere")
            if rounded:
                gain = f", {made[target].sqnr_db - before:+.1f} dB, kept"
                words = made[target].words + gain if made[target].words else "as they were"
                notes.append(f"residual streams ({target}) {words}")
        return made, tuple(notes)

    def _with_biases(self, best: _Attempt, some: Batch) -> _Attempt:
        module = copy.deepcopy(best.module)
        corrections.correct_bias(module, best.plain, best.placement, best.ranges, some)
        return self._better("bias correction", best, replace(best, module=module))

    def _better(self, what: str, best: _Attempt, tried: _Attempt) -> _Attempt:
        tried = replace(tried, sqnr_db=self._output_error(tried.module, tried.placement, tried.ranges))
        notes = (*best.notes, _told(what, best, tried))
        return replace(tried if _is_better(tried, best) else best, notes=notes)


def _is_better(tried: _Attempt, best: _Attempt, by_db: float = WORTH_DB) -> bool:
    return tried.sqnr_db > best.sqnr_db + by_db


def _quantized_values(module: GraphModule) -> tuple[str, ...]:
    """The nodes whose values are rounded in one placement or the other."""
    # Not the mask of an attention, which may be infinite.
    operands = (n for node in (*attentions(module), *products(module)) for n in node.args[:3])
    multiplied = (n.name for n in operands if isinstance(n, Node))
    places = (name for target in TARGETS for name in place(module, target).tensors)
    return tuple(dict.fromkeys((*places, *multiplied)))


def _not_finite(node: Node) -> SamplesError:
    return SamplesError(
        f"a calibration sample makes the value of {layer_name(node)} NaN or infinite",
        "remove such samples, or repair the model",
    )


def observe(module: GraphModule, names: Sequence[str], given: Iterable[Batch]) -> dict[str, Observed]:
    """One pass of the samples through the fp32 graph, watching the values ``names``.

    Raises ``SamplesError`` where one of them is NaN or infinite.
    """
    wanted = set(names)
    nodes = {node.name: node for node in module.graph.nodes}
    readers = {name: [user for user in nodes[name].users if user in set(layers(module))] for name in wanted}
    sums = streams.cut_off(module)
    operands = {operand for found in sums.values() for operand in found}
    observed: dict[str, Observed] = {}

    def see(node: Node, value: object) -> None:
        if node.name not in wanted or not isinstance(value, Tensor):
            return
        if node.name not in observed:
            axis = channel_axis(value, readers[node.name][0]) if readers[node.name] else min(1, value.dim() - 1)
            observed[node.name] = Observed(axis)
        if not observed[node.name].see(value):
            raise _not_finite(node)

    def step(node: Node, args: tuple[Any, ...], kwargs: dict[str, object]) -> object:
        for operand, own, other in zip(node.args[:2], args[:2], args[1::-1], strict=True) if node in sums else ():
            if isinstance(operand, Node) and operand in sums[node] and operand.name in wanted:
                see(operand, streams.felt(own, other))
        value = compute(node, args, kwargs)
        if node not in operands:
            see(node, value)
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


def _unjudged(module: GraphModule, calibration: Samples) -> Iterable[str]:
    """Why corrections are not tried: nothing could tell whether they pay."""
    if len(calibration) < FEW:
        few = f"{len(calibration)} calibrate; give 100 or more"
        yield f"warning: ranges may be too narrow, and no correction was tried: {few}"
    outputs = next(iter(reversed(module.graph.nodes))).all_input_nodes
    if not any(is_float(node) for node in outputs):
        yield "warning: no output is floating point, so that no correction could be judged; return scores too"


def _doubts(module: GraphModule, observed: Mapping[str, Observed]) -> Iterable[str]:
    nodes = {node.name: node for node in module.graph.nodes}
    partly_seen = {operand.name for found in streams.cut_off(module).values() for operand in found}
    for name, seen in observed.items():
        if seen.low == seen.high and name not in partly_seen:
            what = f"input {name}" if nodes[name].op == "placeholder" else f"the value of {layer_name(nodes[name])}"
            yield f"warning: calibration saw nothing but {seen.low:g} in {what}: its range is a guess"


def _told(what: str, before: _Attempt, after: _Attempt, by_db: float = WORTH_DB) -> str:
    kept = "kept" if _is_better(after, before, by_db) else "not kept"
    return f"{what} {after.sqnr_db - before.sqnr_db:+.1f} dB, {kept}"


def _example(samples: Samples) -> Batch:
    """Two rows of one shape: torch.export takes a batch of one for a constant."""
    first = next(iter(batches(samples, 2)))
    return first if len(first[0]) > 1 else tuple(torch.cat([tensor, tensor]) for tensor in first)
