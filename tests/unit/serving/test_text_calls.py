"""Long requests of texts take turns with short ones: few calls in the queue, each small, given up when they must be."""

import asyncio
import time
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

from corewise.batching import Answer, NotServed
from corewise.pipeline import Tokens
from corewise.records.build import Plan
from corewise.serving import text_calls, texts
from corewise.serving.deliveries import Deliveries
from corewise.serving.front import SMALL_BYTES
from corewise.serving.memory_limit import COPIES
from corewise.serving.protocol import ProtocolError
from corewise.serving.text import TextInput
from corewise.serving.text_calls import CALL_TOKENS, TextCalls
from corewise.serving.texts import TextRequest

INSTANCES, ROWS = 2, 16


class Front:
    """Runs work at once."""

    def __init__(self):
        self.deliveries = Deliveries()
        self.read_bytes = []

    async def tokenize(self, work, characters, served, deadline_s):
        return work()

    async def read(self, work, size, *, deadline_s):
        self.read_bytes.append(size)
        return work()

    def call(self, models, served, inputs, deadline_s):
        models.due_s.append(deadline_s)
        timeout_s = deadline_s - time.monotonic()
        ran, future = models.submit(served.name, served.version, inputs, timeout_s=timeout_s, priority=0)
        return ran or served, self.deliveries.wait(future)


class Texts:
    """A text's tokens are its characters; a call's answers are the lengths of its texts."""

    pipeline = SimpleNamespace(pads=True, task="vectors")

    def __init__(self):
        self.calls_alone = {}

    def tokens(self, asked, start):
        return [Tokens(np.array([*map(ord, item)], np.int32), np.zeros(len(item), np.int32)) for item in asked.items]

    def inputs(self, tokens, longest):
        return (np.array([[len(each)] for each in tokens]), np.full((len(tokens), longest), 0))

    def answers(self, outputs, items, tokens, activation):
        assert [len(item) for item in items] == [len(each) for each in tokens]
        return outputs[0][:, 0].tolist()


class Queue:
    """The models' side: calls wait until they are ended; some are refused."""

    def __init__(self, refuse=lambda number: None):
        self.refuse, self.waiting, self.shapes, self.most, self.offers = refuse, [], [], 0, 0
        self.cancelled, self.retry_after_s = 0, 0.0
        self.others = {}
        self.due_s = []

    def submit(self, name, version, inputs, *, timeout_s, priority):
        self.offers += 1
        if (reason := self.refuse(self.offers)) is not None:
            raise NotServed(reason, self.retry_after_s)
        future = Future()
        self.waiting.append((future, inputs))
        self.shapes.append(inputs[1].shape)
        self.most = max(self.most, len(self.waiting))
        return self.others.get(self.offers), future

    async def end_all(self):
        while True:
            await asyncio.sleep(0)
            if self.waiting:
                future, inputs = self.waiting.pop(0)
                self.cancelled += future.cancelled()
                if not future.cancelled():
                    answer = Answer(outputs=[inputs[0]], waited_s=1.0, ran_s=0.5, batch_rows=len(inputs[0]))
                    future.set_result(answer)


PLAN = Plan(threads_per_instance=1, instances=INSTANCES, batch=ROWS)


def manifest_of(model):
    return SimpleNamespace(model=model, plan=PLAN, call_costs=None)


def served_of(texts):
    values = SimpleNamespace(check=lambda inputs: None)
    manifest = manifest_of("first")
    return SimpleNamespace(name="m", version="1", plan=PLAN, text=texts, values=values, manifest=manifest)


def run(queue, items, *, ends=True, booked=None, on_tokenized=lambda: None, within_s=60):
    served = served_of(Texts())
    booking = SimpleNamespace(add=([] if booked is None else booked).append)

    async def both():
        work = TextCalls(queue, Front()).run(
            served,
            TextRequest(items=items),
            booking,
            deadline_s=time.monotonic() + within_s,
            on_tokenized=on_tokenized,
        )
        working = asyncio.ensure_future(work)
        if not ends:
            async with asyncio.timeout(60):
                while len(queue.waiting) < INSTANCES + text_calls.AHEAD:
                    await asyncio.sleep(0)
            return await asyncio.wait_for(working, 0.05 if within_s == 60 else 60)
        ending = asyncio.ensure_future(queue.end_all())
        try:
            return await asyncio.wait_for(working, 60)
        finally:
            ending.cancel()

    return asyncio.run(both())


