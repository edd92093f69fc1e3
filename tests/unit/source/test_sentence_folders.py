"""source: folders and objects of sentence-transformers as its versions write them, and what is refused by name."""

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

from corewise.common.errors import SourceError
from corewise.pipeline import TextEncoder
from corewise.source import Loaded, load_with_texts

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "house", "tree"]
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 32,
}
OLD, NEW = "sentence_transformers.models.", "sentence_transformers.sentence_transformer.modules."
TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def save(folder: Path, kind: str, most: int | None = None, **config: Any) -> Path:
    torch.manual_seed(0)
    getattr(transformers, kind)(transformers.BertConfig(**SIZES, **config)).save_pretrained(folder)
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    told = {} if most is None else {"model_max_length": most}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", **told
    ).save_pretrained(folder)
    return folder


def encoder(folder: Path, *modules: tuple[str, dict[str, Any]], most: int | None = None, **facts: Any) -> Path:
    """A folder of these modules behind a Transformer, and with these facts beside them."""
    save(folder, "BertModel", most)
    listed = [{"path": "", "type": f"{OLD}Transformer"}]
    for number, (kind, config) in enumerate(modules, 1):
        write(folder / f"{number}_{kind}" / "config.json", config)
        listed.append({"path": f"{number}_{kind}", "type": f"{OLD}{kind}"})
    write(folder / "modules.json", listed)
    write(folder / "config_sentence_transformers.json", facts)
    return folder


def answers(loaded: Loaded, texts: list[Any]) -> np.ndarray:
    assert loaded.pipeline is not None
    texts_encoder = TextEncoder(loaded.pipeline, loaded.tokenizer)
    arrays = texts_encoder.collate(texts_encoder.encode(texts))
    names = [each.name for each in loaded.pipeline.inputs]
    assert isinstance(loaded.model, nn.Module)
    with torch.no_grad():
        output = loaded.model.eval()(**dict(zip(names, map(torch.from_numpy, arrays), strict=True)))
    made: np.ndarray = (output if isinstance(output, torch.Tensor) else output.logits).numpy()
    return made


def refused(folder: Any) -> str:
    with pytest.raises(SourceError) as caught:
        load_with_texts(folder if not isinstance(folder, Path) else f"st:{folder}")
    assert caught.value.fix
    assert "\n" not in str(caught.value)
    return str(caught.value)


MEAN = ("Pooling", {"pooling_mode": "mean"})


def test_libraries_say_nothing_on_the_terminal(tmp_path: Path) -> None:
    folder = encoder(tmp_path / "model", MEAN)
    code = f"from corewise.source import load_with_texts; load_with_texts('st:{folder}')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_vectors_are_as_short_as_the_folder_says(tmp_path: Path) -> None:
    whole = load_with_texts(f"st:{encoder(tmp_path / 'whole', MEAN, ('Normalize', {}))}")
    cut = load_with_texts(f"st:{encoder(tmp_path / 'cut', MEAN, ('Normalize', {}), truncate_dim=3)}")
    assert whole.pipeline is not None
    assert cut.pipeline is not None
    assert (whole.pipeline.normalize, cut.pipeline.normalize) == (True, False)
    texts = ["red house", "blue"]
    np.testing.assert_array_equal(answers(cut, texts), answers(whole, texts)[:, :3])


@pytest.mark.parametrize(
    ("told", "of_tokenizer", "most"), [(16, None, 16), (16, 8, 16), (None, 8, 8), (99, 8, 32), (None, None, 32)]
)
def test_the_maximum_length_is_the_librarys_and_else_the_tokenizers(
    tmp_path: Path, told: int | None, of_tokenizer: int | None, most: int
) -> None:
    folder = encoder(tmp_path, MEAN, most=of_tokenizer)
    write(folder / "sentence_bert_config.json", {"max_seq_length": told, "do_lower_case": False})
    made = load_with_texts(f"st:{folder}").pipeline
    assert made is not None
    assert made.max_length == most


