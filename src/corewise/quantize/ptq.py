"""Post-training quantization as a ladder: ranges first, then one correction after the other, each kept if it pays.

``Ladder.first`` is the quick start, ``Ladder.climb`` makes the next step from any stage, and ``quantize`` goes to the
top. ``state`` keeps stages on disk, so that a later build starts from the stage where an earlier one ended.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from corewise.common.errors import EngineError
from corewise.quantize import corrections, streams
from corewise.quantize.balance import Balance
from corewise.quantize.calibration import NotFinite, grids, naming_samples, never_varied, observe, quantized_values
from corewise.quantize.graph import (
    Step,
    compute,
    execute,
    folded,
    is_float,
    layers,
    weight,
)
from corewise.quantize.graph import output_axis as axis_of
from corewise.quantize.observers import (
    Channels,
    QParams,
    round_weight,
    weight_scales,
)
from corewise.quantize.placement import TARGETS, Placement, Target, place
from corewise.quantize.quantized import CORRECTIONS, Quantized, Recipe, batches
from corewise.quantize.simulate import WORTH_DB, Simulation, sqnr_db
from corewise.samples import Samples

RUNGS = ("first", "ranges", *CORRECTIONS)
"""The steps of the ladder: ranges of few samples, ranges of all samples, and the corrections."""
TOP = len(RUNGS) - 1
FIRST_SAMPLES, FIRST_JUDGED = 16, 4
"""Calibration samples that the first rung takes its ranges from, and others that choose between observers."""
TRIED = 32
"""Calibration samples that show whether a correction that moves channels pays; the ranges kept come from all."""
JUDGED = 16
"""The last calibration samples, at most a quarter of all. They judge, so nothing learns from them: ranges that have
seen a sample do not cut off what it holds, as they do with samples to come."""
ROUNDING_SAMPLES = 32
BIAS_SAMPLES = 48
SMOOTHING_WORTH_DB = 1.0
"""What SmoothQuant must win. More than other corrections, because it is not free at run time."""
CLOSE_DB = 2.0
"""Observers this near to the best one stay in the search: the best one may gain less from the corrections."""
FEW = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Attempt:
    """The stage's graph with values on the grids of one observer and rounded weights."""

    module: GraphModule
    scales: dict[str, Tensor]
    ranges: dict[str, QParams]
    observer: str
    sqnr_db: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """What the ladder has on one of its rungs."""

    rung: int
    plain: GraphModule
    """The graph as corrections of channels left it, with weights that are not rounded."""
    placement: Placement
    """The placement in ``plain``, for target ``fused``."""
    channels: dict[str, Channels]
    """What calibration saw of each value's channels in ``plain``; empty once no further correction needs it."""
    attempts: tuple[Attempt, ...]
    """One for each observer, the best first before weights were corrected."""
    few_db: float
    """The best attempt's SQNR with ranges of ``TRIED`` samples, to compare corrections of channels with."""
    changed: tuple[int, ...]
    """The rungs that changed something, this one among them if it did."""
    smoothed: tuple[str, ...] = ()
    tuned: dict[Target, streams.Tuned] = field(default_factory=dict)
    """Ranges of residual streams; empty below the last rung."""
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    stream_notes: tuple[str, ...] = ()

    @property
    def best(self) -> Attempt:
        """The attempt with the best outputs."""
        return max(self.attempts, key=lambda attempt: attempt.sqnr_db)


def quantize(program: ExportedProgram, calibration: Samples, recipe: Recipe) -> Quantized:
    """Calibrate, round and correct ``program``: the whole ladder.

    Raises ``EngineError`` if nothing can be quantized, and ``SamplesError`` if a sample makes a layer's input NaN
    or infinite.
    """
    ladder = Ladder(folded(program), calibration, recipe)
    stage = ladder.ranges()
    while stage.rung < TOP:
        stage = ladder.climb(stage)
    return ladder.quantized(stage)


