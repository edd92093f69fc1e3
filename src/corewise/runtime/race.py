"""Contenders timed against each other: alternating rounds in one run, each in its own process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from corewise.common.errors import CorewiseError, InputError
from corewise.records.build import Build, Plan
from corewise.records.jsonable import to_json
from corewise.records.measurement import Rates
from corewise.runtime.client import AnyWorker

ROUNDS = 10
ROUND_S = 0.6
WARM_S = 1.5


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A payload and the plan it runs under."""

    build: Build
    plan: Plan
    payload: Path


class ContenderFailed(CorewiseError):
    """A contender failed in the race."""

    def __init__(self, build: Build, reason: str) -> None:
        super().__init__(f"in the alternating run: {reason}")
        self.build = build


@dataclass(frozen=True, kw_only=True)
class Race:
    """The rates of all contenders, and the memory that their processes had together at most."""

    rates: tuple[Rates, ...]
    peak_memory_bytes: int


def race(
    contenders: Sequence[Contender],
    *,
    samples: str,
    start: Callable[[Build], AnyWorker],
    rounds: int = ROUNDS,
    round_s: float = ROUND_S,
    on_round: Callable[[int, int, tuple[Rates, ...]], None] = lambda number, rounds, rates: None,
) -> Race:
    """``start`` a worker for every contender, open them all, then time each in turn, round after round.

    Every second round runs backwards. Alternation makes drift of the machine (clock, neighbours, temperature) fall
    on all alike (Kalibera and Jones 2013, section 5). Raises ``ContenderFailed`` where a contender fails.
    ``on_round`` is called after each round.
    """
    with ExitStack() as stack:
        workers: list[AnyWorker] = []
        rates: list[list[float]] = [[] for _ in contenders]
        throttled = [0] * len(contenders)

        def so_far() -> tuple[Rates, ...]:
            return tuple(
                Rates(build=one.build, plan=one.plan, per_s=tuple(per_s), throttled=stopped)
                for one, per_s, stopped in zip(contenders, rates, throttled, strict=True)
            )

        for one in contenders:
            with _falling(one):
                worker = stack.enter_context(start(one.build))
                build, plan = to_json(one.build), to_json(one.plan)
                worker.call("open", "opening", folder=str(one.payload), build=build, plan=plan)
                worker.call("enter_race", "warming up", samples=samples, batch=one.plan.batch, budget_s=WARM_S)
            workers.append(worker)
        for number in range(rounds):
            order = list(range(len(workers)))
            for i in reversed(order) if number % 2 else order:
                with _falling(contenders[i]):
                    answer = workers[i].call("round", "racing", budget_s=round_s)
                    rates[i].append(answer["per_s"])
                    throttled[i] += answer["throttled"]
            on_round(number + 1, rounds, so_far())
        return Race(rates=so_far(), peak_memory_bytes=sum(worker.peak_memory_bytes for worker in workers))


@contextmanager
def _falling(one: Contender) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except CorewiseError as error:
        raise ContenderFailed(one.build, str(error)) from error
