"""What requests may take under a memory limit, and what the server counts before it reads."""

import asyncio
import gzip
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from starlette.requests import Request

from corewise.records.build import TensorSpec
from corewise.serving import bodies, memory_limit, messages, oip, rpc
from corewise.serving.budget import Budget
from corewise.serving.front import Front
from corewise.serving.memory_limit import COPIES, LEAST_BYTES, PIXEL_BYTES, USABLE_SHARE, Share, fit, room_bytes
from corewise.serving.messages import PROBES, Receiver, Streams
from corewise.serving.protocol import MOST_ID, MOST_TENSORS, Limits, NoRoom, ProtocolError
from corewise.serving.rpc_extensions import Stream

MIB, GIB = 2**20, 2**30


@pytest.mark.parametrize("limit_bytes", [256 * MIB, GIB, 4 * GIB, 64 * GIB])
def test_all_that_may_come_at_once_stays_below_the_limit(limit_bytes):
    limits = fit(Limits(), limit_bytes)
    received = (limits.receiving + limits.streams + PROBES) * limits.message_bytes
    connections = 2 * limits.connections * memory_limit.CONNECTION_BYTES
    assert COPIES * limits.bodies_bytes + received + connections <= 0.75 * limit_bytes
    assert limits.message_bytes <= limits.body_bytes <= limits.bodies_bytes * limits.client_share
    # One image of one client can be decoded.
    assert limits.pixels * PIXEL_BYTES // COPIES <= limits.bodies_bytes * limits.client_share


def test_a_large_machine_permits_what_was_asked_for():
    assert fit(Limits(), 64 * GIB) == Limits()
    small = fit(Limits(), GIB)
    assert (small.bodies_bytes, small.body_bytes, small.message_bytes) == (GIB // 12, GIB // 48, 8 * MIB)
    assert fit(Limits(body_bytes=1000), GIB).message_bytes == 1000
    assert memory_limit.notes(Limits(), small) == (
        "the memory limit leaves 21.3 MiB for a body over HTTP and 8 MiB over gRPC",
    )
    assert memory_limit.notes(Limits(), Limits()) == ()


def test_memory_that_no_request_explains_leaves_less_room():
    limits = fit(Limits(), GIB)

    def room(idle, resident, booked=0):
        return room_bytes(limits, GIB, idle_bytes=idle * MIB, resident_bytes=resident * MIB, booked_bytes=booked * MIB)

    assert room(100, 100) == limits.bodies_bytes
    # 80 MiB of bodies may take COPIES times as much; that was planned for.
    assert room(100, 100 + COPIES * 80, booked=80) == room(100, 100)
    # An engine that has grown, or memory that did not come back.
    received = (limits.receiving + limits.streams + PROBES) * limits.message_bytes
    assert room(100, 600) == (int(USABLE_SHARE * GIB) - received - 600 * MIB) // COPIES
    assert room(100, 1000) == room(5000, 100) == LEAST_BYTES


def test_the_budget_looks_at_the_room_as_it_is_used():
    budget, rooms = Budget(Limits(bodies_bytes=1000, client_share=1.0)), [1000, 100, 1000]
    asked = []

    def room(booked_bytes):
        asked.append(booked_bytes)
        return rooms[len(asked) - 1]

    budget.watch(room, 200)
    with budget.booking("a") as booking:
        booking.add(150)
        assert asked == [0]
        with pytest.raises(NoRoom):
            booking.add(100)
        assert asked == [0, 150]
        budget.look()
        booking.add(100)
    assert budget.total_booked_bytes == 250


def test_arrays_that_are_larger_than_their_bodies_are_booked():
    budget = Budget(Limits(bodies_bytes=1000, client_share=1.0))
    with budget.booking("a") as booking:
        booking.add(100)
        booking.cover([np.zeros(50, np.uint8)])
        assert booking.size_bytes == 100
        booking.cover([np.zeros(50), np.zeros(50)])
        assert booking.size_bytes == 800
        with pytest.raises(NoRoom):
            booking.cover([np.zeros(2000)])


def unpacked(*parts):
    left = [{"type": "http.request", "body": part, "more_body": k + 1 < len(parts)} for k, part in enumerate(parts)]

    async def receive():
        return left.pop(0)

    request = Request({"type": "http", "headers": [(b"content-encoding", b"gzip")]}, receive)
    return asyncio.run(bodies.read(request, Limits(), Budget(Limits()).booking("a")))


def test_a_packed_body_ends_with_its_packing():
    packed = gzip.compress(b"body")
    assert unpacked(packed) == unpacked(packed[:5], packed[5:]) == b"body"
    for parts in ((packed + packed,), (packed + b"x",), (packed, b"x")):
        with pytest.raises(ProtocolError, match="goes on after its gzip"):
            unpacked(*parts)
    with pytest.raises(ProtocolError, match="not a whole gzip"):
        unpacked(packed[:-1])


# --- messages over gRPC -------------------------------------------------------------------------------------------


def infer(**more):
    return oip.message("ModelInferRequest")(model_name="m", **more).SerializeToString()


def test_a_message_of_tiny_messages_is_refused_before_it_is_decoded():
    limits = Limits(typed_bytes=MIB)
    messages.check_infer(infer(raw_input_contents=[bytes(8 * MIB)]), limits)
    messages.check_infer(infer(raw_input_contents=[bytes(MIB)] * 8, outputs=[{"name": "a"}]), limits)
    numbers = {"name": "a", "contents": {"int64_contents": [1] * 2 * MIB}}
    for data in (b"\x2a\x00" * MIB, b"\x3a\x00" * MIB, b"\x0a" * 2 * MIB, bytes(2 * MIB), infer(inputs=[numbers])):
        with pytest.raises(ProtocolError, match="beside its raw tensors"):
            messages.check_infer(data, limits)
    messages.check_small(bytes(64 * 1024))
    with pytest.raises(ProtocolError, match="send names only"):
        messages.check_small(bytes(64 * 1024 + 1))


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"inputs": [{"name": "x"}] * (MOST_TENSORS + 1)}, "more than 64 inputs or outputs"),
        ({"outputs": [{"name": "y"}] * (MOST_TENSORS + 1)}, "more than 64 inputs or outputs"),
        ({"id": "x" * (MOST_ID + 1)}, "more than 256 characters"),
    ],
)
def test_a_request_has_as_many_tensors_and_as_long_an_id_as_over_http(more, match):
    request = oip.message("ModelInferRequest")(**more)
    with pytest.raises(ProtocolError, match=match):
        rpc.parse(request, [], [])


