"""The paths for texts: errors in each API's own form, and requests that are given up when their client is gone."""

import asyncio
import json
from types import SimpleNamespace

import numpy as np
import pytest
from gate_tools import gate_of
from starlette.requests import ClientDisconnect, Request

from corewise.batching import Answer
from corewise.serving import text_routes
from corewise.serving.app import App
from corewise.serving.deliveries import Waiters
from corewise.serving.front import Front
from corewise.serving.infer import GONE, WHOLE
from corewise.serving.protocol import Limits, ProtocolError
from corewise.serving.text_calls import TextAnswer
from corewise.serving.texts import FieldError
from corewise.serving.tokens import Tokens


def scope_of(path, method="POST", headers=(), **more):
    return {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": list(headers),
        "client": ("1.1.1.1", 5),
        "request_id": "mine",
        **more,
    }


async def receive():
    return {"type": "http.request", "body": b"{}", "more_body": False}


def asked(scopes, change=lambda app: None, tokens=()):
    """Status and body of the answer to each request."""

    async def main():
        front = Front(Limits(), 16)
        made, found = gate_of(front), []
        made.known.names = [("m", "1")]
        app = App(made.known, made.metrics, Limits(), Tokens(tokens), front)
        change(app)

        async def send(message):
            if message["type"] == "http.response.start":
                found.append([message["status"], b""])
            else:
                found[-1][1] += message.get("body", b"")

        for scope in scopes:
            await app.asgi(scope, receive, send)
        front.close()
        return [(status, json.loads(body)) for status, body in found]

    return asyncio.run(asyncio.wait_for(main(), 30))


def test_errors_that_come_before_a_paths_own_have_its_form_too():
    openais, plain, method, teis = asked(
        [scope_of("/v1/chat"), scope_of("/x"), scope_of("/v1/embeddings", "GET"), scope_of("/embed", "GET")]
    )
    assert (openais[0], openais[1]["error"]["code"]) == (404, None)
    assert openais[1]["error"]["message"] == "there is nothing at this path; see /docs"
    assert (method[0], method[1]["error"]["message"]) == (405, "this path has another method; see /docs")
    assert teis == (405, {"error": "this path has another method; see /docs", "error_type": "Validation"})
    assert plain == (404, {"error": "there is nothing at this path; see /docs"})
    (refused,) = asked([scope_of("/embed")], tokens=("sesame",))
    assert (refused[0], sorted(refused[1])) == (401, ["error", "error_type"])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/v1/embeddings", lambda found: found["error"]["message"]),
        ("/embeddings", lambda found: found["error"]["message"]),
        ("/v1/rerank", lambda found: found["detail"]),
        ("/embed", lambda found: found["error"]),
    ],
)
def test_what_was_not_foreseen_is_told_in_the_apis_form(path, message):
    async def fail(request):
        raise ZeroDivisionError

    def change(app):
        app.asgi._texts[path]._handler = fail

    ((status, found),) = asked([scope_of(path)], change)
    assert status == 500
    assert message(found) == "the server failed; the server's log says why, at request mine"


def test_a_model_that_there_is_not_is_named_in_openais_form():
    versions, name = asked([scope_of("/v1/models/m@7", "GET"), scope_of("/v1/models/gpt", "GET")])
    for status, found in (versions, name):
        assert (status, found["error"]["param"], found["error"]["code"]) == (404, "model", "model_not_found")


@pytest.mark.parametrize("wait", [True, False])
def test_a_client_that_is_gone_has_its_work_given_up(wait):
    async def main():
        waiters, ended = Waiters(), []

        async def work():
            try:
                await asyncio.sleep(3600)
            finally:
                ended.append("given up")

        if not wait:
            waiters.disconnect()
        else:
            asyncio.get_running_loop().call_soon(lambda: asyncio.get_running_loop().call_soon(waiters.disconnect))
        with pytest.raises(ClientDisconnect):
            await text_routes._unless_gone(Request(scope_of("/embed", **{GONE: waiters})), work())
        assert ended == ["given up"]
        assert not waiters._waiting
        assert not asyncio.current_task().cancelling()
        await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_client_that_goes_after_its_answer_ends_nothing():
    async def main():
        waiters = Waiters()

        async def work():
            # It goes in the same round of the loop in which its work ends.
            waiters.disconnect()
            return 7

        assert await text_routes._unless_gone(Request(scope_of("/embed", **{GONE: waiters})), work()) == 7
        for _ in range(3):
            await asyncio.sleep(0)  # nothing cancels what the connection does next

    asyncio.run(asyncio.wait_for(main(), 30))


