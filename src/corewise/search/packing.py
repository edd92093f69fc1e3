"""Whether texts share rows: the winner's build of a packed program is tried, and its answers and its speed decide."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corewise.accuracy.outputs import Outputs
from corewise.artifact import PackedFiles
from corewise.artifact.texts import call_limits
from corewise.common.errors import CorewiseError, EngineError, MetricError, OutputError
from corewise.engines import engine
from corewise.engines.base import mixes_rows
from corewise.pipeline import Call, CostTable, fill
from corewise.pipeline.packing import PackedCall, pack, packed_arrays, total_ms, unpacked
from corewise.pipeline.runner import MULTIPLE
from corewise.records.build import Plan
from corewise.records.goal import Requirements, Throughput
from corewise.records.pipeline import PACKED_INPUTS, Packing
from corewise.records.reason import Detail, Reason, ReasonKind
from corewise.records.report import Choice
from corewise.report.reasons import sentence
from corewise.runtime.client import Client, read_outputs
from corewise.runtime.workspace import Workspace
from corewise.samples import Samples, from_python
from corewise.search.alone import unpadded
from corewise.search.budget import FINISHING
from corewise.search.task import Task, digest, write_program
from corewise.search.trial import SearchContext

ROW_TOKENS = (64, 128, 256)
"""How long rows may be. Attention takes more time for each token of a longer row."""
TYPICAL = 3
"""A row has room for at least this many texts of the median length: longer texts are hardly padded in usual calls."""
CALL_TOKENS = 512
"""Tokens of a call, all its rows together. For MiniLM 1,024 to 4,096 were 1 to 3 % faster (Zen 4), but a call that is
not full takes as long as one that is."""
ROUNDS, ROUND_S, TURNS = 3, 1.0, 4
"""Rounds of the race, their least seconds, and how often each call runs in one; its first run is not timed."""
BETTER = 1.05
"""Texts are packed if at least this many times as many are answered: the model is then held twice."""
PACKING_S = 25.0
"""Under a budget, what is left for exporting, building and timing the packed program (MiniLM in int8 20 s, Zen 4)."""
BEFORE_S = 5.0
"""What is left beside that for what comes between the race and packing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """The packed program of the winner, and how it is used."""

    packing: Packing
    files: PackedFiles


@dataclass(frozen=True, kw_only=True, eq=False)
class _Texts:
    """Token ids of samples, and the packed calls of those that fit a row, in the order of ``fitting``."""

    ids: Sequence[NDArray[np.int64]]
    fitting: NDArray[np.intp]
    calls: Sequence[PackedCall]
    rows: Samples
    """The packed rows of all calls, each of which is filled up with empty rows."""


