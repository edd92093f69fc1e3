"""Requests of short texts in one call, whatever their lengths: several texts share a row where that takes less time.

In calls of one length each, few of the texts that wait go together, and OpenVINO prepares nearly every call anew, as it
has another shape than the one before: 1.5 ms for MiniLM, as much as a text of 32 tokens (Zen 5). Packed rows have one
length.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corewise.artifact import Manifest
from corewise.artifact.texts import call_cost, call_limits
from corewise.batching import Arrays, OneBatch, Run
from corewise.pipeline import Call, fill
from corewise.pipeline.packing import PackedCall, pack_few, packed_arrays, unpacked
from corewise.records.build import Plan
from corewise.records.pipeline import Packing, TextPipeline
from corewise.serving.text import BUCKET

MOST_ROWS = 4
"""Texts of a request whose calls others may join: those of a long request would hold them up."""
SHORT = "short texts"


class ShortTexts(OneBatch):
    """Joins requests of short texts (``batching.Joining``); all others share calls with those of their shapes."""

    def __init__(
        self,
        pipeline: TextPipeline,
        packing: Packing,
        manifest: Manifest,
        plan: Plan,
        run_packed: Callable[[int, Arrays], Sequence[NDArray[Any]]],
    ) -> None:
        """``run_packed`` runs a packed call beside the instance of a number."""
        self._pipeline, self._packing, self._run_packed = pipeline, packing, run_packed
        self._roles = [each.role for each in pipeline.inputs]
        self._cost = call_cost(manifest, plan)
        self._limits = call_limits(plan, self._cost)

    def group(self, inputs: Arrays) -> Hashable:
        """``SHORT`` for a few texts that fit a packed row each, and are nothing but ids before padding."""
        if len(inputs[0]) > MOST_ROWS or inputs[0].shape[1] > self._packing.tokens:
            return super().group(inputs)
        mask = inputs[self._roles.index("mask")] != 0
        starts_with_its_text = mask[:, 0].all() and (mask[:, 1:] <= mask[:, :-1]).all()
        return SHORT if starts_with_its_text else super().group(inputs)

    def answer(self, run: Run, instance: int, requests: Sequence[Arrays]) -> list[list[NDArray[Any]]]:
        """Each request's vectors."""
        if len(requests) == 1 or self.group(requests[0]) != SHORT:
            return super().answer(run, instance, requests)
        ids, mask = (self._roles.index(role) for role in ("ids", "mask"))
        rows = [
            row[: np.count_nonzero(known)]
            for inputs in requests
            for row, known in zip(inputs[ids], inputs[mask], strict=True)
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
        size = len(call.places), min(call.tokens, self._pipeline.max_length)
        arrays = [
            np.full(size, self._pipeline.pad_id if each.role == "ids" else 0, each.dtype)
            for each in self._pipeline.inputs
        ]
        for number, place in enumerate(call.places):
            for array, role in zip(arrays, self._roles, strict=True):
                array[number, : len(rows[place])] = rows[place] if role == "ids" else 1
        vectors, *_ = run(arrays)
        return vectors
