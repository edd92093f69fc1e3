"""Text Embeddings Inference's API: ``/embed``, ``/similarity``, ``/rerank``, ``/predict``, ``/tokenize``. Pure.

The API is https://huggingface.github.io/text-embeddings-inference; ``POST /`` is what fits the model, as Hugging Face's
endpoints have it. Beside its fields a request may have ``model``, where a server has several that fit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from corewise.pipeline import ClassAnswer, Span, TokenPiece
from corewise.records.pipeline import Activation, TextPipeline
from corewise.samples.texts import Text
from corewise.serving import texts
from corewise.serving.rerank import ranked
from corewise.serving.texts import FieldError, TextRequest, Truncate


class _Cut(msgspec.Struct):
    """What requests say of texts that are too long, and of prompts."""

    truncate: Truncate = None
    truncation_direction: str | None = None
    prompt_name: str | None = None
    model: str | None = None


class _Embed(_Cut, kw_only=True):
    inputs: msgspec.Raw
    normalize: bool = True
    dimensions: int | None = None


class _Inputs(msgspec.Struct):
    inputs: msgspec.Raw


class _Sentences(msgspec.Struct):
    source_sentence: str
    sentences: list[str]


class _Similarity(msgspec.Struct):
    inputs: _Sentences
    parameters: _Cut | None = None


class _Parameters(msgspec.Struct):
    """What Hugging Face's client sends beside a text."""

    top_k: Annotated[int, msgspec.Meta(ge=1)] | None = None
    function_to_apply: Activation | None = None
    aggregation_strategy: Literal["simple", "first"] | None = None
    """Entities are made of words, each with the label of its first token."""
    ignore_labels: list[str] | None = None


class _Predict(_Cut, kw_only=True):
    inputs: str | list[str | list[str]]
    raw_scores: bool = False
    parameters: _Parameters | None = None


class _Rerank(_Cut, kw_only=True):
    query: str
    texts: list[str]
    raw_scores: bool = False
    return_text: bool = False


class _Tokenize(_Cut, kw_only=True):
    inputs: str | list[str]
    add_special_tokens: bool = True


class _Decode(msgspec.Struct):
    ids: msgspec.Raw
    skip_special_tokens: bool = True
    model: str | None = None


_decode_embed = msgspec.json.Decoder(_Embed).decode
_decode_inputs = msgspec.json.Decoder(_Inputs).decode
_decode_similarity = msgspec.json.Decoder(_Similarity).decode
_decode_predict = msgspec.json.Decoder(_Predict).decode
_decode_rerank = msgspec.json.Decoder(_Rerank).decode
_decode_tokenize = msgspec.json.Decoder(_Tokenize).decode
_decode_ids = msgspec.json.Decoder(_Decode).decode


@dataclass(frozen=True, kw_only=True)
class EmbedRequest:
    """Texts to embed."""

    model: str | None
    texts: TextRequest
    normalize: bool = True
    dimensions: int | None = None
    is_similarity: bool = False
    """Whether cosines of the first text with the others are wanted, and no vectors."""


@dataclass(frozen=True, kw_only=True)
class PredictRequest:
    """Texts to classify, or to find entities in."""

    model: str | None
    texts: TextRequest
    is_batch: bool
    """Whether the answer is a list with an answer for each text."""
    is_pipeline: bool = False
    """Whether it comes from Hugging Face's client, which takes the first answer's classes of a list."""
    activation: Activation | None = None
    """What makes scores of what the model gives, in place of its own; ``none``: nothing."""
    top: int | None = None
    ignored: Sequence[str] = ()
    """Labels of entities that are not wanted."""


@dataclass(frozen=True, kw_only=True)
class RankRequest:
    """Texts to rank by how well they answer a query: pairs of the query and each text."""

    model: str | None
    texts: TextRequest
    raw_scores: bool = False
    return_text: bool = False


@dataclass(frozen=True, kw_only=True)
class TokenizeRequest:
    """Texts to tokenize."""

    model: str | None
    items: Sequence[str]
    add_special_tokens: bool = True
    prompt: str | None = None


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """Rows of token ids to make texts of."""

    model: str | None
    ids: Sequence[Sequence[int]]
    skip_special_tokens: bool = True


