"""Contenders timed against each other: alternating rounds in one run, each in its own process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from corewise.common.errors import CorewiseError, InputError
from corewise.records.build import Build, Plan
from corewise.records.measurement import Rates
from corewise.records.reason import Reason
from corewise.runtime.client import Client, StepFailed

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

    def __init__(self, build: Build, error: CorewiseError) -> None:
        super().__init__(f"{build.label}: {error}")
        self.build = build
        self.reason = error.reason if isinstance(error, StepFailed) else Reason.text(str(error))


@dataclass(frozen=True, kw_only=True)
class Race:
    """The rates of all contenders, and the peak memory of their processes together."""

    rates: tuple[Rates, ...]
    peak_memory_bytes: int


def run_race(
    contenders: Sequence[Contender],
    *,
    samples: Path,
    start: Callable[[Build], Client],
    rounds: int = ROUNDS,
    round_s: float = ROUND_S,
    on_round: Callable[[int, int, tuple[Rates, ...]], None] = lambda number, rounds, rates: None,
) -> Race:
    """``start`` a client for every contender, open them all, then time each in turn, round after round.

    Every second round runs backwards. Alternation spreads the machine's drift (clock, neighbours, temperature) over all
    contenders alike (Kalibera and Jones 2013, section 5). ``on_round`` is called after each round. Raises
    ``ContenderFailed`` if a contender fails.
    """
    with ExitStack() as stack:
        clients: list[Client] = []
        rates: list[list[float]] = [[] for _ in contenders]
        throttled = [0] * len(contenders)

        def so_far() -> tuple[Rates, ...]:
            return tuple(
                Rates(build=contender.build, plan=contender.plan, per_s=tuple(per_s), throttled=count)
                for contender, per_s, count in zip(contenders, rates, throttled, strict=True)
            )

        for contender in contenders:
            with _naming(contender):
                client = stack.enter_context(start(contender.build))
                client.open(contender.payload, contender.build, contender.plan)
                client.warm_up(samples, contender.plan.batch, WARM_S)
            clients.append(client)
        for number in range(rounds):
            order = list(range(len(clients)))
            for i in reversed(order) if number % 2 else order:
                with _naming(contenders[i]):
                    round_rate = clients[i].run_round(round_s)
                rates[i].append(round_rate.per_s)
                throttled[i] += round_rate.throttled
            on_round(number + 1, rounds, so_far())
        return Race(rates=so_far(), peak_memory_bytes=sum(client.peak_memory_bytes for client in clients))


@contextmanager
def _naming(contender: Contender) -> Iterator[None]:
    """Raise failures as the contender's."""
    try:
        yield
    except InputError:
        raise
    except CorewiseError as error:
        raise ContenderFailed(contender.build, error) from error
