"""Requests of short texts in one call, whatever their lengths: several texts share a row where that takes less time.

If a call had texts of one length only, few of those that wait could share it, and most calls would have another shape
than the call before. OpenVINO prepares for each new shape: 1.5 ms for MiniLM, as long as a text of 32 tokens takes
(Zen 5). Packed rows have one length.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corewise.artifact import Manifest
from corewise.artifact.texts import call_cost, call_limits
from corewise.batching import Arrays, OneBatch, Run
from corewise.pipeline import Call, Tokens, fill
from corewise.pipeline.packing import PackedCall, pack_few, packed_arrays, unpacked
from corewise.records.build import Plan
from corewise.records.pipeline import Packing, TextPipeline
from corewise.serving.text import BUCKET

MOST_ROWS = 4
"""The most texts of a request that shares calls with texts of other lengths: more of them would hold the others up."""
SHORT = "short texts"
"""The group of all requests that may be packed."""


class ShortTexts(OneBatch):
    """Joins requests of short texts (``batching.Joining``); all others share calls with those of their shapes."""

    def __init__(
        self,
        pipeline: TextPipeline,
        packing: Packing,
        manifest: Manifest,
        plan: Plan,
        collate: Callable[[Sequence[Tokens], int], Arrays],
        run_packed: Callable[[int, Arrays], Sequence[NDArray[Any]]],
    ) -> None:
        """``collate`` is that of the pipeline's ``TextEncoder``.

        ``run_packed`` runs a call of the packed program on the cores of the instance with the given number.
        """
        self._collate = collate
        self._pipeline, self._packing, self._run_packed = pipeline, packing, run_packed
        roles = [each.role for each in pipeline.inputs]
        self._ids, self._mask = roles.index("ids"), roles.index("mask")
        # Raw tensors may have more tokens than texts do, and calls have no room for them.
        self._most_tokens = min(packing.tokens, pipeline.max_length)
        self._cost = call_cost(manifest, plan)
        self._limits = call_limits(plan, self._cost)

    def group(self, inputs: Arrays) -> Hashable:
        """``SHORT`` for a few texts that each fit a packed row; what the model is given must be ids and then padding.

        The mask of raw tensors may have anything: holes, padding on the left, weights, or another length than the ids.
        """
        ids, mask = inputs[self._ids], inputs[self._mask]
        if len(ids) > MOST_ROWS or ids.shape[1] > self._most_tokens or ids.shape != mask.shape:
            return super().group(inputs)
        is_text = mask == 1
        begins_with_text = is_text[:, 0].all() and (is_text[:, 1:] <= is_text[:, :-1]).all()
        is_plain = begins_with_text and (is_text | (mask == 0)).all()
        return SHORT if is_plain else super().group(inputs)

    def answer(self, run: Run, instance: int, requests: Sequence[Arrays]) -> list[list[NDArray[Any]]]:
        """Each request's vectors."""
        if len(requests) == 1 or self.group(requests[0]) != SHORT:
            return super().answer(run, instance, requests)
        rows = [
            row[: np.count_nonzero(is_text)]
            for inputs in requests
            for row, is_text in zip(inputs[self._ids], inputs[self._mask], strict=True)
        ]
        vectors: list[Any] = [None] * len(rows)
        for call in pack_few([len(row) for row in rows], self._fill, self._cost, self._packing):
            found = self._packed(instance, rows, call) if isinstance(call, PackedCall) else self._usual(run, rows, call)
            for place, vector in zip(call.places, found, strict=True):
                vectors[place] = vector
        whole, start, answers = np.stack(vectors), 0, []
        for inputs in requests:
            answers.append([whole[start : start + len(inputs[0])]])
            start += len(inputs[0])
        return answers

    def _fill(self, lengths: Sequence[int]) -> list[Call]:
        return fill(lengths, limits=self._limits, cost=self._cost, multiple=BUCKET)

    def _packed(self, instance: int, rows: Sequence[NDArray[Any]], call: PackedCall) -> NDArray[Any]:
        packing = replace(self._packing, rows=len(call.rows))
        ids = [[rows[place] for place in row] for row in call.rows]
        vectors, *_ = self._run_packed(instance, packed_arrays(ids, packing, self._pipeline.pad_id))
        return unpacked(call, vectors)

    def _usual(self, run: Run, rows: Sequence[NDArray[Any]], call: Call) -> NDArray[Any]:
        tokens = [Tokens(rows[place], np.zeros_like(rows[place])) for place in call.places]
        vectors, *_ = run(self._collate(tokens, min(call.tokens, self._pipeline.max_length)))
        return vectors
