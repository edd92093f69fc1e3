"""The floors that hold for each group of output channels, whatever the metric says."""

from collections.abc import Iterator, Sequence

import numpy as np

from corewise.accuracy.groups import FEWEST_LOST, FEWEST_SAMPLES, NEGLIGIBLE, Channels, Energies, Layout, decibels
from corewise.accuracy.outputs import Array
from corewise.records.fidelity import GroupFidelity

FLOOR_DB = 10.0
"""The lowest SQNR of a group: an error of a tenth of what varies over samples. int8 builds of MobileNetV2, ResNet-50,
ResNet-20 and MiniLM whose metric drops by less than 5 points have 12 dB and more; outputs that are zero, unrelated or
half as large have 0 to 6 dB (docs/adr/0007)."""
CHANNEL_FLOOR_DB = 3.0
"""The same for a single channel. Of 1,000 classes of a rounded MobileNetV2 the worst has 8 dB; a channel that is zero
has 0 dB, and two that are exchanged have -3 dB."""
LOST = 0.9
"""An error of this share of a channel's signal leaves nothing of it."""
LOST_FLOOR_DB = 0.5
"""The SQNR of such a channel."""
QUIET = 0.25
"""A position with a smaller share of the mean power is not judged alone: noise is about equal at all positions."""
INTEGER_FLOOR_DB = 7.0
"""The same for integer outputs: at least four values of five are fp32's."""


def group_fidelities(layouts: Sequence[Layout], sums: Sequence[Energies]) -> tuple[GroupFidelity, ...]:
    """Every group of every output beside its floor, the nearest to it or farthest below it first."""
    fidelities = [
        _group(layout, energies, channels)
        for layout, energies in zip(layouts, sums, strict=True)
        if energies.signal.size
        for channels in layout.groups
    ]
    return tuple(sorted(fidelities, key=_margin_db))


def lost_positions(
    layouts: Sequence[Layout], references: Sequence[Array], candidates: Sequence[Array]
) -> Iterator[GroupFidelity]:
    """Positions of outputs (N, positions, channels), such as the vectors of tokens, of which nothing is left.

    The first token of a transformer may be all that is used of its output, and has values unlike the others'.
    """
    for layout, ours, theirs in zip(layouts, references, candidates, strict=True):
        if layout.across is None or not ours.size:
            continue
        energies = layout.across.energies(ours, theirs)
        power, error = energies.power(), energies.error.sum(axis=0)
        carrying = (power >= max(QUIET * power.mean(), 1e-300)) & (energies.carrying_samples() >= FEWEST_LOST)
        for position in np.flatnonzero(carrying & (error >= LOST * power))[:1]:
            yield GroupFidelity(
                name=layout.across.named(position[None]),
                sqnr_db=decibels(float(power[position]), float(error[position])),
                floor_db=LOST_FLOOR_DB,
            )


def _margin_db(group: GroupFidelity) -> float:
    """How far the group is above its floor; below 0 also where only its worst channel fails."""
    channel = group.worst_channel_db - group.channel_floor_db
    return min(group.sqnr_db - group.floor_db, channel) if channel < 0 else group.sqnr_db - group.floor_db


def _group(layout: Layout, energies: Energies, channels: Channels) -> GroupFidelity:
    power, error = energies.power()[channels], energies.error.sum(axis=0)[channels]
    sqnr = decibels(float(power.sum()), float(error.sum()))
    worst, worst_db = _worst_channel(layout, energies, channels)
    integers = layout.mean is None
    return GroupFidelity(
        name=layout.named(channels),
        sqnr_db=sqnr,
        floor_db=INTEGER_FLOOR_DB if integers else FLOOR_DB,
        correlation=None if integers else _correlation(energies.of(channels)),
        worst_channel=worst,
        worst_channel_db=worst_db,
        channel_floor_db=CHANNEL_FLOOR_DB,
    )


def _worst_channel(layout: Layout, energies: Energies, channels: Channels) -> tuple[str, float]:
    """The name and SQNR of the channel of lowest SQNR among those that carry a signal; empty where none is judged."""
    if len(channels) < 2:
        return "", 200.0
    power, error = energies.power()[channels], energies.error.sum(axis=0)[channels]
    samples = energies.carrying_samples()[channels]
    enough = (samples >= FEWEST_SAMPLES) | ((samples >= FEWEST_LOST) & (error >= LOST * power))
    negligible = 0.0 if layout.mean is None else NEGLIGIBLE * power.mean()  # a class of few pixels counts too
    carrying = np.flatnonzero((power >= max(negligible, 1e-300)) & enough)
    if not carrying.size:
        return "", 200.0
    ratios = error[carrying] / power[carrying]
    worst = int(carrying[ratios.argmax()])
    return layout.named(channels[worst : worst + 1]), decibels(float(power[worst]), float(error[worst]))


def _correlation(sums: Energies) -> float | None:
    """Correlation of one group's values with fp32's, both centred on fp32's mean over samples."""
    signal, candidate, error = (float(part.sum()) for part in (sums.signal, sums.candidate, sums.error))
    norm = float(np.sqrt(signal) * np.sqrt(candidate))
    if not norm:
        return None
    return min(1.0, max(-1.0, (signal + candidate - error) / 2 / norm))


def worst_sample(sums: Sequence[Energies]) -> tuple[int, float]:
    """The row whose outputs are farthest from fp32's, and its error in dB below the mean signal of a sample."""
    samples = len(sums[0].signal)
    ratios = np.zeros(samples)
    for energies in sums:
        signal = float(energies.power().sum()) / samples
        ratios = np.maximum(ratios, energies.error.sum(axis=1) / max(signal, 1e-300))
    row = int(ratios.argmax())
    return row, decibels(1.0, float(ratios[row]))
