"""source: models as people bring them, and what is said about those that cannot be used."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from corewise.common.errors import SamplesError, SourceError
from corewise.records.reason import ReasonKind
from corewise.report.reasons import sentence
from corewise.samples import from_python, read
from corewise.search.task import Task
from corewise.source import export, load, own_answers


def rows(count: int = 6, width: int = 4) -> list[np.ndarray]:
    return list(np.random.default_rng(0).normal(size=(count, width)).astype(np.float32))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.linear(x)


class ReturnsNothingFromTrain(Net):
    """As those do that keep a part frozen."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.linear.eval()


class BesideAnArray(Net):
    def forward(self, x: Tensor) -> Any:
        return {"logits": self.linear(x), "scale": np.ones(2)}


def uncompilable(graph: Any, inputs: Any) -> Any:
    raise AssertionError("it was compiled")


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend=uncompilable)


def in_place(module: nn.Module) -> nn.Module:
    module.compile(backend=uncompilable)
    return module


@pytest.mark.parametrize(
    "make",
    [
        ReturnsNothingFromTrain,
        lambda: nn.DataParallel(Net()),
        lambda: compiled(Net()),
        lambda: nn.DataParallel(compiled(Net())),
        lambda: compiled(nn.DataParallel(Net())),
        lambda: nn.Sequential(compiled(Net()), nn.ReLU()),
        lambda: nn.Sequential(in_place(Net()), nn.ReLU()),
        lambda: in_place(Net()),
    ],
)
def test_wrappers_and_habits_do_not_matter(make: Any) -> None:
    result = export(make(), from_python(rows()))
    assert result.program is not None, result.why_not
    assert result.fixed_batch is None
    assert not result.module.model.training


def special(name: str) -> nn.Module:
    model = Net()
    values = {
        "float8": torch.zeros(3).to(torch.float8_e4m3fn),
        "subclass": TwoTensor(torch.ones(3), torch.ones(3)),
    }
    model.register_buffer("special", values[name])
    return model


def dynamic_int8() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        return torch.ao.quantization.quantize_dynamic(Net(), {nn.Linear})


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (dynamic_int8(), r"linear is quantized already \(Linear\); give the model in float32"),
        (Net, r"the model is the class Net; give an instance: Net\(...\)"),
        (rows, "the model is a function; give a torch.nn.Module"),
        (special("float8"), "special is torch.float8_e4m3fn; call model.float"),
        (special("subclass"), "special is a TwoTensor, not a plain tensor; give the model in float32"),
        (BesideAnArray(), "the model's scale is a ndarray, which is not a tensor"),
    ],
)
def test_what_cannot_be_used_is_named(model: Any, what: str) -> None:
    with pytest.raises(SourceError, match=what):
        export(model, from_python(rows()))


class OneForEachStep(Net):
    """Takes one row, and returns a list as long as its sequence."""

    def forward(self, x: Tensor) -> Any:
        return list(self.linear(x.reshape(1, x.shape[1], 4)).unbind(1))


class CountsSteps(Net):
    def forward(self, x: Tensor) -> Any:
        return self.linear(x.reshape(1, x.shape[1], 4)).mean(1), x.shape[1]


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (OneForEachStep(), "the model returns 5 tensors for one input and 3 for another; return as many for each"),
        (CountsSteps(), "the model's output has constants that depend on its input"),
    ],
)
def test_an_output_of_another_structure_is_named_where_the_batch_is_fixed(model: nn.Module, what: str) -> None:
    samples = [np.ones((steps, 4), np.float32) for steps in (3, 5, 3, 5)]
    with pytest.raises(SourceError, match=what):
        export(model, from_python(samples))


def test_the_caller_may_be_in_inference_mode_and_the_model_not() -> None:
    model = Net()
    with torch.inference_mode():
        made_inside = Net()
        result = export(model, from_python(rows()))
        with pytest.raises(SourceError, match=r"linear\.weight was made in inference mode.*; make the model outside"):
            export(made_inside, from_python(rows()))
    assert result.program is not None, result.why_not
    with torch.no_grad():
        torch.testing.assert_close(result.program.module()(torch.ones(3, 4))[0], model(torch.ones(3, 4)))


@torch.library.custom_op("corewise_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class WithAnOperatorOfItsOwn(Net):
    def forward(self, x: Tensor) -> Any:
        return twice(self.linear(x))


def test_a_program_with_operators_that_no_other_process_has_is_not_used() -> None:
    result = export(WithAnOperatorOfItsOwn(), from_python(rows()))
    assert result.program is None
    assert "the operator corewise_tests.twice.default is not PyTorch's own" in result.why_not


class Chooses(Net):
    """Chooses a branch by data, as torch.export can take it."""

    def forward(self, x: Tensor) -> Any:
        return torch.cond(self.linear.weight.sum() > 0, lambda y: y + 1, lambda y: y - 1, (self.linear(x),))


def test_control_flow_that_torch_can_export_is_run_as_it_is() -> None:
    result = export(Chooses(), from_python(rows()))
    assert result.program is not None, result.why_not
    assert result.fixed_batch is None


def test_torchscript_that_cannot_be_exported_is_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        part = torch.jit.script(nn.Sequential(nn.Linear(4, 2), nn.ReLU()))
    result = export(nn.Sequential(part, nn.ReLU()), from_python(rows()))
    assert result.program is None
    assert result.why_not.startswith("torch.export does not take TorchScript, and its 0 is; give the module")


def test_a_reference_may_name_the_model_or_the_samples_themselves(tmp_path: Path) -> None:
    file = tmp_path / "corewise_brought.py"
    file.write_text("from torch import nn\nmodel = nn.Linear(4, 2)\nsamples = [[1.0, 2.0], [3.0, 4.0]]\ncount = 3\n")
    assert isinstance(load(f"{file}:model"), nn.Linear)
    file.write_text("import numpy as np\nsamples = list(np.ones((3, 4), np.float32))\ncount = 3\n")
    other = tmp_path / "corewise_brought_samples.py"
    file.rename(other)
    assert len(read(f"{other}:samples")) == 3
    with pytest.raises(SamplesError, match="has no function 'count': count is an int; name a function that returns it"):
        read(f"{other}:count")
    with pytest.raises(SourceError, match="has no function 'samples': samples is a list; name a function"):
        load(f"{other}:samples")


def task(model: nn.Module) -> Task:
    return Task.read(
        model,
        rows(),
        metric=None,
        engines=("eager",),
        ignored=(),
        calibration=None,
        seed=0,
        class_names=None,
        tokenizer=None,
        pooling=None,
        on_event=lambda event: None,
    )


def test_a_baseline_whose_answers_differ_from_the_models_is_told() -> None:
    from corewise.accuracy.outputs import Outputs

    given = task(Net())
    with torch.no_grad():
        answers = given.exported.module(torch.from_numpy(np.stack([row[0] for row in given.holdout.rows])))[0].numpy()
    assert given.baseline_doubt(Outputs((answers * 1.0001,))) is None
    doubt = given.baseline_doubt(Outputs((answers + 1,)))
    assert doubt is not None
    assert doubt.kind == ReasonKind.BASELINE_DIFFERS
    assert "for 4 samples the baseline's answers agree with the model's own only to " in sentence(doubt)
    numbers, outputs = own_answers(given.exported, given.holdout)
    np.testing.assert_allclose(outputs[0], answers[numbers])
