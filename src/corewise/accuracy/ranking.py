"""Metrics of rankings: relevant documents first, and the neighbours of embeddings."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corewise.accuracy.classification import first
from corewise.accuracy.outputs import Array
from corewise.accuracy.pooled import Pooled, share_of
from corewise.common.errors import MetricError, SamplesError

BLOCK = 1024


def ndcg(outputs: Any, labels: Any, *, k: int = 10) -> Pooled:
    """The normalized discounted cumulative gain of the first ``k``, a mean over queries; gain 2^relevance - 1.

    Burges et al., Learning to rank using gradient descent, 2005.

    Args:
        outputs: One score for each sample, (N,) or (N, 1); scores of D documents, (N, D); or embeddings (N, D).
        labels: For one score: (query, relevance) of each sample, (N, 2). For scores of documents: their relevance,
            (N, D). For embeddings: a dict for each sample, ``{"id": ...}`` for a document and ``{"relevant": ids,
            "relevance": numbers}`` for a query, which ranks all documents of the holdout by cosine.
    """
    scores = first(outputs)
    if labels is None:
        raise SamplesError(f"ndcg@{k} needs labels and the samples have none", "add the relevance of documents")
    if all(isinstance(label, Mapping) for label in labels):
        return _ndcg_of_embeddings(scores, labels, k)
    if scores.size == len(scores) and labels.shape == (len(scores), 2):
        return _ndcg_of_pairs(scores.reshape(-1), labels, k)
    if labels.shape != scores.shape or scores.ndim != 2:
        what = f"ndcg@{k} does not understand labels of shape {labels.shape} for outputs of shape {scores.shape}"
        raise SamplesError(what, "give (query, relevance) for each sample, or the relevance of each score")
    gains = np.array([_ndcg(score, relevance, k) for score, relevance in zip(scores, labels, strict=True)])
    return share_of(np.nan_to_num(gains), np.isfinite(gains).astype(np.float64))


def recall(outputs: Any, reference: Any, *, k: int = 10) -> NDArray[np.float64]:
    """The share of each sample's ``k`` nearest others by fp32's embeddings that are so by the candidate's: (N,).

    Args:
        outputs: First array: embeddings (N, D), compared by cosine.
        reference: fp32's outputs.
    """
    ours, theirs = first(reference), first(outputs)
    if ours.dtype == object or ours.ndim != 2 or ours.shape[1] < 2:
        raise MetricError(f"recall@{k} needs embeddings (N, D), not {ours.shape}", "use concordance")
    if len(ours) <= k:
        raise MetricError(f"{len(ours)} samples do not have {k} neighbours", f"give more samples or a number below {k}")
    pairs = zip(_neighbours(ours, k), _neighbours(theirs, k), strict=True)
    return np.array([np.isin(answer, expected).mean() for expected, answer in pairs])


def _neighbours(embeddings: Array, k: int) -> NDArray[np.intp]:
    """Each row's ``k`` nearest other rows by cosine: (N, k)."""
    unit = _unit(embeddings)
    nearest = []
    for start in range(0, len(unit), BLOCK):
        near = unit[start : start + BLOCK] @ unit.T
        rows = np.arange(len(near))
        near[rows, start + rows] = -np.inf
        nearest.append(np.argpartition(-near, k - 1, axis=1)[:, :k])
    return np.concatenate(nearest)


def _unit(embeddings: Array) -> NDArray[np.float64]:
    wide = embeddings.astype(np.float64)
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-300))


def _ndcg(scores: Array, relevance: Array, k: int) -> float:
    """The gain of one query; NaN if nothing is relevant."""
    gains = np.exp2(np.asarray(relevance, np.float64)) - 1
    discounts = 1 / np.log2(np.arange(2, min(k, len(gains)) + 2))
    best = float((np.sort(gains)[::-1][:k] * discounts).sum())
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")[:k]
    return float((gains[order] * discounts).sum()) / best if best else float("nan")


def _ndcg_of_pairs(scores: Array, labels: Array, k: int) -> Pooled:
    """Samples of one query share its weight of 1, so that it counts once however many documents it has."""
    _, members = np.unique(labels[:, 0], return_inverse=True)
    parts, weights = np.zeros(len(scores)), np.zeros(len(scores))
    for query in range(int(members.max()) + 1):
        rows = np.flatnonzero(members == query)
        gain = _ndcg(scores[rows], labels[rows, 1], k)
        if np.isfinite(gain):
            parts[rows], weights[rows] = gain / len(rows), 1 / len(rows)
    pooled = share_of(parts, weights)
    return Pooled(pooled.of_rows, len(scores), members)


def _ndcg_of_embeddings(embeddings: Array, labels: Array, k: int) -> Pooled:
    unit = _unit(embeddings)
    documents = [row for row, label in enumerate(labels) if "relevant" not in label]
    place = {int(labels[row]["id"]): index for index, row in enumerate(documents)}
    parts, weights = np.zeros(len(labels)), np.zeros(len(labels))
    for row, label in enumerate(labels):
        if "relevant" not in label:
            continue
        relevance = np.zeros(len(documents))
        for document, grade in zip(np.ravel(label["relevant"]), np.ravel(label["relevance"]), strict=True):
            if int(document) in place:
                relevance[place[int(document)]] = grade
        gain = _ndcg(unit[documents] @ unit[row], relevance, k)
        if np.isfinite(gain):
            parts[row], weights[row] = gain, 1.0
    if not weights.any():
        raise SamplesError("no query in the holdout has a relevant document there", "keep more samples for the holdout")
    return share_of(parts, weights)
