"""OpenAI's ``/v1/embeddings`` and ``/v1/models``: requests, answers and errors. Pure.

The API is https://platform.openai.com/docs/api-reference/embeddings. Beside its fields a request may have ``truncate``
and ``prompt_name``, which clients send as ``extra_body``; other fields are ignored, as ``user`` is.
"""

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from corewise.serving import texts
from corewise.serving.texts import TextRequest, Truncate

Encoding = Literal["float", "base64"]


class _Body(msgspec.Struct):
    input: msgspec.Raw
    model: str | None = None
    encoding_format: Encoding | None = None
    dimensions: int | None = None
    truncate: Truncate = None
    prompt_name: str | None = None


_decode_body = msgspec.json.Decoder(_Body).decode


@dataclass(frozen=True, kw_only=True)
class EmbeddingsRequest:
    """What is embedded, and how the vectors are wanted."""

    model: str | None
    """``None``: the only one that embeds."""
    texts: TextRequest
    encoding: Encoding = "float"
    dimensions: int | None = None


def parse(body: bytes) -> EmbeddingsRequest:
    """The request in a body. Raises ``FieldError``, and ``ProtocolError`` for what is no JSON."""
    read = texts.decode(body, _decode_body)
    items, ids = texts.strings_or_ids(read.input, "input")
    side = texts.side(read.truncate)
    return EmbeddingsRequest(
        model=read.model,
        texts=TextRequest(items=items, ids=ids, truncate=side, prompt=read.prompt_name),
        encoding=read.encoding_format or "float",
        dimensions=read.dimensions,
    )


def render(asked: EmbeddingsRequest, model: str, vectors: NDArray[np.float32], tokens: int) -> bytes:
    """The answer's body: vectors float32 (N, D), and how many tokens the model read."""
    head = msgspec.json.encode(
        {"object": "list", "model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    )
    if asked.encoding == "base64":
        little = np.ascontiguousarray(vectors, "<f4")
        written: Iterator[bytes] = (b'"' + base64.b64encode(row.data) + b'"' for row in little)
    else:
        written = texts.number_lists(vectors)
    rows = (b'{"object":"embedding","index":%d,"embedding":%s}' % (k, row) for k, row in enumerate(written))
    return b"".join((head[:-1], b',"data":[', b",".join(rows), b"]}"))


def model_entry(name: str, created: str) -> dict[str, Any]:
    """A model as ``/v1/models`` lists it; ``created`` is a time in ISO 8601."""
    try:
        seconds = int(datetime.fromisoformat(created).timestamp())
    except ValueError:
        seconds = 0
    return {"id": name, "object": "model", "created": seconds, "owned_by": "corewise"}


def error(message: str, status: int, field: str | None = None) -> dict[str, Any]:
    """An error's body."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    codes = {401: "invalid_api_key", 413: "request_too_large", 503: "overloaded"}
    if field == "model":
        codes[404] = "model_not_found"
    return {"error": {"message": message, "type": kind, "param": field, "code": codes.get(status)}}
