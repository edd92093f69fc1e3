"""Structured nonsense for a server, by hypothesis: JSON, binary tensors, protobuf, images, texts and HTTP itself."""

import gzip
import io
import json
import socket
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from math import inf, nan
from typing import Any

import grpc
import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from PIL import Image

from corewise.serving import oip
from corewise.serving.protocol import DATATYPES

HANG_S = 10.0
BROKEN = ("500", "502", "504", "INTERNAL", "UNKNOWN", "hang")
"""Outcomes that no request may have. 501 says that a model does not do what was asked, 503 that it cannot now."""
SERVICE = oip.SERVICE
IMAGES = ("L PNG", "P PNG", "RGBA PNG", "1 PNG", "I;16 PNG", "RGB JPEG", "CMYK JPEG", "RGB WEBP", "RGBA WEBP")
IMAGES += ("RGB GIF", "RGB TIFF", "RGB BMP", "RGB PPM")
"""Mode and format."""
METHODS = (*oip.METHODS, *oip.EXTENSIONS)


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """What the requests are about; one object for all of them, as strategies take long to make."""

    name: str
    input: str
    row: np.ndarray
    """A sound input of shape (1, ...) and dtype float32."""


@dataclass
class Outcomes:
    """How often each kind of request ended how, and requests that ended as none may."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def note(self, kind: str, outcome: str, sent: Any) -> None:
        self.counts.setdefault(kind, Counter())[outcome] += 1
        if outcome in BROKEN:
            self.broken.append(f"{kind}: {outcome}: {sent!r:.2000}")


# --- what is sent -------------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 2**31, 2**63, -(2**63), 2**64, 1e308, -0.0, inf, -inf, nan]),
    st.floats(),
    st.text(max_size=20),
)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
datatypes = st.sampled_from([*DATATYPES.values(), "FP128", "", "fp32"])
sizes = st.sampled_from([-1, 0, 1, 2, 3, 4, 12, 2**31, 2**40, 2**63 - 1])
words = st.text(max_size=200) | st.sampled_from(["\0", "\ud800", "a" * 10_000, "w1 w2", "‮"])


def sometimes(sound: Any, wrong: SearchStrategy[Any]) -> SearchStrategy[Any]:
    """Mostly the sound value: a request that is wrong in one place gets further than one that is wrong everywhere."""
    return st.one_of(st.just(sound), st.just(sound), st.just(sound), wrong)


@cache
def requests(model: Model) -> SearchStrategy[tuple[str, dict[str, Any]]]:
    """A JSON request, near to a sound one, and its parts that are wrong on purpose."""
    shape = list(model.row.shape)
    data = model.row.reshape(-1).tolist()
    some = st.lists(scalars, max_size=20) | json_values | st.just(model.row.tolist()) | st.just(data[:-1])
    parameters = st.dictionaries(
        st.sampled_from(["binary_data_size", "timeout", "priority", "binary_data_output", "classification", "x"]),
        sizes | scalars,
        max_size=3,
    )
    tensor = st.fixed_dictionaries(
        {
            "name": sometimes(model.input, words | json_values),
            "datatype": sometimes("FP32", datatypes | json_values),
            "shape": sometimes(shape, st.lists(sizes, max_size=6) | json_values),
        },
        optional={"data": sometimes(data, some), "parameters": parameters | json_values},
    )
    return st.fixed_dictionaries(
        {"inputs": st.lists(tensor, min_size=1, max_size=2) | json_values},
        optional={
            "id": words | json_values,
            "parameters": parameters | json_values,
            "outputs": st.lists(
                st.fixed_dictionaries({"name": sometimes("output_0", words)}, optional={"parameters": parameters}),
                max_size=3,
            )
            | json_values,
        },
    ).map(lambda found: ("json", found))


@st.composite
def spoiled(draw: DrawFn, sound: bytes) -> bytes:
    """Bytes with some changed, cut out, doubled or put in."""
    found = bytearray(sound)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(found)))
        length = draw(st.integers(0, 40))
        kind = draw(st.sampled_from(["change", "cut", "double", "put", "end"]))
        if kind == "change":
            found[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "cut":
            del found[at : at + length]
        elif kind == "double":
            found[at:at] = found[at : at + length]
        elif kind == "put":
            found[at:at] = draw(st.binary(max_size=40))
        else:
            del found[at:]
    return bytes(found)


@st.composite
def bodies(draw: DrawFn, model: Model) -> tuple[str, bytes, dict[str, str]]:
    """Path, body and headers of a request over HTTP."""
    path = draw(sometimes(f"/v2/models/{model.name}/infer", paths(model)))
    headers: dict[str, str] = {}
    kind = draw(st.sampled_from(["json", "json", "json", "binary", "binary", "raw", "image", "bytes"]))
    if kind in ("json", "binary"):
        _, found = draw(requests(model))
        body = json.dumps(found).encode("utf-8", "surrogatepass")
        if kind == "binary":
            length = draw(sometimes(str(len(body)), st.sampled_from(["0", "-1", "1", "9" * 12, "9" * 30, "x", "7"])))
            headers["inference-header-content-length"] = length
            body += draw(st.binary(max_size=64) | st.just(model.row.tobytes()))
        elif draw(st.booleans()):
            body = draw(spoiled(body))
    elif kind == "raw":
        headers["inference-header-content-length"] = "0"
        body = draw(spoiled(model.row.tobytes()))
    elif kind == "image":
        path, body = f"/v2/models/{model.name}/classify", draw(images())
    else:
        body = draw(st.binary(max_size=200))
    packing = draw(sometimes("", st.sampled_from(["gzip", "deflate", "br", "gzip, gzip", "\xff"])))
    if packing:
        headers["content-encoding"] = packing
        packed = {"gzip": gzip.compress, "deflate": zlib.compress}.get(packing, bytes)(body)
        body = draw(st.just(packed) | spoiled(packed))
    if draw(st.integers(0, 5)) == 0:
        headers["x-request-timeout-ms"] = draw(st.sampled_from(["1", "0", "-5", "nan", "inf", "1e400", "x", "60000"]))
    if draw(st.integers(0, 5)) == 0:
        headers["x-request-id"] = draw(st.sampled_from(["", "a" * 5000, "\x7f", "seven", "\xe9"]))
    return path, body, headers


@cache
def paths(model: Model) -> SearchStrategy[str]:
    """Paths of the server, of none, and of what it does not have."""
    parts = st.sampled_from(
        ["v2", "models", model.name, "versions", "1", "infer", "classify", "..", "%00", "%ff", "", "a" * 9000]
    )
    listed = ["/metrics", "/live.json?since=x", "/live.json?since=99999999999999", "/docs", "/openapi.json", "/"]
    listed += [f"/v2/models/{model.name}{end}" for end in ("", "/ready", "/stats", "/config", "/versions/2/infer")]
    return st.lists(parts, max_size=7).map(lambda found: "/" + "/".join(found)) | st.sampled_from(listed)


@st.composite
def images(draw: DrawFn) -> bytes:
    """An image in any format and mode, whole or spoiled."""
    mode, name = draw(st.sampled_from(IMAGES)).split()
    size = (draw(st.sampled_from([1, 2, 7, 64, 500])), draw(st.sampled_from([1, 2, 7, 64, 500])))
    file = io.BytesIO()
    Image.new(mode, size, 0).save(file, name)
    return draw(st.just(file.getvalue()) | spoiled(file.getvalue()))


@st.composite
def messages(draw: DrawFn, model: Model) -> tuple[str, bytes]:
    """A gRPC method and a message."""
    name = draw(sometimes("ModelInfer", st.sampled_from([*METHODS, "None"])))
    kind = draw(st.sampled_from(["near", "near", "near", "spoiled", "bytes"]))
    if kind == "bytes":
        return name, draw(st.binary(max_size=200))
    contents = {
        "int_contents": st.integers(-(2**31), 2**31 - 1),
        "int64_contents": st.integers(-(2**63), 2**63 - 1),
        "uint_contents": st.integers(0, 2**32 - 1),
        "fp32_contents": st.floats(width=32),
        "bool_contents": st.booleans(),
        "bytes_contents": st.binary(max_size=30),
    }
    tensors = []
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2]))):
        tensor = {
            "name": draw(sometimes(model.input, st.sampled_from(["", "text", "\0", "a" * 1000]))),
            "datatype": draw(sometimes("FP32", datatypes)),
            "shape": draw(sometimes(list(model.row.shape), st.lists(sizes, max_size=6))),
        }
        if draw(st.integers(0, 3)) == 0:
            values = draw(st.sampled_from(sorted(contents)))
            tensor["contents"] = {values: draw(st.lists(contents[values], max_size=20))}
        tensors.append(tensor)
    numbers = st.sampled_from(["timeout", "priority", "x"])
    parameter = st.one_of(
        st.fixed_dictionaries({"int64_param": st.sampled_from([0, 1, -1, 10**6, 2**62])}),
        st.fixed_dictionaries({"string_param": st.text(st.characters(codec="utf-8"), max_size=9)}),
        st.fixed_dictionaries({"bool_param": st.booleans()}),
    )
    message = oip.message("ModelInferRequest")(
        model_name=draw(sometimes(model.name, st.sampled_from(["", "none", "a" * 5000]))),
        model_version=draw(sometimes("", st.sampled_from(["1", "99", "x" * 300]))),
        id=draw(st.sampled_from(["", "7", "a" * 5000])),
        inputs=tensors,
        outputs=[{"name": draw(sometimes("output_0", st.just("none")))}] * draw(st.sampled_from([0, 0, 1, 2])),
        parameters=draw(st.dictionaries(numbers, parameter, max_size=2)),
        raw_input_contents=draw(st.just([model.row.tobytes()]) | st.lists(st.binary(max_size=40), max_size=3)),
    ).SerializeToString()
    return name, draw(spoiled(message)) if kind == "spoiled" else message


# --- how it is sent -----------------------------------------------------------------------------------------------


class Sender:
    """Sends them, each on its own connection or call, and notes what became of them."""

    def __init__(self, http_port: int, grpc_target: str, outcomes: Outcomes) -> None:
        self._port, self._outcomes = http_port, outcomes
        self._channel = grpc.insecure_channel(grpc_target)

    def over_http(self, sent: tuple[str, bytes, dict[str, str]]) -> None:
        """A request whose HTTP is sound."""
        path, body, headers = sent
        lines = [f"POST {path} HTTP/1.1", "host: fuzz", f"content-length: {len(body)}", "connection: close"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n"
        self._outcomes.note("http", self._exchange(head + body), sent)

    def over_wire(self, sent: bytes) -> None:
        """Bytes."""
        self._outcomes.note("wire", self._exchange(sent), sent)

    def over_grpc(self, sent: tuple[str, bytes]) -> None:
        """A call, or a stream of one message."""
        name, message = sent
        started_s = time.monotonic()
        try:
            if name == "ModelStreamInfer":
                list(self._channel.stream_stream(f"/{SERVICE}/{name}")(iter([message]), timeout=HANG_S))
            else:
                self._channel.unary_unary(f"/{SERVICE}/{name}")(message, timeout=HANG_S)
            outcome = "OK"
        except grpc.RpcError as error:
            outcome = error.code().name
        self._outcomes.note("grpc", "hang" if time.monotonic() - started_s >= HANG_S else outcome, sent)

    def close(self) -> None:
        self._channel.close()

    def _exchange(self, sent: bytes) -> str:
        try:
            with socket.create_connection(("127.0.0.1", self._port), HANG_S) as connection:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                answer = b""
                while len(answer) < 12 or answer.startswith(b"HTTP/1.1 100"):
                    answer = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
                    part = connection.recv(65536)
                    if not part:
                        break
                    answer += part
        except TimeoutError:
            return "hang"
        except OSError:
            return "closed"
        return answer[9:12].decode("latin-1") if answer else "closed"
