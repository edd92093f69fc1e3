"""A mutation test of the gate: damage of sixty kinds to outputs of twelve kinds is refused, or within the tolerance.

The tolerance with ``max_drop`` 0.01 and no metric named: at most one answer in a hundred differs, or the concordance of
the worst group of channels is at least 0.99, and no group's error is above a tenth of its variance, no single channel's
above half of it.
"""

from dataclasses import dataclass

import numpy as np
import pytest

from corewise.accuracy.gate import AccuracyGate, judge
from corewise.accuracy.outputs import Outputs
from corewise.common.errors import EngineError
from corewise.common.nested import flatten
from corewise.records.goal import Requirements
from corewise.samples import from_python

pytestmark = pytest.mark.usefixtures("few_resamples")

N = 300


def rng(seed=0):
    return np.random.default_rng(seed)


def classes():
    """Logits (N, 10) of a classifier that is sure of most of its answers."""
    logits = rng().normal(size=(N, 10))
    logits[np.arange(N), rng(1).integers(10, size=N)] += 8
    return logits.astype(np.float32) - 3


def thousand_classes():
    """Probabilities (N, 1000), most of them next to nothing."""
    logits = rng(2).normal(size=(N, 1000)) * 2
    logits[np.arange(N), rng(3).integers(1000, size=N)] += 12
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)


def detector(cells=100, names=8):
    """(40, 4 + 8, 100): boxes in pixels around the centers of cells, and scores of which few are above 0.5."""
    centers = np.stack(np.meshgrid(np.arange(10), np.arange(10))).reshape(1, 2, cells) * 64.0 + 32
    boxes = np.concatenate([np.broadcast_to(centers, (40, 2, cells)), np.full((40, 2, cells), 96.0)], axis=1)
    boxes = boxes + rng(4).normal(size=boxes.shape) * 10
    scores = 1 / (1 + np.exp(5 - 2.5 * rng(5).normal(size=(40, names, cells))))
    return np.concatenate([boxes, scores], axis=1).astype(np.float32)


def anchors():
    """(40, 2, 4 + 8, 10, 5): the detector's channels behind its anchors, as YOLO's layers return them."""
    return detector().reshape(40, 12, 2, 10, 5).swapaxes(1, 2).copy()


def rare():
    """(40, 4 + 80, 100): each of 80 classes is seen in a few images only."""
    scores = np.where(rng(13).random((40, 80, 100)) < 0.004, rng(14).uniform(0.5, 1, (40, 80, 100)), 1e-4)
    return np.concatenate([detector()[:, :4], scores], axis=1).astype(np.float32)


def ages():
    """One number for each sample (N, 1), around 40."""
    return (40 + 8 * rng(6).normal(size=(N, 1))).astype(np.float32)


def embeddings():
    """Vectors of norm 1, (N, 64), that share a direction."""
    vectors = rng(7).normal(size=(N, 64)) + 0.5
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def maps():
    """Scores of 5 classes at each pixel, (24, 5, 16, 16)."""
    smooth = rng(8).normal(size=(24, 5, 4, 4)).repeat(4, axis=2).repeat(4, axis=3)
    return (3 * smooth + rng(9).normal(size=(24, 5, 16, 16)) * 0.3).astype(np.float32)


def tokens():
    """Hidden states (60, 12, 64) of a transformer; two channels are thirty times as large as the others."""
    hidden = rng(10).normal(size=(60, 12, 64)) + rng(11).normal(size=64) * 2
    hidden[:, :, [3, 40]] *= 30
    return hidden.astype(np.float32)


def sentences():
    """Hidden states (60, 100, 64), of which the first token's may be all that is used."""
    return (rng(15).normal(size=(60, 100, 64)) * np.exp(0.7 * rng(16).normal(size=64))).astype(np.float32)


def masks():
    """Classes of pixels (40, 16, 16); a fault covers one pixel in two hundred."""
    return (rng(17).random((40, 16, 16)) < 0.005).astype(np.int64)


def nested():
    """A dict of an integer map, logits and a large pooled vector."""
    logits = classes()
    return {
        "logits": logits,
        "pooled": 1000 * rng(12).normal(size=(N, 32)).astype(np.float32),
        "ids": logits.argsort(1),
    }


MADE = (classes, thousand_classes, detector, anchors, rare, ages, embeddings, maps, tokens, sentences, masks, nested)
KINDS = {make.__name__: make for make in MADE}


def with_noise(value, db, seed=20):
    """Every channel with an error of so many dB below what varies over samples, as rounding to int8 makes it."""
    if isinstance(value, dict):
        return {name: with_noise(part, db) for name, part in value.items()}
    if value.dtype.kind != "f":
        return value
    channels = 2 if value.shape[::2] == (60, 64) or value.ndim == 5 else 1
    positions = tuple(axis for axis in range(1, value.ndim) if axis != channels)
    spread = np.sqrt(value.var(axis=0, keepdims=True).mean(axis=positions, keepdims=True))
    return (value + rng(seed).normal(size=value.shape) * spread * 10 ** (-db / 20)).astype(np.float32)


