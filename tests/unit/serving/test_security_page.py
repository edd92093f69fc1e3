"""What docs/security.md promises and no other file tests: its numbers, who is let in, and whose code is opened."""

import asyncio
import gzip
import hashlib
import json
import shutil
from dataclasses import replace

import pytest
from places import GOLDEN, ROOT
from starlette.requests import Request

from corewise import artifact
from corewise.cli.serve_options import LogOptions, PortOptions, RequestOptions, SecurityOptions, server_options
from corewise.cluster import connection
from corewise.common.errors import ArtifactError
from corewise.machine.inspect import inspect_cpu
from corewise.serving import (
    app,
    bodies,
    connections,
    files,
    front,
    large_json,
    messages,
    protocol,
    rpc_connections,
    text,
    texts,
    turns,
    web_server,
)
from corewise.serving.app import App
from corewise.serving.budget import Budget
from corewise.serving.front import Front
from corewise.serving.memory_limit import LARGE_ANSWER_BYTES, fit
from corewise.serving.metrics import Metrics
from corewise.serving.models import Models
from corewise.serving.protocol import Limits, ProtocolError
from corewise.serving.served import NATIVE, Served, Source, Trust
from corewise.serving.tokens import Tokens
from corewise.serving.traces import Traces

PAGE = " ".join((ROOT / "docs" / "security.md").read_text().split())
KIB, MIB, GIB = 2**10, 2**20, 2**30
WORDS = {4: "four", 8: "eight", 16: "sixteen"}
USUAL, SMALL = Limits(), fit(Limits(), GIB)


@pytest.mark.parametrize(
    "sentence",
    [
        f"headers: {web_server.HEADERS_BYTES // KIB} KiB over HTTP and {rpc_connections.METADATA_BYTES // KIB} KiB "
        f"over gRPC, where each header counts {web_server.HEADER_BYTES} bytes more",
        f"`--max-body`, {USUAL.body_bytes // MIB} MiB by default",
        f"tensors: at most {protocol.MOST_TENSORS}, with shapes",
        f"at most {protocol.MOST_STRINGS:,} strings in each",
        f"images: {USUAL.pixels / 1e6:g} million pixels",
        f"recordings: {USUAL.samples / 1e6:g} million samples",
        f"1 GiB allows {SMALL.body_bytes / MIB:.0f} MiB for a body over HTTP, {SMALL.message_bytes / MIB:g} MiB for a "
        f"gRPC message, of which {SMALL.typed_bytes / MIB:g} MiB beside raw tensors, {SMALL.pixels // 10**6} million "
        f"pixels for an image, {WORDS[SMALL.streams]} streams, {SMALL.connections} connections on each port, and "
        f"{SMALL.bodies_bytes / MIB:.0f} MiB for all requests together",
        f"to at most {bodies.RATIO} times their size (or {bodies.SMALL_BYTES // MIB} MiB)",
        f"it may have {large_json.MAX_FRAME_BYTES // MIB} MiB and {large_json.MAX_FRAME_MARKS:,} strings and objects",
        f"A gRPC message may have {USUAL.typed_bytes // MIB} MiB beside raw tensors, and "
        f"{messages.FREE_BYTES // KIB} KiB if its call has no tensors",
        f"may have {text.TOKEN_CHARACTERS} characters for each token",
        f"A form with an image or a recording may have {files.MOST_PARTS} parts",
        f"a body may have {texts.BODY_BYTES // MIB} MiB and {texts.MOST_TEXTS:,} texts",
        f"it may have {texts.TOKENIZED_BYTES // KIB} KiB",
        f"together may hold {USUAL.bodies_bytes // MIB} MiB, and those of one address half of that",
        f"{WORDS[USUAL.receiving].capitalize()} are received at a time, {WORDS[USUAL.receiving // 2]} of them from one "
        f"address; a message that takes more than {messages.SLOW_S:g} s is dropped if others wait. At most "
        f"{USUAL.streams} calls stream",
        f"`--queue` says (at least {front.LEAST_PLACES})",
        f"in the order of their deadlines, {WORDS[turns.PER_ROUND]} in each of its rounds",
        f"Those that take more than {front.LARGE_BYTES / 1e6:g} MB",
        f"Bodies must arrive within {USUAL.body_s:g} s and headers within {web_server.HEADERS_S:g} s",
        f"that continues a body for {web_server.REST_S:g} s after its answer, that sends more than "
        f"{web_server.MOST_PIPELINED} requests on a connection without",
        f"HTTP and gRPC accept {USUAL.connections:,} connections each",
        f"Both accept {WORDS[connections.HEALTH_CONNECTIONS]} more, half of them from one address",
        f"A TLS handshake may take {connections.HANDSHAKE_S:g} s. A gRPC connection may have "
        f"{rpc_connections.STREAMS:,} calls at a time",
        f"which must come within {connections.HANDSHAKE_S:g} s and {rpc_connections.HELD_BYTES // KIB} KiB",
        f"An answer of more than {LARGE_ANSWER_BYTES // KIB} KiB counts",
        f"A client that reads nothing from its connection for {web_server.UNREAD_S:g} s is disconnected",
        f"except {', '.join(f'`{path}`' for path in app.OPEN_TO_ALL[:2])} and `{app.OPEN_TO_ALL[2]}`",
        f"does not answer within {connection.ANSWER_S:g} s, the command ends",
        f"Ray older than {'.'.join(map(str, connection.LEAST_RAY))} is refused",
    ],
    ids=lambda sentence: sentence[:40],
)
def test_the_numbers_of_the_page_are_those_of_the_server(sentence):
    assert sentence in PAGE


