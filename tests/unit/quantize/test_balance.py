"""Errors count by what they do to their own group of outputs: a detector's scores are not lost beside its boxes."""

import pytest
import torch
from torch import nn

from corewise.quantize.balance import Balance
from corewise.quantize.ptq import Recipe, batches, quantize
from corewise.quantize.sensitivity import measure_sensitivity, order_of_return
from corewise.quantize.simulate import sqnr_db
from corewise.samples import from_python
from corewise.source import export


class Detector(nn.Module):
    """Boxes in pixels from one branch, scores in 0..1 from another, in one output (N, 4 + 3, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.boxes = nn.Conv2d(16, 4, 1)
        self.scores = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 1))

    def forward(self, x):
        hidden = torch.relu(self.stem(x))
        boxes = 320 + 60 * self.boxes(hidden).flatten(2)
        return torch.cat([boxes, (3 * self.scores(hidden).flatten(2)).sigmoid()], 1)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    samples = from_python([torch.randn(3, 8, 8) for _ in range(40)])
    program = export(Detector().eval(), samples).program
    quantized = quantize(program, samples, Recipe(corrections=(), observers=("minmax",), weight_bits=7))
    return quantized, list(batches(samples.take(range(16)), 8))


def outputs(detector):
    return [Detector().eval()(batch[0]).detach() for batch in detector[1]]


def test_an_error_of_the_scores_counts_like_one_of_the_boxes(detector):
    expected = outputs(detector)
    balance = Balance([(one,) for one in expected])
    without_scores = [torch.cat([one[:, :4], 0 * one[:, 4:]], 1) for one in expected]
    raw = sqnr_db([(one,) for one in expected], [(one,) for one in without_scores])
    balanced = sqnr_db([balance((one,)) for one in expected], [balance((one,)) for one in without_scores])
    assert raw > 45
    assert balanced < 3


def test_outputs_of_one_scale_stay_as_they_are():
    logits = torch.randn(8, 5)
    assert Balance([(logits,)])((logits,))[0] is logits
    assert Balance([(logits.int(),)])((logits.int(),))[0].dtype == torch.int32


def test_layers_of_the_branch_that_lost_most_go_back_first(detector):
    quantized, given = detector
    rows = measure_sensitivity(quantized, given)
    assert {row.name for row in rows} == {"stem", "boxes", "scores.0", "scores.2"}
    worst = max(rows, key=lambda row: row.won_back)
    assert worst.name in ("stem", "scores.0", "scores.2")
    by_name = {row.name: row for row in rows}
    assert by_name["scores.2"].won_back > by_name["boxes"].won_back
    assert order_of_return(rows).index("scores.2") < order_of_return(rows).index("boxes")