def test_two_thousand_texts_run_in_small_calls_of_which_few_wait():
    random = np.random.default_rng(0)
    items = ["x" * int(length) for length in random.integers(1, 400, 2000)]
    queue = Queue()
    found = run(queue, items)
    assert found.answers == [len(item) for item in items]
    assert found.tokens == sum(map(len, items))
    assert queue.most <= INSTANCES + text_calls.AHEAD
    assert all(rows <= ROWS and (rows == 1 or rows * length <= CALL_TOKENS) for rows, length in queue.shapes)
    assert (found.calls.waited_s, found.calls.ran_s) == (1.0, 0.5)


@pytest.mark.parametrize("requests", [2, 3, 8])
def test_long_requests_share_the_places_that_one_may_have(requests):
    queue, served = Queue(), served_of(Texts())

    async def all_of_them():
        calls = TextCalls(queue, Front())
        asked = TextRequest(items=["x" * 8] * 300)
        booking = SimpleNamespace(add=lambda size: None)
        working = [calls.run(served, asked, booking, deadline_s=time.monotonic() + 60) for _ in range(requests)]
        ending = asyncio.ensure_future(queue.end_all())
        found = await asyncio.wait_for(asyncio.gather(*working), 60)
        ending.cancel()
        assert not calls._long
        return found

    found = asyncio.run(all_of_them())
    assert [each.answers for each in found] == [[8] * 300] * requests
    # The first one does not know yet that others come.
    assert queue.most <= INSTANCES + text_calls.AHEAD + requests


@pytest.mark.parametrize(
    ("task", "outputs", "is_small"),
    [
        ("vectors", np.zeros((4, 4096)), True),
        ("classes", np.zeros((1, 28)), True),
        ("classes", np.zeros((16, 1000)), False),
        ("tokens", np.zeros((1, 12, 9)), True),
        ("tokens", np.zeros((8, 128, 9)), False),
    ],
)
def test_answers_that_take_long_to_read_are_read_beside_the_event_loop(task, outputs, is_small):
    tokens = [Tokens(np.zeros(row.shape[0] if row.ndim == 2 else 8, np.int32), np.zeros(0)) for row in outputs]
    answer = Answer(outputs=[outputs], waited_s=0.0, ran_s=0.0, batch_rows=len(outputs))
    size = text_calls.read_bytes(SimpleNamespace(pipeline=SimpleNamespace(task=task)), tokens, answer)
    assert (size <= SMALL_BYTES) == is_small


def test_a_text_that_is_alone_is_looked_up_by_its_length(monkeypatch):
    served = served_of(Texts())
    (call,) = text_calls.split([5], served)
    assert call == ((0,), 8)
    monkeypatch.setattr(text_calls, "fill", lambda *_, **__: pytest.fail("it is known"))
    assert text_calls.split([5], served) == [call]


def test_later_calls_do_not_go_before_requests_that_came_meanwhile():
    queue = Queue()
    run(queue, ["x" * 400] * 200)
    assert queue.due_s == sorted(queue.due_s)
    assert queue.due_s[-1] > queue.due_s[0]


def test_a_short_request_is_one_call():
    queue = Queue()
    assert run(queue, ["abc"]).answers == [3]
    assert queue.shapes == [(1, 8)]


def test_what_finds_no_room_later_asks_again():
    queue = Queue(refuse=lambda number: "queue full" if number in (3, 4, 9) else None)
    items = ["x" * 8] * 300
    assert run(queue, items).answers == [8] * 300


