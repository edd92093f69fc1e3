"""What stands before a model in the server: estimates, pools, heads that were seen before, and one wake-up for many."""

import asyncio
import json
import threading
import time
from concurrent.futures import Future
from math import inf
from types import SimpleNamespace

import numpy as np
import pytest

from corewise.batching import Accepted, Answer, LatencyTable, NotServed, Policy, Refused, Request
from corewise.batching.policy import Place, _Plan
from corewise.records.build import TensorSpec
from corewise.serving import json_body, oip, recordings, rpc, triton
from corewise.serving.costs import HALF_S, Costs, Tail
from corewise.serving.deliveries import Deliveries
from corewise.serving.files import Work
from corewise.serving.frames import LONGEST_BYTES, MOST_FRAMES, Frames
from corewise.serving.front import LONG_BYTES, LOOK_EACH, SLACK_S, SMALL_TENSOR_BYTES, TICK_S, Front
from corewise.serving.infer import Infer, target
from corewise.serving.pool import AT_ONCE, Pool
from corewise.serving.protocol import Asked, InferRequest, Limits, ProtocolError
from corewise.serving.refusals import told
from corewise.serving.rpc_frames import RpcFrames
from corewise.serving.statistics import Statistics
from corewise.serving.tallies import Histogram, Tally
from corewise.serving.tokens import Tokens

INPUTS = (
    TensorSpec(name="a", dtype="float32", shape=(None, 2)),
    TensorSpec(name="b", dtype="int64", shape=(None,)),
)
OUTPUTS = (TensorSpec(name="y", dtype="float32", shape=(None, 2)),)


# --- estimates ----------------------------------------------------------------------------------------------------


def test_costs_are_of_their_kind_and_size_and_move():
    costs = Costs()
    assert costs.expected_s("pixels", 1000) == 0
    costs.note("pixels", 1000, 0.1)
    assert costs.expected_s("pixels", 1023) == pytest.approx(0.1)
    assert costs.expected_s("pixels", 4000) == pytest.approx(0.4)
    assert costs.expected_s("pixels", 250) == pytest.approx(0.025)
    assert costs.expected_s("characters", 1000) == 0
    for _ in range(50):
        costs.note("pixels", 1000, 0.2)
    assert costs.expected_s("pixels", 1000) == pytest.approx(0.2, rel=0.01)


def test_a_tail_is_high_among_what_varies_and_forgets_when_it_is_told_nothing():
    tail, random = Tail(), np.random.default_rng(0)
    for k, took_s in enumerate(random.uniform(0, 1, 4000)):
        tail.note(took_s, k * 1e-4)
    assert 0.6 < tail.seconds(0.4) < 1
    assert tail.seconds(0.4 + HALF_S) == pytest.approx(tail.seconds(0.4) / 2)
    assert tail.seconds(0.4 + 20 * HALF_S) < 1e-5


def test_a_queue_tells_how_long_it_takes_and_keeps_a_margin():
    policy = Policy(LatencyTable(points=((1, 10.0), (4, 40.0))), max_batch=4, max_waiting=64)
    assert policy.expected_s(0.0) == 0
    policy.finished(0)
    assert policy.expected_s(0.0) == pytest.approx(0.01)
    assert policy.expected_s(0.0, ahead_rows=8) == pytest.approx(0.09)
    assert isinstance(policy.offer(Request(id=0, deadline_s=1.0), 0.0), Accepted)
    policy.next_batch(0, 0.0)
    assert policy.expected_s(0.0) == pytest.approx(0.02)
    assert isinstance(policy.offer(Request(id=1, deadline_s=0.03), 0.0), Accepted)
    policy.cancel(1)
    policy.margin_s = 0.02
    assert isinstance(policy.offer(Request(id=2, deadline_s=0.03), 0.0), Refused)
    assert isinstance(policy.offer(Request(id=3, deadline_s=0.05), 0.0), Accepted)


def test_requests_that_are_alike_are_played_call_by_call_as_one_by_one():
    random = np.random.default_rng(0)
    for _ in range(200):
        policy = Policy(LatencyTable(points=((1, 10.0), (6, 30.0))), max_batch=6, max_waiting=64)
        instances = int(random.integers(1, 4))
        for k in range(instances):
            policy.finished(k)
        deadlines = np.sort(random.uniform(0.0, 0.4, random.integers(1, 40)))
        places = [
            Place(due_s, 0, k, Request(id=k, deadline_s=due_s), 0.01) for k, due_s in enumerate(deadlines.tolist())
        ]
        plan = _Plan(random.uniform(-0.02, 0.05, instances).tolist(), places, -inf)
        assert policy._play_alike(plan) == policy._play(plan)


