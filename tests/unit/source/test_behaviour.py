"""Models whose answers depend on more than their own row are recognised by running them, with the line to blame."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from corewise.common.agreement import EQUAL_DB, worst_row_db
from corewise.common.errors import SourceError
from corewise.samples import from_python
from corewise.source import NotRepeatable, export
from corewise.source.behaviour import state_change
from corewise.source.examples import Examples
from corewise.source.exported import Flat
from corewise.source.state import changed_names, kept_state

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


class ChangesLater(Net):
    def forward(self, x):
        self.calls += 1
        return self.linear(x) + (self.calls > 1000).float()


class Remembers(Net):
    def forward(self, x):
        hidden = self.linear(x)
        answer = hidden + self.cache
        self.cache.copy_(0.5 * self.cache + hidden.detach().mean(0))  # remembers
        return answer


class RemembersTheLastInput(Net):
    """The same input twice in a row is answered equally."""

    def forward(self, x):
        hidden = self.linear(x)
        answer = hidden - self.cache
        self.cache = hidden.detach().mean(0)  # keeps the last
        return answer


class ScalesByTheLargest(Net):
    """Answers change only once a larger input came."""

    def forward(self, x):
        self.cache.copy_(torch.maximum(self.cache, x.abs().max()))  # keeps the largest
        return self.linear(x / self.cache[0])


class KeepsAListOfTensors(Net):
    def __init__(self) -> None:
        super().__init__()
        self._past = [torch.zeros(4)]

    def forward(self, x):
        hidden = self.linear(x) + self._past[-1]
        self._past[-1] = 0.5 * hidden.detach().mean(0)  # fills a list
        return hidden


class KeepsAnObject(Net):
    def __init__(self) -> None:
        super().__init__()
        self.session = Session()

    def forward(self, x):
        self.session.calls += 1  # counts elsewhere
        return self.linear(x) * self.session.calls


class KeepsObjectsInAList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.sessions = [Session()]

    def forward(self, x):
        self.sessions[0].calls += 1  # counts in a list
        return self.linear(x) * self.sessions[0].calls


class Session:
    calls = 0


class CanBeReset(Net):
    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self):
        self.state = torch.zeros(4)

    def forward(self, x):
        return self.step(self.linear(x))

    def step(self, hidden):
        self.state = 0.9 * self.state + 0.1 * hidden.mean(0)  # goes on
        return hidden - self.state


class LearnsOn(Net):
    def forward(self, x):
        with torch.no_grad():
            self.linear.bias.add_(0.1)
        return self.linear(x)


class CountsElsewhere(Net):
    def forward(self, x):
        next(NUMBERS)
        return self.linear(x) + next(NUMBERS)  # from elsewhere


NUMBERS = itertools.count()


class CountsHereAndElsewhere(Net):
    def forward(self, x):
        self.calls += 1
        return self.linear(x) + next(NUMBERS)


class CountsBehindInt8(Net):
    def forward(self, x):
        hidden = torch.quantize_per_tensor(self.linear(x), 0.01, 0, torch.qint8)
        return hidden.dequantize() + next(NUMBERS)  # behind int8


class CountsInAHook(Net):
    def __init__(self) -> None:
        super().__init__()
        self.linear.register_forward_hook(lambda module, inputs, output: output + next(NUMBERS))  # hooked


class ChangesDataOfWeights(Net):
    def forward(self, x):
        self.linear.bias.data += 0.01  # past torch's counter
        return self.linear(x)


class DrawsByNumPysGenerator(Net):
    def __init__(self) -> None:
        super().__init__()
        self.random = np.random.default_rng(0)

    def forward(self, x):
        return self.linear(x) + float(self.random.normal())  # numpy's generator


class StartsFromTheFirst(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("started", torch.tensor(False))

    def forward(self, x):
        hidden = self.linear(x)
        if not self.started:
            self.started.fill_(True)
            self.scale.copy_(1 / (hidden.abs().amax(0) + 0.1))  # starts
        return hidden * self.scale


class KeepsTheFirst(Net):
    def forward(self, x):
        hidden = self.linear(x)
        if not hasattr(self, "mean"):
            self.mean = hidden.detach().mean(0)  # keeps the first
        return hidden - self.mean


class KeepsATable(Net):
    """As positions are kept for each length."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = {}

    def forward(self, x):
        return self.linear(x) + self.tables.setdefault(x.shape[1], torch.arange(4.0))