def embed(body: bytes) -> EmbedRequest:
    """The request of ``/embed`` in a body. As all here it raises ``FieldError``, and ``ProtocolError`` for no JSON."""
    read = texts.decode(body, _decode_embed)
    items, ids = texts.strings_or_ids(read.inputs, "inputs")
    return EmbedRequest(
        model=read.model, texts=_request(read, items, ids), normalize=read.normalize, dimensions=read.dimensions
    )


def similarity(body: bytes) -> EmbedRequest:
    """The request of ``/similarity``: the source sentence is the first text."""
    read = texts.decode(body, _decode_similarity)
    texts.check_count(len(read.inputs.sentences), "inputs.sentences")
    cut = read.parameters or _Cut()
    sentences = [read.inputs.source_sentence, *read.inputs.sentences]
    return EmbedRequest(model=cut.model, texts=_request(cut, sentences), is_similarity=True)


def embed_or_compare(body: bytes) -> EmbedRequest:
    """A request of ``/similarity`` if its ``inputs`` are an object, else one of ``/embed``.

    Hugging Face's client sends both to one address.
    """
    inputs = texts.decode(body, _decode_inputs).inputs
    is_object = bytes(memoryview(inputs)[: texts.MOST_ROOM]).lstrip().startswith(b"{")
    return similarity(body) if is_object else embed(body)


def predict(body: bytes, *, pairs: Callable[[str | None], bool]) -> PredictRequest:
    """The request of ``/predict``; ``pairs`` says whether the model that it names takes pairs.

    ``inputs`` is a text, a pair as a list of two texts, or a list of lists of one or two texts each. A list of texts is
    a pair for a model of pairs, and a batch for others.
    """
    read = texts.decode(body, _decode_predict)
    given = [read.inputs] if isinstance(read.inputs, str) else read.inputs
    is_list = not isinstance(read.inputs, str)
    is_batch = is_list and not (all(isinstance(each, str) for each in given) and pairs(read.model))
    items = [_item(each) for each in given] if is_batch else [_item(given)]
    texts.check_count(len(items), "inputs")
    parameters = read.parameters or _Parameters()
    return PredictRequest(
        model=read.model,
        texts=_request(read, items),
        is_batch=is_batch,
        is_pipeline=read.parameters is not None,
        activation="none" if read.raw_scores else parameters.function_to_apply,
        top=parameters.top_k,
        ignored=parameters.ignore_labels or (),
    )


def rank(body: bytes) -> RankRequest:
    """The request of ``/rerank``."""
    read = texts.decode(body, _decode_rerank)
    texts.check_count(len(read.texts), "texts")
    items = [(read.query, each) for each in read.texts]
    return RankRequest(
        model=read.model, texts=_request(read, items), raw_scores=read.raw_scores, return_text=read.return_text
    )


def tokenize(body: bytes) -> TokenizeRequest:
    """The request of ``/tokenize``."""
    read = texts.decode(body, _decode_tokenize)
    items = [read.inputs] if isinstance(read.inputs, str) else read.inputs
    texts.check_count(len(items), "inputs")
    return TokenizeRequest(
        model=read.model, items=items, add_special_tokens=read.add_special_tokens, prompt=read.prompt_name
    )


def decode_ids(body: bytes) -> DecodeRequest:
    """The request of ``/decode``."""
    read = texts.decode(body, _decode_ids)
    items, ids = texts.strings_or_ids(read.ids, "ids")
    if items:
        raise FieldError("ids", "ids are texts, not numbers", "give token ids")
    return DecodeRequest(model=read.model, ids=ids, skip_special_tokens=read.skip_special_tokens)


def render_vectors(vectors: NDArray[np.float32]) -> bytes:
    """The answer of ``/embed``: float32 (N, D) as a list of lists."""
    return b"[" + b",".join(texts.number_lists(vectors)) + b"]"


def render_token_vectors(answers: Sequence[NDArray[np.float32]]) -> bytes:
    """The answer of ``/embed_all``: float32 (tokens, D) of each text."""
    return b"[" + b",".join(render_vectors(each) for each in answers) + b"]"


def render_similarities(vectors: NDArray[np.float32]) -> bytes:
    """The answer of ``/similarity``: cosines of the first vector with each other one."""
    unit = texts.normalized(vectors)
    return next(texts.number_lists((unit[1:] @ unit[0])[None]))