# --- pools --------------------------------------------------------------------------------------------------------


class Gate:
    """Work that ends when it may, and notes its name."""

    def __init__(self) -> None:
        self.entered, self.opened, self.done = threading.Event(), threading.Event(), []

    def work(self, name):
        def run():
            self.entered.set()
            self.opened.wait(60)
            self.done.append(name)
            return name

        return run

    async def is_entered(self):
        """Wait until work has begun."""
        assert await asyncio.to_thread(self.entered.wait, 60)


def later(seconds):
    return time.monotonic() + seconds


@pytest.fixture
def pool():
    made = Pool("test", 1)
    yield made
    made.close()


def test_a_pool_does_first_what_is_due_first(pool):
    gate = Gate()

    async def main():
        running = asyncio.ensure_future(pool.run(gate.work("first"), kind="k", size=1))
        await gate.is_entered()
        others = [
            asyncio.ensure_future(pool.run(gate.work(name), kind="k", size=1, deadline_s=later(seconds)))
            for name, seconds in (("late", 900), ("never", 1e9), ("soon", 600))
        ]
        await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(running, *others)

    asyncio.run(main())
    assert gate.done == ["first", "soon", "late", "never"]


def test_an_answer_that_only_has_to_be_written_goes_before_all_and_is_never_refused(pool, monkeypatch):
    monkeypatch.setattr("corewise.serving.pool.MOST_WAITING", 1)
    gate = Gate()

    async def main():
        running = asyncio.ensure_future(pool.run(gate.work("first"), kind="k", size=1))
        await gate.is_entered()
        waiting = asyncio.ensure_future(pool.run(gate.work("soon"), kind="k", size=1, deadline_s=later(600)))
        await asyncio.sleep(0)
        with pytest.raises(NotServed, match="queue is full"):
            await pool.run(gate.work("late"), kind="k", size=1, deadline_s=later(600))
        answer = asyncio.ensure_future(pool.run(gate.work("answer"), kind="k", size=1, deadline_s=AT_ONCE))
        await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(running, waiting, answer)

    asyncio.run(main())
    assert gate.done == ["first", "answer", "soon"]


def test_a_busy_pool_refuses_at_once_what_would_be_late_and_an_idle_one_shows_what_it_costs(pool):
    gate, free = Gate(), Gate()
    free.opened.set()

    async def main():
        pool._costs.note("k", 1, 5.0)
        assert await pool.run(free.work("idle"), kind="k", size=1, deadline_s=later(4.0)) == "idle"
        assert pool.expected_s("k", 1) < 5
        running = asyncio.ensure_future(pool.run(gate.work("first"), kind="k", size=1))
        await gate.is_entered()
        with pytest.raises(NotServed) as refused:
            await pool.run(free.work("late"), kind="k", size=1, deadline_s=later(3.0))
        assert refused.value.reason == "overloaded"
        assert refused.value.retry_after_s > 1
        with pytest.raises(NotServed):
            await pool.run(free.work("late"), kind="k", size=1, deadline_s=later(30.0), later_s=40.0)
        gate.opened.set()
        await running

    asyncio.run(main())
    assert "late" not in free.done


def test_what_can_no_longer_be_in_time_is_not_begun_and_errors_are_the_requests(pool):
    gate = Gate()

    def fail():
        raise ValueError("what it was")

    async def main():
        running = asyncio.ensure_future(pool.run(gate.work("first"), kind="k", size=1))
        await gate.is_entered()
        expiring = asyncio.ensure_future(pool.run(gate.work("expired"), kind="new", size=1, deadline_s=later(0.1)))
        cancelled = asyncio.ensure_future(pool.run(gate.work("cancelled"), kind="new", size=1))
        await asyncio.sleep(0.2)
        cancelled.cancel()
        await asyncio.sleep(0)
        gate.opened.set()
        await running
        with pytest.raises(NotServed, match="waited until"):
            await expiring
        with pytest.raises(ValueError, match="what it was"):
            await pool.run(fail, kind="k", size=1)
        assert not pool.is_busy

    asyncio.run(main())
    assert gate.done == ["first"]


def test_an_image_is_refused_by_its_size_before_it_is_read():
    class Served:
        waiting_rows, statistics, audio = 0, Statistics(), None

        def expected_s(self, ahead_rows=0):
            return 0.1

    async def main():
        front, gate = Front(Limits(), 16), Gate()
        front._costs.note("image", 100_000, 0.3)
        front.check_file(100_000, Served(), later(0.1))
        running = [
            asyncio.ensure_future(front._decoders.run(gate.work(k), kind="pixels", size=1))
            for k in range(front._decoders._threads)
        ]
        await asyncio.sleep(0)
        front.check_file(100_000, Served(), later(60.0))
        with pytest.raises(NotServed) as refused:
            front.check_file(100_000, Served(), later(0.2))
        assert refused.value.reason == "overloaded"
        gate.opened.set()
        await asyncio.gather(*running)
        front.close()

    asyncio.run(main())


