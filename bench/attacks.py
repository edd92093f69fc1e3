"""Attacks on a server in a cgroup of 1 GiB, which has to stay below it, alive, and of use to others.

    python -m bench attacks ARTIFACT [--memory 1GiB] [--only NAME ...]

Each attack comes from 127.0.0.2 over HTTP, or over gRPC, while a healthy client of 127.0.0.1 asks for health and sends
sound requests. Recorded are the peak of the memory of the server and its engine process, what is left three seconds
later, what the attacker was answered, and how the healthy client fared. Writes attacks_NAME.json.
"""

import argparse
import gzip
import io
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
from PIL import Image

from bench.cgroups import MemoryCgroup
from bench.harness import machine_facts, say, write_results
from bench.healthy import Healthy
from bench.servers import Server
from bench.wire import INFER, MODEL, post
from bench.wire_grpc import ACK, END_HEADERS, HEADERS, PREFACE, SETTINGS, frame
from corewise import artifact
from corewise.cli.quantities import size
from corewise.serving import oip

MIB = 2**20
ATTACKER = "127.0.0.2"
ANSWER_S = 60.0
AFTER_S = 3.0
RPC = f"/{oip.SERVICE}/ModelInfer"


class Target:
    """The server as an attacker sees it."""

    def __init__(self, server: Server) -> None:
        self.http, self.grpc = server.ports["http"], f"127.0.0.1:{server.ports['grpc']}"
        self.answers: Counter[str] = Counter()
        self._lock = threading.Lock()

    def note(self, answer: str) -> None:
        with self._lock:
            self.answers[answer] += 1

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.http), ANSWER_S, (ATTACKER, 0))

    def send(self, *parts: bytes) -> None:
        """A request over HTTP; its status is noted."""
        try:
            with self.connect() as connection:
                for part in parts:
                    connection.sendall(part)
                self.note(connection.recv(4096)[9:12].decode("latin-1") or "closed")
        except TimeoutError:
            self.note("silence")
        except OSError:
            self.note("closed")

    def call(self, body: bytes, method: str = RPC, packing: grpc.Compression | None = None) -> None:
        """A call over gRPC; its code is noted."""
        with grpc.insecure_channel(self.grpc, [("grpc.max_send_message_length", -1)]) as channel:
            try:
                channel.unary_unary(method)(body, timeout=ANSWER_S, compression=packing)
                self.note("OK")
            except grpc.RpcError as error:
                self.note(error.code().name)
                if error.code().name in ("INTERNAL", "UNKNOWN"):
                    print(error, flush=True)


def at_once(work: Callable[[], None], times: int, most: int = 32) -> None:
    with ThreadPoolExecutor(min(times, most)) as pool:
        for each in [pool.submit(work) for _ in range(times)]:
            each.result()


# --- the attacks --------------------------------------------------------------------------------------------------


def gzip_bombs(target: Target) -> None:
    """Bodies of 65 KB that unpack to 64 MiB of lists."""
    bomb = gzip.compress(b'{"inputs":[' + b"[]," * (21 * MIB), 6)
    at_once(lambda: target.send(post(INFER, bomb, "content-encoding: gzip\r\n")), 8)


def gzip_below_the_ratio(target: Target) -> None:
    """Bodies that unpack to 60 MiB, by less than the ratio that is allowed."""
    packed = gzip.compress(b'{"inputs":[' + b'{"name":"a","datatype":"FP32","shape":[1],"data":[1]},' * 2**20, 1)
    at_once(lambda: target.send(post(INFER, packed, "content-encoding: gzip\r\n")), 8)


