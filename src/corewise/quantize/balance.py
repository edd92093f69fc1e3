"""Outputs with every group of channels on one scale, so that an error counts by what it does to its own group.

A detector's boxes in pixels have a hundred million times the power of its scores. Summed as they are, errors of the
scores vanish: no correction would be chosen for them, and no layer of their branch would return to floating point.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corewise.accuracy.groups import Layout, layouts
from corewise.accuracy.outputs import Outputs


class Balance:
    """Scales outputs by the groups that reference outputs have (``accuracy.groups``); one group stays as it is."""

    def __init__(self, references: Sequence[Sequence[Any]]) -> None:
        """``references`` are the outputs of the unchanged program, batch by batch."""
        floating = [k for k, output in enumerate(references[0]) if isinstance(output, Tensor) and _has_rows(output)]
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}
        if not floating:
            return
        outputs = Outputs.gather([[batch[index].numpy() for index in floating] for batch in references])
        of_outputs = layouts(outputs.leaves)
        if sum(len(layout.groups) for layout in of_outputs) > 1:
            for index, layout, output in zip(floating, of_outputs, outputs.leaves, strict=True):
                self._weights[index] = _weights(layout, output)

    def __call__(self, outputs: Sequence[Any]) -> tuple[Any, ...]:
        """The outputs of one batch: each group centred, and divided by its scale."""
        return tuple(self._scaled(index, output) for index, output in enumerate(outputs))

    def _scaled(self, index: int, output: Any) -> Any:
        if index not in self._weights:
            return output
        mean, weight = self._weights[index]
        return (output - mean.to(output.dtype)) * weight.to(output.dtype)


def _has_rows(output: Tensor) -> bool:
    return output.is_floating_point() and output.dim() > 0 and output.numel() > 0


def _weights(layout: Layout, output: Any) -> tuple[Tensor, Tensor]:
    """The mean and one over the root of the group's power for each channel, in shapes that go with one sample's."""
    power = layout.energies(output, output).power()
    weights = np.ones(len(power))
    for group in layout.groups:
        weights[group] = 1 / np.sqrt(max(float(power[group].sum()), 1e-30))
    assert layout.mean is not None
    channels = layout.mean.shape[2]
    shape = [1] * layout.dimensions
    if layout.axis is not None:
        shape[layout.axis] = channels
    # A mean for each channel will do: what is constant at a position cancels in every difference.
    mean = layout.mean.mean(axis=(0, 1, 3)) if layout.axis is not None else np.zeros(1)
    return torch.from_numpy(np.asarray(mean).reshape(shape)), torch.from_numpy(weights.reshape(shape))