class SeedsItself(Net):
    def forward(self, x):
        torch.manual_seed(0)
        return self.linear(x) + torch.randn(4)  # seeded


class SeedsItselfBehindDropout(Net):
    """Whose dropout, attention and LSTM draw nothing in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, num_layers=2, dropout=0.1, batch_first=True)

    def forward(self, x):
        hidden = self.lstm(F.dropout(self.linear(x), 0.1, self.training)[:, None])[0]
        hidden = F.scaled_dot_product_attention(hidden, hidden, hidden)[:, 0]
        torch.manual_seed(0)
        return hidden + torch.rand(4)  # seeded behind dropout


class DependsOnExport(Net):
    """Its program differs, and neither draws numbers."""

    def forward(self, x):
        hidden = F.dropout(self.linear(x), 0.1, self.training)
        return hidden + 1 if torch.compiler.is_exporting() else hidden


class EverySeventhCall(Net):
    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def forward(self, x):
        self.number += 1  # numbers its calls
        return self.linear(x) * (2 if self.number % 7 == 0 else 1)


class CountsRows(Net):
    def forward(self, x):
        hidden = self.linear(x)
        return hidden.cumsum(0)  # adds up


class NormalizesTheBatch(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4)

    def forward(self, x):
        self.norm.train()
        return self.norm(self.conv(x[:, None])).relu().sum(2)  # normalizes


class LeavesOut(Net):
    def forward(self, x):
        hidden = self.linear(x)
        return hidden if torch.rand(()) < 0.6 else 2 * hidden  # leaves out


class DrawsByNumPy(Net):
    def forward(self, x):
        return self.linear(x) + float(np.random.rand())  # asks numpy


class DrawsByItsOwnGenerator(Net):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x):
        return self.linear(x) + torch.randn(4, generator=self.generator)  # own generator


class LeavesOutSeldom(Net):
    def forward(self, x):
        hidden = self.linear(x)
        return hidden if random.random() < 0.95 else 2 * hidden  # seldom leaves out


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
    [
        (CentresTheBatch(), "# mixes"),
        (SortsTheBatch(), "# sorts"),
        (LooksAtThePreviousRow(), "# rolls"),
        (CountsRows(), "# adds up"),
        (NormalizesTheBatch(), "# normalizes"),
    ],
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
    assert not exported.state.is_read
    assert exported.program is not None


def test_a_counter_that_answers_are_computed_from_is_told():
    exported = export(ChangesLater(), SAMPLES)
    assert exported.state.is_read
    assert exported.program is not None


@pytest.mark.parametrize(
    ("model", "comment", "words"),
    [
        (Remembers(), "# remembers", "cache changes with each call"),
        (RemembersTheLastInput(), "# keeps the last", "cache changes with each call"),
        (ScalesByTheLargest(), "# keeps the largest", "cache changes with each call"),
        (KeepsAListOfTensors(), "# fills a list", "_past changes with each call"),
        (KeepsAnObject(), "# counts elsewhere", "session changes with each call"),
        (KeepsObjectsInAList(), "# counts in a list", "sessions changes with each call"),
        (CanBeReset(), "# goes on", "state changes with each call"),
        (EverySeventhCall(), "# numbers its calls", "number changes with each call"),
        (CountsElsewhere(), "# from elsewhere", "differently each time (/"),
        (CountsBehindInt8(), "# behind int8", "differently each time (/"),
        (CountsInAHook(), "# hooked", "differently each time (/"),
        (ChangesDataOfWeights(), "# past torch's counter", "differently each time (/"),
        (DrawsByNumPysGenerator(), "# numpy's generator", "differently each time (/"),
        (KeepsTheFirst(), "# keeps the first", "depend on the first input that it sees, which mean keeps"),
        (StartsFromTheFirst(), "# starts", "depend on the first input that it sees, which scale keeps"),
        (LeavesOut(), "# leaves out", "rand draws numbers"),
        (DrawsByNumPy(), "# asks numpy", "np.random.rand draws numbers"),
        (DrawsByItsOwnGenerator(), "# own generator", "randn draws numbers"),
        (DropsOut(), "# drops", "dropout draws numbers"),
        (AddsNoise(), "# draws", "draws numbers"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_model_that_does_not_repeat_itself_is_refused_with_the_line(model, comment, words):
    with pytest.raises(NotRepeatable) as caught:
        export(model, SAMPLES)
    assert words in str(caught.value)
    assert line_of(model, comment) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pythons_random_numbers_are_found_where_they_seldom_change_an_answer(monkeypatch):
    draws = itertools.chain(itertools.repeat(0.5, 10), itertools.repeat(0.99))
    monkeypatch.setattr(random, "random", lambda: next(draws))
    with pytest.raises(NotRepeatable, match=r"random\.random draws numbers") as caught:
        export(LeavesOutSeldom(), SAMPLES)
    assert line_of(LeavesOutSeldom(), "# seldom leaves out") in str(caught.value)


def test_a_table_that_the_first_call_fills_is_no_state():
    exported = export(KeepsATable(), SAMPLES)
    assert exported.state is None
    assert exported.program is not None


@pytest.mark.parametrize(
    ("model", "comment", "operation"),
    [(SeedsItself(), "# seeded", "randn"), (SeedsItselfBehindDropout(), "# seeded behind dropout", "rand")],
    ids=lambda value: type(value).__name__,
)
def test_a_program_that_draws_other_numbers_than_its_model_says_where(model, comment, operation):
    exported = export(model, SAMPLES)
    assert exported.program is None
    assert exported.why_not.endswith(f"it draws random numbers, {operation} ({line_of(model, comment)})")


def test_dropout_in_eval_mode_draws_no_numbers():
    exported = export(DependsOnExport(), SAMPLES)
    assert exported.program is None
    assert exported.why_not.endswith("differently from the model")


@pytest.mark.parametrize("kind", [StartsFromTheFirst, KeepsTheFirst, CountsHereAndElsewhere])
def test_a_model_that_is_refused_is_left_as_it_was(kind):
    model = kind()
    new = kept_state(model)
    flat, examples = Flat(model, SAMPLES.structure), Examples(SAMPLES, model)
    flat(*examples.largest(1).tensors)
    kept = kept_state(model)
    with pytest.raises(NotRepeatable):
        state_change(flat, examples.largest(1), examples.other(1), new)
    assert changed_names(kept, kept_state(model)) == []


def test_a_model_that_changes_its_weights_is_refused_with_their_name():
    with pytest.raises(NotRepeatable, match=r"linear\.bias changes with each call"):
        export(LearnsOn(), SAMPLES)


class RefusesLargeValues(Net):
    def forward(self, x):
        if not torch.compiler.is_exporting() and x.abs().max() > 4:
            raise ValueError("too large")
        return self.linear(x)


def test_inputs_that_no_sample_looks_like_may_be_refused():
    assert export(RefusesLargeValues(), SAMPLES).program is not None


class LogsCalls(Net):
    def __init__(self) -> None:
        super().__init__()
        self.log = ["made"]

    def forward(self, x):
        self.log.append("called")
        return self.linear(x)


def test_a_log_is_state_that_answers_do_not_depend_on():
    model = LogsCalls()
    exported = export(model, SAMPLES)
    assert (exported.state.name, exported.state.changes_answers) == ("log", False)
    assert exported.program is not None


class HasTwoCounters(Net):
    """Answers depend on the other module's."""

    def __init__(self) -> None:
        super().__init__()
        self.sub = Net()

    def forward(self, x):
        self.calls += 1
        return self.linear(x) + self.sub.calls


def test_a_buffer_of_another_module_is_not_the_one_that_is_read():
    exported = export(HasTwoCounters(), SAMPLES)
    assert exported.state.name == "calls"
    assert not exported.state.is_read


class ComparesPairs(Net):
    def forward(self, x):
        rows = self.linear(x)
        return rows @ torch.cat([rows, -rows]).T


class NormalizesFeatures(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x):
        return self.norm(self.linear(x))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (ComparesPairs(), r"compares the rows of a batch with each other: its shape is \(2, 4\) for two rows"),
        (NormalizesFeatures(), r"the batch norm norm takes mean and variance from the rows of each call"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_model_without_an_answer_for_a_row_alone_is_refused(model, words):
    with pytest.raises(SourceError, match=words):
        export(model, SAMPLES)


def test_agreement_is_that_of_the_row_that_differs_most():
    expected = np.ones((3, 4))
    answers = expected.copy()
    assert worst_row_db([expected], [answers]) == EQUAL_DB
    answers[1] += 0.1
    assert worst_row_db([expected], [answers]) == pytest.approx(20.0)
    answers[2, 0] = np.nan
    assert worst_row_db([expected], [answers]) == -EQUAL_DB