def render_ranks(asked: RankRequest, scores: NDArray[np.float64]) -> bytes:
    """The answer of ``/rerank``: scores (N,), the highest first."""
    found: list[dict[str, Any]] = []
    for k in ranked(scores):
        found.append({"index": k, "score": float(scores[k])})
        if asked.return_text:
            found[-1]["text"] = asked.texts.items[k][1]
    return msgspec.json.encode(found)


def render_predictions(asked: PredictRequest, answers: Sequence[Any], labels: Sequence[str]) -> bytes:
    """The answer of ``/predict``: classes with their scores, the highest first, or spans, for each text."""
    found = [_prediction(answer, labels, asked.ignored)[: asked.top] for answer in answers]
    is_list = asked.is_batch or (asked.is_pipeline and isinstance(answers[0], ClassAnswer | float))
    return msgspec.json.encode(found if is_list else found[0])


def render_tokens(rows: Sequence[Sequence[TokenPiece]]) -> bytes:
    """The answer of ``/tokenize``."""
    return msgspec.json.encode(
        [
            [
                {
                    "id": each.id,
                    "text": each.text,
                    "special": each.is_special,
                    "start": None if each.is_special else each.start,
                    "stop": None if each.is_special else each.end,
                }
                for each in row
            ]
            for row in rows
        ]
    )


def info(
    name: str,
    sha: str,
    precision: str,
    pipeline: TextPipeline,
    *,
    version: str,
    batch: int,
    tokens: int,
    requests: int,
    tokenizers: int,
) -> dict[str, Any]:
    """The answer of ``/info``, with all fields that the API's description requires.

    Args:
        name: The model's name.
        sha: A hash that identifies its version.
        precision: The precision of its numbers.
        pipeline: How it takes texts.
        version: The server's version.
        batch: The most rows of a call.
        tokens: The most tokens of a call.
        requests: How many requests may be on their way to a model.
        tokenizers: How many threads tokenize.
    """
    classes: dict[str, Any] = {
        "id2label": {str(k): label for k, label in enumerate(pipeline.labels)},
        "label2id": {label: k for k, label in enumerate(pipeline.labels)},
    }
    kinds: dict[str, dict[str, Any]] = {
        "vectors": {"embedding": {"pooling": pipeline.pooling}},
        "scores": {"reranker" if pipeline.pairs else "classifier": classes},
        "classes": {"classifier": classes},
        "tokens": {"classifier": classes},
    }
    return {
        "model_id": name,
        "model_sha": sha,
        "model_dtype": precision,
        "model_type": kinds[pipeline.task],
        "max_concurrent_requests": requests,
        "max_input_length": pipeline.max_length,
        "max_batch_tokens": max(tokens, pipeline.max_length),
        "max_batch_requests": batch,
        "max_client_batch_size": texts.MOST_TEXTS,
        "auto_truncate": False,
        "tokenization_workers": tokenizers,
        "prompts": sorted(pipeline.prompts),
        "version": version,
    }


def error(message: str, status: int) -> dict[str, Any]:
    """An error's body."""
    kinds = {503: "Overloaded", 500: "Backend"}
    return {"error": message, "error_type": kinds.get(status, "Validation")}


def _request(cut: _Cut, items: Sequence[Text], ids: Sequence[Sequence[int]] = ()) -> TextRequest:
    side = texts.side(cut.truncate, cut.truncation_direction)
    return TextRequest(items=items, ids=ids, truncate=side, prompt=cut.prompt_name)


def _item(given: str | Sequence[str | list[str]]) -> Text:
    """One text or pair."""
    if isinstance(given, str):
        return given
    parts = [each for each in given if isinstance(each, str)]
    if len(parts) != len(given) or not 1 <= len(parts) <= 2:
        raise FieldError("inputs", "inputs has an item that is neither a text nor a pair", "give one or two texts each")
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def _prediction(answer: Any, labels: Sequence[str], ignored: Sequence[str]) -> list[dict[str, Any]]:
    if isinstance(answer, ClassAnswer):
        scores = sorted(answer.probabilities.items(), key=lambda each: -each[1])
        return [{"score": score, "label": label} for label, score in scores]
    if isinstance(answer, float):
        return [{"score": answer, "label": labels[0] if labels else "LABEL_0"}]
    spans: Sequence[Span] = answer
    return [
        {
            "entity_group": each.label,
            "score": each.probability,
            "word": each.text,
            "start": each.start,
            "end": each.end,
        }
        for each in spans
        if each.label not in ignored
    ]