def test_the_limits_of_the_page_are_those_of_eight_gibibytes_and_more():
    assert "are those for 8 GiB and more (32 GiB for streams)" in PAGE
    assert replace(fit(USUAL, 8 * GIB), streams=USUAL.streams) == USUAL == fit(USUAL, 32 * GIB)
    assert replace(fit(USUAL, 8 * GIB - MIB), streams=USUAL.streams) != USUAL != fit(USUAL, 32 * GIB - MIB)
    assert USUAL.client_share == 0.5


# --- who is let in ------------------------------------------------------------------------------------------------


def test_by_default_http_listens_on_loopback_and_nothing_else_does():
    options = server_options(PortOptions(), RequestOptions(), SecurityOptions(), LogOptions())
    assert options.http == ("127.0.0.1", 8000)
    assert (options.grpc, options.admin, options.admin_grpc, options.cors_origins, options.trust) == (
        None, None, None, (), Trust(),
    )  # fmt: skip


async def status_of(asgi, method, path, headers):
    """That of the answer to a request for this path."""
    statuses = []

    async def receive():
        return {"type": "http.request", "body": b"{", "more_body": False}

    async def send(message):
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {"type": "http", "http_version": "1.1", "method": method, "path": path, "query_string": b""}
    await asgi({**scope, "headers": headers, "client": ("1.1.1.1", 5), "request_id": "r1"}, receive, send)
    return statuses[0]


def test_every_path_but_health_wants_the_token():
    async def main():
        models, room = Models([], lambda source: pytest.fail("nothing is opened")), Front(Limits(), 16)
        made = App(models, Metrics(models, Traces()), Limits(), Tokens(["secret"]), room)
        paths = {route.path.replace("{name}", "m").replace("{version}", "1") for route in made.asgi._app.routes}
        assert {"/", "/metrics", "/live.json", "/v2/models/m/versions/1/infer", "/v1/embeddings", "/decode"} <= paths
        right, wrong = ([(b"authorization", b"Bearer " + token)] for token in (b"secret", b"secret2"))
        for path in (*sorted(paths), "/v2/none", "/v2/health/live/", "//v2/health/live"):
            is_open = path in app.OPEN_TO_ALL
            for method in ("GET", "POST", "OPTIONS"):
                for headers in ([], wrong):
                    assert (await status_of(made.asgi, method, path, headers) == 401) != is_open, (method, path)
                assert await status_of(made.asgi, method, path, right) != 401, (method, path)
        room.close()

    asyncio.run(main())


