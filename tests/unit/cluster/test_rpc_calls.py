"""Calls over Ray Serve's gRPC proxy, whose context has less than gRPC's own."""

import asyncio
from types import SimpleNamespace

from corewise.cluster.rpc import Calls
from corewise.serving.front import Front
from corewise.serving.memory_limit import LARGE_ANSWER_BYTES, answer_bytes
from corewise.serving.protocol import Limits
from corewise.serving.rpc import Service
from corewise.serving.tokens import Tokens


class Large(Service):
    """Answers at length."""

    async def _infer(self, data, context):
        return bytes(4 * LARGE_ANSWER_BYTES)


def test_a_large_answer_is_booked_until_the_proxy_has_it():
    booked_bytes = answer_bytes(4 * LARGE_ANSWER_BYTES)
    front = Front(Limits(bodies_bytes=3 * booked_bytes, client_share=0.5), 16)
    calls = Calls()
    calls.service = Large(None, None, Limits(), Tokens(()), front)
    told = SimpleNamespace(peer=lambda: "ipv4:192.0.2.1:5", invocation_metadata=list)
    for _ in range(4):
        answer = asyncio.run(calls.answer("ModelInfer", b"x", told))
        assert len(answer.SerializeToString()) == 4 * LARGE_ANSWER_BYTES
    assert front.budget.total_booked_bytes >= 4 * booked_bytes
    front.close()
