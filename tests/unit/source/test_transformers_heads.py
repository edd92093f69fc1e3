"""source: heads of transformers that are told, missing or unknown, encoders, and model objects with a tokenizer."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

from corewise.common.errors import SamplesError, SourceError
from corewise.pipeline import TextEncoder
from corewise.samples import raw_from_python
from corewise.search.texts import tokenized
from corewise.source import Loaded, load_with_texts

VOCABULARY = ["<pad>", "<unk>", "<s>", "</s>", "red", "blue", "house", "tree"]
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 32,
}


def save_tokenizer(folder: Path) -> Path:
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>").save_pretrained(folder)
    return folder / "tokenizer.json"


def bert(kind: str, **config: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.BertConfig(**SIZES, **config))


def saved(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def change(folder: Path, **facts: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **facts}))


def answers(loaded: Loaded, texts: list[Any]) -> np.ndarray:
    assert loaded.pipeline is not None
    encoder = TextEncoder(loaded.pipeline, loaded.tokenizer)
    arrays = encoder.collate(encoder.encode(texts))
    names = [each.name for each in loaded.pipeline.inputs]
    assert isinstance(loaded.model, nn.Module)
    with torch.no_grad():
        output = loaded.model.eval()(**dict(zip(names, map(torch.from_numpy, arrays), strict=True)))
    made: np.ndarray = (output if isinstance(output, torch.Tensor) else output[0]).numpy()
    return made


def refused(function: Any, *args: Any, **options: Any) -> str:
    with pytest.raises((SourceError, SamplesError)) as caught:
        function(*args, **options)
    assert caught.value.fix
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "config", "facts"),
    [
        ("BertForSequenceClassification", {"num_labels": 3, "problem_type": "regression"}, ("classes", "none")),
        ("BertForSequenceClassification", {"num_labels": 1, "problem_type": "regression"}, ("scores", "none")),
        ("BertForSequenceClassification", {"num_labels": 1}, ("scores", "sigmoid")),
        ("BertForTokenClassification", {"num_labels": 3, "problem_type": "regression"}, ("tokens", "softmax")),
    ],
)
def test_what_a_heads_numbers_mean(tmp_path: Path, kind: str, config: dict[str, Any], facts: tuple[str, str]) -> None:
    made = load_with_texts(f"hf:{saved(tmp_path, bert(kind, **config))}").pipeline
    assert made is not None
    assert (made.task, made.activation) == facts


def test_classes_that_have_no_name_get_transformers_own(tmp_path: Path) -> None:
    folder = saved(tmp_path, bert("BertForSequenceClassification", num_labels=3))
    change(folder, id2label={"1": "good", "2": "bad", "7": "fair"}, label2id=None)
    made = load_with_texts(f"hf:{folder}").pipeline
    assert made is not None
    assert made.labels == ("LABEL_0", "good", "bad")


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (lambda: bert("BertForMaskedLM"), "but BertForMaskedLM has answers of its own kind"),
        (
            lambda: transformers.GPT2LMHeadModel(
                transformers.GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2, n_positions=32)
            ),
            "but GPT2LMHeadModel generates text in a loop, which corewise does not run",
        ),
    ],
)
def test_texts_for_a_head_that_cannot_take_them(tmp_path: Path, model: Any, what: str) -> None:
    folder = saved(tmp_path, model())
    message = refused(tokenized, load_with_texts(f"hf:{folder}"), raw_from_python(["red", "blue"]))
    assert what in message
    assert "--pooling mean makes a vector of each text" in message
    for pooling in ("mean", "last"):
        together = answers(load_with_texts(f"hf:{folder}", pooling=pooling), ["red", "blue house tree"])
        np.testing.assert_allclose(
            together[:1], answers(load_with_texts(f"hf:{folder}", pooling=pooling), ["red"]), atol=1e-6
        )


def test_a_head_without_weights_is_not_random(tmp_path: Path) -> None:
    folder = saved(tmp_path, bert("BertModel"))
    change(folder, architectures=["BertForSequenceClassification"])
    assert "has no weights for classifier.bias, so that the head of BertForSequenceClassification" in refused(
        load_with_texts, f"hf:{folder}"
    )
    change(folder, architectures=["BertForPoems"])
    assert "is a BertForPoems, which transformers" in refused(load_with_texts, f"hf:{folder}")
    assert load_with_texts(f"hf:{folder}", pooling="cls").pipeline is not None
    change(folder, architectures=None)
    made = load_with_texts(f"hf:{folder}").pipeline
    assert made is not None
    assert (made.task, made.pooling) == ("vectors", "none")


def test_code_in_a_folder_is_not_run_and_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail("asked on the terminal"))
    folder = saved(tmp_path, bert("BertModel"))
    (folder / "own.py").write_text("raise SystemExit('it was run')")
    change(folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModel": "own.Model"})
    write_modules(folder)
    for prefix in ("hf", "st"):
        message = refused(load_with_texts, f"{prefix}:{folder}")
        assert f"{prefix}:{folder} needs code of its own, which corewise does not run" in message


def write_modules(folder: Path) -> None:
    (folder / "modules.json").write_text('[{"path": "", "type": "sentence_transformers.models.Transformer"}]')


def test_what_pads_is_what_the_model_knows_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    folder = saved(tmp_path, bert("BertForSequenceClassification", pad_token_id=5))
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    made = load_with_texts(f"hf:{folder}").pipeline
    assert made is not None
    assert made.pad_id == 5


def test_a_decoders_head_finds_the_end_of_a_text_by_its_own_padding(tmp_path: Path) -> None:
    """Its tokenizer's padding is another token."""
    sizes = {"vocab_size": len(VOCABULARY), "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32}
    torch.manual_seed(0)
    model = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**sizes, num_labels=3, pad_token_id=1))
    folder = saved(tmp_path, model)
    by_file = load_with_texts(model, tokenizer=save_tokenizer(tmp_path / "apart"))
    for loaded in (load_with_texts(f"hf:{folder}"), by_file):
        alone = answers(loaded, ["red"])
        np.testing.assert_allclose(answers(loaded, ["red", "blue house tree"])[:1], alone, atol=1e-6)
    with torch.no_grad():
        own = model.eval()(input_ids=torch.tensor([[2, 4, 3]])).logits.numpy()
    np.testing.assert_allclose(answers(by_file, ["red"]), own, atol=1e-6)


