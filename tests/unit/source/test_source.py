"""source: models of every kind in, one flat program with a dynamic batch out, and no code from a file."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from corewise.common import nested
from corewise.common.errors import CorewiseError, OutputError, SamplesError, SourceError
from corewise.records.build import TensorSpec
from corewise.samples import Samples, from_python
from corewise.source import (
    Exported,
    Flat,
    digest,
    export,
    load,
    load_module,
    load_program,
    recurrent_layers_kept,
    save_program,
)

HERE = Path(__file__)


def rows(count: int = 4, width: int = 4) -> list[np.ndarray]:
    return list(np.random.default_rng(0).normal(size=(count, width)).astype(np.float32))


def line_of(text: str) -> str:
    """``file:line`` of the line in this file that ends with ``text``."""
    lines = HERE.read_text().splitlines()
    return f"{HERE}:{1 + next(i for i, line in enumerate(lines) if line.endswith(text))}"


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 2)
        self.register_buffer("offset", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.linear(x) + self.offset


class TwoInputs(Linear):
    def forward(self, x: Tensor, y: Tensor, *, scale: int = 1) -> Any:  # type: ignore[override]
        return self.linear(x) * scale, {"sum": x + y}


class Keywords(Linear):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:  # type: ignore[override]
        x = input_ids.float()
        return self.linear(x if attention_mask is None else x * attention_mask)


@dataclass
class Answer:
    logits: Tensor
    probabilities: Tensor
    name: str = "answer"


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class DataclassOutput(Linear):
    def forward(self, x: Tensor) -> Answer:
        logits = self.linear(x)
        return Answer(logits, logits.softmax(-1))


class NamedTupleOutput(Linear):
    def forward(self, x: Tensor) -> Pair:
        return Pair(self.linear(x), x > 0)


class BranchOnData(Linear):
    def forward(self, x: Tensor) -> Any:
        if x.sum() > 1000:  # a branch on data
            return self.linear(x)
        return self.linear(x) * 2


class BranchOnBatch(Linear):
    def forward(self, x: Tensor) -> Any:
        if len(x) > 2:  # a branch on the batch
            x = x * 1.0
        return self.linear(x)


class OneAtATime(Linear):
    def forward(self, x: Tensor) -> Any:
        return self.linear(x.reshape(1, 4))  # one row only


class TwoAtATime(Linear):
    def forward(self, x: Tensor) -> Any:
        return self.linear(x.reshape(2, 4))  # two rows only


class Returning(nn.Module):
    """Returns what ``function`` makes of its input."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def exported(model: nn.Module | ExportedProgram, samples: Any) -> Exported:
    """The export, checked against the model for several batch sizes."""
    given = from_python(samples)
    result = export(model, given)
    assert result.program is not None, result.why_not
    assert result.why_not == ""
    assert result.program.example_inputs is None
    for size in (1, 2, 3):
        for _, arrays in given.batches(size):
            tensors = [torch.from_numpy(array) for array in arrays]
            args, kwargs = nested.unflatten(given.structure, tensors)
            with torch.no_grad():
                flat = result.program.module()(*tensors)
                expected = model(*args, **kwargs) if isinstance(model, nn.Module) else model.module()(*args, **kwargs)
            leaves, structure = nested.flatten(expected)
            assert structure == result.output_structure
            assert [(s.dtype, len(s.shape)) for s in result.outputs] == [(str(t.dtype)[6:], t.dim()) for t in leaves]
            torch.testing.assert_close(list(flat), leaves)
            torch.testing.assert_close(list(result.module(*tensors)), leaves)
    return result


# What goes in and comes out


def test_one_tensor() -> None:
    result = exported(Linear(), rows())
    assert result.inputs == (TensorSpec(name="x", dtype="float32", shape=(None, 4)),)
    assert result.outputs == (TensorSpec(name="output_0", dtype="float32", shape=(None, 2)),)
    assert result.output_structure.kind == "leaf"


def test_two_inputs_a_constant_and_a_nested_output() -> None:
    samples = [((x, x + 1), None) for x in rows()]
    result = exported(TwoInputs(), samples)
    assert [spec.name for spec in result.inputs] == ["x", "y"]
    assert [spec.name for spec in result.outputs] == ["output_0", "sum"]
    scaled = exported(TwoInputs(), [{"x": x, "y": x, "scale": 3} for x in rows()])
    assert [spec.name for spec in scaled.inputs] == ["x", "y"]


