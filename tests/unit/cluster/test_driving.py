"""cluster.driving: parts to actors that die, refuse and need plans, with a crew in this process."""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corewise.cluster.crew import ActorLost, Node, RayCrew
from corewise.cluster.driving import MOST_LOSSES, Driver, parts_of_rows
from corewise.cluster.messages import Answered, Prepared, answer, answering, refusal, unpacked, unpacked_rows
from corewise.common.errors import ArtifactError, EngineError, SamplesError
from corewise.pipeline.parts import Counts, Parts, Record
from corewise.records.build import Plan
from corewise.records.bulk import BulkProgress, PlanSource
from corewise.records.tuned import Machine, Tuned

OLD, NEW = (Machine(model=name, isa=(), usable_cores=2, hardware_threads=2, quota_cores=None) for name in "ab")
MADE, FOUND = Plan(threads_per_instance=2), Plan(threads_per_instance=1, instances=2, batch=8)


class FakeActor:
    """Keeps what it was given instead of answering it; row 13 has no answer."""

    def __init__(self, machine: Machine, written: Counter[int], refusal: str = "") -> None:
        self.machine, self.written, self.refusal = machine, written, refusal

    @answering
    def prepare(self, cores: int) -> Prepared:
        if self.refusal:
            raise ArtifactError(self.refusal, "make it again")
        source: PlanSource = "made here" if self.machine == OLD else "untuned"
        return Prepared(pid=1, machine=self.machine, plan=MADE, source=source)

    @answering
    def retune(self, budget_s: float) -> Tuned:
        return Tuned(machine=self.machine, created="2026-01-01", goal="throughput", plan=FOUND, measurements=())

    @answering
    def open(self, plan: str) -> tuple[str, ...]:
        return (f"opened {unpacked(Plan, plan).label}",)

    @answering
    def answer(self, number: int, rows: str) -> Answered:
        got = unpacked_rows(rows)
        self.written.update(record.row for record in got)
        failed = sum(record.row == 13 for record in got)
        cut = sum(record.row == 12 for record in got)
        return Answered(rows=len(got), failed=failed, example="line 14 is empty" if failed else "", cut=cut)

    @answering
    def beat(self) -> int:
        return 0


class FakeCrew:
    """Actors that answer when they are waited for, the first call first; ``fates`` says which calls they die of."""

    grows = True

    def __init__(self, machines: Sequence[Machine], fates: Sequence[bool] = (), refusals: dict[int, str] | None = None):
        self.living = [Node(str(k), f"node{k}", 2) for k in range(len(machines))]
        self.machines, self.refusals = machines, refusals or {}
        self.fates = deque(fates)
        self.written: Counter[int] = Counter()
        self.steps: Counter[str] = Counter()
        self.waiting: list[tuple[int, FakeActor, str, tuple[Any, ...]]] = []
        self.stopped: list[FakeActor] = []
        self.most_waiting = 0

    def nodes(self) -> list[Node]:
        return self.living

    def start(self, node: Node, task: str) -> FakeActor:
        return FakeActor(self.machines[int(node.id)], self.written, self.refusals.get(int(node.id), ""))

    def call(self, actor: FakeActor, method: str, *arguments: Any) -> int:
        self.steps[method] += 1
        number = sum(self.steps.values())
        self.waiting.append((number, actor, method, arguments))
        self.most_waiting = max(self.most_waiting, len(self.waiting))
        return number

    def wait(self, calls: Sequence[int], timeout_s: float) -> list[int]:
        return [number for number, *_ in self.waiting if number in calls][:1]

    def result(self, call: int) -> str:
        (found,) = (one for one in self.waiting if one[0] == call)
        self.waiting.remove(found)
        _, actor, method, arguments = found
        dies = bool(self.fates and self.fates.popleft()) or actor in self.stopped
        if not dies or call % 2:  # every second one that dies has written its part before
            told = str(getattr(actor, method)(*arguments))
        if dies:
            raise ActorLost("killed")
        return told

    def stop(self, actor: FakeActor) -> None:
        self.stopped.append(actor)


def rows(count: int) -> Iterator[Record]:
    return (Record(row, "texts.txt", f"line {row + 1}", f"w{row}", "") for row in range(count))