def judged(kind, candidate):
    reference = KINDS[kind]()
    leaves, structure = flatten(reference)
    holdout = from_python([np.zeros(1, np.float32)] * len(leaves[0]))
    gate = AccuracyGate(None, holdout, structure, Requirements(), 0)
    gate(Outputs(tuple(leaves)))
    return gate(Outputs(tuple(flatten(candidate)[0])))


@dataclass(frozen=True)
class Fault:
    """Damage to the outputs of one kind."""

    kind: str
    name: str
    damage: object

    def __str__(self):
        return f"{self.kind}: {self.name}"


def edited(edit):
    """Damage that changes a copy in place."""

    def damage(value):
        value = {k: v.copy() for k, v in value.items()} if isinstance(value, dict) else value.copy()
        edit(value)
        return value

    return damage


def swapped(axis, a, b):
    def damage(value):
        order = np.arange(value.shape[axis])
        order[[a, b]] = b, a
        return value.take(order, axis)

    return damage


def zeroed(index):
    return edited(lambda value: value.__setitem__(index, 0))


def of(kind, faults):
    return [Fault(kind, name, damage) for name, damage in faults.items()]


SCORES, BOXES = np.s_[:, 4:], np.s_[:, :4]

CAUGHT = [
    *of(
        "classes",
        {
            "a class is always zero": zeroed(np.s_[:, 4]),
            "two classes are exchanged": swapped(1, 2, 7),
            "the first class moved to the end": lambda v: np.roll(v, -1, axis=1),
            "scores are half as large": lambda v: v / 2,
            "scores are doubled": lambda v: v * 2,
            "the answers are kept and the margins gone": lambda v: np.eye(10, dtype="f4")[v.argmax(1)] * 1e-3,
            "logits became probabilities": lambda v: np.exp(v) / np.exp(v).sum(1, keepdims=True),
            "probabilities became logarithms": lambda v: v - np.log(np.exp(v).sum(1, keepdims=True)) - 20,
            "rows are in another order": lambda v: np.roll(v, 1, axis=0),
            "six rows of 300 belong to other samples": edited(lambda v: v.__setitem__(np.s_[:6], v[6:12])),
            "the sign is turned": lambda v: -v,
            "all samples get the mean": lambda v: np.broadcast_to(v.mean(0), v.shape).copy(),
            "the mean over the batch is taken off": lambda v: v - v.reshape(-1, 20, 10).mean(1).repeat(20, 0) * 3,
            "noise of 8 dB": lambda v: with_noise(v, 8),
            "NaN in one row": edited(lambda v: v.__setitem__((17, 3), np.nan)),
            "infinity in one row": edited(lambda v: v.__setitem__((17, 3), np.inf)),
            "values are cut off at 1": lambda v: np.minimum(v, 1),
            "four levels are left": lambda v: np.round(v / 5) * 5,
        },
    ),
    *of(
        "thousand_classes",
        {
            "small probabilities are cut off at 0.2": lambda v: np.where(v < 0.9, 0, v) * 0.6,
            "classes are shifted by one": lambda v: np.roll(v, 1, axis=1),
        },
    ),
    *of(
        "detector",
        {
            "all scores are zero": zeroed(SCORES),
            "one class is always zero": zeroed(np.s_[:, 6]),
            "two classes are exchanged": swapped(1, 5, 9),
            "scores are half as large": edited(lambda v: v.__setitem__(SCORES, v[SCORES] / 2)),
            "scores are rounded by the grid of the boxes": lambda v: np.round(v / 2.5) * 2.5,
            "scores of other cells": edited(lambda v: v.__setitem__(SCORES, np.roll(v[SCORES], 1, axis=2))),
            "boxes are shifted by one cell": edited(lambda v: v.__setitem__(np.s_[:, 0], v[:, 0] + 64)),
            "boxes lose their width": zeroed(np.s_[:, 2]),
            "boxes are their cells' means": edited(lambda v: v.__setitem__(BOXES, v[BOXES].mean(0))),
            "boxes as corners": edited(lambda v: v.__setitem__(BOXES, np.r_["1", v[:, :2] - v[:, 2:4] / 2, v[:, :2]])),
            "channels last": lambda v: v.swapaxes(1, 2).reshape(v.shape).copy(),
        },
    ),
    *of(
        "anchors",
        {
            "all scores are zero": zeroed(np.s_[:, :, 4:]),
            "one class is always zero": zeroed(np.s_[:, :, 6]),
            "scores are half as large": edited(lambda v: v.__setitem__(np.s_[:, :, 4:], v[:, :, 4:] / 2)),
        },
    ),
    *of("rare", {"one class of 80 is always zero": zeroed(np.s_[:, 40])}),
    *of(
        "ages",
        {
            "the mean for everybody": lambda v: np.full_like(v, v.mean()),
            "a correlation of 0.35": lambda v: 40 + (v - 40) * 0.35 + 7.5 * rng(30).normal(size=v.shape),
            "five years too old": lambda v: v + 5,
            "months in place of years": lambda v: v * 12,
        },
    ),
    *of(
        "embeddings",
        {
            "only what all share is left": lambda v: np.broadcast_to(v.mean(0), v.shape).copy(),
            "a quarter of the dimensions is zero": zeroed(np.s_[:, ::4]),
            "they are not of norm 1": lambda v: v * 3,
        },
    ),
    *of(
        "maps",
        {
            "one class is always zero": zeroed(np.s_[:, 2]),
            "shifted by four pixels": lambda v: np.roll(v, 4, axis=3),
            "turned over": lambda v: v[..., ::-1].copy(),
            "height and width exchanged": lambda v: v.swapaxes(2, 3).copy(),
        },
    ),
    *of(
        "tokens",
        {
            "only the two large channels are left": edited(
                lambda v: v.__setitem__(np.s_[:, :, np.setdiff1d(np.arange(64), [3, 40])], 0)
            ),
            "the last token repeats the one before": edited(lambda v: v.__setitem__(np.s_[:, 6:], v[:, :6])),
        },
    ),
    *of(
        "sentences",
        {
            "the first token of 100 is lost": zeroed(np.s_[:, 0]),
            "the first token repeats the second": edited(lambda v: v.__setitem__(np.s_[:, 0], v[:, 1])),
        },
    ),
    *of("masks", {"no pixel has the rare class": lambda v: v * 0}),
    *of(
        "nested",
        {
            "the second output is zero": edited(lambda v: v.update(pooled=0 * v["pooled"])),
            "the second output belongs to other samples": edited(lambda v: v.update(pooled=np.roll(v["pooled"], 1, 0))),
            "integers are shifted by one": edited(lambda v: v.update(ids=v["ids"] + 1)),
            "a third of the integers is wrong": edited(lambda v: v["ids"].__setitem__(np.s_[::3], 0)),
        },
    ),
]