@pytest.mark.parametrize(("number", "reason"), [(1, "queue full"), (1, "too urgent"), (5, "draining")])
def test_what_is_refused_for_good_is_told_and_gives_up_its_places(number, reason):
    queue = Queue(refuse=lambda offer: reason if offer == number else None)
    with pytest.raises(NotServed) as caught:
        run(queue, ["x" * 8] * 300)
    assert caught.value.reason == reason


def test_a_client_that_goes_gives_up_its_places():
    queue = Queue()
    with pytest.raises(TimeoutError):
        run(queue, ["x" * 8] * 300, ends=False)
    assert len(queue.waiting) == INSTANCES + text_calls.AHEAD
    assert all(future.cancelled() for future, _ in queue.waiting)


@pytest.mark.parametrize("manifest", ["first", "second"])
def test_no_answers_are_of_two_models(manifest):
    queue = Queue()
    queue.others[3] = SimpleNamespace(manifest=manifest_of(manifest))
    if manifest == "first":
        assert run(queue, ["x" * 8] * 300).answers == [8] * 300
        return
    with pytest.raises(ProtocolError, match="was replaced meanwhile"):
        run(queue, ["x" * 8] * 300)


def test_tokens_are_booked_and_the_place_is_given_up_before_the_first_call():
    queue, booked, offers = Queue(), [], []
    run(queue, ["x" * 80] * 300, booked=booked, on_tokenized=lambda: offers.append(queue.offers))
    assert offers == [0]
    assert COPIES * sum(booked[:2]) > 300 * 80 * 8  # two pieces, before what the calls answer


def test_a_pause_ends_with_the_deadline():
    queue = Queue(refuse=lambda number: None if number == 1 else "too urgent" if number > 2 else "overloaded")
    queue.retry_after_s = 30.0
    with pytest.raises(NotServed, match="time"):
        run(queue, ["x" * 8] * 300, within_s=0.1)


def test_a_long_request_waits_for_its_calls_no_longer_than_it_may_take():
    with pytest.raises(NotServed) as caught:
        run(Queue(), ["x" * 8] * 300, ends=False, within_s=0.1)
    assert caught.value.reason == "expired"


def test_texts_in_place_of_tensors_are_tokenized_in_pieces_too():
    pieces = []

    class Encoder:
        def problem(self, item):
            return ""

        def no_answer(self, tokens):
            return ""

        def encode(self, items, *, prompt, truncate, first):
            pieces.append(sum(map(len, items)))
            return [Tokens(np.zeros(50, np.int32), np.zeros(50, np.int32), [(0, 1)] * 50, [0] * 50) for _ in items]

        def collate(self, rows, tokens):
            assert not any(each.offsets for each in rows)  # which nobody needs, and which take much
            return (np.zeros((len(rows), tokens)),)

    text = TextInput.__new__(TextInput)
    text.pipeline = SimpleNamespace(pairs=False, noun="text", max_length=512, pads=True, fixed_length=None)
    text.encoder, text._most_characters = Encoder(), 32 * 512
    (made,) = text.arrays([np.array([b"x" * 16_000] * 100, object)])
    assert made.shape == (100, 56)
    assert sum(pieces) == 1_600_000
    assert max(pieces) < 2 * texts.PIECE_CHARACTERS


def test_pieces_are_bounded_and_whole():
    asked = TextRequest(items=["a" * 10_000] * 20 + ["b"] * 1000, prompt="p", truncate="left")
    found = list(texts.pieces(asked))
    assert [item for piece in found for item in piece.asked.items] == asked.items
    assert [piece.start for piece in found] == np.cumsum([0, *(len(piece.asked) for piece in found)])[:-1].tolist()
    assert all(len(piece.asked) <= texts.PIECE_TEXTS and piece.characters < 80_000 for piece in found)
    assert all((piece.asked.prompt, piece.asked.truncate) == ("p", "left") for piece in found)
    ids = TextRequest(ids=[[1], [2, 3]])
    (piece,) = texts.pieces(ids)
    assert (piece.asked, piece.characters) == (ids, 0)