def driver_of(crew: FakeCrew, count: int = 45, *, finished: Sequence[int] = (), **changes: Any) -> Driver:
    kept = Parts(folder=Path("out"), suffix=".parquet", several=False, mark="_")
    done = {number: Counts(10, 0) for number in finished}
    options: dict[str, Any] = {
        "done": Counts(10 * len(done), 0),
        "total": count,
        "max_failed": None,
        "retune_s": 30.0,
        "on_tuned": lambda entry: "",
        "on_progress": lambda progress: None,
    }
    return Driver(crew, "{}", kept, parts_of_rows(rows(count), 10, done), **{**options, **changes})


def test_every_row_is_answered_once_and_what_is_done_is_not_done_again() -> None:
    crew, told = FakeCrew([OLD, OLD]), list[BulkProgress]()
    driver = driver_of(crew, finished=[2, 3], on_progress=told.append)
    driven = driver.run()
    assert crew.written == Counter(row for row in range(45) if row // 10 not in (2, 3))
    assert driver.done == Counts(45, 1, 1)
    assert (told[0].rows, told[-1].rows, told[-1].failed, told[-1].actors) == (20, 45, 1, 2)
    assert {(share.plan, share.source, share.lost) for share in driven.shares} == {(MADE, "made here", False)}
    assert sum(share.rows for share in driven.shares) == 25
    assert len(crew.stopped) == 2
    assert crew.most_waiting <= 4  # two for each actor, whatever the inputs' size


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 60), st.integers(1, 3))
def test_no_row_is_missing_or_counted_twice_whoever_dies(fates: list[bool], count: int, actors: int) -> None:
    crew = FakeCrew([OLD] * actors, fates)
    driver = driver_of(crew, count)
    try:
        driver.run()
    except EngineError:
        assert sum(fates) >= MOST_LOSSES
        return
    assert set(crew.written) == set(range(count))
    assert driver.done == Counts(count, int(count > 13), int(count > 12))


def test_a_lost_actor_is_replaced_and_told_of() -> None:
    # Two prepare, two open, and the first part that is answered takes its actor with it.
    crew, told = FakeCrew([OLD, OLD], [False] * 4 + [True]), list[BulkProgress]()
    driven = driver_of(crew, on_progress=told.append).run()
    assert set(crew.written) == set(range(45))
    assert crew.steps["prepare"] == 3
    assert told[-1].lost == 1
    assert [share.lost for share in driven.shares] == [True, False, False]


def test_a_part_that_one_node_has_lost_is_given_to_another_that_comes_later() -> None:
    class Together(FakeCrew):
        """The second node alone until its actor has died, then the first one's dies; all that follows ends at once."""

        def wait(self, calls: Sequence[int], timeout_s: float) -> list[int]:
            assert sum(self.steps.values()) < 100, "a part is given to nobody"
            self.steps["wait"] += 1
            one = alone.popleft() if alone else None
            found = [number for number, actor, *_ in self.waiting if number in calls and one in (None, actor.machine)]
            return found[:1] if one else found

    alone = deque([NEW, NEW, NEW, OLD])
    crew = Together([OLD, NEW], [False, False, True, True])
    driver = driver_of(crew, 10, retune_s=0.0)
    driver.run()
    assert driver.done == Counts(10, 0)


def test_one_actor_searches_the_plan_of_its_kind_and_the_others_run_it() -> None:
    kept: list[Tuned] = []
    crew = FakeCrew([NEW, OLD, NEW, NEW])
    driven = driver_of(crew, 200, on_tuned=lambda entry: kept.append(entry) or "kept").run()
    assert crew.steps["retune"] == 1
    assert [entry.machine for entry in kept] == [NEW]
    shares = {share.node: (share.plan, share.source) for share in driven.shares}
    assert shares["node1"] == (MADE, "made here")
    assert {shares[f"node{k}"] for k in (0, 2, 3)} == {(FOUND, "tuned now")}
    assert "kept" in driven.notes


def test_without_a_search_each_runs_the_plan_that_it_has() -> None:
    crew = FakeCrew([NEW])
    assert driver_of(crew, retune_s=0.0).run().shares[0].source == "untuned"
    assert crew.steps["retune"] == 0


def test_who_searches_and_dies_holds_up_nobody() -> None:
    crew = FakeCrew([NEW, NEW], [False, False, True])
    driven = driver_of(crew).run()
    assert set(crew.written) == set(range(45))
    assert crew.steps["retune"] == 1
    assert all(share.plan == MADE for share in driven.shares)


