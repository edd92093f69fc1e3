"""Which channels of an output belong together, found from fp32's values."""

import numpy as np
import pytest

from corewise.accuracy.floors import group_fidelities
from corewise.accuracy.groups import layouts
from corewise.accuracy.outputs import ragged


def rng(seed=0):
    return np.random.default_rng(seed)


def groups_of(output, name="output_0"):
    (layout,) = layouts([output], [name])
    return [layout.named(channels) for channels in layout.groups]


def boxes(*shape):
    return 320 + 40 * rng(1).normal(size=shape)


def scores(*shape):
    return 1 / (1 + np.exp(4 - 2 * rng(2).normal(size=shape)))


HIDDEN = rng(3).normal(size=(20, 12, 32)) + rng(4).normal(size=32)
SEVERAL = {
    "boxes beside scores": (np.concatenate([boxes(20, 4, 50), scores(20, 80, 50)], 1), ["[:, 0:4]", "[:, 4:84]"]),
    "channels last": (np.concatenate([boxes(20, 50, 4), scores(20, 50, 80)], 2), ["[..., 0:4]", "[..., 4:84]"]),
    "one class only": (np.concatenate([boxes(20, 4, 50), scores(20, 1, 50)], 1), ["[:, 0:4]", "[:, 4]"]),
    "boxes that hardly move": (
        np.concatenate(
            [boxes(1, 4, 50).repeat(20, axis=0) + 0.05 * rng().normal(size=(20, 4, 50)), scores(20, 8, 50)],
            1,
        ),
        ["[:, 0:4]", "[:, 4:12]"],
    ),
    "large channels of a transformer": (HIDDEN * np.where(np.isin(np.arange(32), (5, 20)), 40, 1), ["[..., 5, 20]"]),
    "quantities of different units": (rng().normal(size=(50, 3)) * [1000, 1, 0.001], ["[:, 0]", "[:, 1]", "[:, 2]"]),
    "scores between boxes": (
        np.concatenate([boxes(20, 2, 50), scores(20, 3, 50), boxes(20, 2, 50)], 1),
        ["[:, 0:2, 5:7]", "[:, 2:5]"],
    ),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_channels_of_one_scale_are_a_group(kind):
    output, expected = SEVERAL[kind]
    assert groups_of(output)[: len(expected)] == [f"output_0{name}" for name in expected]


ONE = {
    "logits": rng().normal(size=(50, 10)),
    "probabilities, most next to nothing": rng().dirichlet(np.full(200, 0.02), size=50),
    "one number": 40 + rng().normal(size=(50, 1)),
    "a number without dimensions": rng().normal(size=50),
    "scores, of which one class never occurs": np.concatenate([scores(20, 3, 50), 1e-6 * scores(20, 1, 50)], 1),
    "features that are seldom used": np.maximum(0, rng().normal(size=(50, 64)) - np.where(np.arange(64) < 2, 3.0, 0)),
    "features that are never used": rng().normal(size=(50, 64)) * (np.arange(64) > 2),
    "maps of classes": rng().normal(size=(8, 5, 12, 12)),
    "images": rng().uniform(size=(8, 3, 12, 12)),
    "hidden states": HIDDEN,
    "integers": rng().integers(9, size=(20, 5)),
    "nothing but zeros": np.zeros((20, 5)),
    "one sample": rng().normal(size=(1, 5)),
}


@pytest.mark.parametrize("kind", ONE)
def test_what_is_one_quantity_stays_one_group(kind):
    assert groups_of(ONE[kind]) == ["output_0"]


def test_rows_of_varying_length_are_grouped_by_the_axis_that_does_not_vary():
    rows = ragged([np.concatenate([boxes(n, 4), scores(n, 6)], 1) for n in (3, 9, 5, 7)])
    assert groups_of(rows, "found") == ["found[..., 0:4]", "found[..., 4:10]"]


def fidelities(reference, candidate):
    found = layouts([reference])
    return group_fidelities(found, [found[0].energies(reference, candidate)])


def test_the_signal_is_what_varies_over_samples():
    reference = 100 + rng().normal(size=(200, 1)) * 10
    (group,) = fidelities(reference, reference + rng(1).normal(size=(200, 1)))
    assert group.sqnr_db == pytest.approx(20, abs=1)
    assert group.correlation == pytest.approx(0.995, abs=0.002)
    (shifted,) = fidelities(reference, reference + 10)
    assert shifted.sqnr_db == pytest.approx(0, abs=0.5)
    assert shifted.correlation == pytest.approx(1 / np.sqrt(2), abs=0.02)


def test_what_does_not_vary_is_judged_by_its_magnitude():
    grid = np.broadcast_to(np.arange(1, 9) * 32.0, (20, 8))
    (rounded,) = fidelities(grid, grid * (1 + 0.002 * rng().choice((-1, 1), size=(20, 8))))
    assert rounded.passed
    (moved,) = fidelities(grid, grid + 32)
    assert not moved.passed


def test_the_worst_group_comes_first_and_a_lost_channel_is_named():
    reference = np.concatenate([boxes(40, 4, 50), scores(40, 80, 50)], 1)
    candidate = reference.copy()
    candidate[:, 17] = 0
    worst, best = fidelities(reference, candidate)
    assert (worst.name, worst.worst_channel, worst.passed) == ("output_0[:, 4:84]", "output_0[:, 17]", False)
    assert worst.sqnr_db > worst.floor_db  # one class of 80 is a small part of the group
    assert (best.name, best.sqnr_db, best.passed) == ("output_0[:, 0:4]", 200, True)


def test_a_channel_that_few_samples_use_is_not_judged_alone():
    """Of a thousand probabilities, most belong to classes that the holdout shows once: one wrong answer loses them."""
    answers = rng().permutation(500)
    reference = np.full((200, 500), 1e-3)
    reference[np.arange(200), answers[:200]] = 0.9
    candidate = reference.copy()
    candidate[0] = reference[1]
    (group,) = fidelities(reference, candidate)
    assert (group.worst_channel, group.passed) == ("", True)
    often = rng(1).normal(size=(200, 10))
    assert fidelities(often, often * (np.arange(10) != 3))[0].worst_channel == "output_0[:, 3]"


def test_integers_count_by_the_share_that_differs():
    reference = rng().integers(10, size=(100, 4))
    candidate = reference.copy()
    candidate[:10] += 1
    (group,) = fidelities(reference, candidate)
    assert (group.sqnr_db, group.passed, group.correlation) == (pytest.approx(10, abs=0.1), True, None)
    candidate[:30] = 99
    assert not fidelities(reference, candidate)[0].passed


def test_infinity_is_no_signal():
    reference = rng().normal(size=(50, 4))
    reference[:, 3] = -np.inf
    (group,) = fidelities(reference, reference.copy())
    assert group.sqnr_db == 200


def test_complex_outputs_are_judged_by_both_parts():
    reference = rng().normal(size=(50, 4)) + 1j * rng(1).normal(size=(50, 4))
    assert fidelities(reference, reference.conj())[0].sqnr_db < 0
    assert fidelities(reference, reference * 1.01)[0].sqnr_db == pytest.approx(40, abs=0.5)
