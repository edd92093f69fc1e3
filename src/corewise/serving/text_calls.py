"""Requests of many texts as many calls: tokenized in pieces, sorted by length, and never more than a few in the queue.

A long request must not hold up short ones. So its calls are small, they enter the queue only as earlier ones end, and
calls of other requests that are due before them go first. Several long requests share the places that one may have.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from corewise.artifact.texts import call_cost
from corewise.batching import Answer, NotServed
from corewise.pipeline import Call, CallLimits, Tokens, fill
from corewise.records.pipeline import Activation
from corewise.serving.budget import Booking
from corewise.serving.front import Front
from corewise.serving.memory_limit import COPIES
from corewise.serving.models import Models
from corewise.serving.pool import AT_ONCE
from corewise.serving.protocol import ProtocolError
from corewise.serving.served import Served
from corewise.serving.text import BUCKET, TextInput
from corewise.serving.texts import TextRequest, pieces

CALL_TOKENS = 1024
"""Rows times padded tokens of one call: about 100 ms of MiniLM on one thread, of which a call's overhead is 2 %."""
AHEAD = 1
"""Calls of long requests that wait while their others run on all instances."""
PAUSE_S = 0.02
"""How long a request waits at least before it asks again for a place in the queue."""
TEXT_BYTES, TOKEN_BYTES, WORD_BYTES = 512, 8, 160
"""What each tokenized text takes in memory, each of its tokens, and each token's place in the text."""
SORTED_BYTES = 64
"""What sorting one text into calls costs, as bytes of JSON."""
CLASS_BYTES, SPAN_BYTES = 8, 256
"""What a class's probability costs to read from an output, and a token's label, as bytes of JSON."""


@dataclass(frozen=True, kw_only=True)
class TextAnswer:
    """The answers to a request's texts, in their order."""

    answers: Sequence[Any]
    """As ``pipeline.decode`` gives them."""
    tokens: int
    """How many the model read, special ones included, without padding."""
    calls: Answer
    """The only call; of several, without outputs, the longest wait and run, and the most rows of one."""