def test_a_node_that_cannot_run_the_job_is_left_out_by_name() -> None:
    crew = FakeCrew([OLD, OLD], refusals={0: "there is no artifact"})
    driven = driver_of(crew).run()
    assert driven.left_out == ("node node0: there is no artifact; make it again",)
    assert {share.node for share in driven.shares} == {"node1"}
    with pytest.raises(ArtifactError, match="node node0: there is no artifact; make it again"):
        driver_of(FakeCrew([OLD], refusals={0: "there is no artifact"})).run()


def test_a_node_that_is_not_ready_before_the_job_ends_is_named() -> None:
    class Late(FakeCrew):
        def wait(self, calls: Sequence[int], timeout_s: float) -> list[int]:
            return [number for number, actor, *_ in self.waiting if number in calls and actor.machine == OLD][:1]

    driven = driver_of(Late([OLD, NEW])).run()
    assert driven.left_out == ("node node1: it was not ready before the job ended; it takes 2 free CPUs",)
    assert [share.node for share in driven.shares] == ["node0"]


def test_a_node_without_corewise_is_left_out_by_name() -> None:
    class Bare(FakeCrew):
        def result(self, call: int) -> str:
            (actor,) = (actor for number, actor, *_ in self.waiting if number == call)
            told = super().result(call)
            if actor.machine == NEW:
                return refusal(EngineError("corewise is not installed there", "install corewise on every node"))
            return told

    driven = driver_of(Bare([OLD, NEW])).run()
    assert driven.left_out == ("node node1: corewise is not installed there; install corewise on every node",)
    assert {share.node for share in driven.shares} == {"node0"}
    with pytest.raises(EngineError, match="node node0: corewise is not installed there"):
        driver_of(Bare([NEW])).run()