TOLERATED = [
    *of(
        "classes",
        {
            "one row of 300 belongs to another sample": edited(lambda v: v.__setitem__(0, v[1])),
            "scores are a twentieth smaller": lambda v: v * 0.95,
            "noise of 20 dB": lambda v: with_noise(v, 20),
        },
    ),
    *of("detector", {"scores are a twentieth smaller": edited(lambda v: v.__setitem__(SCORES, v[SCORES] * 0.95))}),
    *of("ages", {"a tenth of a year too old": lambda v: v + 0.1}),
    *of("maps", {"one map of 24 is a little noisy": edited(lambda v: v.__setitem__(0, with_noise(v, 15)[0]))}),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("db", [20, 25])
def test_honest_rounding_passes(kind, db):
    fidelity, verdict = judged(kind, with_noise(KINDS[kind](), db))
    assert verdict.passed, verdict.reason
    assert all(db - 3 < group.sqnr_db for group in fidelity.groups)


@pytest.mark.parametrize("fault", CAUGHT, ids=str)
def test_damage_is_refused_whatever_the_metric_says(fault):
    candidate = fault.damage(KINDS[fault.kind]())
    if fault.name.endswith("in one row"):
        with pytest.raises(EngineError, match="NaN or infinity where fp32's has none, for sample 17"):
            judged(fault.kind, candidate)
        return
    fidelity, verdict = judged(fault.kind, candidate)
    assert not verdict.passed
    assert verdict.rule in ("drop", "floor")
    # Whoever allows the metric to drop still gets no outputs that are lost.
    if fault.name not in ("six rows of 300 belong to other samples", "noise of 8 dB"):
        assert judge(fidelity, Requirements(max_drop=2.0)).rule == "floor"


@pytest.mark.parametrize("fault", TOLERATED, ids=str)
def test_damage_within_the_tolerance_is_what_the_tolerance_says(fault):
    reference = KINDS[fault.kind]()
    candidate = fault.damage(reference)
    fidelity, verdict = judged(fault.kind, candidate)
    assert verdict.passed, verdict.reason
    error = ((candidate - reference).astype(float) ** 2).sum()
    varying = ((reference - reference.mean(0)).astype(float) ** 2).sum()
    assert error < 0.1 * varying
    if fidelity.metric == "agreement":
        assert (candidate.argmax(1) != reference.argmax(1)).mean() <= 0.01


def test_there_are_forty_kinds_of_damage():
    assert len(CAUGHT) + len(TOLERATED) >= 40


def test_a_single_wrong_row_is_named():
    fidelity, _ = judged("classes", edited(lambda v: v.__setitem__(211, -v[211]))(classes()))
    assert (fidelity.worst_sample, fidelity.worst_sample_db < 0) == ("sample 211", True)
