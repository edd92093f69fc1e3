"""Requests of texts, whatever API they come by: read from JSON into one form, within limits. Pure.

``openai``, ``tei`` and ``rerank`` know each API's fields and answers; what they share is here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from corewise.samples.texts import Text, count_characters
from corewise.serving.protocol import ProtocolError, not_json

BODY_BYTES = 8 * 2**20
"""The largest body of such a request. A parser needs up to 12 times the bytes of a hostile one."""
TOKENIZED_BYTES = 256 * 1024
"""The largest body whose tokens are the answer: each takes a hundred bytes in JSON."""
MOST_TEXTS = 8192
"""How many texts a request may have. They run in several calls (``text_calls``)."""
PIECE_TEXTS, PIECE_CHARACTERS = 256, 64 * 1024
"""What is tokenized at once: before other requests have their turn, and before its tokens count."""
MOST_ROOM = 64
"""Characters of a wrong value that an error repeats."""

Side = Literal["right", "left"]
KINDS = {b"[[": "rows", **{b"[%c" % digit: "ids" for digit in b"-0123456789"}}
"""What a list in JSON has, by what it begins with; texts, if it is none of these."""

T = TypeVar("T")
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Truncate = bool | str | None
"""True and false as Text Embeddings Inference has them; NONE, START and END as Cohere has them."""


class FieldError(ProtocolError):
    """A field of a request that is wrong; OpenAI's errors name it."""

    def __init__(self, field: str, what: str, fix: str = "", status: int = 400) -> None:
        super().__init__(what, fix, status)
        self.field = field


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """What a model is asked about texts: ``items``, or rows of token ids in their place."""

    items: Sequence[Text] = ()
    ids: Sequence[Sequence[int]] = ()
    """Token ids as the model takes them, special ones included."""
    truncate: Side | None = None
    """Where texts that are longer than the model takes are cut; ``None``: they are refused."""
    prompt: str | None = None
    """The name of the prompt that goes before each text."""

    def __len__(self) -> int:
        return len(self.items) or len(self.ids)


class Piece(NamedTuple):
    """Some texts of a request."""

    start: int
    asked: TextRequest
    characters: int


def pieces(asked: TextRequest) -> Iterator[Piece]:
    """The request in parts of ``PIECE_TEXTS`` texts and about ``PIECE_CHARACTERS`` characters at most."""
    if len(asked) == 1:
        yield Piece(0, asked, count_characters(asked.items[0]) if asked.items else 0)
        return
    start = characters = 0
    for k in range(len(asked)):
        # Token ids are tokenized already.
        characters += count_characters(asked.items[k]) if asked.items else 0
        is_last = k + 1 == len(asked)
        if is_last or characters >= PIECE_CHARACTERS or k + 1 - start == PIECE_TEXTS:
            stop = k + 1
            part = replace(asked, items=asked.items[start:stop], ids=asked.ids[start:stop])
            yield Piece(start, part, characters)
            start, characters = stop, 0


def decode(body: bytes, read: Callable[[bytes], T]) -> T:
    """The body as a msgspec decoder reads it. Raises ``FieldError`` with the field that is wrong."""
    try:
        return read(body)
    except RecursionError as error:
        raise ProtocolError("the request nests too deeply") from error
    except msgspec.ValidationError as error:
        what, _, place = " ".join(str(error).split())[:400].partition(" - at `$")
        named = what.split("`")[1] if what.startswith("Object missing required field") else ""
        field = place.rstrip("`").lstrip(".") or named
        where = f"{field}: " if place and field else ""
        raise FieldError(field.partition("[")[0], f"the request does not fit: {where}{what}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"the request is not JSON: {not_json(error, body)}") from error


def strings_or_ids(raw: msgspec.Raw, field: str) -> tuple[list[str], list[list[int]]]:
    """A text, texts, token ids or rows of them: the texts, or the rows. Raises ``FieldError``."""
    text = b"".join(bytes(memoryview(raw)[:MOST_ROOM]).split())
    kind = "text" if text[:1] == b'"' else KINDS.get(text[:2], "texts")
    if text.startswith(b"[]"):
        raise FieldError(field, f"{field} is empty", "give at least one text")
    found: Any = decode(bytes(raw), _decoder(kind, field))[field]
    if kind in ("text", "ids"):
        found = [found]
    check_count(len(found), field)
    if kind in ("ids", "rows"):
        if not all(found):
            raise FieldError(field, f"{field} has a row without token ids", "give at least one token id each")
        return [], found
    return found, []


@cache
def _decoder(kind: str, field: str) -> Any:
    types = {"text": str, "texts": list[str], "ids": list[TokenId], "rows": list[list[TokenId]]}
    read = msgspec.json.Decoder(types[kind]).decode

    def decoded(raw: bytes) -> Any:
        try:
            return {field: read(raw)}
        except msgspec.ValidationError as error:
            what, _, place = str(error).partition(" - at `$")
            raise msgspec.ValidationError(f"{what} - at `$.{field}{place.rstrip('`')}`") from error

    return decoded


def check_count(count: int, field: str) -> None:
    """Raise ``FieldError`` unless a request has 1 to ``MOST_TEXTS`` texts."""
    if not count:
        raise FieldError(field, f"{field} is empty", "give at least one text")
    if count > MOST_TEXTS:
        raise FieldError(
            field, f"{field} has {count} texts, but at most {MOST_TEXTS} are allowed", "send them in several requests"
        )


def side(truncate: Truncate, direction: str | None = None) -> Side | None:
    """Where texts are cut, by an API's ``truncate`` and ``truncation_direction``. Raises ``FieldError``."""
    sides: dict[str, Side] = {"end": "right", "right": "right", "start": "left", "left": "left"}
    if direction is not None and direction.lower() not in ("left", "right"):
        raise FieldError("truncation_direction", "truncation_direction is neither Left nor Right")
    if not isinstance(truncate, str):
        return sides[(direction or "right").lower()] if truncate else None
    if truncate.lower() == "none":
        return None
    if truncate.lower() not in ("start", "end"):
        raise FieldError("truncate", f"truncate is {truncate[:MOST_ROOM]!r}", "give true, false, NONE, START or END")
    return sides[truncate.lower()]


def number_lists(vectors: NDArray[np.float32]) -> Iterator[bytes]:
    """Each row of float32 (N, D) as a JSON list, with the fewest digits that say the same float32."""
    for vector in np.ascontiguousarray(vectors, np.float32):
        yield orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY)


def shortened(vectors: NDArray[np.float32], dimensions: int | None) -> NDArray[np.float32]:
    """The first ``dimensions`` of each row (N, D), at length 1; all of them as they are."""
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    return normalized(vectors[:, :dimensions])


def normalized(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows (N, D) at length 1; a row of zeros stays as it is."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1), np.float32)
