"""``/v1/rerank`` as Cohere and Jina have it: documents in the order in which they answer a query. Pure.

https://docs.cohere.com/reference/rerank and https://jina.ai/reranker: both take the same fields, and ignore each
other's. A document is a text or an object with texts, of which Cohere's ``rank_fields`` says which count. Long
documents are cut at their end, as both do, unless ``truncate`` says otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from corewise.serving import texts
from corewise.serving.texts import FieldError, TextRequest, Truncate

MOST_CHARACTERS = 400
"""Characters of an error that repeats names of fields."""

Document = str | dict[str, Any]
"""A text, or an object that has texts."""


class _Body(msgspec.Struct):
    query: str
    documents: list[Document]
    model: str | None = None
    top_n: Annotated[int, msgspec.Meta(ge=1)] | None = None
    return_documents: bool | None = None
    rank_fields: list[str] | None = None
    truncate: Truncate = None


_decode_body = msgspec.json.Decoder(_Body).decode


@dataclass(frozen=True, kw_only=True)
class RerankRequest:
    """Documents to rank."""

    model: str | None
    texts: TextRequest
    """Pairs of the query and each document."""
    documents: Sequence[Document] = ()
    """As they were given."""
    top: int | None = None
    """How many are returned; ``None``: all."""
    return_documents: bool = False


def parse(body: bytes) -> RerankRequest:
    """The request in a body. Raises ``FieldError``, and ``ProtocolError`` for what is no JSON."""
    read = texts.decode(body, _decode_body)
    texts.check_count(len(read.documents), "documents")
    fields = read.rank_fields or ("text",)
    items = [(read.query, _text(document, number, fields)) for number, document in enumerate(read.documents)]
    side = texts.side(True if read.truncate is None else read.truncate)
    return RerankRequest(
        model=read.model,
        texts=TextRequest(items=items, truncate=side),
        documents=read.documents,
        top=read.top_n,
        return_documents=bool(read.return_documents),
    )


def render(asked: RerankRequest, model: str, name: str, scores: NDArray[np.float64], tokens: int) -> bytes:
    """The answer's body: scores (N,) between 0 and 1, the highest first; ``name`` is the request's id."""
    results: list[dict[str, Any]] = []
    for k in ranked(scores)[: asked.top]:
        results.append({"index": k, "relevance_score": float(scores[k])})
        if asked.return_documents:
            document = asked.documents[k]
            results[-1]["document"] = {"text": document} if isinstance(document, str) else document
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return msgspec.json.encode({"id": name, "model": model, "results": results, "usage": usage})


def _text(document: Document, number: int, fields: Sequence[str]) -> str:
    """What is ranked of a document: the text itself, or those of an object's fields that it has, one after another."""
    if isinstance(document, str):
        return document
    found = [document[field] for field in fields if field in document]
    if not found or not all(isinstance(each, str) for each in found):
        what = "has none of the fields" if not found else "has something that is not a text among the fields"
        raise FieldError(
            "documents",
            f"documents[{number}] {what} {', '.join(fields)}"[:MOST_CHARACTERS],
            "give texts, or objects whose rank_fields are texts",
        )
    return "\n".join(found)


def ranked(scores: NDArray[np.float64]) -> Sequence[int]:
    """The places of scores (N,), the highest first; equal ones in their order."""
    order: list[int] = np.argsort(-scores, kind="stable").tolist()
    return order


def error(message: str) -> dict[str, Any]:
    """An error's body: Cohere's clients read ``message``, Jina's ``detail``."""
    return {"message": message, "detail": message}
