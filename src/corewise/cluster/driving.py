"""A job's driver: reads the inputs, hands parts to the actors of a crew, and has lost parts done again.

Each row is in one part, by its number alone, and each part is written whole or not at all; so whatever is lost, the
same part is made again. No more than two parts for each actor are in memory.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from typing import Any, Literal, NamedTuple

from corewise.artifact.tuned import bulk_plan
from corewise.cluster.crew import AT_ONCE, ActorLost, Crew, Node
from corewise.cluster.messages import Answered, Prepared, answer, packed, packed_rows
from corewise.common.errors import CorewiseError, EngineError
from corewise.pipeline.parts import Counts, Parts, Record
from corewise.records.build import Plan
from corewise.records.bulk import BulkProgress, NodeShare, OnProgress, PlanSource
from corewise.records.tuned import Machine, Tuned

LOOK_S = 5.0
"""How often the driver looks for new nodes."""
START_S = 120.0
"""How long a cluster may take to start the first actor."""
HANG_S = 300.0
"""An actor whose engine ends no call for so long is ended. What counts is how often the driver has looked meanwhile, as
it may be stopped itself, or read for long."""
MOST_LOSSES = 3
"""A part that ends this many actors ends the job; a node is left out if as many end there before they are ready."""


class Part(NamedTuple):
    """Rows that belong together, by their numbers."""

    number: int
    rows: list[Record]

    @property
    def label(self) -> str:
        """``rows 2,048 to 3,071``."""
        return f"rows {self.rows[0].row:,} to {self.rows[-1].row:,}"


def parts_of_rows(rows: Iterable[Record], size: int, finished: Mapping[int, Counts]) -> Iterator[Part]:
    """The parts that are not finished, read as they are taken."""
    rest = iter(rows)
    number = 0
    while part := list(islice(rest, size)):
        if number not in finished:
            yield Part(number, part)
        number += 1


Step = Literal["prepare", "retune", "open", "answer", "beat"]


@dataclass(eq=False)
class _Actor:
    """One of the crew, and what it is doing."""

    node: Node
    handle: Any
    prepared: Prepared | None = None
    plan: Plan | None = None
    source: PlanSource = "untuned"
    ready: bool = False
    parts: list[Part] = field(default_factory=list)
    rows: int = 0
    calls_ended: int = -1
    looks: int = 0
    """How often the driver has looked since that number rose, or a step began or ended."""

    def share(self, *, lost: bool) -> NodeShare | None:
        """What the report says of the node; ``None`` if it never had a plan."""
        if self.prepared is None or self.plan is None:
            return None
        return NodeShare(
            node=self.node.name,
            pid=self.prepared.pid,
            machine=self.prepared.machine,
            plan=self.plan,
            source=self.source,
            rows=self.rows,
            lost=lost,
        )


class _Call(NamedTuple):
    actor: _Actor
    step: Step
    part: Part | None = None


@dataclass(frozen=True, kw_only=True)
class Driven:
    """What came of driving a job."""

    shares: tuple[NodeShare, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


class Driver:
    """Drives one job."""

    def __init__(
        self,
        crew: Crew,
        task: str,
        kept: Parts,
        parts: Iterator[Part],
        *,
        done: Counts,
        total: int | None,
        max_failed: int | None,
        retune_s: float,
        on_tuned: Callable[[Tuned], str],
        on_progress: OnProgress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to drive.

        Args:
            crew: Who does it.
            task: The packed ``Task``.
            kept: The folder of finished parts.
            parts: The parts to do.
            done: What is done already.
            total: About how many rows there are, for the progress, if that is known.
            max_failed: How many rows may be set aside.
            retune_s: Seconds for the plan of each kind of machine that the artifact has none for; 0 for never.
            on_tuned: Keeps such a plan; returns a note, or nothing.
            on_progress: Called when a part is done, and when an actor comes or goes.
            clock: Seconds that only rise.
        """
        self.done = done
        """Rows done and set aside so far."""
        self._crew, self._task, self._kept, self._parts = crew, task, kept, parts
        self._total, self._max_failed = total, max_failed
        self._retune_s, self._on_tuned, self._on_progress, self._clock = retune_s, on_tuned, on_progress, clock
        self._actors: dict[str, _Actor] = {}
        self._ready: set[str] = set()
        """The nodes of those that answer."""
        self._calls: dict[Any, _Call] = {}
        self._all_read = False
        self._again: deque[Part] = deque()
        self._ended: dict[int, list[str]] = defaultdict(list)
        self._losses: dict[str, int] = defaultdict(int)
        self._lost = 0
        self._refusals: dict[str, CorewiseError] = {}
        self._plans: dict[Machine, tuple[Plan, PlanSource]] = {}
        self._tuning: dict[Machine, _Actor] = {}
        self._shares: list[NodeShare] = []
        self._notes: list[str] = []
        self._looked_s = self._asked_s = self._began_s = clock()

    def run(self) -> Driven:
        """Have all parts done.

        Raises:
            SamplesError: An input cannot be read, or too many rows failed.
            OutputError: A part cannot be written.
            EngineError: The engine fails, or a part ends one actor after the other.
            CorewiseError: No node can run the job, with the first one's reason.
        """
        try:
            self._hire()
            self._tell()
            while self._hand_out() or self._again or any(actor.parts for actor in self._actors.values()):
                self._hear()
                if self._clock() - self._looked_s > LOOK_S:
                    self._hire()
                if self._clock() - self._asked_s > LOOK_S:
                    self._check_moving()
                self._check_started()
            for actor in self._actors.values():
                self._keep_share(actor, lost=False)
            return Driven(
                shares=tuple(self._shares),
                left_out=(*map(str, self._refusals.values()), *self._late()),
                notes=tuple(self._notes),
            )
        finally:
            for actor in self._actors.values():
                self._crew.stop(actor.handle)

    def _hire(self) -> None:
        """Start an actor on each node that has none."""
        self._looked_s = self._clock()
        nodes = self._crew.nodes()
        if not nodes and not self._crew.grows:
            raise EngineError(
                "the Ray cluster that was started for this job has ended",
                f"run the same command: finished parts are kept in {self._kept.folder}",
            )
        for node in nodes:
            if node.id not in self._actors and node.id not in self._refusals:
                actor = _Actor(node, self._crew.start(node, self._task))
                self._actors[node.id] = actor
                self._call(actor, "prepare", node.cpus)

    def _hand_out(self) -> bool:
        """Give parts to actors that have less than they can work on; whether parts are left to give."""
        for load in range(AT_ONCE):
            for actor in self._actors.values():
                if not actor.ready or len(actor.parts) != load:
                    continue
                part = self._part_for(actor)
                if part is not None:  # another actor may be given what this one has lost
                    actor.parts.append(part)
                    self._call(actor, "answer", part.number, packed_rows(part.rows), part=part)
        return not self._all_read

    def _part_for(self, actor: _Actor) -> Part | None:
        """What the actor does next. A part that has ended another one is alone, so that it is blamed and no other."""
        if any(part.number in self._ended for part in actor.parts):
            return None
        lost = self._lost_part(actor)
        if lost is None:
            return self._next_part()
        if actor.parts:
            return None  # until it has nothing else to do
        self._again.remove(lost)
        return lost

    def _next_part(self) -> Part | None:
        part = None if self._all_read else next(self._parts, None)
        self._all_read = part is None
        return part

    def _lost_part(self, actor: _Actor) -> Part | None:
        """A part that ended an actor; on another node than that one, if there is one."""
        for part in self._again:
            ended = self._ended[part.number]
            if actor.node.id not in ended or self._ready <= set(ended):
                return part
        return None

    def _call(self, actor: _Actor, step: Step, *arguments: Any, part: Part | None = None) -> None:
        self._calls[self._crew.call(actor.handle, step, *arguments)] = _Call(actor, step, part)
        if step != "beat":
            actor.looks = 0

    def _hear(self) -> None:
        """Wait for an answer for a moment, and act on it."""
        for ended in self._crew.wait(list(self._calls), 1.0):
            call = self._calls.pop(ended, None)
            if call is None:  # another answer told already that its actor is gone
                continue
            try:
                told = self._crew.result(ended)
            except ActorLost as error:
                self._lose(call.actor, str(error))
                continue
            if call.step == "answer":
                self._answered(call, answer(Answered, told, f"node {call.actor.node.name}"))
            elif call.step == "beat":
                self._moved(call.actor, answer(int, told, f"node {call.actor.node.name}"))
            else:
                self._advance(call, told)

    def _answered(self, call: _Call, said: Answered) -> None:
        assert call.part is not None
        call.actor.parts.remove(call.part)
        call.actor.rows += said.rows
        call.actor.looks = 0
        self.done = self.done.plus(Counts(said.rows, said.failed, said.cut))
        self._kept.check_failed(self.done.failed, self._max_failed, said.example)
        self._tell()

    def _moved(self, actor: _Actor, calls_ended: int) -> None:
        if calls_ended != actor.calls_ended:
            actor.calls_ended, actor.looks = calls_ended, 0

    def _check_moving(self) -> None:
        """Ask each actor how far its engine is, and give up one that hangs or does not even answer that."""
        self._asked_s = self._clock()
        asked = {call.actor for call in self._calls.values() if call.step == "beat"}
        # To be prepared may mean to wait for CPUs.
        steps = {call.actor: call.step for call in self._calls.values() if call.step not in ("beat", "prepare")}
        for actor, step in steps.items():
            actor.looks += 1
            limit_s = HANG_S + (self._retune_s if step == "retune" else 0.0)
            if actor.looks * LOOK_S > limit_s:
                hung = f"its engine hung: it ended no call for {limit_s:g} s"
                self._lose(actor, hung if step == "answer" else f"it did not {step} the artifact within {limit_s:g} s")
            elif step == "answer" and actor not in asked:
                self._call(actor, "beat")

    def _advance(self, call: _Call, told: str) -> None:
        """An actor's step before its first part has ended."""
        actor, place = call.actor, f"node {call.actor.node.name}"
        try:
            if call.step == "prepare":
                self._plan(actor, answer(Prepared, told, place))
            elif call.step == "retune":
                self._tuned(actor, told, place)
            else:
                for note in answer(tuple[str, ...], told, place):
                    self._note(f"{place}: {note}")
                actor.ready = True
                self._ready.add(actor.node.id)
                self._tell()
        except CorewiseError as refusal:
            self._refuse(actor, refusal)

    def _plan(self, actor: _Actor, prepared: Prepared) -> None:
        """Open the actor's own plan, or that of its kind of machine, which the first one of a kind searches for."""
        actor.prepared = prepared
        if prepared.source != "untuned" or not self._retune_s:
            self._open(actor, prepared.plan, prepared.source)
        elif prepared.machine in self._plans:
            self._open(actor, *self._plans[prepared.machine])
        elif prepared.machine not in self._tuning:
            self._tuning[prepared.machine] = actor
            self._call(actor, "retune", self._retune_s)

    def _tuned(self, actor: _Actor, told: str, place: str) -> None:
        """All actors on that kind of machine can start."""
        assert actor.prepared is not None
        machine = actor.prepared.machine
        try:
            entry = answer(Tuned, told, place)
        except CorewiseError as error:
            self._note(f"no plan was found: {error}")
            self._settle(machine, actor.prepared.plan, "untuned")
        else:
            self._note(self._on_tuned(entry))
            plan = bulk_plan(entry.plan, entry.elastic, entry.goal, entry.measurements)
            self._settle(machine, plan, "tuned now")

    def _settle(self, machine: Machine, plan: Plan, source: PlanSource) -> None:
        self._tuning.pop(machine, None)
        self._plans[machine] = plan, source
        for actor in self._actors.values():
            if actor.prepared is not None and actor.prepared.machine == machine and actor.plan is None:
                self._open(actor, plan, source)

    def _open(self, actor: _Actor, plan: Plan, source: PlanSource) -> None:
        actor.plan, actor.source = plan, source
        self._call(actor, "open", packed(plan))

    def _refuse(self, actor: _Actor, refusal: CorewiseError) -> None:
        """Leave the node out. If no other one is left, its reason ends the job."""
        self._refusals[actor.node.id] = refusal
        self._remove(actor)
        self._crew.stop(actor.handle)
        if not self._actors and all(node.id in self._refusals for node in self._crew.nodes()):
            raise next(iter(self._refusals.values()))

    def _lose(self, actor: _Actor, why: str) -> None:
        """Have an actor's parts done again, and look for its node at once: it may be there and need another one."""
        self._lost += 1
        self._note(f"node {actor.node.name} lost a process: {why}")
        self._losses[actor.node.id] = 0 if actor.ready else self._losses[actor.node.id] + 1
        self._remove(actor)
        self._crew.stop(actor.handle)
        self._keep_share(actor, lost=True)
        if actor.prepared is not None and self._tuning.get(actor.prepared.machine) is actor:
            # The search may be what ended it: the others of its kind do not wait for a second one.
            self._settle(actor.prepared.machine, actor.prepared.plan, "untuned")
        for part in actor.parts:
            self._ended[part.number].append(actor.node.id)
            if len(self._ended[part.number]) >= MOST_LOSSES:
                raise EngineError(
                    f"{part.label} ended {MOST_LOSSES} processes, the last one on node {actor.node.name}: {why}",
                    f"check these rows; finished parts are kept in {self._kept.folder}",
                )
            self._again.append(part)
        if self._losses[actor.node.id] >= MOST_LOSSES:
            self._refuse(actor, EngineError(f"node {actor.node.name}: its processes end while they start: {why}"))
        self._looked_s = -inf
        self._tell()

    def _remove(self, actor: _Actor) -> None:
        self._actors.pop(actor.node.id, None)
        self._ready.discard(actor.node.id)
        self._calls = {ref: call for ref, call in self._calls.items() if call.actor is not actor}

    def _check_started(self) -> None:
        """Raise if the cluster gives nothing to compute on."""
        if any(actor.prepared for actor in self._actors.values()):
            self._began_s = self._clock()
        elif self._clock() - self._began_s > START_S:
            wanted = ", ".join(f"{actor.node.cpus} on {actor.node.name}" for actor in self._actors.values())
            raise EngineError(
                f"Ray started no process within {START_S:g} s, which needs these CPUs to be free: {wanted or 'any'}",
                "see what has them with 'ray status', or add a node",
            )

    def _late(self) -> Iterator[str]:
        """The nodes that did nothing because they were not ready before the job ended."""
        at_work = {share.node for share in self._shares}
        for actor in self._actors.values():
            if not actor.ready and actor.node.name not in at_work:
                yield (
                    f"node {actor.node.name}: it was not ready before the job ended; it takes "
                    f"{actor.node.cpus} free CPUs"
                )

    def _keep_share(self, actor: _Actor, *, lost: bool) -> None:
        share = actor.share(lost=lost)
        if share is not None:
            self._shares.append(share)

    def _note(self, note: str) -> None:
        if note and note not in self._notes:
            self._notes.append(note)

    def _tell(self) -> None:
        self._on_progress(
            BulkProgress(
                rows=self.done.rows,
                total=None if self._total is None else max(self._total, self.done.rows),
                failed=self.done.failed,
                actors=len(self._ready),
                lost=self._lost,
            )
        )
