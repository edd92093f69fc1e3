"""What calibration sees of each value, and the ranges made of it.

Memory is flat in the number of samples: extremes, means and a histogram of fixed size per value.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 2048
SEEN_PER_BATCH = 1 << 17
"""Values of a batch that enter the histogram, evenly spaced; extremes come from all of them."""
MOVING_AVERAGE = 0.1
PERCENTILE = 0.9999
LEVELS = 255
SMALLEST_SCALE = 2.0**-24
"""A constant value still gets a scale, and 1 / scale stays finite in fp32."""


@dataclass(frozen=True, kw_only=True)
class QParams:
    """Affine u8: value = scale * (q - zero_point), q in 0..255."""

    scale: float
    zero_point: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Channels:
    """What calibration saw of each channel of one value."""

    low: Tensor
    high: Tensor
    mean_square: Tensor


class Observed:
    """What calibration saw of one value."""

    def __init__(self, axis: int) -> None:
        """``axis`` counts channels."""
        self.axis = axis
        self.batches = 0
        self.low = self.high = 0.0
        self.average_low = self.average_high = 0.0
        self.bound = 0.0
        """The histogram's bins divide -bound..bound."""
        self.histogram = torch.zeros(BINS)
        self.zeros = 0.0
        self.channel_low = self.channel_high = self.channel_square = torch.zeros(0)
        self.per_channel = 0

    def see(self, value: Tensor) -> bool:
        """Take in one batch; returns whether all of it is finite."""
        value = value.float() if value.dim() > 1 else value.float().reshape(-1, 1)
        rows = value.reshape(math.prod(value.shape[: self.axis]), value.shape[self.axis], -1)
        lows, highs = rows.amin((0, 2)), rows.amax((0, 2))  # aminmax took 14 times as long, 8 x 256 x 56 x 56
        # Over both dimensions at once it took 14 times as long as over one.
        squares = torch.linalg.vector_norm(rows, dim=2).square().sum(0)
        low, high = float(lows.min()), float(highs.max())
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            return False
        if not self.batches:
            self.channel_low, self.channel_high, self.channel_square = lows, highs, squares
            self.average_low, self.average_high = low, high
        elif len(lows) == len(self.channel_low):
            self.channel_low = torch.minimum(self.channel_low, lows)
            self.channel_high = torch.maximum(self.channel_high, highs)
            self.channel_square = self.channel_square + squares
            self.average_low += MOVING_AVERAGE * (low - self.average_low)
            self.average_high += MOVING_AVERAGE * (high - self.average_high)
        self.batches += 1
        self.per_channel += value.numel() // len(lows)
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._count(value.flatten(), max(-low, high))
        return True

    def _count(self, values: Tensor, bound: float) -> None:
        """Add to the histogram, whose range doubles until it holds ``bound``: pairs of bins become one."""
        if bound > 0 and not self.bound:
            self.bound = bound
        while self.bound < bound:
            half = self.histogram.view(-1, 2).sum(1)
            self.histogram = torch.zeros(BINS)
            self.histogram[BINS // 4 : BINS // 4 * 3] = half
            self.bound *= 2
        if self.bound:
            step = max(1, len(values) // SEEN_PER_BATCH)
            self.zeros += step * float((values[::step] == 0).sum())
            self.histogram += step * torch.histc(values[::step], BINS, -self.bound, self.bound)

    @property
    def channels(self) -> Channels:
        """Extremes and mean squares of the channels."""
        mean_square = self.channel_square / max(1, self.per_channel)
        return Channels(low=self.channel_low, high=self.channel_high, mean_square=mean_square)


Range = tuple[float, float]


def minmax(observed: Observed) -> Range:
    """Everything that was seen."""
    return observed.low, observed.high


def moving_average(observed: Observed) -> Range:
    """The extremes of batches, averaged with more weight on the later ones (as TensorFlow's quantization does)."""
    return min(0.0, observed.average_low), max(0.0, observed.average_high)


def percentile(observed: Observed) -> Range:
    """What holds all but 0.01 % of the values at either end."""
    counts, edges = observed.histogram, torch.linspace(-observed.bound, observed.bound, BINS + 1)
    if not float(counts.sum()):
        return observed.low, observed.high
    share = counts.cumsum(0) / counts.sum()
    low = edges[int((share <= 1 - PERCENTILE).sum())]
    high = edges[min(BINS, int((share < PERCENTILE).sum()) + 1)]
    return max(observed.low, min(0.0, float(low))), min(observed.high, max(0.0, float(high)))


def mse(observed: Observed) -> Range:
    """The range that loses least: rounding inside it against clipping outside, by mean squared error.

    Both ends shrink on their own, the upper one first; tried are 70 shares of each extreme.
    """
    low, high = observed.low, observed.high
    if not observed.bound:
        return low, high
    counts = observed.histogram.clone()
    counts[BINS // 2] -= observed.zeros  # they round exactly
    centres = torch.linspace(-observed.bound, observed.bound, BINS + 1)
    centres = (centres[1:] + centres[:-1]) / 2
    shares = torch.linspace(0.3, 1.0, 71)

    def cost(lows: Tensor, highs: Tensor) -> Tensor:
        steps = (highs - lows) / LEVELS
        outside = (lows[:, None] - centres).clamp(min=0) + (centres - highs[:, None]).clamp(min=0)
        inside = (outside == 0).float()
        return (counts * outside.square()).sum(1) + steps.square() / 12 * (counts * inside).sum(1)

    for _ in range(2):
        highs = observed.high * shares
        high = float(highs[cost(torch.full_like(highs, low), highs).argmin()]) if observed.high > 0 else high
        lows = observed.low * shares
        low = float(lows[cost(lows, torch.full_like(lows, high)).argmin()]) if observed.low < 0 else low
    return low, high


OBSERVERS: dict[str, Callable[[Observed], Range]] = {
    "minmax": minmax,
    "moving-average": moving_average,
    "percentile": percentile,
    "mse": mse,
}


def qparams(low: float, high: float) -> QParams:
    """u8 for the range low..high, which holds 0 exactly (padding and ReLU's zeros)."""
    low, high = min(0.0, low), max(0.0, high)
    scale = max((high - low) / LEVELS, SMALLEST_SCALE)
    return QParams(scale=scale, zero_point=min(LEVELS, max(0, round(-low / scale))))


def fake_quantize(value: Tensor, q: QParams) -> Tensor:
    """The value as int8 kernels see it, in fp32."""
    # Three times as fast as torch.fake_quantize_per_tensor_affine, which also makes a mask for gradients.
    steps = (value * (1 / q.scale)).round_().clamp_(-q.zero_point, LEVELS - q.zero_point)
    return steps.mul_(q.scale)


def weight_scales(weight: Tensor, axis: int, bits: int) -> Tensor:
    """Symmetric scales per output channel: the largest weight becomes the largest level (127, or 63 in 7 bits)."""
    largest = weight.movedim(axis, 0).flatten(1).abs().amax(1)
    scales: Tensor = (largest / (2 ** (bits - 1) - 1)).clamp(min=SMALLEST_SCALE)
    return scales


def round_weight(weight: Tensor, scales: Tensor, axis: int, bits: int) -> Tensor:
    """The nearest values on the grid of ``scales``, in fp32."""
    shaped = scales.view([-1 if dim == axis else 1 for dim in range(weight.dim())])
    top = 2 ** (bits - 1)
    rounded: Tensor = (weight / shaped).round().clamp(-top, top - 1) * shaped
    return rounded