def test_a_dense_that_is_a_pickle_is_read_without_running_it(tmp_path: Path) -> None:
    config = {"in_features": 8, "out_features": 2, "activation_function": "torch.nn.modules.linear.Identity"}
    folder = encoder(tmp_path, MEAN, ("Dense", config))
    linear = nn.Linear(8, 2)
    state = {f"linear.{name}": value for name, value in linear.state_dict().items()}
    torch.save(state, folder / "2_Dense" / "pytorch_model.bin")
    plain = load_with_texts(f"st:{encoder(tmp_path / 'plain', MEAN)}")
    with torch.no_grad():
        expected = linear(torch.from_numpy(answers(plain, ["red tree"]))).numpy()
    np.testing.assert_allclose(answers(load_with_texts(f"st:{folder}"), ["red tree"]), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("modules", "what"),
    [
        (("Dense", {"in_features": 8}), "has a Dense for each token's vector"),
        (("Normalize", {}), "has a Normalize for each token's vector"),
        ((MEAN, MEAN), "has a second Pooling"),
        ((MEAN, ("LayerNorm", {"dimension": 8})), "has a LayerNorm"),
        ((("WeightedLayerPooling", {}), MEAN), "has a WeightedLayerPooling"),
        ((MEAN, ("Dense", {"module_input_name": "token_embeddings"})), "has a Dense for each token's vector"),
    ],
)
def test_modules_in_an_order_that_is_not_supported_are_named(tmp_path: Path, modules: Any, what: str) -> None:
    given = modules if isinstance(modules[0], tuple) else (modules,)
    assert what in refused(encoder(tmp_path, *given))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"transformer_task": "fill-mask"}, "has a Transformer for fill-mask"),
        ({"modality_config": {**TEXT, "message": TEXT["text"]}}, "puts texts into its chat template"),
        ({"modality_config": {"text": {"method": "get", "method_output_name": "pooled"}}}, "gives pooled for texts"),
        ({"modality_config": {"image": TEXT["text"]}}, "gives nothing for texts"),
        ({"processing_kwargs": {"text": {"add_special_tokens": False}}}, "tokenizes with add_special_tokens"),
        ({"tokenizer_args": {"add_eos_token": True}}, "is opened with add_eos_token, which is not supported"),
        ({"config_kwargs": {"is_causal": 0}, "model_args": {"adapters": 1}}, "is opened with adapters, is_causal"),
        ({"tokenizer_name_or_path": "other"}, "is opened with tokenizer_name_or_path"),
    ],
)  # fmt: skip
def test_transformers_that_do_more_are_named(tmp_path: Path, settings: dict[str, Any], what: str) -> None:
    write(encoder(tmp_path, MEAN) / "sentence_bert_config.json", settings)
    assert what in refused(tmp_path)


