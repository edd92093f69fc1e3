"""Stages of the quantizer kept on disk, so that engines and later builds start from where an earlier one ended."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from corewise.quantize import corrections, streams
from corewise.quantize.graph import along, bias, folded, layers, output_axis
from corewise.quantize.observers import Channels, QParams
from corewise.quantize.placement import Target, place
from corewise.quantize.ptq import TOP, Attempt, Ladder, Stage
from corewise.quantize.quantized import Quantized, Recipe, batches, lower, short_hash
from corewise.quantize.simulate import Batch
from corewise.records.build import TensorSpec
from corewise.records.jsonable import from_json, to_json
from corewise.samples import Samples
from corewise.source import load_program, save_program

PARTS = ("low", "high", "mean_square")


@dataclass(frozen=True, kw_only=True)
class Decided:
    """What the quantizer decided, in words."""

    warnings: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _AttemptRecord:
    """An ``Attempt`` without its tensors."""

    module: int
    """Its number: attempts share a module until their weights are corrected."""
    ranges: dict[str, QParams]
    observer: str
    sqnr_db: float
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _TunedRecord:
    """A ``streams.Tuned``."""

    ranges: dict[str, QParams]
    sqnr_db: float
    words: str


@dataclass(frozen=True, kw_only=True)
class _StageRecord:
    """A ``Stage`` without its tensors."""

    rung: int
    attempts: tuple[_AttemptRecord, ...]
    few_db: float
    changed: tuple[int, ...]
    smoothed: tuple[str, ...]
    tuned: dict[Target, _TunedRecord]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    stream_notes: tuple[str, ...]

    def stands_for(self, rung: int) -> bool:
        """Whether a build that asks for ``rung`` gets this stage: nothing from there on to here changed anything."""
        below = max((changed for changed in self.changed if changed < self.rung), default=-1)
        return below < rung <= self.rung


def quantized_program(
    program: Path,
    calibration: Samples,
    inputs: Sequence[TensorSpec],
    cache: Path,
    recipe: Recipe,
    target: Target,
    ignored: Sequence[str] = (),
    attention: bool = False,
    rung: int = TOP,
) -> tuple[Path, Decided]:
    """The ``.pt2`` of the program quantized for ``target``, and what was decided.

    Calibration and corrections are made once for all engines and choices of ``ignored``, and kept in ``cache``. Raises
    as ``ptq.quantize`` and ``quantized.lower`` do.
    """
    climbed = [] if rung == TOP else [rung]
    path = cache / f"quantized-{short_hash([to_json(recipe), target, list(ignored), attention, *climbed])}.pt2"
    decided = path.with_suffix(".json")
    if not (path.exists() and decided.exists()):
        quantized = calibrated(program, calibration, cache, recipe, rung)
        part = path.with_suffix(".part")
        save_program(lower(quantized, target, inputs, example(calibration), ignored, attention), part)
        decided.write_text(json.dumps(to_json(Decided(warnings=quantized.warnings, notes=quantized.notes))))
        part.replace(path)
    return path, from_json(Decided, json.loads(decided.read_text()))


def calibrated(program: Path, calibration: Samples, cache: Path, recipe: Recipe, rung: int = TOP) -> Quantized:
    """The program in a file quantized up to ``rung``, and further until a correction changes something.

    Starts from the highest stage below it that is in ``cache``, and keeps each stage there that changed something.
    """
    ladder = Ladder(folded(load_program(program)), calibration, recipe)
    records = _records(cache, recipe)
    ready = next((record for record in records if record.stands_for(rung)), None)
    if ready is not None:
        return ladder.quantized(load_stage(ladder.reference, _path(cache, recipe, ready.rung)))
    below = [record.rung for record in records if 0 < record.rung < rung]
    if below:
        stage = load_stage(ladder.reference, _path(cache, recipe, below[-1]))
    else:
        stage = ladder.first() if rung == 0 else ladder.ranges()
        save_stage(stage, ladder.reference, _path(cache, recipe, stage.rung))
    while stage.rung < rung or (stage.rung < TOP and stage.rung not in stage.changed):
        stage = ladder.climb(stage)
        if stage.rung in stage.changed or stage.rung == TOP:
            save_stage(stage, ladder.reference, _path(cache, recipe, stage.rung))
    return ladder.quantized(stage)


def rung_reached(cache: Path, recipe: Recipe, rung: int) -> int | None:
    """The rung whose stage a build that asked for ``rung`` got; ``None`` if none was built."""
    return next((record.rung for record in _records(cache, recipe) if record.stands_for(rung)), None)


def save_stage(stage: Stage, reference: GraphModule, path: Path) -> None:
    """Write the stage, whole or not at all.

    Of its graphs only what differs is written: parameters that corrections changed, and weights as int8.
    """
    modules = list({id(attempt.module): attempt.module for attempt in stage.attempts}.values())
    tensors = _differing("plain", stage.plain, reference)
    for number, module in enumerate(modules):
        scales = next(attempt.scales for attempt in stage.attempts if attempt.module is module)
        tensors |= {f"scales-{number}.{name}": tensor.clone() for name, tensor in scales.items()}
        tensors |= _differing(f"module-{number}", module, stage.plain, scales)
    for name, channels in stage.channels.items():
        tensors |= {f"{part}.{name}": getattr(channels, part).clone() for part in PARTS}
    numbers = {id(module): number for number, module in enumerate(modules)}
    record = _StageRecord(
        rung=stage.rung,
        attempts=tuple(
            _AttemptRecord(
                module=numbers[id(attempt.module)],
                ranges=attempt.ranges,
                observer=attempt.observer,
                sqnr_db=attempt.sqnr_db,
                notes=attempt.notes,
            )
            for attempt in stage.attempts
        ),
        few_db=stage.few_db,
        changed=stage.changed,
        smoothed=stage.smoothed,
        tuned={target: _TunedRecord(**tuned._asdict()) for target, tuned in stage.tuned.items()},
        warnings=stage.warnings,
        notes=stage.notes,
        stream_notes=stage.stream_notes,
    )
    part = path.with_suffix(".part")
    save_file(tensors, part, {"stage": json.dumps(to_json(record))})
    part.replace(path)


def load_stage(reference: GraphModule, path: Path) -> Stage:
    """What ``save_stage`` wrote for the ``folded`` program ``reference``."""
    parts: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, "pt") as file:
        record = _record(file)
        for key in file.keys():  # noqa: SIM118 (it is no dict)
            part, _, name = key.partition(".")
            parts.setdefault(part, {})[name] = file.get_tensor(key)
    plain = copy.deepcopy(reference)
    nodes = {node.name: node for node in plain.graph.nodes}
    changes = parts.get("plain", {})
    for name in record.smoothed:
        corrections.divide(plain, nodes[name], torch.ones_like(changes[f"{name}_smooth"]))
    _apply(plain, changes)
    modules, scales = [], []
    for number in sorted({attempt.module for attempt in record.attempts}):
        scales.append(parts.get(f"scales-{number}", {}))
        modules.append(copy.deepcopy(plain))
        _apply(modules[-1], parts.get(f"module-{number}", {}), scales[-1])
    return Stage(
        rung=record.rung,
        plain=plain,
        placement=place(plain, "fused"),
        channels={name: Channels(**{part: parts[part][name] for part in PARTS}) for name in parts.get(PARTS[0], {})},
        attempts=tuple(
            Attempt(
                module=modules[attempt.module],
                scales=scales[attempt.module],
                ranges=attempt.ranges,
                observer=attempt.observer,
                sqnr_db=attempt.sqnr_db,
                notes=attempt.notes,
            )
            for attempt in record.attempts
        ),
        few_db=record.few_db,
        changed=record.changed,
        smoothed=record.smoothed,
        tuned={
            target: streams.Tuned(tuned.ranges, tuned.sqnr_db, tuned.words) for target, tuned in record.tuned.items()
        },
        warnings=record.warnings,
        notes=record.notes,
        stream_notes=record.stream_notes,
    )


def load_quantized(path: Path) -> ExportedProgram:
    """A program that ``quantized_program`` wrote; the imports above registered its operators."""
    return load_program(path)


def example(samples: Samples) -> Batch:
    """Two rows of one shape: torch.export takes a batch of one as a constant. Of a fixed batch, one call."""
    first = next(iter(batches(samples, 2)))
    return first if samples.call_rows or len(first[0]) > 1 else tuple(torch.cat([tensor, tensor]) for tensor in first)


def _path(cache: Path, recipe: Recipe, rung: int) -> Path:
    return cache / f"stage-{recipe.key}-{rung}.safetensors"


def _records(cache: Path, recipe: Recipe) -> list[_StageRecord]:
    """The stages on disk, the lowest first."""
    records = []
    for rung in range(TOP + 1):
        if (path := _path(cache, recipe, rung)).exists():
            with safe_open(path, "pt") as file:
                records.append(_record(file))
    return records


def _record(file: Any) -> _StageRecord:
    return from_json(_StageRecord, json.loads(file.metadata()["stage"]))


def _differing(
    prefix: str, module: GraphModule, other: GraphModule, scales: Mapping[str, Tensor] = MappingProxyType({})
) -> dict[str, Tensor]:
    """The parameters that ``other`` lacks or has with other values; weights with ``scales`` as steps in int8."""
    others = other.state_dict()
    changes = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if name not in others or not torch.equal(tensor, others[name])
    }
    for name, node in _weights(module).items():
        if name in changes and node.name in scales:
            shaped = along(scales[node.name], changes[name], output_axis(node))
            changes[name] = (changes[name] / shaped).round().to(torch.int8)
    return {f"{prefix}.{name}": tensor.contiguous().clone() for name, tensor in changes.items()}


def _apply(
    module: GraphModule, changes: Mapping[str, Tensor], scales: Mapping[str, Tensor] = MappingProxyType({})
) -> None:
    """Put in place what ``_differing`` wrote."""
    with torch.no_grad():
        for node in layers(module):
            if f"{node.name}_bias" in changes:
                bias(module, node)  # it adds the one that a correction had added
        parameters, nodes = dict(module.named_parameters()), _weights(module)
        for name, change in changes.items():
            value = change
            if change.dtype == torch.int8:
                node = nodes[name]
                value = change.float() * along(scales[node.name], change, output_axis(node))
            parameters[name].copy_(value)


def _weights(module: GraphModule) -> dict[str, Node]:
    """The layers by the names of their weights."""
    read: dict[Any, Node] = {node.args[1]: node for node in layers(module)}
    return {str(parameter.target): layer for parameter, layer in read.items()}