def judge_packing(
    task: Task, choice: Choice, context: SearchContext, costs: CostTable | None
) -> tuple[Packed | None, Reason | None]:
    """Build the winner once more from the packed program, and keep it if it passes the gate and is faster.

    Args:
        task: The model, with its pipeline.
        choice: The winner, whose own calls cost ``costs``.
        context: What all trials share.
        costs: ``None`` where texts are not put into calls by their costs, so that they are not packed either.

    Returns:
        The packed program if it is used, and why it is or is not; two ``None`` where packing was not an option.
    """
    tokens, build = row_tokens(task, context.requirements), choice.winner
    if costs is None or tokens is None or build.fixed_batch is not None or mixes_rows(engine(build.engine), build):
        return None, None
    if context.budget.left_s(FINISHING) < _packing_s(task):
        return None, _not_packed("the budget had no time to try packing")
    packing = Packing(rows=CALL_TOKENS // tokens, tokens=tokens, texts=tokens // 4, ms=1.0)
    try:
        return _tried(task, choice, context, costs, packing)
    except (MetricError, OutputError):
        raise
    except CorewiseError as error:  # the winner is what it was; only this choice was not made
        return None, _not_packed(f"packing them failed: {error}")


def reserved_s(task: Task, requirements: Requirements, total_s: float | None) -> float:
    """Seconds of a budget that are kept for packing; none of a short one, in which it would not be tried."""
    needed_s = BEFORE_S + _packing_s(task)
    if total_s is None or needed_s > total_s / 3 or row_tokens(task, requirements) is None:
        return 0.0
    return needed_s


def _packing_s(task: Task) -> float:
    """Seconds that must be left: exporting, which nothing can end, may take as long as it took for the model itself."""
    return max(PACKING_S, task.preparation.export_s)


def row_tokens(task: Task, requirements: Requirements) -> int | None:
    """Tokens of a packed row; ``None`` if packing is not tried for such a goal, such a model or such long texts."""
    from corewise import source

    pipeline = task.pipeline
    if not isinstance(requirements.goal, Throughput) or requirements.memory_limit_bytes is not None:
        return None
    if pipeline is None or pipeline.fixed_length is not None or task.exported.program is None:
        return None
    if source.packable(task.exported.module) is None:
        return None
    typical = median(len(one) for one in _ids(task, task.holdout))
    return next((tokens for tokens in ROW_TOKENS if tokens >= TYPICAL * typical), None)


def _ids(task: Task, samples: Samples) -> list[NDArray[np.int64]]:
    """The token ids of samples, without padding."""
    assert task.pipeline is not None  # as ``row_tokens`` has seen
    roles = [each.role for each in task.pipeline.inputs]
    return [row[roles.index("ids")] for row in unpadded(samples, roles.index("mask")).rows]


def _not_packed(why: str) -> Reason:
    return Reason.of(ReasonKind.TEXTS_NOT_PACKED, why=why)


def _tried(
    task: Task, choice: Choice, context: SearchContext, costs: CostTable, packing: Packing
) -> tuple[Packed | None, Reason | None]:
    build, plan = choice.winner, choice.plan
    judged = _packed_texts(task, task.holdout, packing)
    key = digest((task.key_parts(context.requirements), build, packing))
    kept = context.workspace.kept("packed", key)
    workspace = kept or _prepared(task, context, packing, judged)
    if isinstance(workspace, Reason):
        return None, workspace
    payload = workspace.payload(build)
    with context.client(build, FINISHING) as client:
        if kept is None:
            client.build(workspace, build, workspace.empty_payload(build))
            workspace.keep(key)
        start_s = perf_counter()
        client.open(payload, build, Plan(threads_per_instance=context.cpu.usable_cores, batch=packing.rows))
        opening_ms = 1e3 * (perf_counter() - start_s)
        client.run_samples(workspace.holdout, packing.rows, workspace.outputs(build), alone=False)
        outputs = read_outputs(workspace.outputs(build))
        fidelity, verdict = context.verify(_answers(outputs, judged, context, choice))
        if not verdict.passed:
            return None, _not_packed(f"the answers to packed texts fail the gate: {sentence(verdict.reason)}")
        client.open(payload, build, packing.under(plan))
        usual = _usual_calls(task, [len(judged.ids[row]) for row in judged.fitting], plan, costs)
        usual_ms, packed_ms = _raced(client, workspace, usual, choice, context, costs, packing)
    ratio = usual_ms / (packed_ms * len(judged.calls))
    size_bytes = sum(file.stat().st_size for file in payload.rglob("*") if file.is_file())
    told: dict[str, Detail] = {
        "ratio": ratio,
        "tokens": packing.tokens,
        "metric": fidelity.metric,
        "value": fidelity.value,
    }
    if ratio < BETTER:
        return None, Reason.of(ReasonKind.PACKING_SLOWER, **told)
    golden = next(judged.rows.batches(packing.rows))[1], [leaf[: packing.rows] for leaf in outputs.leaves]
    files = PackedFiles(payload=payload, inputs=golden[0], outputs=golden[1])
    # The table may be from minutes when the machine was faster or slower.
    ms = packed_ms * total_ms(usual, costs) / usual_ms
    packed = Packed(packing=replace(packing, ms=ms, opening_ms=opening_ms), files=files)
    return packed, Reason.of(ReasonKind.PACKS_TEXTS, size_bytes=size_bytes, **told)


def _prepared(task: Task, context: SearchContext, packing: Packing, judged: _Texts) -> Workspace | Reason:
    """A workspace with the packed program and what a build of it reads, or why there is none."""
    from corewise import source

    # The row of the most texts, because one of a single text says nothing about how texts are kept apart.
    row = max(judged.rows.rows, key=lambda row: int(row[-1].max()))
    module = source.packed_form(task.exported.module, packing.texts, row)
    if module is None:
        return _not_packed("the model does not keep the texts of a row apart")
    calibration = _packed_texts(task, task.calibration, packing).rows
    exported = source.export(module, calibration)
    if exported.program is None or exported.fixed_batch is not None:
        return _not_packed(f"the packed model cannot be exported: {exported.why_not or exported.why_fixed}")
    workspace = context.workspace.within("packed")
    write_program(exported, calibration, judged.rows, task.cpu, workspace)
    return workspace


def _packed_texts(task: Task, samples: Samples, packing: Packing) -> _Texts:
    """Samples in packed rows, those of whole calls."""
    assert task.pipeline is not None
    ids = _ids(task, samples)
    fitting = np.flatnonzero([len(one) <= packing.tokens for one in ids])
    calls = pack([len(ids[row]) for row in fitting], packing)
    arrays = [
        packed_arrays([[ids[fitting[place]] for place in row] for row in call.rows], packing, task.pipeline.pad_id)
        for call in calls
    ]
    columns: list[Any] = [np.concatenate(column) for column in zip(*arrays, strict=True)]
    rows = from_python([dict(zip(PACKED_INPUTS, row, strict=True)) for row in zip(*columns, strict=True)])
    return _Texts(ids=ids, fitting=fitting, calls=calls, rows=rows)


def _answers(outputs: Outputs, judged: _Texts, context: SearchContext, choice: Choice) -> Outputs:
    """The answers to the holdout: those of packed rows, and the winner's own to texts that are longer than a row."""
    made = read_outputs(context.workspace.outputs(choice.winner)).leaves[0].copy()
    vectors = outputs.leaves[0].reshape(len(judged.calls), -1, *outputs.leaves[0].shape[1:])
    for call, of_call in zip(judged.calls, vectors, strict=True):
        made[judged.fitting[list(call.places)]] = unpacked(call, of_call)
    return Outputs((made,))


def _usual_calls(task: Task, lengths: Sequence[int], plan: Plan, costs: CostTable) -> list[Call]:
    """The winner's own calls of texts, as ``TextRunner`` makes them."""
    assert task.pipeline is not None
    calls = fill(lengths, limits=call_limits(plan, costs), cost=costs, instances=plan.instances, multiple=MULTIPLE)
    return [call._replace(tokens=min(call.tokens, task.pipeline.max_length)) for call in calls]


def _raced(
    packed: Client,
    workspace: Workspace,
    calls: Sequence[Call],
    choice: Choice,
    context: SearchContext,
    costs: CostTable,
    packing: Packing,
) -> tuple[float, float]:
    """Milliseconds of all usual calls and of one packed call, which take turns."""
    points = sorted({(len(call.places), call.tokens) for call in calls})
    round_s = max(ROUND_S, TURNS * sum(float(costs(np.array([rows]), tokens)[0]) for rows, tokens in points) / 1e3)
    build, own = choice.winner, context.workspace
    usual_ms, packed_ms = list[float](), list[float]()
    with context.client(build, FINISHING) as usual:
        usual.open(own.payload(build), build, choice.plan)
        for _ in range(ROUNDS):
            found = usual.time_calls(own.holdout, points, round_s)
            if len(found) < len(points):
                raise EngineError("its calls took far longer than before", "stop other programs")
            ms = dict(zip(points, found, strict=True))
            usual_ms.append(sum(ms[len(call.places), call.tokens] for call in calls))
            packed_ms += packed.time_calls(workspace.holdout, [(packing.rows, packing.tokens)], ROUND_S)
    return median(usual_ms), median(packed_ms)