def test_settings_of_new_versions_that_change_nothing(tmp_path: Path) -> None:
    settings = {
        "transformer_task": "feature-extraction",
        "modality_config": TEXT,
        "module_output_name": "token_embeddings",
    }
    folder = encoder(tmp_path, MEAN)
    write(folder / "sentence_bert_config.json", {**settings, "processing_kwargs": {"text": {"max_length": 9}}})
    modules = [{"path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}]
    modules.append({"path": "1_Pooling", "type": f"{NEW}pooling.Pooling"})
    write(folder / "modules.json", modules)
    made = load_with_texts(f"st:{folder}").pipeline
    assert made is not None
    assert (made.pooling, made.max_length) == ("mean", 9)


def test_how_a_folder_is_opened_may_be_said_where_that_changes_no_answer(tmp_path: Path) -> None:
    settings = {"max_seq_length": 9, "model_args": {"torch_dtype": "bfloat16"}, "config_args": {"use_cache": False}}
    folder = encoder(tmp_path, MEAN)
    for opened, most in (({}, 9), ({"processor_kwargs": {"model_max_length": 7, "padding_side": "left"}}, 7)):
        write(folder / "sentence_bert_config.json", {**settings, **opened})
        made = load_with_texts(f"st:{folder}").pipeline
        assert made is not None
        assert made.max_length == most


def test_code_of_others_is_not_taken_for_the_librarys(tmp_path: Path) -> None:
    folder = encoder(tmp_path, MEAN)
    modules = json.loads((folder / "modules.json").read_text())
    write(folder / "modules.json", [modules[0], {**modules[1], "type": "custom_st.Pooling"}])
    assert "has the module custom_st.Pooling, which is not of sentence-transformers" in refused(folder)


def test_a_cross_encoder_of_new_versions_has_modules_too(tmp_path: Path) -> None:
    save(tmp_path, "BertForSequenceClassification", num_labels=1)
    write(
        tmp_path / "modules.json", [{"path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}]
    )
    write(tmp_path / "sentence_bert_config.json", {"transformer_task": "sequence-classification"})
    facts = {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.linear.Identity"}
    prompts = {"prompts": {"query": "red "}, "default_prompt_name": "query"}
    write(tmp_path / "config_sentence_transformers.json", {**facts, **prompts})
    loaded = load_with_texts(f"st:{tmp_path}")
    made = loaded.pipeline
    assert made is not None
    assert (made.task, made.pairs, made.activation, made.default_prompt) == ("scores", True, "none", "query")
    ids = TextEncoder(made, loaded.tokenizer).encode([("house", "tree")])[0].ids
    assert ids.tolist() == [2, 4, 6, 3, 7, 3]
    write(tmp_path / "config_sentence_transformers.json", {"activation_fn": "torch.nn.modules.activation.Tanh"})
    assert "scores go through Tanh" in refused(tmp_path)
    logits = {"method": "forward", "method_output_name": "logits"}
    settings = {"transformer_task": "sequence-classification", "modality_config": {"text": logits, "message": logits}}
    write(tmp_path / "sentence_bert_config.json", settings)
    assert "puts texts into its chat template" in refused(tmp_path)


def test_a_cross_encoder_of_several_classes_answers_with_probabilities(tmp_path: Path) -> None:
    save(tmp_path, "BertForSequenceClassification", id2label={0: "no", 1: "maybe", 2: "yes"})
    made = load_with_texts(f"st:{tmp_path}").pipeline
    assert made is not None
    assert (made.task, made.labels, made.activation) == ("classes", ("no", "maybe", "yes"), "softmax")


def named(kind: str, bases: tuple[type, ...] = (), **members: Any) -> Any:
    """A class that stands for one of sentence-transformers."""
    return type(kind, bases or (object,), {"__module__": "sentence_transformers.base", **members})


def test_objects_that_do_not_run_in_pytorch_or_have_more_modules_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "BertForSequenceClassification", num_labels=1)
    inner = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    facts = {"model": inner, "tokenizer": tokenizer, "activation_fn": nn.Sigmoid(), "max_length": None}
    assert "runs in onnx, not in PyTorch" in refused(named("CrossEncoder", **facts, backend="onnx")())
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(**SIZES, is_decoder=True))
    assert "is a BertLMHeadModel, which is not supported" in refused(
        named("CrossEncoder", **{**facts, "model": decoder})()
    )
    parts = named("CrossEncoder", (nn.Sequential,), **facts)
    score = named("LogitScore", (nn.Module,))()
    transformer = named("Transformer", (nn.Module,))()
    assert "is made of Transformer, LogitScore" in refused(parts(transformer, score))
    first = named("Transformer", auto_model=inner.bert, tokenizer=tokenizer, backend="openvino")()
    assert "runs in openvino, not in PyTorch" in refused(named("SentenceTransformer", (list,))([first]))


def test_the_texts_of_an_object_are_as_long_as_it_says(tmp_path: Path) -> None:
    folder = encoder(tmp_path, MEAN)
    bert, tokenizer = transformers.BertModel.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    pooling = named("Pooling", get_config_dict=lambda self: {"pooling_mode": "mean"})()
    told = {"text": {"max_length": 9}, "common": {"max_length": 8}}
    first = named("Transformer", auto_model=bert, tokenizer=tokenizer, processing_kwargs=told)()
    model = named("SentenceTransformer", (list,))([first, pooling])
    model.max_seq_length, model.prompts, model.default_prompt_name = 16, {}, None
    made = load_with_texts(model).pipeline
    assert made is not None
    assert made.max_length == 8


def test_the_vectors_of_an_object_are_as_short_as_it_says(tmp_path: Path) -> None:
    folder = encoder(tmp_path, MEAN, truncate_dim=5)
    bert, tokenizer = transformers.BertModel.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    pooling = named("Pooling", get_config_dict=lambda self: {"pooling_mode": "mean"})()
    model = named("SentenceTransformer", (list,))(
        [named("Transformer", auto_model=bert, tokenizer=tokenizer)(), pooling]
    )
    model.max_seq_length, model.prompts, model.default_prompt_name, model.truncate_dim = 10**30, {}, None, 5
    loaded = load_with_texts(model)
    assert loaded.pipeline == load_with_texts(f"st:{folder}").pipeline
    assert answers(loaded, ["red"]).shape == (1, 5)