def test_work_that_is_cancelled_otherwise_is_no_client_that_is_gone():
    async def main():
        waiters = Waiters()
        work = text_routes._unless_gone(Request(scope_of("/embed", **{GONE: waiters})), asyncio.sleep(3600))
        task = asyncio.ensure_future(work)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not waiters._waiting

    asyncio.run(asyncio.wait_for(main(), 30))


def test_where_only_messages_say_that_the_client_is_gone_they_are_waited_for():
    async def main():
        async def leave():
            return {"type": "http.disconnect"}

        with pytest.raises(ClientDisconnect):
            await text_routes._unless_gone(Request(scope_of("/embed"), leave), asyncio.sleep(3600))

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_body_that_is_there_is_taken_as_it_is_and_is_no_longer_than_allowed():
    async def main():
        front = Front(Limits(), 16)
        scope = scope_of("/embed", **{WHOLE: True})
        with front.booking("c") as booking:
            assert await text_routes._read(Request(scope, receive), Limits(), booking) == b"{}"
            assert booking.size_bytes == 2
            with pytest.raises(ProtocolError) as told:
                await text_routes._read(Request(scope, receive), Limits(body_bytes=1), booking)
        assert told.value.status == 413
        front.close()

    asyncio.run(asyncio.wait_for(main(), 30))


SENTENCES = {"source_sentence": "a", "sentences": ["b", "c"]}


@pytest.mark.parametrize(
    ("path", "inputs", "shape", "answers", "found"),
    [
        ("/embed", "a", (None, 2), [[3, 4]], [[0.6, 0.8]]),
        ("/", "a", (None, 2), [[3, 4]], [[0.6, 0.8]]),
        ("/similarity", SENTENCES, (None, 2), [[1, 0], [2, 0], [0, 3]], [1, 0]),
        ("/", SENTENCES, (None, 2), [[1, 0], [2, 0], [0, 3]], [1, 0]),
        ("/embed_all", ["a", "b"], (None, None, 2), [[[1, 2], [3, 4]], [[5, 6]]], [[[1, 2], [3, 4]], [[5, 6]]]),
        ("/", ["a"], (None, None, 2), [[[1, 2]]], [[[1, 2]]]),
    ],
)
def test_each_path_gives_what_fits_the_model(path, inputs, shape, answers, found):
    async def main():
        front = Front(Limits(), 16)
        made, parts = gate_of(front), []
        app = App(made.known, made.metrics, Limits(), Tokens(()), front)
        routes = app.asgi._texts[path]._handler.__self__
        pipeline = SimpleNamespace(task="vectors", pairs=False, normalize=False, dimensions=())
        outputs, text = [SimpleNamespace(shape=shape)], SimpleNamespace(pipeline=pipeline)
        model = SimpleNamespace(name="m", version="1", outputs=outputs, text=text)
        routes._models.chosen = lambda name, *tasks: model

        async def run(served, asked, booking, **options):
            vectors = [np.array(each, np.float32) for each in answers]
            calls = Answer(outputs=[], waited_s=0.0, ran_s=0.0, batch_rows=1)
            return TextAnswer(answers=vectors, tokens=3, calls=calls)

        routes._calls.run = run

        async def receive():
            return {"type": "http.request", "body": json.dumps({"inputs": inputs}).encode(), "more_body": False}

        async def send(message):
            parts.append(message)

        await app.asgi(scope_of(path, **{WHOLE: True, GONE: Waiters()}), receive, send)
        front.close()
        assert parts[0]["status"] == 200
        return json.loads(parts[1]["body"])

    np.testing.assert_equal(asyncio.run(asyncio.wait_for(main(), 30)), found)


@pytest.mark.parametrize(
    ("shape", "path"), [((None, 8), "/embed"), ((None, None, 8), "/embed_all")], ids=["of texts", "of tokens"]
)
def test_vectors_are_asked_for_where_they_are(shape, path):
    served = SimpleNamespace(name="m", outputs=[SimpleNamespace(shape=shape)], text=None)
    if path == "/embed":
        text_routes.check_vectors(served)
        with pytest.raises(FieldError, match="gives one vector for each text; ask /embed for it"):
            text_routes.check_token_vectors(served)
        return
    text_routes.check_token_vectors(served)
    with pytest.raises(FieldError, match="gives a vector for each token; ask /embed_all for them"):
        text_routes.check_vectors(served)
    with pytest.raises(FieldError, match="leave dimensions out"):
        text_routes.check_token_vectors(served, 4)