# --- bodies -------------------------------------------------------------------------------------------------------


def read(*parts, packing="gzip", limits=USUAL, ends=True):
    """What the server has of a body that comes in these parts, and ends then or does not."""
    left = list(parts)

    async def receive():
        if not left:
            await asyncio.sleep(3600)
        part = left.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(left) or not ends}

    request = Request({"type": "http", "headers": [(b"content-encoding", packing.encode())]}, receive)
    return asyncio.run(bodies.read(request, limits, Budget(limits).booking("a")))


def test_a_packed_body_may_have_as_many_bytes_as_one_that_is_not():
    zeros = bytes(bodies.SMALL_BYTES)
    assert len(gzip.compress(zeros)) < bodies.SMALL_BYTES // bodies.RATIO  # whatever the factor
    assert read(gzip.compress(zeros)) == zeros
    with pytest.raises(ProtocolError, match="100 times its size") as refused:
        read(gzip.compress(zeros + b"1"))
    assert refused.value.status == 413
    noise = hashlib.shake_256(b"").digest(3000)
    assert read(gzip.compress(noise), limits=Limits(body_bytes=3000)) == noise
    with pytest.raises(ProtocolError, match="the body has more than 2999 bytes"):
        read(gzip.compress(noise), limits=Limits(body_bytes=2999))


def test_a_body_that_does_not_come_is_not_waited_for():
    with pytest.raises(ProtocolError, match=r"the body did not arrive in 0\.05 s") as late:
        read(b"a part", packing="identity", limits=Limits(body_s=0.05), ends=False)
    assert late.value.status == 408


# --- artifacts ----------------------------------------------------------------------------------------------------

x86_only = pytest.mark.skipif(inspect_cpu().architecture != "x86_64", reason="the golden artifact is for x86-64")


def of_engine(name, tmp_path):
    """The golden artifact, as if it were of that engine; and the sha256 of its manifest."""
    folder = tmp_path / "m.cw"
    shutil.copytree(GOLDEN / "schema-1", folder)
    content = json.loads((folder / artifact.MANIFEST).read_text())
    del content["digest"]
    content["build"]["engine"] = name
    content["digest"] = artifact.format.digest(content)
    (folder / artifact.MANIFEST).write_text(json.dumps(content))
    return folder, hashlib.sha256((folder / artifact.MANIFEST).read_bytes()).hexdigest()


@x86_only
@pytest.mark.parametrize("name", NATIVE)
def test_a_payload_that_is_code_is_opened_only_if_its_manifest_is_trusted(name, tmp_path):
    folder, digest = of_engine(name, tmp_path)
    told = rf"m\.cw holds code \({name}\), .* give --trust, or put {digest} into the file of --trust-file"
    (tmp_path / "trusted").write_text(f"\n  {digest}  \n")
    (tmp_path / "others").write_text("0" * 64)

    def trust(**options):
        return server_options(PortOptions(), RequestOptions(), SecurityOptions(**options), LogOptions()).trust

    for refused in (trust(), trust(trust_file=tmp_path / "others")):
        with pytest.raises(ArtifactError, match=told):
            Served(Source.of(str(folder)), trust=refused)
    found = artifact.read(folder)
    for trusted in (trust(trust=True), trust(trust_file=tmp_path / "trusted")):
        trusted.check(found, digest)
    with (folder / artifact.MANIFEST).open("a") as file:
        file.write(" ")
    with pytest.raises(ArtifactError, match=r"holds code"):
        Served(Source.of(str(folder)), trust=trust(trust_file=tmp_path / "trusted"))


@x86_only
def test_an_engine_that_is_not_corewises_is_not_served_even_if_everything_is_trusted(tmp_path):
    folder, _ = of_engine("corewise.testing.engines:Segfault", tmp_path)
    with pytest.raises(ArtifactError, match=r"needs the engine corewise\.testing\.engines:Segfault, which is not"):
        Served(Source.of(str(folder)), trust=Trust(everything=True))