def test_a_tensor_of_millions_of_dimensions_takes_no_more_than_its_message():
    spec = TensorSpec(name="x", dtype="float32", shape=(None, 2))
    request = oip.message("ModelInferRequest")(inputs=[{"name": "x", "datatype": "FP32", "shape": [1] * 2 * MIB}])
    tracemalloc.start()
    with pytest.raises(ProtocolError, match=r"has the shape \[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1\], the"):
        rpc.parse(request, [spec], [])
    assert tracemalloc.get_traced_memory()[1] < MIB
    tracemalloc.stop()


def test_what_a_stream_is_told_of_an_error_is_short():
    async def infer(request, context):
        raise ProtocolError("there is no such model", status=404)

    async def main():
        front, context = Front(Limits(), 16), SimpleNamespace(peer=lambda: "unix:")
        metrics = SimpleNamespace(turned_away=lambda protocol, reason: None)
        stream = Stream(metrics, infer, front, Limits(), context)
        long = dict.fromkeys(("model_name", "model_version", "id"), "x" * MIB)
        told, _ = await stream._answer(oip.message("ModelInferRequest")(**long).SerializeToString())
        assert told.error_message == "there is no such model"
        assert told.infer_response.id == "x" * MOST_ID
        assert told.ByteSize() < 4 * MOST_ID
        front.close()

    asyncio.run(main())


class Call:
    """The messages of a call, which come when they are let."""

    def __init__(self):
        self.data = asyncio.Event()

    def __aiter__(self):
        return self

    async def __anext__(self):
        await self.data.wait()
        return b"data"


def test_one_address_has_half_of_the_places_to_receive():
    async def run():
        receiver = Receiver(Limits(receiving=4))
        idle = [Call() for _ in range(10)]
        waiting = [asyncio.ensure_future(receiver.receive(call, "a")) for call in idle]
        await asyncio.sleep(0)
        prompt = Call()
        prompt.data.set()
        async with asyncio.timeout(60):
            assert await receiver.receive(prompt, "b") == b"data"
        for call in idle:
            call.data.set()
        assert await asyncio.gather(*waiting) == [b"data"] * 10
        assert await receiver.receive(prompt, "a") == b"data"

    asyncio.run(run())


def test_too_many_calls_that_send_nothing_are_refused_at_once(monkeypatch):
    monkeypatch.setattr(messages, "MOST_OF_CLIENT", 3)

    async def run():
        receiver = Receiver(Limits(receiving=2))
        waiting = [asyncio.ensure_future(receiver.receive(Call(), "a")) for _ in range(1 + 3)]
        await asyncio.sleep(0)
        with pytest.raises(NoRoom, match="have not sent their message"):
            await receiver.receive(Call(), "a")
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        prompt = Call()
        prompt.data.set()
        assert await receiver.receive(prompt, "a") == b"data"

    asyncio.run(run())


def test_a_place_that_is_just_given_up_is_not_asked_for_again(monkeypatch):
    monkeypatch.setattr(messages, "SLOW_S", 0.01)

    async def run():
        receiver = Receiver(Limits(receiving=1))
        found = await asyncio.gather(*(receiver.receive(Call(), str(k)) for k in range(20)), return_exceptions=True)
        assert {type(each) for each in found} == {NoRoom}

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_call_that_times_out_while_another_comes_is_no_error():
    async def run():
        receiver = Receiver(Limits(receiving=1, body_s=0.05))
        first = asyncio.ensure_future(receiver.receive(Call(), "a"))
        await asyncio.sleep(0)
        (limit,) = receiver._receiving
        # The loop has called its end, and the task has not run yet.
        limit._on_timeout()
        second = asyncio.ensure_future(receiver.receive(Call(), "b"))
        found = await asyncio.gather(first, second, return_exceptions=True)
        assert [type(each) for each in found] == [NoRoom, NoRoom]

    asyncio.run(run())


def test_streams_are_counted_by_address():
    streams = Streams(4)
    with streams.place("a"), streams.place("a"):
        with pytest.raises(NoRoom):
            streams.place("a").__enter__()
        with streams.place("b"), streams.place("b"), pytest.raises(NoRoom):
            streams.place("c").__enter__()
    with streams.place("a"):
        pass


def test_passes_that_take_long_are_rare():
    now_s = [100.0]
    share = Share(1 / 200, lambda: now_s[0])

    def work():
        now_s[0] += 0.005

    assert share.is_due
    share.run(work)
    assert not share.is_due
    for later_s, is_due in ((0.99, False), (0.011, True)):
        now_s[0] += later_s
        assert share.is_due == is_due
    share.run(lambda: now_s.append(now_s.pop() + 60))  # much was freed: then there is more
    assert share.is_due