def test_of_a_model_with_a_decoder_the_encoder_makes_vectors(tmp_path: Path) -> None:
    sizes = {"vocab_size": len(VOCABULARY), "d_model": 8, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
    config = transformers.BartConfig(**sizes, **heads, **ends, max_position_embeddings=32)
    folder = saved(tmp_path, transformers.BartForConditionalGeneration(config))
    encoder = transformers.BartModel.from_pretrained(folder).get_encoder().eval()
    with torch.no_grad():
        hidden = encoder(input_ids=torch.tensor([[2, 4, 6, 3]])).last_hidden_state.mean(1)
    loaded = load_with_texts(f"hf:{folder}", pooling="mean")
    np.testing.assert_allclose(answers(loaded, ["red house", "tree " * 9])[:1], hidden.numpy(), atol=1e-5)


def test_a_tokenizer_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    folder = saved(tmp_path, bert("BertForSequenceClassification"))
    file = save_tokenizer(tmp_path / "whole")
    (folder / "tokenizer.json").write_text("{}")
    assert f"hf:{folder} cannot be loaded" in refused(load_with_texts, f"hf:{folder}")
    assert load_with_texts(f"hf:{folder}", tokenizer=file).pipeline is not None


def test_a_model_object_takes_a_tokenizer_file_as_its_folder_does(tmp_path: Path) -> None:
    """All inputs of transformers' models have a default, so that their signatures do not say what they need."""
    model = bert("BertForSequenceClassification", id2label={0: "bad", 1: "good"})
    file = save_tokenizer(tmp_path)
    loaded = load_with_texts(model, tokenizer=file)
    assert loaded.pipeline is not None
    assert (loaded.pipeline.task, loaded.pipeline.labels, loaded.pipeline.max_length) == (
        "classes",
        ("bad", "good"),
        32,
    )
    assert [each.role for each in loaded.pipeline.inputs] == ["ids", "mask", "types"]
    given = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert given.pad_token_id == 0
    by_object = load_with_texts(model, tokenizer=given)
    np.testing.assert_array_equal(answers(by_object, ["red tree", "blue"]), answers(loaded, ["red tree", "blue"]))
    padded = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(file)), pad_token="tree")
    untold = bert("BertForSequenceClassification", pad_token_id=None)
    assert load_with_texts(untold, tokenizer=padded).pipeline.pad_id == 7  # type: ignore[union-attr]
    assert load_with_texts(model, tokenizer=Tokenizer.from_file(str(file))).pipeline is not None
    assert "the tokenizer is a dict" in refused(load_with_texts, model, tokenizer={})
    pooled = load_with_texts(model, tokenizer=file, pooling="mean")
    assert answers(pooled, ["red", "blue tree house"]).shape == (2, 8)
    words = load_with_texts(bert("BertForMaskedLM"), tokenizer=file)
    assert words.pipeline is not None
    assert [each.name for each in words.pipeline.inputs] == ["input_ids", "attention_mask"]

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model.bert

        def forward(self, input_ids: Any = None, attention_mask: Any = None, output_attentions: Any = None) -> Any:
            return self.inner(input_ids, attention_mask)

    wrapped = load_with_texts(Wrapped(), tokenizer=file, pooling="mean")
    assert wrapped.pipeline is not None
    assert wrapped.pipeline.max_length == 32
    np.testing.assert_allclose(answers(wrapped, ["red tree"]), answers(pooled, ["red tree"]), atol=1e-6)


def test_loading_a_head_writes_nothing_on_the_terminal(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", bert("BertForSequenceClassification", num_labels=2))
    code = f"from corewise.source import load_with_texts; load_with_texts('hf:{folder}')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ended.stdout + ended.stderr == ""