@pytest.mark.parametrize(
    ("cause", "what"),
    [
        (
            ModuleNotFoundError("No module named 'corewise'"),
            r"corewise is not installed there; install corewise \S+ on every node$",
        ),
        (RuntimeError("oops\nno AMX"), "an actor failed: RuntimeError: no AMX; see the logs of Ray's workers there"),
    ],
)
def test_what_an_actor_did_not_expect_is_told_with_its_node(
    cause: Exception, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")

    def get(call: object) -> str:
        raise ray.exceptions.RayTaskError("answer", "", cause)

    monkeypatch.setattr(ray, "get", get)
    told = RayCrew(None).result(object())
    with pytest.raises(EngineError, match=f"^node a: {what}"):
        answer(Answered, told, "node a")


@pytest.mark.parametrize("step", ["retune", "open"])
def test_an_actor_that_fails_before_its_first_part_ends_no_job(step: str) -> None:
    class Failing(FakeCrew):
        def result(self, call: int) -> str:
            (found,) = (one for one in self.waiting if one[0] == call)
            told = super().result(call)
            fails = found[2] == step and found[1].machine == NEW
            return refusal(EngineError("an actor failed: RuntimeError: no AMX")) if fails else told

    driven = driver_of(crew := Failing([OLD, NEW])).run()
    assert set(crew.written) == set(range(45))
    if step == "retune":
        assert "no plan was found: node node1: an actor failed: RuntimeError: no AMX" in driven.notes
        assert {share.node: share.source for share in driven.shares} == {"node0": "made here", "node1": "untuned"}
    else:
        assert driven.left_out == ("node node1: an actor failed: RuntimeError: no AMX",)


def test_a_cluster_that_is_gone_is_one_line() -> None:
    ray = pytest.importorskip("ray")
    assert not ray.is_initialized()
    with pytest.raises(EngineError, match=r"the Ray cluster does not answer any more: .*; see 'ray status', and run"):
        RayCrew(None).nodes()


def test_a_part_that_ends_every_process_ends_the_job() -> None:
    with pytest.raises(EngineError, match=r"rows 0 to 9 ended 3 processes, the last one on node node0: killed"):
        driver_of(FakeCrew([OLD], [False, False, True] * 9), 10).run()


def test_the_part_that_ends_processes_is_named_and_not_the_one_beside_it() -> None:
    class Poisoned(FakeCrew):
        """The actor that gets row 15 dies before it returns anything else."""

        def result(self, call: int) -> str:
            (actor,) = (actor for number, actor, *_ in self.waiting if number == call)
            given = [rest[1] for _, other, method, rest in self.waiting if other is actor and method == "answer"]
            if any(record.row == 15 for packed in given for record in unpacked_rows(packed)):
                self.fates.append(True)
            return super().result(call)

    with pytest.raises(EngineError, match=r"^rows 10 to 19 ended 3 processes, the last one on node node0: killed"):
        driver_of(Poisoned([OLD]), 25).run()


def test_a_driver_that_was_stopped_itself_gives_up_nobody() -> None:
    class Stopped(FakeCrew):
        """An hour passes with Ctrl-Z, or while an input is read."""

        def wait(self, calls: Sequence[int], timeout_s: float) -> list[int]:
            if self.steps["answer"] == 1 and self.steps["beat"] < 2:
                now_s[0] += 3600.0
                return [number for number, _, method, _ in self.waiting if number in calls and method == "beat"]
            return super().wait(calls, timeout_s)

    now_s, told = [0.0], list[BulkProgress]()
    crew = Stopped([OLD])
    driver_of(crew, 10, clock=lambda: now_s[0], on_progress=told.append).run()
    assert (crew.steps["prepare"], told[-1].lost) == (1, 0)


def test_an_actor_that_hangs_is_ended_and_its_parts_are_done_elsewhere() -> None:
    class Hanging(FakeCrew):
        """The first node answers no part, but says that it is alive; the second one has other parts to do."""

        def wait(self, calls: Sequence[int], timeout_s: float) -> list[int]:
            hung = [entry for entry in self.waiting if entry[1] is self.first and entry[2] == "answer"]
            self.waiting = [entry for entry in self.waiting if entry not in hung]
            ended = super().wait(calls, timeout_s) if self.waiting else []
            self.waiting += hung
            return ended

        def start(self, node: Node, task: str) -> FakeActor:
            made = super().start(node, task)
            self.first = getattr(self, "first", made)
            return made

    now = iter(range(0, 10**6, 3))
    crew = Hanging([OLD, OLD])
    driven = driver_of(crew, clock=lambda: float(next(now))).run()
    assert set(crew.written) == set(range(45))
    assert driven.notes[-1] == "node node0 lost a process: its engine hung: it ended no call for 300 s"
    assert {share.node: share.rows for share in driven.shares if not share.rows} == {"node0": 0}


def test_too_many_failed_rows_end_the_job() -> None:
    with pytest.raises(
        SamplesError, match=r"1 row cannot be answered, such as line 14 is empty, and --max-failed is 0"
    ):
        driver_of(FakeCrew([OLD]), max_failed=0).run()


def test_a_cluster_that_starts_nothing_is_not_waited_for_without_end() -> None:
    class Busy(FakeCrew):
        def wait(self, calls: Sequence[int], timeout_s: float) -> list[int]:
            return []

    now = iter(range(0, 10**6, 50))
    with pytest.raises(EngineError, match=r"Ray started no process within 120 s, .*: 2 on node0; see what has them"):
        driver_of(Busy([OLD]), clock=lambda: float(next(now))).run()


def test_a_cluster_whose_nodes_are_refused_or_gone_is_not_waited_for_without_end() -> None:
    class Leaving(FakeCrew):
        def result(self, call: int) -> str:
            if not self.steps["answer"]:
                return super().result(call)
            self.living = []
            raise ActorLost("its node is gone")

    now = iter(range(0, 10**6, 50))
    with pytest.raises(EngineError, match=r"Ray started no process within 120 s, .*: any"):
        driver_of(Leaving([OLD, OLD], refusals={1: "no AVX2"}), clock=lambda: float(next(now))).run()


def test_a_cluster_of_our_own_that_ends_is_not_waited_for() -> None:
    class Ending(FakeCrew):
        grows = False

        def result(self, call: int) -> str:
            self.living = []
            raise ActorLost("its node is gone")

    with pytest.raises(EngineError, match="the Ray cluster that was started for this job has ended; run the same comm"):
        driver_of(Ending([OLD])).run()


def test_parts_are_rows_by_number() -> None:
    assert [(part.number, part.label) for part in parts_of_rows(rows(25), 10, {1: Counts(10, 0)})] == [
        (0, "rows 0 to 9"),
        (2, "rows 20 to 24"),
    ]