class OutputError:
    """How near simulated outputs for some samples come to those of the fp32 program, in dB, every group alike."""

    def __init__(self, reference: GraphModule, samples: Samples, step: Step = compute) -> None:
        self._batches = list(batches(samples))
        expected = [execute(reference, batch, step) for batch in self._batches]
        self._balance = Balance(expected)
        self._expected = [self._balance(outputs) for outputs in expected]

    def __call__(self, module: GraphModule, placement: Placement, ranges: Mapping[str, QParams]) -> float:
        """The SQNR of the module's outputs."""
        simulation = Simulation(module, placement.edges, ranges)
        return sqnr_db(self._expected, [self._balance(simulation.run(batch)) for batch in self._batches])


class Ladder:
    """The stages of one program, judged by their simulated outputs for the last calibration samples.

    Without corrections these samples calibrate too. Raises ``EngineError`` if the program has nothing to quantize,
    and ``SamplesError`` if a sample makes a value NaN or infinite.
    """

    def __init__(self, module: GraphModule, calibration: Samples, recipe: Recipe) -> None:
        if not place(module, "fused").layers:
            raise EngineError("the model has no convolution or linear layer to quantize", "use another precision")
        self.reference = module
        self.recipe = recipe
        self._calibration = calibration
        self._doubts = tuple(_unjudged(module, calibration))
        self._corrections = () if self._doubts else recipe.corrections
        count = len(calibration)
        learning = max(1, count - min(JUDGED, max(1, count // 4)))
        self._learning = calibration.take(range(learning if self._corrections else count))
        self._few = self._learning.take(range(min(TRIED if self._corrections else count, len(self._learning))))
        self._judging = range(min(learning, count - 1), count)
        self._choosing = range(max(0, 2 * learning - count), learning)

    def first(self) -> Stage:
        """The first rung: ranges of a few samples, for both placements, and weights rounded to nearest."""
        with _calm():
            judged = self._judging[-FIRST_JUDGED:]
            learning = self._learning.take(range(min(FIRST_SAMPLES, len(self._learning))))
            judge = self._output_error_on(judged)
            stage = self._attempted(copy.deepcopy(self.reference), learning, judge)
            told = f"{stage.best.sqnr_db:.1f} dB, ranges of {len(learning)} samples, judged by {len(judged)}"
            return replace(stage, rung=0, changed=(0,), warnings=(*self._doubts, *stage.warnings), notes=(told,))

    def ranges(self) -> Stage:
        """The second rung: ranges of all samples, and the observer with the best outputs."""
        with _calm():
            brief = self._attempted(copy.deepcopy(self.reference), self._few, self._output_error)
            stage = self._whole(brief)
            plain_db = f"{brief.few_db:.1f} dB without corrections, ranges of {len(self._few)} samples"
            return replace(stage, rung=1, changed=(1,), warnings=(*self._doubts, *stage.warnings), notes=(plain_db,))

    def climb(self, stage: Stage) -> Stage:
        """The stage on the next rung. Does nothing but count if the rung's correction is not in the recipe."""
        steps: dict[str, Callable[[Stage], Stage]] = {
            "equalize": self._equalized,
            "smooth": self._smoothed,
            "rounding": self._rounded,
            "bias": self._bias_corrected,
            "streams": self._streams_tuned,
        }
        if stage.rung == 0:
            return self.ranges()
        name, rung = RUNGS[stage.rung + 1], stage.rung + 1
        with _calm():
            if name == "rounding":
                stage = _close_to_best(stage)
            after = steps[name](stage) if name in self._corrections else stage
        return replace(after, rung=rung, changed=(*stage.changed, rung) if _differ(stage, after) else stage.changed)

    def quantized(self, stage: Stage) -> Quantized:
        """What engines get from a stage."""
        best = stage.best
        return Quantized(
            module=best.module,
            plain=stage.plain,
            reference=self.reference,
            ranges={target: stage.tuned[target].ranges if stage.tuned else best.ranges for target in TARGETS},
            scales=best.scales,
            smoothed=stage.smoothed,
            recipe=self.recipe,
            sqnr_db=stage.tuned["fused"].sqnr_db if stage.tuned else best.sqnr_db,
            warnings=stage.warnings,
            notes=(*stage.notes, f"ranges by {best.observer}", *best.notes, *stage.stream_notes),
        )

    def _attempted(self, plain: GraphModule, seen: Samples, judge: OutputError) -> Stage:
        """Weights rounded to nearest, and values by what each observer makes of the samples ``seen``."""
        placement, names = place(plain, "fused"), quantized_values(plain)
        observed = naming_samples(seen, lambda part: observe(plain, names, batches(part)))
        module = copy.deepcopy(plain)
        scales = round_to_nearest(module, placement, self.recipe.weight_bits)
        attempts = []
        for observer in self.recipe.observers:
            ranges = grids(plain, names, observed, observer)
            score_db = judge(module, placement, ranges)
            attempts.append(Attempt(module=module, scales=scales, ranges=ranges, observer=observer, sqnr_db=score_db))
        attempts.sort(key=lambda attempt: -attempt.sqnr_db)
        return Stage(
            rung=1,
            plain=plain,
            placement=placement,
            channels={name: seen.channels for name, seen in observed.items()},
            attempts=tuple(attempts),
            few_db=attempts[0].sqnr_db,
            changed=(),
            warnings=tuple(never_varied(plain, observed)),
        )

    def _whole(self, brief: Stage) -> Stage:
        """The stage of ``brief``, which saw few samples, with ranges of all."""
        if len(self._few) == len(self._learning):
            return brief
        return replace(self._attempted(brief.plain, self._learning, self._output_error), few_db=brief.few_db)

    def _equalized(self, stage: Stage) -> Stage:
        plain = copy.deepcopy(stage.plain)
        if not corrections.equalize(plain, stage.placement, stage.channels, self.recipe.weight_bits):
            return stage
        return self._rescaled(stage, plain, "channel equalization", WORTH_DB)

    def _smoothed(self, stage: Stage) -> Stage:
        plain = copy.deepcopy(stage.plain)
        names = corrections.smooth(plain, stage.placement, stage.channels, self.recipe.weight_bits)
        if not names:
            return stage
        after = self._rescaled(stage, plain, f"SmoothQuant on {len(names)} values", SMOOTHING_WORTH_DB)
        return replace(after, smoothed=names) if after.plain is plain else after

    def _rescaled(self, stage: Stage, plain: GraphModule, correction: str, worth_db: float) -> Stage:
        """The stage with the rescaled graph ``plain`` if that pays with ranges of few samples."""
        brief = self._attempted(plain, self._few, self._output_error)
        notes = (*stage.notes, _verdict(correction, stage.few_db, brief.few_db, worth_db))
        if brief.few_db <= stage.few_db + worth_db:
            return replace(stage, notes=notes)
        return replace(
            self._whole(brief),
            changed=stage.changed,
            smoothed=stage.smoothed,
            warnings=stage.warnings,
            notes=notes,
        )

    def _rounded(self, stage: Stage) -> Stage:
        """GPTQ's rounding: once, for the values of the first attempt."""
        first = stage.attempts[0]
        module = copy.deepcopy(stage.plain)
        few = list(batches(self._learning.take(range(min(ROUNDING_SAMPLES, len(self._learning))))))
        scales = corrections.round_weights(module, stage.placement, first.ranges, few, self.recipe.weight_bits)
        attempts = (
            self._better("GPTQ rounding", stage, attempt, replace(attempt, module=module, scales=scales))
            for attempt in stage.attempts
        )
        return replace(stage, attempts=tuple(attempts))

    def _bias_corrected(self, stage: Stage) -> Stage:
        samples = next(iter(batches(self._learning, min(BIAS_SAMPLES, len(self._learning)))))
        attempts = []
        for attempt in stage.attempts:
            module = copy.deepcopy(attempt.module)
            corrections.correct_bias(module, stage.plain, stage.placement, attempt.ranges, samples)
            attempts.append(self._better("bias correction", stage, attempt, replace(attempt, module=module)))
        return replace(stage, attempts=tuple(attempts))

    def _better(self, correction: str, stage: Stage, before: Attempt, after: Attempt) -> Attempt:
        after = replace(after, sqnr_db=self._output_error(after.module, stage.placement, after.ranges))
        notes = (*before.notes, _verdict(correction, before.sqnr_db, after.sqnr_db, WORTH_DB))
        return replace(after if after.sqnr_db > before.sqnr_db + WORTH_DB else before, notes=notes)

    def _streams_tuned(self, stage: Stage) -> Stage:
        """The ranges of residual streams changed for each placement if that pays.

        The last samples that calibrate choose. They are as many as those that judge their choice. Only ``everywhere``
        rounds both operands of an add, so that one scale can gain something.
        """
        best = stage.best
        everywhere = place(best.module, "everywhere")
        tied = streams.residual_streams(best.module, everywhere)
        chooser = self._output_error_on(self._choosing) if tied else self._output_error
        placements: dict[Target, Placement] = {"fused": stage.placement, "everywhere": everywhere}
        tuned, notes = {}, []
        for target, placement in placements.items():
            choose, judge = (partial(error, best.module, placement) for error in (chooser, self._output_error))
            before_db = best.sqnr_db if target == "fused" else judge(best.ranges)
            rounded = [stream for stream in tied if set(stream) & set(placement.tensors)]
            tuned[target] = streams.tune(best.ranges, rounded, choose, judge, before_db, shared=target == "everywhere")
            if rounded:
                gain = f", {tuned[target].sqnr_db - before_db:+.1f} dB, kept"
                words = tuned[target].words + gain if tuned[target].words else "as they were"
                notes.append(f"residual streams ({target}) {words}")
        return replace(stage, tuned=tuned, stream_notes=tuple(notes))

    @cached_property
    def _output_error(self) -> OutputError:
        """By the judging samples, whose values are looked at for NaN and infinity."""
        return self._output_error_on(self._judging)

    def _output_error_on(self, indices: Iterable[int]) -> OutputError:
        names = set(quantized_values(self.reference))

        def step(node: Node, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
            value = compute(node, args, kwargs)
            if node.name in names and isinstance(value, Tensor) and not bool(value.isfinite().all()):
                raise NotFinite(node)
            return value

        return naming_samples(self._calibration.take(indices), lambda part: OutputError(self.reference, part, step))


@contextmanager
def _calm() -> Iterator[None]:
    """Without gradients, and without torch's warnings."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _differ(before: Stage, after: Stage) -> bool:
    """Whether what engines get from the two stages differs."""
    ranges = any(tuned.words for tuned in after.tuned.values())
    return ranges or after.plain is not before.plain or after.best.module is not before.best.module


def _close_to_best(stage: Stage) -> Stage:
    """The stage with the attempts whose observers are near the best one, and without what only channels needed."""
    nearest_db = stage.attempts[0].sqnr_db
    close = tuple(attempt for attempt in stage.attempts if attempt.sqnr_db > nearest_db - CLOSE_DB)
    return replace(stage, attempts=close, channels={})


def _verdict(correction: str, before_db: float, after_db: float, worth_db: float) -> str:
    """``GPTQ rounding +1.2 dB, kept``."""
    kept = "kept" if after_db > before_db + worth_db else "not kept"
    return f"{correction} {after_db - before_db:+.1f} dB, {kept}"


def round_to_nearest(module: GraphModule, placement: Placement, bits: int) -> dict[str, Tensor]:
    """Round the weights of the placed layers in place, and return their scales."""
    placed = {layer.node for layer in placement.layers}
    scales = {}
    for node in layers(module):
        if node.name in placed:
            own, axis = weight(module, node), axis_of(node)
            scales[node.name] = weight_scales(own, axis, bits)
            own.copy_(round_weight(own, scales[node.name], axis, bits))
    return scales


def _unjudged(module: GraphModule, calibration: Samples) -> Iterable[str]:
    """Why corrections are not tried: nothing could judge whether they pay."""
    if len(calibration) < FEW:
        few = f"{len(calibration)} calibrate; give 100 or more"
        yield f"ranges may be too narrow, and no correction was tried: {few}"
    outputs = next(iter(reversed(module.graph.nodes))).all_input_nodes
    if not any(is_float(node) for node in outputs):
        yield "no output is floating point, so no correction could be judged; return scores too"
