"""source: tokenizers, lengths, names and folders of text models that are wrong, and what is said of them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn

from corewise.common.errors import InputError, SamplesError, SourceError
from corewise.records.build import TensorSpec
from corewise.samples import from_python
from corewise.search.texts import fitted
from corewise.source import Loaded, export, load_with_texts, sentence_models
from corewise.source.loaded import text_pipeline
from corewise.source.models import split_reference
from corewise.source.transformers_models import longest


class Words(nn.Module):
    """A user's own encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 4)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        vectors: Tensor = self.embedding(ids) * attention_mask[:, :, None]
        return vectors


def tokenizer_with(path: Path, **changes: Any) -> Path:
    made = json.loads(Tokenizer(WordLevel({"[UNK]": 0, "red": 1}, unk_token="[UNK]")).to_str())
    path.write_text(json.dumps({**made, **changes}))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {}},
        {"model": {"type": "WordPiece"}},
        {"padding": {"pad_id": "none"}},
        {"padding": {"pad_id": None, "strategy": "BatchLongest"}},
        {"truncation": "right"},
    ],
)
def test_a_tokenizer_is_opened_before_there_is_an_artifact_of_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Also where samples are tokens, which need no tokenizer: nothing could open the artifact."""
    path = tokenizer_with(tmp_path / "tokenizer.json", **changes)
    with pytest.raises(InputError, match=r"tokenizer.json is not a tokenizer: .*; give the model's own") as caught:
        load_with_texts(Words(), tokenizer=path)
    assert "\n" not in str(caught.value)


def test_a_whole_tokenizer_is_taken(tmp_path: Path) -> None:
    assert load_with_texts(Words(), tokenizer=tokenizer_with(tmp_path / "tokenizer.json")).pipeline is not None


@pytest.mark.parametrize(
    ("task", "shape", "count"),
    [("tokens", (None, None, 4), 3), ("tokens", (None, None, 6), 9), ("classes", (None, 3), 2)],
)
def test_names_of_classes_are_as_many_as_the_model_has(task: Any, shape: Any, count: int) -> None:
    """Their answers would have wrong names, or ``predict`` would fail."""
    names = tuple(f"class {number}" for number in range(count))
    pipeline = text_pipeline(b"", ("input_ids", "attention_mask"), task=task, max_length=8, labels=names)
    tokens = TensorSpec(name="input_ids", dtype="int64", shape=(None, None))
    output = TensorSpec(name="logits", dtype="float32", shape=shape)
    other = TensorSpec(name="hidden", dtype="float32", shape=(None, 5))
    exported: Any = SimpleNamespace(inputs=(tokens, tokens), outputs=(output, other))
    loaded = Loaded(model=Words(), pipeline=pipeline)
    with pytest.raises(SamplesError, match=f"has {count} class names, but the model has {shape[-1]} classes"):
        fitted(loaded, exported, asked=False)


def test_lengths_below_one_are_none() -> None:
    config: Any = SimpleNamespace(max_position_embeddings=512, model_type="bert", pad_token_id=0)
    assert longest(SimpleNamespace(model_max_length=-1), config, -5) == 512
    assert longest(SimpleNamespace(model_max_length=128), config, 0) == 128


@pytest.mark.parametrize("library", ["st", "hf"])
def test_a_folder_below_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """No shell puts the home's path in the place of ``~`` behind a colon."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert split_reference(f"{library}:~/models/mine") == (library, f"{tmp_path}/models/mine")
    assert split_reference("timm:~") == ("timm", "~")


def test_a_model_of_the_hub_whose_weights_are_older_than_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    hub = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setattr(sentence_models, "import_package", lambda name, extra: hub)
    assert sentence_models._downloaded("mine") == tmp_path
    assert [any("pytorch_model*" in pattern for pattern in patterns) for patterns in asked] == [False, True]
    asked.clear()
    (tmp_path / "model.safetensors").touch()
    sentence_models._downloaded("mine")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("st:/none/at/all", "there is no folder /none/at/all; check the path"),
        ("hf:./none", "there is no folder ./none; check the path"),
        ("hf:none/at/all", "there is no folder none/at/all; check the path"),
        (f"st:{__file__}", "test_text_source_faults.py is a file; give the folder with the model's config.json"),
        ("st:", "'st:' names no model; give st:NAME"),
        ("timm: ", "'timm: ' names no model; give timm:NAME"),
    ],
)
def test_names_of_nothing(reference: str, message: str) -> None:
    with pytest.raises(SourceError) as caught:
        load_with_texts(reference)
    assert str(caught.value).endswith(message)


def test_token_ids_behind_the_models_table_are_said_to_be_of_another_tokenizer() -> None:
    ids = [{"ids": np.array([1, 40]), "attention_mask": np.ones(2, np.int64)}] * 2
    with pytest.raises(SamplesError, match=r"IndexError: .*; the samples have the number 40, and no table"):
        export(Words(), from_python(ids))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("sentence_bert_config.json", {"max_seq_length": "many"}),
        ("config_sentence_transformers.json", {"prompts": ["query: "]}),
    ],
)
def test_settings_of_another_kind_are_told_of(tmp_path: Path, file: str, content: Any) -> None:
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=8)).save_pretrained(tmp_path)
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "red": 1}, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    (tmp_path / "modules.json").write_text(
        json.dumps([{"type": "sentence_transformers.models.Transformer", "path": ""}])
    )
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(SourceError, match=r"st:.* cannot be loaded: (ValueError|AttributeError)"):
        load_with_texts(f"st:{tmp_path}")