def test_keyword_inputs_with_a_missing_mask() -> None:
    ids = np.arange(8).reshape(2, 4)
    masked = exported(Keywords(), [{"input_ids": row, "attention_mask": np.ones(4, np.int64)} for row in ids])
    assert [(spec.name, spec.dtype) for spec in masked.inputs] == [("input_ids", "int64"), ("attention_mask", "int64")]
    assert len(exported(Keywords(), [{"input_ids": row, "attention_mask": None} for row in ids]).inputs) == 1


def test_dataclasses_and_namedtuples_come_back_as_their_class() -> None:
    result = exported(DataclassOutput(), rows())
    assert [spec.name for spec in result.outputs] == ["logits", "probabilities"]
    answer = nested.unflatten(result.output_structure, result.module(torch.ones(2, 4)))
    assert isinstance(answer, Answer)
    assert answer.name == "answer"
    pair = exported(NamedTupleOutput(), rows())
    assert [(spec.name, spec.dtype) for spec in pair.outputs] == [("first", "float32"), ("second", "bool")]


def test_samples_of_different_lengths_make_that_dimension_dynamic() -> None:
    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(9, 4)
            self.positions = nn.Parameter(torch.zeros(12, 4))

        def forward(self, ids: Tensor, mask: Tensor) -> Any:
            states = self.tokens(ids) + self.positions[: ids.shape[1]]
            return states * mask[..., None], (states * mask[..., None]).sum(1)

    samples = [{"ids": np.arange(n) % 9, "mask": np.ones(n, np.float32)} for n in (3, 1, 5, 5, 12)]
    result = exported(Embed(), samples)
    assert [spec.shape for spec in result.inputs] == [(None, None), (None, None)]
    assert [spec.shape for spec in result.outputs] == [(None, None, 4), (None, 4)]


def test_a_single_sample_is_enough_to_export() -> None:
    assert exported(Linear(), rows(1)).program is not None


def test_transformers_model_output() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=30,
        max_position_embeddings=12,
    )
    samples = [{"input_ids": np.arange(n), "attention_mask": np.ones(n, np.int64)} for n in (3, 7, 12, 1)]
    result = exported(transformers.BertModel(config).eval(), samples)
    assert [spec.name for spec in result.outputs] == ["last_hidden_state", "pooler_output"]
    assert [spec.shape for spec in result.outputs] == [(None, None, 16), (None, 16)]
    back = nested.unflatten(result.output_structure, [torch.zeros(1), torch.ones(1)])
    assert type(back).__name__.startswith("BaseModelOutput")
    assert back[1] is back.pooler_output


def test_the_model_is_put_in_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.9)).train()
    exported(model, rows())
    assert not model.training


def test_an_exported_program_is_wrapped_again() -> None:
    batch = Dim("n")
    program = torch.export.export(Linear().eval(), (torch.ones(2, 4),), dynamic_shapes=({0: batch},))
    assert exported(program, rows()).inputs[0].name == "x"


# What cannot be exported


@pytest.mark.parametrize(
    ("model", "line", "what"),
    [
        (BranchOnData(), "# a branch on data", "Could not guard on data-dependent expression"),
    ],
)
def test_why_not_names_the_operation_and_the_line(model: nn.Module, line: str, what: str, capfd: Any) -> None:
    result = export(model, from_python(rows()))
    assert result.program is None
    assert what in result.why_not
    assert line_of(line) in result.why_not
    assert result.why_not.endswith(line)
    assert "\n" not in result.why_not
    assert capfd.readouterr() == ("", "")
    assert result.module(torch.ones(3, 4))[0].shape == (3, 2)
    assert result.outputs[0].shape == (None, 2)