class TextCalls:
    """Answers requests of texts. Used from the server's event loop."""

    def __init__(self, models: Models, front: Front) -> None:
        self._models, self._front = models, front
        self._long: Counter[tuple[str, str]] = Counter()
        """Requests of several calls that are on their way, by the name and version of their model."""

    async def run(
        self,
        served: Served,
        asked: TextRequest,
        booking: Booking,
        *,
        deadline_s: float,
        activation: Activation | None = None,
        on_tokenized: Callable[[], None] = lambda: None,
    ) -> TextAnswer:
        """The answers by a deadline on the monotonic clock; ``activation`` in place of the pipeline's own.

        Tokens and outputs are booked as they come. ``on_tokenized`` is called when the texts are ready for the model.

        Raises ``ProtocolError`` for a text that is wrong, and ``NotServed`` if it would come too late.
        """
        texts = served.text
        assert texts is not None
        tokens: list[Tokens] = []
        for piece in pieces(asked):
            work = partial(texts.tokens, piece.asked, piece.start)
            found = await self._front.tokenize(work, piece.characters, served, deadline_s)
            booking.add(held_bytes(found) // COPIES)
            tokens += found
        on_tokenized()
        lengths = [len(each) for each in tokens]
        size = SORTED_BYTES * len(lengths)
        calls = await self._front.read(lambda: split(lengths, served), size, deadline_s=deadline_s)
        answers: list[Any] = [None] * len(tokens)
        ended: list[Answer] = []

        async def take(call: Call, answer: Answer) -> None:
            chosen = [tokens[place] for place in call.places]
            items = [asked.items[place] for place in call.places] if asked.items else [""] * len(chosen)
            read = partial(texts.answers, answer.outputs, items, chosen, activation)
            found = await self._front.read(read, read_bytes(texts, chosen, answer), deadline_s=AT_ONCE)
            for place, each in zip(call.places, found, strict=True):
                answers[place] = each
            ended.append(answer if len(calls) == 1 else replace(answer, outputs=[]))
            booking.add(sum(output.nbytes for output in answer.outputs))

        if len(calls) == 1:
            (call,) = calls
            inputs = texts.inputs([tokens[place] for place in call.places], call.tokens)
            await take(call, await self._submit(served, inputs, deadline_s))
        else:
            await self._run(served, texts, tokens, calls, take, deadline_s)
        return TextAnswer(answers=answers, tokens=sum(lengths), calls=_longest(ended))

    async def _run(
        self,
        served: Served,
        texts: TextInput,
        tokens: Sequence[Tokens],
        calls: Sequence[Call],
        take: Callable[[Call, Answer], Awaitable[None]],
        deadline_s: float,
    ) -> None:
        """Run all calls, a few at a time; give up the places of those that wait if one fails, or the client goes.

        Each call waits as a request that came now would. With the deadline of the whole, all of its calls would go
        before short requests that came later.
        """
        patience_s = deadline_s - time.monotonic()
        waiting, running = deque(calls), dict[asyncio.Future[Answer], Call]()
        key = served.name, served.version
        self._long[key] += 1
        try:
            while waiting or running:
                if (now_s := time.monotonic()) > deadline_s:
                    raise NotServed("expired")
                pause_s: float | None = None
                most = -(-(served.plan.instances + AHEAD) // self._long[key])
                while waiting and len(running) < most and pause_s is None:
                    call = waiting[0]
                    inputs = texts.inputs([tokens[place] for place in call.places], call.tokens)
                    try:
                        future = self._submit(served, inputs, time.monotonic() + patience_s)
                    except NotServed as refused:
                        # Without an end yet, the whole request is refused; later there will be room, or no time.
                        if len(waiting) == len(calls) or refused.reason not in ("queue full", "overloaded"):
                            raise
                        pause_s = max(PAUSE_S, refused.retry_after_s or 0.0)
                    else:
                        running[future] = waiting.popleft()
                if not running:
                    left_s = deadline_s - time.monotonic()
                    await asyncio.sleep(max(PAUSE_S, min(pause_s or PAUSE_S, left_s)))
                    continue
                # Calls wait longer than the whole may take.
                left_s = max(0.0, deadline_s - now_s)
                ended, _ = await asyncio.wait(running, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                for each in ended:
                    await take(running.pop(each), each.result())
        finally:
            for each in running:
                each.cancel()
            self._long[key] -= 1
            if not self._long[key]:
                del self._long[key]

    def _submit(self, served: Served, inputs: Sequence[Any], deadline_s: float) -> "asyncio.Future[Answer]":
        served.values.check(inputs)
        ran, future = self._front.call(self._models, served, inputs, deadline_s)
        if ran is not served and ran.manifest != served.manifest:  # half of the answers would be another model's
            future.cancel()
            raise ProtocolError(f"the model {served.name} was replaced meanwhile", "send the request again", 503)
        return future


def held_bytes(tokens: Sequence[Tokens]) -> int:
    """About how much memory tokenized texts take: a query is tokenized with each of its documents."""
    return sum(TEXT_BYTES + TOKEN_BYTES * len(each) + WORD_BYTES * len(each.offsets) for each in tokens)


def read_bytes(texts: TextInput, tokens: Sequence[Tokens], answer: Answer) -> int:
    """What it costs to read the answers from a call's outputs, as bytes of JSON; vectors are there as they are."""
    task = texts.pipeline.task
    if task == "vectors":
        return 0
    return SPAN_BYTES * sum(map(len, tokens)) if task == "tokens" else CLASS_BYTES * answer.outputs[0].size


def split(lengths: Sequence[int], served: Served) -> list[Call]:
    """The calls for texts of these lengths, which no other request has to wait for long."""
    plan, text = served.plan, served.text
    if len(lengths) == 1 and text is not None and (known := text.calls_alone.get(lengths[0])) is not None:
        return [known]
    limits = CallLimits.of_few_sizes(plan.batch, tokens=CALL_TOKENS)
    pads = text is None or text.pipeline.pads
    cost = call_cost(served.manifest, plan)
    calls = fill(lengths, limits=limits, cost=cost, instances=plan.instances, multiple=BUCKET, pads=pads)
    if len(lengths) == 1 and text is not None:
        text.calls_alone[lengths[0]] = calls[0]
    return calls


def _longest(calls: Sequence[Answer]) -> Answer:
    if len(calls) == 1:
        return calls[0]
    return Answer(
        outputs=[],
        waited_s=max(each.waited_s for each in calls),
        ran_s=max(each.ran_s for each in calls),
        batch_rows=max(each.batch_rows for each in calls),
    )
