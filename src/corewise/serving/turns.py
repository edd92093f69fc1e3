"""The order in which requests have their turn in the event loop, and how many in one round of it.

Parsing a small request, queueing its call and writing its answer are done in the event loop. If all that came were
begun at once, health checks, refusals and answers would wait for all of it. So in each round a few are begun, those
that are due first, and how long the others have to wait is known before they are read.
"""

import asyncio
from bisect import bisect_left, insort
from collections.abc import Callable
from itertools import count
from math import inf
from time import monotonic
from typing import NamedTuple

from corewise.batching import NotServed
from corewise.serving.deliveries import Waiters

PER_ROUND = 8
"""Requests that are begun in one round of the event loop: about two milliseconds."""
FIRST_S = 0.0003
"""What a request takes in the loop, before that was seen."""
NEW_SHARE = 0.1
"""The weight of the newest round against all earlier ones."""
SAFETY = 2.0
"""Expected waits are multiplied by this: rounds vary, and a late refusal is worse for a client than one at once."""


class _Turn(NamedTuple):
    """A request that waits; turns sort by deadline and arrival."""

    deadline_s: float
    arrival: int
    begun: "asyncio.Future[None]"


class Turns:
    """Used from one event loop."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._waiting: list[_Turn] = []
        """Sorted."""
        self._arrivals = count()
        self._expected = self._begun = 0
        """Requests of this round: of which the headers came, and that had their turn."""
        self._round_s = 0.0
        """When this round began."""
        self._each_s = FIRST_S
        """What passes from one turn to the next while requests wait."""
        self._is_scheduled = False

    @property
    def are_taken(self) -> bool:
        """Whether a request that came now would have to wait."""
        return bool(self._waiting) or self._expected >= PER_ROUND

    def wait_s(self, deadline_s: float = inf) -> float:
        """How long a request with that deadline would have to wait, behind those that are due before it."""
        ahead = bisect_left(self._waiting, deadline_s, key=lambda turn: turn.deadline_s) + self._expected
        return ahead * self._each_s

    def late_s(self, deadline_s: float, after_s: float = 0.0) -> float:
        """How much too late a request might be that takes ``after_s`` after its turn; at most 0: not at all."""
        return self._clock() + SAFETY * self.wait_s(deadline_s) + after_s - deadline_s

    def expect(self) -> None:
        """A request has come that will ask for its turn in the next round."""
        self._expected += 1
        self._schedule()

    async def turn(self, deadline_s: float, after_s: float = 0.0, gone: Waiters | None = None) -> None:
        """Wait until it is the turn of a request with that deadline, or its client disconnects (``Front.call``).

        Raises ``NotServed`` if it might be late ``after_s`` after that, and if its deadline has passed meanwhile.
        """
        if not self._waiting and self._begun < PER_ROUND:
            self._begun += 1
            self._schedule()
            return
        if (late_s := self.late_s(deadline_s, after_s)) > 0:
            raise NotServed("overloaded", late_s)
        begun = asyncio.get_running_loop().create_future()
        insort(self._waiting, _Turn(deadline_s, next(self._arrivals), begun))
        self._schedule()
        if gone is not None:
            gone.add(begun)
        try:
            await begun
        finally:
            if gone is not None:
                gone.discard(begun)

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled, self._round_s = True, self._clock()
            asyncio.get_running_loop().call_soon(self._next_round)

    def _next_round(self) -> None:
        """Begin what is due first."""
        self._is_scheduled = False
        now_s = self._clock()
        if self._waiting and self._begun:
            self._each_s += NEW_SHARE * ((now_s - self._round_s) / self._begun - self._each_s)
        self._expected = self._begun = 0
        ended = 0
        for turn in self._waiting:
            if self._begun == PER_ROUND or ended == 4 * PER_ROUND:  # a refusal takes less than a request
                break
            ended += 1
            if turn.begun.done():  # the client is gone
                continue
            if now_s > turn.deadline_s:
                turn.begun.set_exception(NotServed("expired"))
            else:
                turn.begun.set_result(None)
                self._begun += 1
        del self._waiting[:ended]
        if self._waiting or self._begun:
            self._schedule()