def test_an_error_without_words_is_named_by_its_line() -> None:
    class Refusing(nn.Module):
        def forward(self, x: Tensor) -> Any:
            if not isinstance(x.shape[0], int):
                raise NotImplementedError  # without words
            return x * 2

    result = export(Refusing(), from_python(rows()))
    assert result.fixed_batch == 1
    assert result.why_fixed.startswith("torch.export failed: NotImplementedError (")
    assert result.why_fixed.endswith("raise NotImplementedError  # without words")


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch, in run_decompositions
def test_recurrent_layers_take_sequences_of_any_length() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return self.lstm(x)[0]

    model = Recurrent()
    result = export(model, from_python([np.ones((n, 4)) for n in (2, 5, 3)]))
    assert result.program is not None
    assert result.outputs[0].shape == (None, None, 3)
    with recurrent_layers_kept():
        again = result.program.run_decompositions({})
    for program in (result.program, again):
        x = torch.randn(2, 7, 4)
        torch.testing.assert_close(program.module()(x)[0], model(x), atol=1e-5, rtol=1e-4)


def test_a_batch_that_cannot_be_dynamic_is_fixed_at_one_and_says_why() -> None:
    result = export(BranchOnBatch(), from_python(rows()))
    assert result.program is not None
    assert result.fixed_batch == 1
    assert line_of("# a branch on the batch") in result.why_fixed


def test_a_model_that_takes_one_row_only_runs_row_by_row() -> None:
    result = export(OneAtATime(), from_python(rows()))
    assert result.fixed_batch == 1
    assert "the model takes one sample but no batch of two" in result.why_fixed


def test_a_program_that_answers_differently_is_not_used() -> None:
    model = Returning(lambda x: x * (2 if torch.compiler.is_exporting() else 3))
    result = export(model, from_python(rows()))
    assert result.program is None
    assert result.why_not == "the exported program answers a batch of 1 differently from the model"


# Wrong models and samples


def error_of(error: type[CorewiseError], function: Any, *args: Any) -> str:
    with pytest.raises(error) as caught:
        function(*args)
    assert caught.value.fix
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "line", "what"),
    [
        (TwoAtATime(), "# two rows only", "the model takes a batch of two but not of three"),
    ],
)
def test_a_fixed_batch_is_named_with_its_line(model: nn.Module, line: str, what: str) -> None:
    message = error_of(SourceError, export, model, from_python(rows()))
    assert what in message
    assert line_of(line) in message


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda x: x.sum(), "the model's output_0 has shape () for a batch of 2"),
        (lambda x: x[:, :0], "the model returns no values: the shape of its output is (2, 0)"),
        (lambda x: x[:1], "the model's output_0 has shape (1, 4) for a batch of 2"),
        (lambda x: {"y": x, "n": len(x)}, "the model's output has constants that depend on its input"),
        (lambda x: [{"boxes": x[:1]} for _ in x], "return what is before the suppression"),
        (lambda x: 3, "the model returns int without tensors"),
        (lambda x: x.numpy(), "the model returns ndarray without tensors"),
        (lambda x: {"cache": object(), "x": x}, 'the model\'s output["cache"] is an object, which is not a tensor'),
        (lambda x: x.bfloat16(), "the model's output_0 is torch.bfloat16"),
        (lambda x: x.mul_(2), "the model changes its input x in place"),
        (lambda x: {"logits": (x - x) / (x - x)}, "the model's logits has NaN"),
    ],
)
def test_unusable_outputs(function: Any, what: str) -> None:
    assert what in error_of(SourceError, export, Returning(function), from_python(rows()))


def test_nan_is_told_of_the_users_own_sample() -> None:
    samples = replace(from_python(rows()).take([3, 1]), names=["d.png", "b.png"])
    message = error_of(SourceError, export, Returning(lambda x: x * np.nan), samples)
    assert "has NaN for sample 3 (d.png); repair the model or that sample" in message


