"""Models whose answers depend on more than their own row are recognised by running them, with the line to blame."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from corewise.common.agreement import EQUAL_DB, worst_row_db
from corewise.samples import from_python
from corewise.source import NotRepeatable, export

SAMPLES = from_python(list(np.random.default_rng(0).standard_normal((12, 6)).astype(np.float32)))


class Net(nn.Module):
    """A linear layer; the others do something behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 4)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("cache", torch.zeros(4))

    def forward(self, x):
        return self.linear(x)


class CentresTheBatch(Net):
    def forward(self, x):
        hidden = self.linear(x)
        return hidden - hidden.mean(0)  # mixes


class SortsTheBatch(Net):
    def forward(self, x):
        hidden = self.linear(x)
        return hidden.sort(0).values  # sorts


class LooksAtThePreviousRow(Net):
    def forward(self, x):
        hidden = self.linear(x)
        return hidden + 0.5 * hidden.roll(1, 0)  # rolls


class Counts(Net):
    def forward(self, x):
        hidden = self.linear(x)
        self.calls += 1  # counts
        return hidden


class Remembers(Net):
    def forward(self, x):
        hidden = self.linear(x)
        answer = hidden + self.cache
        self.cache.copy_(0.5 * self.cache + hidden.detach().mean(0))  # remembers
        return answer


class DropsOut(Net):
    def forward(self, x):
        hidden = self.linear(x)
        return F.dropout(hidden, 0.5)  # drops


class AddsNoise(Net):
    def forward(self, x):
        hidden = self.linear(x)
        return hidden + torch.randn_like(hidden)  # draws


def line_of(model: nn.Module, comment: str) -> str:
    source = Path(__file__).read_text().split("\n")
    number = next(k for k, line in enumerate(source, 1) if line.endswith(comment))
    return f"{__file__}:{number}"


@pytest.mark.parametrize(
    ("model", "comment"),
    [(CentresTheBatch(), "# mixes"), (SortsTheBatch(), "# sorts"), (LooksAtThePreviousRow(), "# rolls")],
    ids=lambda value: type(value).__name__,
)
def test_a_model_that_mixes_its_batch_is_exported_row_by_row(model, comment):
    exported = export(model, SAMPLES)
    assert exported.mixing is not None
    assert exported.mixing.decibels < 60
    assert exported.mixing.origin.where == line_of(model, comment)
    assert exported.fixed_batch == 1


def test_a_plain_model_has_no_mixing_state_or_fixed_batch():
    exported = export(Net(), SAMPLES)
    assert (exported.mixing, exported.state, exported.fixed_batch) == (None, None, None)


def test_a_counter_is_state_that_answers_do_not_depend_on():
    exported = export(Counts(), SAMPLES)
    assert exported.state is not None
    assert exported.state.name == "calls"
    assert not exported.state.changes_answers
    assert exported.program is not None


@pytest.mark.parametrize(
    ("model", "comment", "words"),
    [
        (Remembers(), "# remembers", "cache changes with each call"),
        (DropsOut(), "# drops", "dropout draws numbers"),
        (AddsNoise(), "# draws", "draws numbers"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_model_that_does_not_repeat_itself_is_refused_with_the_line(model, comment, words):
    with pytest.raises(NotRepeatable) as caught:
        export(model, SAMPLES)
    assert words in str(caught.value)
    assert line_of(model, comment) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_agreement_is_that_of_the_row_that_differs_most():
    expected = np.ones((3, 4))
    answers = expected.copy()
    assert worst_row_db([expected], [answers]) == EQUAL_DB
    answers[1] += 0.1
    assert worst_row_db([expected], [answers]) == pytest.approx(20.0)
    answers[2, 0] = np.nan
    assert worst_row_db([expected], [answers]) == -EQUAL_DB
