"""The groups of output channels that are judged each on its own, found from fp32's outputs.

One array may hold quantities of different scale: a detector's boxes in pixels beside scores in 0..1, a few large
channels of a transformer beside hundreds of small ones. One figure for all of them says nothing about the small ones.
Channels are therefore grouped by their scale, and each group is centred on fp32's mean over samples, so that a large
constant part cannot hide an error in what varies.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import log10, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corewise.accuracy.outputs import Array, kind

GAP = 8.0
"""Channels belong to different groups where no channel's scale lies between two scales of this ratio."""
FEWEST_CHANNELS = 0.05
"""A group of small scale with a smaller share of the channels is no quantity of its own but channels that are seldom
used, and joins the next larger group."""
CONSTANT = 0.01
"""Variation below this share of a channel's magnitude is no signal: rounding to bf16 alone makes an error of 0.2 %."""
NEGLIGIBLE = 0.01
"""A channel with a smaller share of its group's mean power is not judged alone."""
FEWEST_SAMPLES = 20.0
"""A channel whose signal comes from fewer samples, such as the probability of a class that the holdout shows once, is
not judged alone: a single answer would decide."""
FEWEST_LOST = 5.0
"""A channel whose signal comes from at least this many samples is judged alone if it is lost in all of them."""
MOST_VALUES = 256
"""Integer outputs with no more values, such as maps of classes, are judged by value too."""
BLOCK_ELEMENTS = 2**22
SCANNED_ELEMENTS = 2**24
"""The layout of a larger output is found from some of its rows."""

Channels = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Energies:
    """Sums of squares over all positions of each sample and channel: float64 arrays (N, K).

    For integer outputs ``signal`` counts values and ``error`` those that differ.
    """

    signal: NDArray[np.float64]
    """Energy of fp32, centred on its mean over samples."""
    candidate: NDArray[np.float64]
    """Energy of the candidate, centred on fp32's mean over samples."""
    error: NDArray[np.float64]
    raw: NDArray[np.float64]
    """Energy of fp32, not centred."""
    raw_candidate: NDArray[np.float64]

    def of(self, channels: Channels) -> "Energies":
        """The sums over some channels: (N, 1) each."""
        parts = (self.signal, self.candidate, self.error, self.raw, self.raw_candidate)
        return Energies(*(part[:, channels].sum(axis=1, keepdims=True) for part in parts))

    def carrying_samples(self) -> NDArray[np.float64]:
        """From how many samples each channel's signal comes, (K,): (sum of energies)^2 / sum of their squares."""
        squares = np.square(self.signal).sum(axis=0)
        return np.asarray(np.square(self.signal.sum(axis=0)) / np.where(squares > 0, squares, 1.0))

    def power(self) -> NDArray[np.float64]:
        """The signal of each channel over all samples, at least ``CONSTANT`` of its magnitude: (K,)."""
        samples = len(self.signal)
        signal = self.signal.sum(axis=0) * (samples / (samples - 1) if samples > 1 else 1.0)
        return np.asarray(np.maximum(signal, CONSTANT**2 * self.raw.sum(axis=0)))