@pytest.mark.parametrize(
    ("samples", "what"),
    [
        (rows(2, 5), "in a batch x float32 (2, 5): RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ([np.zeros(4, np.int64)] * 2, "in a batch x int64 (2, 4): RuntimeError"),
        ([((x, x), None) for x in rows()], "TypeError: Linear.forward() takes 2 positional arguments"),
        ([{"z": x} for x in rows()], "in a batch z float32 (2, 4): TypeError"),
    ],
)
def test_samples_that_the_model_does_not_take(samples: Any, what: str) -> None:
    message = error_of(SamplesError, export, Linear(), from_python(samples))
    assert what in message
    assert "a sample that is a pair is (inputs, label)" in message


@pytest.mark.parametrize(
    ("model", "what"),
    [
        ("resnet50", "the model is a str"),
        (Linear().half(), "linear.weight is torch.float16; call model.float() first"),
        (Linear().to("meta"), "linear.weight has no values: it is on the device meta"),
    ],
)
def test_unusable_models(model: Any, what: str) -> None:
    assert what in error_of(SourceError, export, model, from_python(rows()))


def test_an_exported_program_with_a_fixed_batch_keeps_it() -> None:
    result = export(torch.export.export(Linear(), (torch.ones(2, 4),)), from_python(rows(4, 4)))
    assert result.fixed_batch == 2


# Loading


def write_module(folder: Path, text: str) -> str:
    (folder / "corewise_factory.py").write_text(text)
    return f"{folder}/corewise_factory.py"


def test_factories_in_files_and_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_module(tmp_path, "from torch import nn\ndef build():\n    return nn.Linear(3, 1)\n")
    assert isinstance(load(f"{file}:build"), nn.Linear)
    monkeypatch.chdir(tmp_path)
    assert isinstance(load("corewise_factory:build"), nn.Linear)
    assert isinstance(load("torch.nn:Identity"), nn.Identity)


@pytest.mark.parametrize(
    ("text", "name", "what"),
    [
        (
            "def build():\n    raise ValueError('no weights\\nat all')\n",
            "build",
            "failed: ValueError: no weights ({}:2)",
        ),
        ("import nothing_like_this\n", "build", "cannot be imported: ModuleNotFoundError: No module named"),
        ("def build(:\n", "build", "cannot be imported: SyntaxError: invalid syntax"),
        ("raise SystemExit(3)\n", "build", "cannot be imported: SystemExit: 3 ({}:1)"),
        ("def build(): ...\n", "biuld", "has no function 'biuld'; did you mean 'build'?"),
        ("build = 3\n", "build", "has no function 'build'"),
        ("def build(width): ...\n", "build", "failed: TypeError: build() missing 1 required positional argument"),
        ("def build():\n    return {'a': 1}\n", "build", "returned a dict, not a torch.nn.Module; return the model"),
        ("def build(): ...\n", "build", "returned None, not a torch.nn.Module"),
        ("from torch import nn\ndef build():\n    return nn.Linear\n", "build", "returned the class Linear"),
    ],
)
def test_bad_factories(tmp_path: Path, text: str, name: str, what: str) -> None:
    file = write_module(tmp_path, text)
    assert what.format(file) in error_of(SourceError, load, f"{file}:{name}")


@pytest.mark.parametrize(
    ("reference", "what"),
    [
        ("nowhere.py:build", "there is no file nowhere.py"),
        ("nowhere_at_all:build", "cannot be imported: ModuleNotFoundError"),
        ("resnet50", "'resnet50' does not name a model; give module:factory"),
        ("nowhere.pt2", "there is no file nowhere.pt2"),
        ("model.pth", "model.pth is a pickle, which can run any code when it is opened; write a function"),
        ("model.onnx", "model.onnx is an ONNX model, and corewise begins with the PyTorch model; give the code"),
        ("/tmp", "/tmp is a folder; write hf:/tmp or st:/tmp if it holds a model"),
        ("weights/pytorch_model.bin", "is a pickle"),
        ("hf:/nowhere/at/all", "there is no folder /nowhere/at/all"),
        ("timm:resnet18", "timm: models need the package timm; pip install timm"),
    ],
)
def test_bad_references(reference: str, what: str) -> None:
    if reference.startswith("timm") and "timm" in sys.modules:
        pytest.skip("timm is installed")
    assert what in error_of(SourceError, load, reference)


def test_a_torchvision_that_does_not_fit_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    message = error_of(SourceError, load, "torchvision:resnet18")
    assert f"does not fit torch {torch.__version__}: operator torchvision::nms does not exist" in message


def test_a_transformers_folder_is_loaded_in_fp32_by_its_architecture(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    transformers.BertForSequenceClassification(config).half().save_pretrained(tmp_path)
    model = load(f"hf:{tmp_path}")
    assert isinstance(model, transformers.BertForSequenceClassification)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# Programs as files


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "linear.pt2"
    result = export(Linear(), from_python(rows()))
    assert result.program is not None
    save_program(result.program, path)
    return path


def test_a_saved_program_holds_no_pickle_and_loads_equal(saved: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        assert archive.getinfo("archive/data/sample_inputs/model.pt").file_size == 0
        contents = [archive.read(name) for name in archive.namelist()]
    assert not any(content.startswith((b"\x80", b"PK")) for content in contents)
    program = load(str(saved))
    assert isinstance(program, ExportedProgram)
    x = torch.randn(5, 4)
    torch.testing.assert_close(load_module(saved)(x)[0], Linear()(x))
    assert exported(program, rows()).outputs[0].shape == (None, 2)


def test_a_program_of_torch_export_save_is_taken(tmp_path: Path) -> None:
    program = torch.export.export(Linear(), (torch.ones(2, 4),), dynamic_shapes=({0: Dim("n")},))
    torch.export.save(program, tmp_path / "own.pt2")
    assert exported(load(str(tmp_path / "own.pt2")), rows()).inputs[0].shape == (None, 4)


def test_a_program_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    program = torch.export.export(Linear(), (torch.ones(2, 4),))
    assert "cannot be written" in error_of(OutputError, save_program, program, tmp_path / "missing" / "x.pt2")


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def rewrite(source: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """The archive with its records changed."""
    with zipfile.ZipFile(source) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in records.items():
            archive.writestr(name.removeprefix("//") if name.startswith("//") else f"{target.stem}/{name}", content)


def in_json(record: str, change: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    def apply(records: dict[str, bytes]) -> None:
        data = json.loads(records[record])
        change(data)
        records[record] = json.dumps(data).encode()

    return apply


MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


def first_node(data: Any) -> Any:
    return data["graph_module"]["graph"]["nodes"][0]


def attacks(trap: Path) -> dict[str, Callable[[dict[str, bytes]], None]]:
    """Changes of an archive by which torch.export.load, or running the program, would make the folder ``trap``."""
    torch_pickle = io.BytesIO()
    torch.save(Trap(trap), torch_pickle)
    call = f"__import__('os').mkdir('{trap}')"

    def pickled_weight(records: dict[str, bytes]) -> None:
        in_json(WEIGHTS, lambda data: data["config"]["model.linear.weight"].update(use_pickle=True))(records)
        name = json.loads(records[WEIGHTS])["config"]["model.linear.weight"]["path_name"]
        records[f"data/weights/{name}"] = torch_pickle.getvalue()

    def opaque_constant(records: dict[str, bytes]) -> None:
        payload = {"path_name": "opaque_obj_0", "use_pickle": True}
        in_json(CONSTANTS, lambda data: next(iter(data["config"].values())).update(payload))(records)
        records["data/constants/opaque_obj_0"] = pickle.dumps(Trap(trap))

    def renamed_input(records: dict[str, bytes]) -> None:
        records[MODEL] = records[MODEL].replace(b'"tensors_0"', f'"tensors_0={call}"'.encode())

    def expression(data: Any) -> None:
        values = data["graph_module"]["graph"]["tensor_values"]
        next(size for value in values.values() for size in value["sizes"] if "as_expr" in size)["as_expr"][
            "expr_str"
        ] = call

    def system_call(data: Any) -> None:
        node = first_node(data)
        node["target"] = "torch.os.mkdir"
        node["inputs"] = [{"name": "path", "arg": {"as_string": str(trap)}, "kind": 1}]
        data["verifiers"] = []

    def import_by_tree(data: Any) -> None:
        context = json.dumps({"__enum__": True, "fqn": "antigravity:Color", "name": "RED"}).replace("_", "\\u005f")
        tree = {"type": "builtins.dict", "context": context, "children_spec": []}
        data["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps([1, tree])

    def default_factory(data: Any) -> None:
        context = {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []}
        tree = {"type": "collections.defaultdict", "context": context, "children_spec": []}
        data["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps([1, tree])

    return {
        "sample inputs": lambda records: records.update({"data/sample_inputs/model.pt": torch_pickle.getvalue()}),
        "pickled weight": pickled_weight,
        "opaque constant": opaque_constant,
        "legacy weights": lambda records: records.update({"data/weights/model.pt": torch_pickle.getvalue()}),
        "legacy constants": lambda records: records.update({"data/constants/model.pt": torch_pickle.getvalue()}),
        "native code": lambda records: records.update({"data/aotinductor/model/kernel.so": b"\x7fELF"}),
        "outside the folder": lambda records: records.update({"//version": b"8.0"}),
        "input name": renamed_input,
        "shape expression": in_json(MODEL, expression),
        "operator": in_json(MODEL, system_call),
        "dlopen": in_json(MODEL, lambda data: first_node(data).update(target="torch.ops.load_library")),
        "enum": in_json(MODEL, import_by_tree),
        "default factory": in_json(MODEL, default_factory),
    }


@pytest.mark.parametrize("name", list(attacks(Path("trap"))))
def test_a_program_that_holds_code_is_refused_without_running_it(saved: Path, tmp_path: Path, name: str) -> None:
    trap, path = tmp_path / "trap", tmp_path / "evil.pt2"
    rewrite(saved, path, attacks(trap)[name])
    message = error_of(SourceError, load_program, path)
    assert str(path) in message
    assert not trap.exists()
    assert "antigravity" not in sys.modules


def test_these_attacks_work_on_torch_itself(saved: Path, tmp_path: Path) -> None:
    """Otherwise the test above would prove nothing."""
    names = ["sample inputs", "pickled weight", "opaque constant", "legacy weights", "legacy constants"]
    names += ["input name", "shape expression"]
    for name in names:
        rewrite(saved, tmp_path / f"{name}.pt2", attacks(tmp_path / f"{name} was here")[name])
    code = f"""
import contextlib, torch
for name in {names!r}:
    with contextlib.suppress(Exception):
        torch.export.load(f"{tmp_path}/{{name}}.pt2").module()(torch.ones(2, 4))
"""
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert [name for name in names if not (tmp_path / f"{name} was here").exists()] == []


def test_guards_in_a_file_are_dropped(tmp_path: Path) -> None:
    trap, own, path = tmp_path / "trap", tmp_path / "own.pt2", tmp_path / "guarded.pt2"
    torch.export.save(torch.export.export(Linear(), (torch.ones(2, 4),)), own)
    guard = f"__import__('os').mkdir('{trap}') is None"
    rewrite(own, path, in_json(MODEL, lambda data: data.update(guards_code=[guard])))
    load_program(path).module()(torch.ones(2, 4))
    assert not trap.exists()
    torch.export.load(path).module()(torch.ones(2, 4))
    assert trap.exists(), "otherwise this test proves nothing"


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "no model", "broken json", "other version"])
def test_damaged_programs_are_refused_in_one_line(saved: Path, tmp_path: Path, damage: str, capfd: Any) -> None:
    path = tmp_path / "damaged.pt2"
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not a program")
    elif damage == "cut":
        path.write_bytes(saved.read_bytes()[:-200])
    elif damage == "no model":
        rewrite(saved, path, lambda records: records.pop(MODEL) and None)  # type: ignore[func-returns-value]
    elif damage == "broken json":
        rewrite(saved, path, lambda records: records.update({MODEL: b"{"}))
    else:
        rewrite(saved, path, in_json(MODEL, lambda data: data["schema_version"].update(major=1)))
    assert str(path) in error_of(SourceError, load_program, path)
    assert capfd.readouterr() == ("", "")


# The digest


def test_the_digest_knows_graph_weights_and_interface_and_is_the_same_in_every_process(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(HERE.parent)!r})
from test_source import *
print(digest(export(Linear(), from_python(rows()))), digest(export(BranchOnData(), from_python(rows()))))
"""
    there = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    samples = from_python(rows())
    here = [digest(export(model, samples)) for model in (Linear(), BranchOnData())]
    assert there == here
    other_weights = Linear()
    nn.init.ones_(other_weights.linear.bias)
    other_offset = Linear()
    other_offset.offset = torch.zeros(2)
    others = [digest(export(m, samples)) for m in (other_weights, other_offset, DataclassOutput(), BranchOnBatch())]
    assert len({*here, *others}) == 6


def test_flat_is_importable_for_eager_engines() -> None:
    samples: Samples = from_python(rows())
    assert isinstance(export(Linear(), samples).module, Flat)
