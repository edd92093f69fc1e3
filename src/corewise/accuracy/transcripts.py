"""Error rates of transcripts: words and characters, from token ids or from scores of tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from corewise.accuracy.classification import first
from corewise.accuracy.outputs import Array
from corewise.accuracy.pooled import Pooled, share_of
from corewise.common.errors import MissingExtra, SamplesError


def cer(outputs: Any, labels: Any) -> Pooled:
    """Edits from the transcripts to the labels over the labels' length; tokens are characters. Lower is better.

    Args:
        outputs: First array: token ids (N, T), or scores of tokens (N, T, V), whose best ones are taken. Where the
            most frequent of these is in no label, it is the blank of CTC: repeats and blanks are then removed.
        labels: Token ids of each sample, integers of varying length; negative ones do not count. A dict's ``ids``.
    """
    truth = [_ids(label) for label in _given("cer", labels)]
    return _error_rate("cer", decode_transcripts(first(outputs), truth), truth)


def wer(outputs: Any, labels: Any) -> Pooled:
    """``cer`` with words in place of characters.

    Args:
        outputs: As ``cer`` takes them.
        labels: A dict for each sample: ``{"ids": token ids, "separator": the token between words}``.
    """
    given = _given("wer", labels)
    if not all(isinstance(label, Mapping) and "separator" in label for label in given):
        fix = 'give each label as {"ids": ..., "separator": ...}, or use cer'
        raise SamplesError("wer needs to know which token stands between words", fix)
    truth = [_ids(label) for label in given]
    separators = [int(label["separator"]) for label in given]
    answers = decode_transcripts(first(outputs), truth)
    split = [[_words(ids, s) for ids, s in zip(texts, separators, strict=True)] for texts in (answers, truth)]
    return _error_rate("wer", *split)


def decode_transcripts(tokens: Array, truth: Sequence[Sequence[int]]) -> list[list[int]]:
    """The token ids of each sample, without the blanks and repeats of CTC and without padding at the end."""
    known = {token for ids in truth for token in ids}
    rows = [np.asarray(row) for row in tokens]
    scored = rows[0].ndim == 2
    ids = [row.argmax(axis=-1) if scored else row.astype(np.int64) for row in rows]
    if not scored:
        return [_without_padding(row.tolist(), known) for row in ids]
    counts = np.bincount(np.concatenate(ids))
    blank = int(counts.argmax())
    if blank in known:
        return [row.tolist() for row in ids]
    kept = [row[np.r_[True, row[1:] != row[:-1]] & (row != blank)] for row in ids]
    return [row.tolist() for row in kept]


def _without_padding(ids: list[int], known: set[int]) -> list[int]:
    end = len(ids)
    while end and ids[end - 1] == ids[-1] and ids[-1] not in known:
        end -= 1
    return ids[:end]


def _given(metric: str, labels: Any) -> Any:
    if labels is None:
        raise SamplesError(f"{metric} needs labels and the samples have none", "add the token ids of the transcripts")
    return labels


def _ids(label: Any) -> list[int]:
    ids = np.ravel(label["ids"] if isinstance(label, Mapping) else label)
    if ids.dtype.kind not in "iu":
        raise SamplesError(
            f"a transcript has dtype {ids.dtype}", "give integer token ids, or a metric of your own that decodes"
        )
    return [int(token) for token in ids if token >= 0]


def _words(ids: Sequence[int], separator: int) -> list[tuple[int, ...]]:
    words: list[list[int]] = [[]]
    for token in ids:
        if token == separator:
            words.append([])
        else:
            words[-1].append(token)
    return [tuple(word) for word in words if word]


def _error_rate(metric: str, answers: Sequence[Any], truth: Sequence[Any]) -> Pooled:
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise MissingExtra("rapidfuzz", "metrics", f"the metric {metric}") from None
    edits = [Levenshtein.distance(ours, theirs) for ours, theirs in zip(answers, truth, strict=True)]
    return share_of(np.array(edits, np.float64), np.array([len(text) for text in truth], np.float64))