@dataclass(frozen=True, eq=False)
class Layout:
    """How one output is judged: which axis counts its channels, and which channels belong together."""

    name: str
    axis: int | None
    """The axis of the output (N, ...) that counts channels; ``None`` where the output is taken as a whole."""
    mean: Array | None
    """fp32's mean over samples, in the shape of a block (1, before, K, after); ``None`` for integer outputs."""
    groups: tuple[Channels, ...]
    dimensions: int
    """Dimensions of the output, samples included."""
    values: NDArray[Any] | None = None
    """All values of an integer output that has few: each is a channel."""
    across: "Layout | None" = None
    """The same by position, for an output (N, positions, channels)."""

    def named(self, channels: Channels) -> str:
        """The channels in Python's notation, for example ``logits[:, 4:84]``."""
        count = sum(len(group) for group in self.groups)
        if len(channels) == count:
            return self.name
        if self.values is not None:
            return f"{self.name} == {self.values[channels[0]]}"
        if self.axis is None:
            return self.name
        runs = np.split(channels, np.flatnonzero(np.diff(channels) > 1) + 1)
        words = [str(run[0]) if len(run) == 1 else f"{run[0]}:{run[-1] + 1}" for run in runs]
        shown = ", ".join(words[:3]) + (f", and {len(words) - 3} more" if len(words) > 3 else "")
        before = "..., " if 1 < self.axis == self.dimensions - 1 else ":, " * self.axis
        return f"{self.name}[{before}{shown}]"

    def energies(self, reference: Array, candidate: Array) -> Energies:
        """The sums of squares of each sample and channel."""
        parts = [self._of_block(r, c) for r, c in _pairs(reference, candidate)]
        return Energies(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _of_block(self, reference: Array, candidate: Array) -> tuple[NDArray[np.float64], ...]:
        if self.mean is None:
            size, differing = self._counted(reference, candidate)
            nothing = np.zeros_like(size)
            return size, nothing, differing, nothing, nothing
        known = np.isfinite(real(reference))
        r, c = (np.where(known, real(array), 0) for array in (reference, candidate))
        mean = self.mean.astype(r.dtype)
        r, c = block(r, self.axis), block(c, self.axis)
        known = block(known, self.axis)
        centred, candidate_centred = (np.where(known, array - mean, 0) for array in (r, c))
        return tuple(_squares(part) for part in (centred, candidate_centred, c - r, r, c))

    def _counted(self, reference: Array, candidate: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """How often each row of integers has each value, and how often the candidate then has another one."""
        rows, count = len(reference), 1 if self.values is None else len(self.values)
        ours, theirs = (array.reshape(rows, -1) for array in (reference, candidate))
        channel = np.zeros(ours.shape, np.intp) if self.values is None else np.searchsorted(self.values, ours)
        places = (np.minimum(channel, count - 1) + count * np.arange(rows)[:, None]).ravel()
        sizes, differing = (
            np.bincount(chosen, minlength=rows * count).astype(np.float64).reshape(rows, count)
            for chosen in (places, places[(ours != theirs).ravel()])
        )
        return sizes, differing


def layouts(reference: Sequence[Array], names: Sequence[str] = ()) -> tuple[Layout, ...]:
    """The layout of each output, from fp32's values for N samples; outputs without any value are left out."""
    names = names or [f"output_{index}" for index in range(len(reference))]
    return tuple(_layout(output, name) for output, name in zip(reference, names, strict=True))


def decibels(signal: float, error: float) -> float:
    """10 log10(signal / error), within -200..200; 200 where there is no error."""
    return min(200.0, max(-200.0, 10 * log10((signal or 1e-300) / error))) if error else 200.0


def real(array: Array) -> Array:
    """The array in at least single precision; complex numbers as pairs on the last axis."""
    if array.dtype.kind == "c":
        array = np.ascontiguousarray(array)
        array = array.view(array.real.dtype).reshape(*array.shape, 2)
    return array.astype(np.promote_types(array.dtype, np.float32), copy=False)


def block(array: Array, axis: int | None) -> Array:
    """The array (N, ...) as (N, before, K, after) around its channel axis, or (N, all, 1, 1) without one."""
    if axis is None:
        return array.reshape(len(array), prod(array.shape[1:]), 1, 1)
    return array.reshape(len(array), prod(array.shape[1:axis]), array.shape[axis], prod(array.shape[axis + 1 :]))


def _squares(array: Array) -> NDArray[np.float64]:
    """Sums of squares of a block by sample and channel: (N, K)."""
    return np.asarray(np.einsum("nakb,nakb->nk", array, array, dtype=np.float64))


def _pairs(reference: Array, candidate: Array) -> Iterator[tuple[Array, Array]]:
    """Blocks of rows of both, each of one shape and of moderate size."""
    if reference.dtype == object:
        yield from ((np.asarray(r)[None], np.asarray(c)[None]) for r, c in zip(reference, candidate, strict=True))
        return
    rows = max(1, BLOCK_ELEMENTS // max(1, prod(reference.shape[1:])))
    for start in range(0, len(reference), rows):
        yield reference[start : start + rows], candidate[start : start + rows]


def _layout(output: Array, name: str) -> Layout:
    first = np.asarray(output[0])
    dimensions = first.ndim + 1
    whole = (np.arange(1),)
    size = max(1, first.size)
    scanned = output[:: max(1, len(output) * size // SCANNED_ELEMENTS)]
    if kind(output) not in "fc":
        values = _values(scanned)
        return Layout(name, None, None, whole if values is None else (np.arange(len(values)),), dimensions, values)
    best, spread = Layout(name, None, _mean(output, None), whole, dimensions), (0.0, 0.0)
    across: Layout | None = None
    for axis in _channel_axes(output):
        layout = Layout(name, axis, _mean(output, axis), (np.arange(_length(output, axis)),), dimensions)
        groups, gap, deviation = _grouped(layout, scanned)
        if (gap, deviation) > spread or best.axis is None:
            best, layout = replace(layout, groups=groups), best
            spread = gap, deviation
        across = layout if layout.axis is not None else across
    return replace(best, across=across if dimensions == 3 else None)


def _values(output: Array) -> NDArray[Any] | None:
    """All values of an integer output; ``None`` if they are many, as token ids are, or of varying size."""
    if output.dtype == object or output.dtype.kind not in "iub":
        return None
    values = np.unique(output)
    return values if 1 < len(values) <= MOST_VALUES else None


def _channel_axes(output: Array) -> list[int]:
    """The axes that may count channels: the first or the last behind the samples, of one length in all samples.

    Also the second of (N, anchors, channels, height, width), as YOLO's layers return it.
    """
    first = np.asarray(output[0])
    if first.dtype.kind == "c":
        return []
    axes = sorted({1, first.ndim, 2 if first.ndim == 4 else 1} - {0}) if first.ndim else []
    if output.dtype == object:
        axes = [axis for axis in axes if len({np.asarray(row).shape[axis - 1] for row in output}) == 1]
    return axes


def _length(output: Array, axis: int) -> int:
    return int(np.asarray(output[0]).shape[axis - 1])


def _mean(output: Array, axis: int | None) -> Array:
    """The mean over samples as (1, before, K, after); over positions too where their number varies."""
    if output.dtype == object:
        blocks = [block(real(np.asarray(row)[None]), axis) for row in output]
        count = sum(np.isfinite(part).sum(axis=(0, 1, 3), keepdims=True) for part in blocks)
        total = sum(np.where(np.isfinite(part), part, 0).sum(axis=(0, 1, 3), keepdims=True) for part in blocks)
        return np.asarray(total / np.maximum(count, 1))
    total, count = np.zeros(1), np.zeros(1)
    for rows, _ in _pairs(output, output):
        part = block(real(rows), axis)
        known = np.isfinite(part)
        total = total + np.where(known, part, 0).sum(axis=0, keepdims=True, dtype=np.float64)
        count = count + known.sum(axis=0, keepdims=True)
    # A single sample is its own mean, and nothing would be left of it.
    return total / np.maximum(count, 1) if len(output) > 1 else np.zeros_like(total)


def _grouped(layout: Layout, output: Array) -> tuple[tuple[Channels, ...], float, float]:
    """The groups along the layout's axis, the widest gap between scales that parts them, and how much scales differ.

    Channels are parted by their magnitude and then by how much they vary: what stands beside boxes in pixels may be as
    large as these vary, and what varies little may be as large as what varies much.
    """
    energies = layout.energies(output, output)
    magnitudes, variations = np.sqrt(energies.raw.sum(axis=0)), np.sqrt(energies.power())
    in_unit = _within_unit(output, layout.axis)
    parted, gap = _parted(np.arange(len(magnitudes)), magnitudes, in_unit)
    groups = []
    for channels in parted:
        parts, wider = _parted(channels, variations, in_unit)
        groups += parts
        gap = max(gap, wider)
    deviations = (np.std(np.log10(scales[scales > 0])) for scales in (magnitudes, variations) if scales.any())
    deviation = float(max(deviations, default=0.0))
    return tuple(np.sort(channels) for channels in groups), gap, deviation


def _parted(
    channels: Channels, scales: NDArray[np.float64], in_unit: NDArray[np.bool_]
) -> tuple[list[Channels], float]:
    """The channels in groups from large to small scale, and the widest gap between two groups, as a logarithm."""
    used = channels[scales[channels] > 0]
    if len(used) < 2:
        return [channels], 0.0
    order = used[np.argsort(-scales[used], kind="stable")]
    cuts = np.flatnonzero(-np.diff(np.log10(scales[order])) >= log10(GAP)) + 1
    first, *others = np.split(order, cuts)
    groups, gap = [first], 0.0
    for group in others:
        both_are_shares = in_unit[groups[-1]].all() and in_unit[group].all()
        if both_are_shares or len(group) < FEWEST_CHANNELS * len(scales):
            groups[-1] = np.concatenate([groups[-1], group])
        else:
            gap = max(gap, log10(scales[groups[-1]].min() / scales[group[0]]))
            groups.append(group)
    silent = channels[scales[channels] == 0]
    groups[-1] = np.concatenate([groups[-1], silent])
    return groups, gap


def _within_unit(output: Array, axis: int | None) -> NDArray[np.bool_]:
    """Whether each channel has no value outside 0..1, as scores have: (K,)."""
    inside = None
    for rows, _ in _pairs(output, output):
        part = block(real(rows), axis)
        part_inside = ((part >= 0) & (part <= 1)).all(axis=(0, 1, 3))
        inside = part_inside if inside is None else inside & part_inside
    return np.asarray(inside)