def test_texts_that_would_be_tokenized_too_late_for_their_call_are_refused_and_counted():
    class Served:
        refused = 0

        def expected_s(self, ahead_rows=0):
            return 0.5

        @property
        def statistics(self):
            return self

        def not_served(self):
            self.refused += 1

    async def main():
        front, gate, served = Front(Limits(), 16), Gate(), Served()
        assert await front.tokenize(lambda: "tokens", 5, served, later(60.0)) == "tokens"
        running = [
            asyncio.ensure_future(front._decoders.run(gate.work(k), kind="pixels", size=1))
            for k in range(front._decoders._threads)
        ]
        await asyncio.sleep(0)
        with pytest.raises(NotServed):
            await front.tokenize(lambda: "tokens", 5, served, later(0.1))
        assert served.refused == 1
        gate.opened.set()
        await asyncio.gather(*running)
        front.close()

    asyncio.run(main())


@pytest.mark.parametrize(("size_bytes", "pool"), [(100, "read"), (LONG_BYTES, "decode")])
def test_recordings_count_together_and_long_ones_do_not_hold_up_what_is_parsed(size_bytes, pool, monkeypatch):
    threads = []

    def work(body, name, served, limits):
        threads.append(threading.current_thread().name.partition("_")[0])
        return Work(limits.samples // 2, 1, 1)

    async def main():
        monkeypatch.setattr(recordings, "work", work)
        front, served = Front(Limits(), 16), SimpleNamespace(audio=object())
        with pytest.raises(ProtocolError, match=r"have 150,000,000 samples together, the server takes 100,000,000"):
            await front._decoded([bytes(size_bytes)] * 3, served, "1.1.1.1", later(60.0))
        front.close()

    asyncio.run(main())
    assert threads == [pool] * 3


def test_a_large_request_is_refused_unread_but_for_some_and_not_where_priorities_count():
    class Counted:
        refused = 0

        def not_served(self):
            self.refused += 1

    class Served:
        waiting_rows, has_priorities, statistics = 8, False, Counted()

        def expected_s(self, ahead_rows=0):
            return 0.5

    async def main():
        front, served, refused = Front(Limits(), 16), Served(), 0
        front.check_queue(served, later(60.0))
        for _ in range(2 * LOOK_EACH):
            try:
                front.check_queue(served, later(0.1))
            except NotServed:
                refused += 1
        assert refused == served.statistics.refused == 2 * (LOOK_EACH - 1)
        served.has_priorities = True
        for _ in range(LOOK_EACH):
            front.check_queue(served, later(0.1))
        front.close()

    asyncio.run(main())


def test_bytes_that_lay_in_their_socket_while_the_loop_was_held_up_came_before_that(monkeypatch):
    now_s = 1000.0
    monkeypatch.setattr("corewise.serving.front.monotonic", lambda: now_s)

    async def is_seen_alive(front):
        async with asyncio.timeout(60):
            while front._alive_s != now_s:
                await asyncio.sleep(0.005)

    async def main():
        nonlocal now_s
        front = Front(Limits(), 16)
        assert front.arrived_s() == now_s
        front.watch_loop()
        await is_seen_alive(front)
        assert front.arrived_s() == now_s
        now_s += 0.3  # the loop is held up
        assert now_s - front.arrived_s() == pytest.approx(0.3 - TICK_S - SLACK_S)
        assert front.arrived_s() > 1000.0
        await is_seen_alive(front)
        assert front.arrived_s() == now_s
        front.close()

    asyncio.run(main())


# --- wake-ups -----------------------------------------------------------------------------------------------------


def test_many_ends_wake_the_loop_once():
    async def main():
        loop, deliveries, futures = asyncio.get_running_loop(), Deliveries(), [Future() for _ in range(50)]
        waiters = [deliveries.wait(future) for future in futures]
        woken, call = [], loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *arguments: (woken.append(1), call(*arguments))

        def end():
            for k, future in enumerate(futures):
                if k == 7:
                    future.set_exception(ValueError("seven"))
                elif k == 8:
                    future.cancel()
                else:
                    future.set_result(k)

        thread = threading.Thread(target=end)
        thread.start()
        thread.join()  # the loop waits with it, so that all have ended when it looks
        answers = await asyncio.gather(*waiters, return_exceptions=True)
        assert len(woken) == 1
        assert answers[:7] == list(range(7))
        assert isinstance(answers[7], ValueError)
        assert isinstance(answers[8], asyncio.CancelledError)
        assert answers[9:] == list(range(9, 50))

    asyncio.run(main())


@pytest.mark.parametrize("end", [lambda waiter: waiter.cancel(), lambda waiter: waiter.set_exception(ValueError())])
def test_what_nobody_waits_for_any_more_is_cancelled(end):
    async def main():
        deliveries, future = Deliveries(), Future()
        waiter = deliveries.wait(future)
        end(waiter)
        await asyncio.sleep(0)
        assert future.cancelled()

    asyncio.run(main())


# --- heads that were seen before ----------------------------------------------------------------------------------


def body_of(a, b, **more):
    tensors = [
        {"name": name, "datatype": kind, "shape": list(x.shape), "parameters": {"binary_data_size": x.nbytes}}
        for name, kind, x in (("b", "INT64", b), ("a", "FP32", a))
    ]
    head = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": True}, **more}).encode()
    return head + b.tobytes() + a.tobytes(), len(head)


A, B = np.arange(6, dtype=np.float32).reshape(3, 2), np.arange(3)


def test_a_head_seen_before_is_the_request_that_it_was():
    frames = Frames(INPUTS, OUTPUTS)
    body, length = body_of(A, B, parameters={"binary_data_output": True, "priority": 3, "timeout": 5e6})
    assert frames.known(body, length) is None
    parsed = json_body.parse(body, length, INPUTS, OUTPUTS)
    frames.remember(body, length, parsed)
    other, _ = body_of(A + 1, B + 1, parameters={"binary_data_output": True, "priority": 3, "timeout": 5e6})
    for known, expected in ((frames.known(body, length), parsed), (frames.known(other, length), None)):
        expected = expected or json_body.parse(other, length, INPUTS, OUTPUTS)
        for array, wanted in zip(known.inputs, expected.inputs, strict=True):
            assert array.dtype == wanted.dtype
            np.testing.assert_array_equal(array, wanted)
        assert (known.outputs, known.timeout_s, known.priority, known.id) == (parsed.outputs, 5.0, 3, None)


def test_only_what_is_the_same_is_known():
    frames = Frames(INPUTS, OUTPUTS)
    body, length = body_of(A, B)
    frames.remember(body, length, json_body.parse(body, length, INPUTS, OUTPUTS))
    assert frames.known(body[:-1], length) is None
    assert frames.known(body + b"x", length) is None
    assert frames.known(body, None) is None
    assert frames.known(body, length - 1) is None
    for more in ({"id": "seven"}, {"padding": "x" * LONGEST_BYTES}):
        body, length = body_of(A, B, **more)
        frames.remember(body, length, json_body.parse(body, length, INPUTS, OUTPUTS))
        assert frames.known(body, length) is None
    for k in range(2 * MOST_FRAMES):
        body, length = body_of(A, B, other=k)
        frames.remember(body, length, json_body.parse(body, length, INPUTS, OUTPUTS))
    assert len(frames._requests) <= MOST_FRAMES


def test_answers_are_rendered_as_without_memory():
    frames = Frames(INPUTS, OUTPUTS)
    body, length = body_of(A, B)
    asked = json_body.parse(body, length, INPUTS, OUTPUTS)
    for y in (A, A + 1, A[:2]):
        data, headers = frames.render("net", "1", asked, [y])
        parts, json_length = json_body.render("net", "1", asked, {"y": y})
        assert data == b"".join(parts)
        assert dict(headers)[b"inference-header-content-length"] == b"%d" % json_length
        assert dict(headers)[b"content-length"] == b"%d" % len(data)
    text, _ = body_of(A, B, parameters={})
    in_json = json_body.parse(text, len(text) - A.nbytes - B.nbytes, INPUTS, OUTPUTS)
    assert frames.render("net", "1", in_json, [A]) is None


def test_a_grpc_message_seen_before_is_the_request_that_it_was_and_answers_are_the_same_bytes():
    class Served:
        name, version, inputs, outputs, instead, frames = "net", "1", INPUTS, OUTPUTS, (), object()

    def message(a, b, **more):
        described = [
            {"name": "b", "datatype": "INT64", "shape": b.shape},
            {"name": "a", "datatype": "FP32", "shape": a.shape},
        ]
        made = oip.message("ModelInferRequest")(
            model_name="net", inputs=described, raw_input_contents=[b.tobytes(), a.tobytes()], **more
        )
        return made, made.SerializeToString()

    frames = RpcFrames()
    request, data = message(A, B)
    assert frames.known(data) is None
    parsed = rpc.parse(request, INPUTS, OUTPUTS)
    frames.remember(data, request, Served, parsed)
    _, other = message(A + 1, B + 5)
    name, version, of, asked = frames.known(other)
    assert (name, version, of, asked.outputs) == ("net", "", Served.frames, parsed.outputs)
    np.testing.assert_array_equal(asked.inputs[0], A + 1)
    np.testing.assert_array_equal(asked.inputs[1], B + 5)
    for different in (message(A[:2], B[:2]), message(A, B, model_version="2"), message(A, B, id="seven")):
        assert frames.known(different[1]) is None
    request, data = message(A, B, id="seven")
    frames.remember(data, request, Served, rpc.parse(request, INPUTS, OUTPUTS))
    assert frames.known(data) is None
    for y in (A, A + 1, np.zeros((100, 2), np.float32)):
        answer = oip.message("ModelInferResponse").FromString(frames.render(Served, parsed, [y]))
        assert answer == rpc.render(Served, parsed, {"y": y})


@pytest.mark.parametrize(
    ("values", "classes", "is_beside"), [(2, 1, False), (2000, 3, True), (SMALL_TENSOR_BYTES, 0, True)]
)
def test_classes_and_large_answers_are_put_together_beside_the_event_loop(values, classes, is_beside, monkeypatch):
    threads, classified = [], triton.classified

    def watched(counts, outputs, labels):
        threads.append(threading.current_thread())
        return classified(counts, outputs, labels)

    monkeypatch.setattr(triton, "classified", watched)
    outputs = [np.arange(values, dtype=np.float32)[None]]
    answer = Answer(outputs=outputs, waited_s=0.0, ran_s=0.0, batch_rows=1)
    asked = InferRequest(inputs=(), outputs=(Asked(name="y", binary=True, classes=classes),))
    served = SimpleNamespace(name="net", version="1", outputs=OUTPUTS, manifest=SimpleNamespace(labels=None))
    served.frames = Frames(INPUTS, OUTPUTS)

    async def main():
        front = Front(Limits(), 16)
        read, deadlines = front.read, []

        def watched_read(*given, deadline_s):
            deadlines.append(deadline_s)
            return read(*given, deadline_s=deadline_s)

        front.read = watched_read
        data, headers = await Infer(None, None, Limits(), front)._rendered(served, "1", asked, answer)
        service = rpc.Service(None, None, Limits(), Tokens(()), front)
        message = await service._rendered(rpc._Ran(served, served, asked, answer, 0.0), as_bytes=True)
        front.close()
        assert deadlines == [AT_ONCE] * 2
        (raw,) = oip.message("ModelInferResponse").FromString(message).raw_output_contents
        assert data.endswith(raw)
        assert dict(headers)[b"content-length"] == b"%d" % len(data)

    asyncio.run(main())
    assert [thread is not threading.current_thread() for thread in threads] == [is_beside] * 2


# --- what is told and counted -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/v2/models/net/infer", {"name": "net"}),
        ("/v2/models/net/versions/3/infer", {"name": "net", "version": "3"}),
        ("/v2/models//infer", None),
        ("/v2/models/net/other/3/infer", None),
        ("/v2/models/a/b/infer", None),
        ("/v2/models/infer", None),
        ("/v2/models/net/classify", None),
    ],
)
def test_requests_for_inference_are_known_by_their_path(path, found):
    assert target({"method": "POST", "path": path}) == found
    assert target({"method": "GET", "path": path}) is None


def test_a_refusal_says_when_to_come_again_only_if_that_helps():
    status, headers, body = told(NotServed("overloaded", 2.2))
    assert (status, dict(headers)[b"retry-after"]) == (503, b"3")
    assert int(dict(headers)[b"content-length"]) == len(body)
    assert b"retry-after" not in dict(told(NotServed("too urgent"))[1])
    assert told(NotServed("too large"))[0] == 400


def test_a_tally_counts_as_prometheus_does():
    tally = Tally((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 2.0):
        tally.add(value)
    assert tally.cumulative == [("0.1", 2), ("1.0", 3), ("+Inf", 4)]
    assert tally.total == pytest.approx(2.65)
    histogram = Histogram("seconds", "About.", ["model"], (1.0,))
    histogram.of(("net",)).add(0.5)
    (family,) = histogram.collect()
    samples = {(one.name, one.labels.get("le")): one.value for one in family.samples}
    assert samples[("seconds_bucket", "+Inf")] == samples[("seconds_count", None)] == 1