def empty_json(target: Target) -> None:
    """64 MiB of empty lists, objects or strings."""
    for part in (b"[],", b"{},", b'"",'):
        body = b'{"inputs":[' + part * (60 * MIB // 3)
        at_once(lambda body=body: target.send(post(INFER, body)), 4)


def json_numbers(target: Target) -> None:
    """30 MiB of zeros, which are arrays of twice to four times their size."""
    count = 15 * MIB
    head = b'{"inputs":[{"name":"input","datatype":"FP32","shape":[%d,3,12,12],"data":[' % (count // 432)
    body = head + b"0," * (count - 1) + b"0]}]}"
    at_once(lambda: target.send(post(INFER, body)), 8)


def large_bodies(target: Target) -> None:
    """Sixteen bodies of 60 MiB over HTTP."""
    body = post(INFER, bytes(60 * MIB), "inference-header-content-length: 0\r\n")
    at_once(lambda: target.send(body), 16)


def chunked_bodies(target: Target) -> None:
    """The same without a length."""
    head = f"POST {INFER} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    chunk = b"100000\r\n" + bytes(MIB) + b"\r\n"
    at_once(lambda: target.send(head, *[chunk] * 60, b"0\r\n\r\n"), 16)


def claims(target: Target) -> None:
    """Sockets that claim 64 MiB and send a byte."""
    idle = []
    for _ in range(64):
        connection = target.connect()
        connection.sendall(f"POST {INFER} HTTP/1.1\r\nhost: x\r\ncontent-length: {64 * MIB}\r\n\r\nX".encode())
        idle.append(connection)
    time.sleep(3)
    _close(idle)


def headers_without_end(target: Target) -> None:
    """A thousand connections with 60 KB of headers each."""
    idle = []
    for _ in range(1000):
        try:
            connection = target.connect()
            idle.append(connection)
            connection.sendall(b"GET /v2 HTTP/1.1\r\nx: " + b"y" * 60_000)
        except OSError:
            target.note("closed")
    time.sleep(3)
    _close(idle)


def photos_of_one_colour(target: Target) -> None:
    """PNGs of 48 KB that decode to 50 million pixels, and some of 7 million."""
    for side in (7070, 5600, 2800):
        file = io.BytesIO()
        Image.new("L", (side, side), 7).save(file, "PNG", compress_level=9)
        body = post(f"/v2/models/{MODEL}/classify", file.getvalue())
        at_once(lambda body=body: target.send(body), 10)


def long_texts(target: Target) -> None:
    """Texts of 8 MB over gRPC, and of 254 KB over HTTP."""
    text = b"word " * (8 * MIB // 5)
    body = _request("text", [1], "BYTES", len(text).to_bytes(4, "little") + text)
    at_once(lambda: target.call(body), 8)
    described = b'{"inputs":[{"name":"text","datatype":"BYTES","shape":[1],"data":["' + text[:254_000] + b'"]}]}'
    at_once(lambda: target.send(post(INFER, described)), 16)


def large_messages(target: Target) -> None:
    """Messages of 60 MiB and of 7 MiB over gRPC, also to calls that need no token."""
    large, small = (_request("input", [n * MIB, 1], "FP32", bytes(4 * n * MIB)) for n in (15, 1))
    at_once(lambda: target.call(large), 12, 12)
    at_once(lambda: target.call(small), 48)
    for name in (f"/{oip.SERVICE}/ServerLive", "/grpc.health.v1.Health/Check", f"/{oip.SERVICE}/ModelConfig"):
        at_once(lambda name=name: target.call(bytes(7 * MIB), name), 8)


def packed_messages(target: Target) -> None:
    """Messages over gRPC of 200 KB that unpack to 200 MiB."""
    body = _request("input", [50 * MIB, 1], "FP32", bytes(200 * MIB))
    for packing in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        at_once(lambda packing=packing: target.call(body, packing=packing), 6, 6)


def much_metadata(target: Target) -> None:
    """A thousand calls over gRPC with 1,500 tiny headers each, which never send their message."""
    release = threading.Event()
    metadata = [(f"x{k:x}", "y") for k in range(1500)]

    def nothing() -> Iterable[bytes]:
        release.wait(20)
        return iter(())

    channels = [grpc.insecure_channel(target.grpc, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(4)]
    for channel in channels:
        for _ in range(250):
            call = channel.stream_unary(RPC).future(_lazy(nothing), metadata=metadata)
            call.add_done_callback(lambda done: target.note(done.code().name))
    time.sleep(4)
    release.set()
    for channel in channels:
        channel.close()


def one_byte_headers(target: Target) -> None:
    """Calls over gRPC with 16,000 headers of one byte each, of clients that acknowledge no settings, or all at once."""
    named = {b":path": RPC.encode(), b":authority": b"x", b"te": b"trailers", b"content-type": b"application/grpc"}
    headers = b"\x83\x86" + b"".join(b"\0%c%b%c%b" % (len(k), k, len(v), v) for k, v in named.items())
    calls = b"".join(frame(HEADERS, END_HEADERS, 2 * k + 1, headers + b"\x8f" * 16_000) for k in range(20))
    greetings = [PREFACE + frame(SETTINGS, 0, 0, b"") + end for end in (b"", frame(SETTINGS, ACK, 0, b""))]
    place = ("127.0.0.1", int(target.grpc.rpartition(":")[2]))
    end_s = time.monotonic() + 4

    def connect_again_and_again() -> None:
        while time.monotonic() < end_s:
            for greeting in greetings:
                with suppress(OSError), socket.create_connection(place, 2, (ATTACKER, 0)) as connection:
                    connection.sendall(greeting + calls)
                    time.sleep(0.05)
                    target.note("sent")

    at_once(connect_again_and_again, 6)


def tiny_messages(target: Target) -> None:
    """Messages of 7 MiB that consist of tiny ones, and of numbers of one byte."""
    for body in (b"\x2a\x00" * (3 * MIB), b"\x3a\x00" * (3 * MIB), b"\x32\x00" * (3 * MIB)):
        at_once(lambda body=body: target.call(body), 8)
    numbers = oip.message("ModelInferRequest")(model_name=MODEL)
    given = numbers.inputs.add(name="input", datatype="FP32", shape=[1, 3, 12, 12])
    given.contents.int64_contents.extend([1] * (2 * MIB))
    body = numbers.SerializeToString()
    at_once(lambda: target.call(body), 8)


def idle_calls(target: Target) -> None:
    """Calls and streams over gRPC that never send their message."""
    release = threading.Event()

    def nothing() -> Iterable[bytes]:
        release.wait(20)
        return iter(())

    channels = [grpc.insecure_channel(target.grpc, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(4)]
    for channel in channels:
        calls = [channel.stream_unary(RPC).future(_lazy(nothing)) for _ in range(200)]
        streams = [channel.stream_stream(f"/{oip.SERVICE}/ModelStreamInfer")(_lazy(nothing)) for _ in range(40)]
        for call in calls:
            call.add_done_callback(lambda done: target.note(done.code().name))
        del streams
    time.sleep(4)
    release.set()
    for channel in channels:
        channel.close()


def streams_of_large_messages(target: Target) -> None:
    """Streams of messages of 7 MiB over gRPC."""
    body = _request("input", [MIB, 1], "FP32", bytes(4 * MIB))

    def stream() -> None:
        with grpc.insecure_channel(target.grpc, [("grpc.max_send_message_length", -1)]) as channel:
            call = channel.stream_stream(f"/{oip.SERVICE}/ModelStreamInfer")
            try:
                for _ in call(iter([body] * 20), timeout=ANSWER_S):
                    target.note("answer")
            except grpc.RpcError as error:
                target.note(error.code().name)

    at_once(stream, 12)


def broken_messages(target: Target) -> None:
    """Bytes that are no protobuf."""
    at_once(lambda: target.call(b"\x0a\xff\xff\xff\xff\xff\x01 nothing"), 200)


def slow_bodies(target: Target) -> None:
    """Four hundred connections that send a byte of a body now and then."""
    idle = []
    for _ in range(400):
        connection = target.connect()
        connection.sendall(f"POST {INFER} HTTP/1.1\r\nhost: x\r\ncontent-length: 400\r\n\r\n".encode())
        idle.append(connection)
    for _ in range(20):
        for connection in idle:
            with suppress(OSError):
                connection.sendall(b" ")
        time.sleep(0.2)
    _close(idle)


def many_headers(target: Target) -> None:
    """Ten thousand headers, complete and without an end."""
    headers = b"".join(b"%x: y\r\n" % k for k in range(10_000))
    at_once(lambda: target.send(b"GET /v2 HTTP/1.1\r\n" + headers + b"\r\n"), 64)
    idle = []
    for _ in range(400):
        with suppress(OSError):
            connection = target.connect()
            idle.append(connection)
            connection.sendall(b"GET /v2 HTTP/1.1\r\n" + headers[:60_000])
    time.sleep(3)
    _close(idle)


def tiny_chunks(target: Target) -> None:
    """Bodies in a million chunks of one byte, and chunks with long extensions."""
    head = f"POST {INFER} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    at_once(lambda: target.send(head, b"1\r\n \r\n" * MIB, b"0\r\n\r\n"), 4)
    at_once(lambda: target.send(head, b"1;" + b"x" * (8 * MIB) + b"\r\n \r\n0\r\n\r\n"), 8)


def deep_json(target: Target) -> None:
    """JSON of a hundred thousand lists in lists, and of objects in objects."""
    for part, end in ((b"[", b"]"), (b'{"a":', b"}")):
        deep = part * 100_000 + b"0" + end * 100_000
        for body in (deep, b'{"inputs":' + deep + b"}", b'{"inputs":[{"name":"input","data":' + deep + b"}]}"):
            at_once(lambda body=body: target.send(post(INFER, body)), 8)


def false_lengths(target: Target) -> None:
    """Strings in binary tensors that claim up to 4 GiB, and more strings than there are bytes."""
    for length in (2**32 - 1, 2**31, 2**20):
        data = length.to_bytes(4, "little") + b"x"
        for shape in ([1], [2**31 - 1]):
            at_once(lambda data=data, shape=shape: target.call(_request("text", shape, "BYTES", data)), 16)
            described = {"name": "text", "datatype": "BYTES", "shape": shape}
            described["parameters"] = {"binary_data_size": len(data)}
            text = json.dumps({"inputs": [described]}).encode()
            body = post(INFER, text + data, f"inference-header-content-length: {len(text)}\r\n")
            at_once(lambda body=body: target.send(body), 16)


def pipelined(target: Target) -> None:
    """Connections that send requests without end and read no answer."""
    for path in (b"/v2/health/live", b"/metrics", b"/v2/models/" + MODEL.encode(), b"/openapi.json"):
        one = b"GET " + path + b" HTTP/1.1\r\nhost: x\r\n\r\n"

        def flood(one: bytes = one) -> None:
            sent = 0
            try:
                with target.connect() as connection:
                    connection.settimeout(2.0)
                    while sent < 16 * MIB:
                        connection.sendall(one * 1000)
                        sent += 1000 * len(one)
                target.note("took it all")
            except TimeoutError:
                target.note("read no more")
            except OSError:
                target.note("closed")

        at_once(flood, 16)


def unread_answers(target: Target) -> None:
    """Streams over gRPC whose client sends and reads no answer."""
    body = _request("input", [1, 3, 12, 12], "FP32", bytes(4 * 432))
    release = threading.Event()

    def ask() -> Iterable[bytes]:
        while not release.is_set():
            yield body

    channels = [grpc.insecure_channel(target.grpc, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(8)]
    calls = [channel.stream_stream(f"/{oip.SERVICE}/ModelStreamInfer")(_lazy(ask)) for channel in channels]
    time.sleep(4)
    release.set()
    for call in calls:
        call.cancel()
    for channel in channels:
        channel.close()


def idle_connections(target: Target) -> None:
    """Two thousand connections to each port that say nothing."""
    idle = []
    for port in (target.http, int(target.grpc.rpartition(":")[2])):
        for _ in range(2000):
            try:
                idle.append(socket.create_connection(("127.0.0.1", port), 2, (ATTACKER, 0)))
            except OSError:
                target.note("closed")
    time.sleep(4)
    _close(idle)


ALONE: tuple[Callable[[Target], None], ...] = (
    gzip_bombs,
    gzip_below_the_ratio,
    empty_json,
    json_numbers,
    large_bodies,
    chunked_bodies,
    claims,
    headers_without_end,
    photos_of_one_colour,
    long_texts,
    large_messages,
    packed_messages,
    much_metadata,
    one_byte_headers,
    tiny_messages,
    idle_calls,
    streams_of_large_messages,
    broken_messages,
    slow_bodies,
    many_headers,
    tiny_chunks,
    deep_json,
    false_lengths,
    pipelined,
    unread_answers,
    idle_connections,
)


def everything(target: Target) -> None:
    """All of them at the same time."""
    with ThreadPoolExecutor(len(ALONE)) as pool:
        for each in [pool.submit(attack, target) for attack in ALONE]:
            each.result()


ATTACKS = {attack.__name__: attack for attack in (*ALONE, everything)}


def _close(connections: list[socket.socket]) -> None:
    for connection in connections:
        connection.close()


def _request(name: str, shape: list[int], datatype: str, data: bytes) -> bytes:
    described = {"name": name, "shape": shape, "datatype": datatype}
    made: bytes = oip.message("ModelInferRequest")(
        model_name=MODEL, inputs=[described], raw_input_contents=[data]
    ).SerializeToString()
    return made


def _lazy(make: Callable[[], Iterable[bytes]]) -> Iterable[bytes]:
    yield from make()


# --- the run ------------------------------------------------------------------------------------------------------


class Peak(threading.Thread):
    """Reads the group's memory every few milliseconds."""

    def __init__(self, group: MemoryCgroup) -> None:
        super().__init__(daemon=True)
        self._group, self._over, self.peak_bytes = group, threading.Event(), 0

    def run(self) -> None:
        while not self._over.wait(0.02):
            self.peak_bytes = max(self.peak_bytes, self._group.facts()["used_bytes"])

    def end(self) -> int:
        self._over.set()
        self.join()
        return self.peak_bytes


def run(name: str, server: Server, group: MemoryCgroup, folder: Path) -> dict[str, Any]:
    """One attack beside a healthy client."""
    target, before = Target(server), group.facts()
    healthy, peak = Healthy(server.port, folder), Peak(group)
    peak.start()
    start_s = time.monotonic()
    ATTACKS[name](target)
    seconds = time.monotonic() - start_s
    beside, peak_bytes = healthy.facts(), peak.end()
    time.sleep(AFTER_S)
    after = group.facts()
    return {
        "what": ATTACKS[name].__doc__,
        "seconds": seconds,
        "answers": dict(target.answers),
        "memory_bytes": {"before": before["used_bytes"], "peak": peak_bytes, "after": after["used_bytes"]},
        "killed": after["killed"],
        "alive": server.process.poll() is None,
        **beside,
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--memory", default="1GiB", metavar="SIZE", help="of the cgroup (default: 1GiB)")
    parser.add_argument("--only", nargs="+", choices=ATTACKS, metavar="NAME", help=", ".join(ATTACKS))


def main(options: argparse.Namespace) -> None:
    """Run the attacks one after the other on one server."""
    limit_bytes = size("--memory", options.memory)
    found: dict[str, Any] = {}
    name = options.artifact.name.removesuffix(".cw")
    result = {"artifact": artifact.read(options.artifact).manifest.model, "limit_bytes": limit_bytes, **machine_facts()}
    with (
        MemoryCgroup(f"corewise-bench-{os.getpid()}", limit_bytes) as group,
        Server(options.artifact, "--grpc", "127.0.0.1:0", cgroup=group.path) as server,
    ):
        result["cgroup_version"] = group.version
        for attack in options.only or ATTACKS:
            found[attack] = run(attack, server, group, options.artifact)
            mib = {key: value // MIB for key, value in found[attack]["memory_bytes"].items()}
            say(f"{attack}: MiB {mib}, answers {found[attack]['answers']}")
            say(f"  health {found[attack]['health']}, sound {found[attack]['sound']}")
            if not found[attack]["alive"]:
                say("the server is dead")
                break
    write_results(options.results / f"attacks_{name}.json", {**result, "attacks": found})
