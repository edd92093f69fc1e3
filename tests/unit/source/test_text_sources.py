"""source: models of sentence-transformers and transformers with their tokenizers, poolings, prompts and heads."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from corewise.common.errors import InputError, SamplesError, SourceError
from corewise.pipeline import TextEncoder
from corewise.records.build import TensorSpec
from corewise.report import story
from corewise.samples import raw_from_python
from corewise.search.alone import unpadded
from corewise.search.texts import fitted, tokenized
from corewise.source import Loaded, load_with_texts
from corewise.source.loaded import fast_tokenizer
from corewise.source.pooling import pool

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "green", "house", "tree"]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 32,
}


def save_tokenizer(folder: Path, inputs: tuple[str, ...] = INPUTS) -> None:
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_input_names=list(inputs)
    ).save_pretrained(folder)


def save_bert(folder: Path, kind: str = "BertModel", **config: Any) -> Path:
    torch.manual_seed(0)
    getattr(transformers, kind)(transformers.BertConfig(**SIZES, **config)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def sentence_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of sentences: the first token, a dense layer, norm 1; with prompts, lower case and 16 tokens."""
    folder = save_bert(tmp_path_factory.mktemp("sentences"), matryoshka_dimensions=[2])
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    for path in kinds:
        (folder / path).mkdir(exist_ok=True)
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 16, "do_lower_case": True})
    write_json(
        folder / "1_Pooling" / "config.json", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    )
    dense = {
        "in_features": 8,
        "out_features": 4,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    write_json(folder / "2_Dense" / "config.json", dense)
    generator = torch.Generator().manual_seed(1)
    weights = {
        "linear.weight": torch.randn(4, 8, generator=generator),
        "linear.bias": torch.randn(4, generator=generator),
    }
    save_file(weights, folder / "2_Dense" / "model.safetensors")
    prompts = {"prompts": {"query": "red: ", "document": ""}, "default_prompt_name": "query"}
    write_json(folder / "config_sentence_transformers.json", prompts)
    return folder


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data))


def vectors_of(loaded: Loaded, texts: list[Any], **options: Any) -> np.ndarray:
    """What the model says to texts, through its own pipeline."""
    assert loaded.pipeline is not None
    encoder = TextEncoder(loaded.pipeline, loaded.tokenizer)
    arrays = encoder.collate(encoder.encode(texts, **options))
    assert isinstance(loaded.model, nn.Module)
    names = [each.name for each in loaded.pipeline.inputs]
    with torch.no_grad():
        output = loaded.model.eval()(**dict(zip(names, map(torch.from_numpy, arrays), strict=True)))
    made: np.ndarray = (output if isinstance(output, Tensor) else output[0]).numpy()
    return made


def error_of(function: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert caught.value.fix
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Pooling


def test_pooling_uses_the_mask() -> None:
    hidden = torch.tensor([[[1.0, -1.0], [3.0, -3.0], [90.0, 90.0]], [[1.0, 1.0], [2.0, 2.0], [6.0, 6.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pool(hidden, mask, "mean").tolist() == [[2.0, -2.0], [3.0, 3.0]]
    assert pool(hidden, mask, "max").tolist() == [[3.0, -1.0], [6.0, 6.0]]
    assert pool(hidden, mask, "cls").tolist() == [[1.0, -1.0], [1.0, 1.0]]
    assert pool(hidden, mask, "last").tolist() == [[3.0, -3.0], [6.0, 6.0]]
    assert pool(hidden, mask, "none") is hidden
    np.testing.assert_allclose(pool(hidden, mask, "weighted")[:, 0], [7 / 3, 23 / 6])
    np.testing.assert_allclose(pool(hidden, mask, "sqrt")[:, 0], [4 / 2**0.5, 9 / 3**0.5], rtol=1e-6)
    left = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert pool(hidden, left, "last")[0].tolist() == [90.0, 90.0]


# sentence-transformers


def test_a_folder_of_sentence_transformers(sentence_folder: Path) -> None:
    loaded = load_with_texts(f"st:{sentence_folder}")
    made = loaded.pipeline
    assert made is not None
    assert (made.task, made.pooling, made.normalize, made.max_length) == ("vectors", "cls", True, 16)
    assert (made.prompts, made.default_prompt) == ({"query": "red: ", "document": ""}, "query")
    assert made.dimensions == (2,)
    bert = transformers.BertModel.from_pretrained(sentence_folder).eval()
    dense = nn.Linear(8, 4)
    from safetensors.torch import load_file

    weights = load_file(sentence_folder / "2_Dense" / "model.safetensors")
    dense.load_state_dict({name.removeprefix("linear."): value for name, value in weights.items()})
    with torch.no_grad():
        hidden = bert(torch.tensor([[2, 4, 1, 7, 5, 3]])).last_hidden_state[:, 0]
        expected = nn.functional.normalize(torch.tanh(dense(hidden)), dim=-1).numpy()
    # The default prompt is before the text, which is lower-cased; a neighbour that is longer changes nothing.
    answers = vectors_of(loaded, ["House BLUE", "red " * 90])
    np.testing.assert_allclose(answers[:1], expected, atol=1e-6)
    assert answers.shape == (2, 4)


@pytest.mark.parametrize(
    ("config", "ways"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, ("max", "mean")),
        ({"pooling_mode": ["mean", "cls"]}, ("mean", "cls")),
        ({"pooling_mode_weightedmean_tokens": True}, ("weighted",)),
        ({"pooling_mode": "mean_sqrt_len_tokens"}, ("sqrt",)),
        ({"word_embedding_dimension": 8}, ("mean",)),
    ],
)
def test_vectors_of_several_ways_to_pool_are_joined_in_their_order(
    sentence_folder: Path, tmp_path: Path, config: dict[str, Any], ways: tuple[Any, ...]
) -> None:
    shutil.copytree(sentence_folder, tmp_path, dirs_exist_ok=True)
    write_json(tmp_path / "1_Pooling" / "config.json", config)
    write_json(tmp_path / "modules.json", json.loads((tmp_path / "modules.json").read_text())[:2])
    loaded = load_with_texts(f"st:{tmp_path}")
    assert loaded.pipeline is not None
    assert loaded.pipeline.pooling == (ways[0] if ways == ("mean",) else "own")
    bert = transformers.BertModel.from_pretrained(sentence_folder).eval()
    with torch.no_grad():
        hidden = bert(torch.tensor([[2, 4, 1, 7, 5, 3]])).last_hidden_state
    expected = torch.cat([pool(hidden, torch.ones(1, 6), way) for way in ways], -1)
    # "red: " goes before each.
    np.testing.assert_allclose(vectors_of(loaded, ["house blue", "red " * 9])[:1], expected, atol=1e-6)


def test_of_t5_the_encoder_makes_vectors(tmp_path: Path) -> None:
    sizes = {"vocab_size": len(WORDS), "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, INPUTS[:2])
    (tmp_path / "1_Pooling").mkdir()
    write_json(tmp_path / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"))
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
    write_json(tmp_path / "modules.json", modules)
    texts = ["house", "red " * 9]
    expected = vectors_of(load_with_texts(f"hf:{tmp_path}", pooling="mean"), texts)
    np.testing.assert_allclose(vectors_of(load_with_texts(f"st:{tmp_path}"), texts), expected)
    assert expected.shape == (2, 8)


def test_the_real_minilm_is_what_its_card_says(data_folder: Path) -> None:
    loaded = load_with_texts(f"st:{data_folder / 'weights' / 'all-MiniLM-L6-v2'}")
    assert loaded.pipeline is not None
    assert (loaded.pipeline.pooling, loaded.pipeline.normalize, loaded.pipeline.max_length) == ("mean", True, 256)
    texts = ["A man is eating food.", "A man is eating a piece of bread.", "Two dogs run."]
    vectors = vectors_of(loaded, texts)
    assert vectors.shape == (3, 384)
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > 0.7 > 0.3 > far


@pytest.mark.parametrize(
    ("file", "data", "what"),
    [
        ("modules.json", [{"path": "", "type": "sentence_transformers.models.CLIPModel"}], "begins with CLIPModel"),
        (
            "modules.json",
            [
                {"path": "", "type": "sentence_transformers.models.Transformer"},
                {"path": "1", "type": "sentence_transformers.models.WordWeights"},
            ],
            "has a WordWeights, which is not supported",
        ),
        ("1_Pooling/config.json", {"pooling_mode_attention": True}, "pools by attention, which is not supported"),
        ("1_Pooling/config.json", {"pooling_mode": 3}, "pools by 3, which is not supported"),
        ("1_Pooling/config.json", {"pooling_mode": []}, "pools by [], which is not supported"),
        ("1_Pooling/config.json", {"pooling_mode": ["mean", 3]}, "pools by 3, which is not supported"),
        ("1_Pooling/config.json", {"include_prompt": False}, "pools without the prompt's tokens"),
    ],
)
def test_modules_that_are_not_supported(sentence_folder: Path, tmp_path: Path, file: str, data: Any, what: str) -> None:
    shutil.copytree(sentence_folder, tmp_path, dirs_exist_ok=True)
    write_json(tmp_path / file, data)
    assert what in error_of(load_with_texts, f"st:{tmp_path}")


def test_a_folder_without_modules(tmp_path: Path) -> None:
    save_bert(tmp_path)
    assert f"try hf:{tmp_path} --pooling mean" in error_of(load_with_texts, f"st:{tmp_path}")


def test_a_cross_encoder(tmp_path: Path) -> None:
    save_bert(tmp_path, "BertForSequenceClassification", num_labels=1)
    config = json.loads((tmp_path / "config.json").read_text())
    activation = {"activation_fn": "torch.nn.modules.linear.Identity", "version": "5.0"}
    write_json(tmp_path / "config.json", {**config, "sentence_transformers": activation})
    made = load_with_texts(f"st:{tmp_path}").pipeline
    assert made is not None
    assert (made.task, made.pairs, made.activation, made.labels) == ("scores", True, "none", ())
    assert [each.role for each in made.inputs] == ["ids", "mask", "types"]
    assert made.max_length == 32


class Part:
    """Stands for a module of sentence-transformers."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


def stand_in(name: str, bases: tuple[type, ...] = (Part,), **members: Any) -> type:
    return type(name, bases, {"__module__": "sentence_transformers.base", **members})


def test_a_sentence_transformer_object(sentence_folder: Path) -> None:
    folder = load_with_texts(f"st:{sentence_folder}")
    bert, tokenizer = transformers.BertModel.from_pretrained(sentence_folder), transformers.AutoTokenizer
    encoder: Any = folder.model
    parts = [
        stand_in("Transformer")(
            auto_model=bert, tokenizer=tokenizer.from_pretrained(sentence_folder), do_lower_case=True
        ),
        stand_in("Pooling", get_config_dict=lambda self: {"pooling_mode": "cls"})(),
        stand_in("Dense")(linear=encoder.after[0], activation_function=nn.Tanh()),
        stand_in("Normalize")(),
    ]
    kind = stand_in("SentenceTransformer", (list,))
    model: Any = kind(parts)
    model.max_seq_length, model.prompts, model.default_prompt_name = 16, {"query": "red: ", "document": ""}, "query"
    loaded = load_with_texts(model)
    assert load_with_texts(model, pooling="cls").pipeline == loaded.pipeline
    assert "brings its own pooling" in error_of(load_with_texts, model, pooling="mean")
    assert loaded.pipeline == folder.pipeline
    np.testing.assert_array_equal(vectors_of(loaded, ["blue house"]), vectors_of(folder, ["blue house"]))


def test_a_cross_encoder_object(tmp_path: Path) -> None:
    save_bert(tmp_path, "BertForSequenceClassification", num_labels=1)
    inner = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    kind = stand_in("CrossEncoder")
    model = kind(model=inner, tokenizer=tokenizer, activation_fn=nn.Sigmoid(), max_length=20)
    made = load_with_texts(model).pipeline
    assert made is not None
    assert (made.task, made.pairs, made.activation, made.max_length) == ("scores", True, "sigmoid", 20)
    odd = kind(model=inner, tokenizer=tokenizer, activation_fn=nn.Tanh(), max_length=None)
    assert "scores go through Tanh" in error_of(load_with_texts, odd)


# transformers


def test_the_head_that_the_configuration_names(tmp_path: Path) -> None:
    names = {0: "bad", 1: "good"}
    save_bert(tmp_path / "classes", "BertForSequenceClassification", id2label=names)
    save_bert(tmp_path / "several", "BertForSequenceClassification", problem_type="multi_label_classification")
    save_bert(tmp_path / "tokens", "BertForTokenClassification", id2label={0: "O", 1: "B-X", 2: "I-X"})
    save_bert(tmp_path / "bare")
    save_bert(tmp_path / "words", "BertForMaskedLM")
    made = {path.name: load_with_texts(f"hf:{path}").pipeline for path in tmp_path.iterdir()}
    facts = {name: each and (each.task, each.labels, each.activation, each.pooling) for name, each in made.items()}
    assert facts == {
        "classes": ("classes", ("bad", "good"), "softmax", "none"),
        "several": ("classes", ("LABEL_0", "LABEL_1"), "sigmoid", "none"),
        "tokens": ("tokens", ("O", "B-X", "I-X"), "softmax", "none"),
        "bare": ("vectors", (), "none", "none"),
        "words": None,
    }


def test_pooling_makes_vectors_of_any_text_model(tmp_path: Path) -> None:
    save_bert(tmp_path, "BertForMaskedLM")
    loaded = load_with_texts(f"hf:{tmp_path}", pooling="mean")
    assert loaded.pipeline is not None
    assert (loaded.pipeline.task, loaded.pipeline.max_length) == ("vectors", 32)
    together = vectors_of(loaded, ["red", "blue house tree green"])
    np.testing.assert_allclose(together[:1], vectors_of(loaded, ["red"]), atol=1e-6)


def test_positions_that_begin_behind_the_padding_token(tmp_path: Path) -> None:
    config = transformers.RobertaConfig(**SIZES, pad_token_id=1)
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, INPUTS[:2])
    made = load_with_texts(f"hf:{tmp_path}", pooling="cls").pipeline
    assert made is not None
    assert made.max_length == 30


def test_models_that_generate_name_what_is_supported(tmp_path: Path) -> None:
    sizes = {"vocab_size": len(WORDS), "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    save_tokenizer(tmp_path / "t5", INPUTS[:2])
    message = error_of(load_with_texts, f"hf:{tmp_path / 't5'}")
    assert "generates text in a loop (T5ForConditionalGeneration), which corewise does not run" in message
    assert message.endswith("the encoder is supported: --pooling mean makes a vector of each text")
    loaded = load_with_texts(f"hf:{tmp_path / 't5'}", pooling="mean")
    assert vectors_of(loaded, ["red", "blue tree"]).shape == (2, 8)
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 60}
    ends = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    whisper = transformers.WhisperConfig(
        **sizes, **ends, decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8
    )
    transformers.WhisperForConditionalGeneration(whisper).save_pretrained(tmp_path / "whisper")
    message = error_of(load_with_texts, f"hf:{tmp_path / 'whisper'}")
    assert "generates transcripts in a loop" in message
    assert "model.get_encoder()" in message


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_a_folder_without_a_tokenizer_takes_one_from_a_file(tmp_path: Path, pooling: Any) -> None:
    """DistilBERT's forward has no type ids, which a tokenizer.json alone cannot say."""
    kind = "DistilBertModel" if pooling else "DistilBertForSequenceClassification"
    sizes = {"vocab_size": len(WORDS), "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}
    getattr(transformers, kind)(transformers.DistilBertConfig(**sizes, max_position_embeddings=32)).save_pretrained(
        tmp_path / "model"
    )
    save_tokenizer(tmp_path / "apart")
    assert load_with_texts(f"hf:{tmp_path / 'model'}").pipeline is None
    assert "give --tokenizer" in error_of(load_with_texts, f"hf:{tmp_path / 'model'}", pooling="mean")
    file = tmp_path / "apart" / "tokenizer.json"
    loaded = load_with_texts(f"hf:{tmp_path / 'model'}", tokenizer=file, pooling=pooling)
    assert loaded.pipeline is not None
    assert [each.name for each in loaded.pipeline.inputs] == ["input_ids", "attention_mask"]
    assert (loaded.pipeline.task, loaded.pipeline.max_length) == ("vectors" if pooling else "classes", 32)
    together = vectors_of(loaded, ["red", "blue house tree green"])
    np.testing.assert_allclose(together[:1], vectors_of(loaded, ["red"]), atol=1e-6)
    (tmp_path / "apart" / "vocab.txt").write_text("red")
    assert "vocab.txt is not a tokenizer" in error_of(
        load_with_texts, f"hf:{tmp_path / 'model'}", tokenizer=tmp_path / "apart" / "vocab.txt"
    )


def test_a_slow_tokenizer_is_converted(tmp_path: Path) -> None:
    words = tmp_path / "vocab.txt"
    words.write_text("\n".join([*WORDS, "##s"]) + "\n")
    slow: Any = type("BertTokenizer", (BertTokenizerLegacy,), {})(str(words))
    assert not hasattr(slow, "backend_tokenizer")
    fast = Tokenizer.from_str(fast_tokenizer(slow).decode())
    for text in ("red houses", "Blue  tree, poems"):
        assert fast.encode(text).ids == slow(text)["input_ids"]
    assert "has no fast form" in error_of(fast_tokenizer, transformers.CanineTokenizer())


# Other models with a tokenizer


class Words(nn.Module):
    """A user's own encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), 4)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids (N, tokens) -> vectors (N, tokens, 4)."""
        vectors: Tensor = self.embedding(ids)
        return vectors


def test_a_factory_with_a_tokenizer_and_pooling(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    loaded = load_with_texts(Words(), tokenizer=str(tmp_path / "tokenizer.json"), pooling="mean")
    assert loaded.pipeline is not None
    assert [(each.name, each.role) for each in loaded.pipeline.inputs] == [("ids", "ids"), ("attention_mask", "mask")]
    assert vectors_of(loaded, ["red", "red blue house"]).shape == (2, 4)
    with pytest.raises(SourceError, match="--pooling needs a tokenizer"):
        load_with_texts(Words(), pooling="mean")
    for unknown in ("average", "own"):
        assert "give one of mean, cls" in error_of(load_with_texts, Words(), pooling=unknown)
    without_mask = nn.Embedding(4, 4)
    assert "takes an attention mask" in error_of(
        load_with_texts, without_mask, tokenizer=tmp_path / "tokenizer.json", pooling="mean"
    )
    words = tmp_path / "vocab.txt"
    words.write_text("red\n")
    assert "vocab.txt is not a tokenizer" in error_of(load_with_texts, Words(), tokenizer=words)


# Samples through the pipeline


def test_texts_become_samples_padded_as_they_are_served(sentence_folder: Path) -> None:
    texts = ["red", "blue tree", "red house", "green " * 60, "tree"]
    loaded, samples = tokenized(load_with_texts(f"st:{sentence_folder}"), raw_from_python(texts))
    lengths = [row[0].shape[0] for row in samples.rows]
    # With the prompt these have 5, 6, 6, 62 and 5 tokens; the longest is cut to 16.
    assert lengths == [8, 8, 8, 16, 8]
    ids, mask = samples.rows[0]
    assert mask.tolist() == [1] * 5 + [0] * 3
    assert ids.dtype == np.int64
    assert loaded.pipeline is not None
    facts = samples.tokens
    assert facts is not None
    assert (facts.median, facts.p95, facts.longest, facts.most, facts.cut) == (6, 16, 16, 16, 0.2)
    assert (facts.padding, facts.padding_unsorted) == (1 - 38 / 48, 1 - 38 / sum([6 * 3, 16 * 2]))
    assert story.texts(facts) == (
        "median 6 tokens, 95 % have up to 16, the longest 16; 20.0 % were cut at 16; 21 % of the model's input is "
        "padding, or 24 % without sorting by length"
    )
    alone = unpadded(samples, 1)
    assert [row[0].shape[0] for row in alone.rows] == [5, 6, 6, 16, 5]
    assert all(row[1].all() for row in alone.rows)


def test_pairs_for_an_encoder_are_neighbours_and_for_a_classifier_pairs(sentence_folder: Path, tmp_path: Path) -> None:
    pairs = raw_from_python([(("red", "blue"), 1.0), (("tree", "house"), 2.0)])
    loaded, samples = tokenized(load_with_texts(f"st:{sentence_folder}"), pairs)
    assert loaded.pipeline is not None
    assert not loaded.pipeline.pairs
    assert (len(samples), samples.labels.tolist()) == (4, [1.0, 1.0, 2.0, 2.0])  # type: ignore[union-attr]
    save_bert(tmp_path, "BertForSequenceClassification")
    loaded, samples = tokenized(load_with_texts(f"hf:{tmp_path}"), pairs)
    assert loaded.pipeline is not None
    assert loaded.pipeline.pairs
    assert samples.rows[0][2].max() == 1  # the second text's type


def test_labels_by_name(tmp_path: Path) -> None:
    save_bert(tmp_path, "BertForSequenceClassification", id2label={0: "bad", 1: "good"})
    loaded = load_with_texts(f"hf:{tmp_path}")
    _, samples = tokenized(loaded, raw_from_python({"text": ["red", "blue"], "label": ["good", "bad"]}))
    assert samples.labels is not None
    assert samples.labels.tolist() == [1, 0]
    named, samples = tokenized(loaded, raw_from_python([("red", "good"), ("blue", "bad")]))
    assert named.pipeline == loaded.pipeline
    assert samples.labels is not None
    assert samples.labels.tolist() == [1, 0]
    with pytest.raises(SamplesError, match=r"has the label 'fair'; the model's classes are bad, good"):
        tokenized(loaded, raw_from_python({"text": ["red", "blue"], "label": ["fair", "bad"]}))


@pytest.mark.parametrize(
    ("pairs", "wrong"),
    [
        ([("red", "Good"), ("blue", "BAD")], "Good"),
        ([("red", "good"), ("blue", "bad"), ("tree", "godo")], "godo"),
    ],
)
def test_names_of_classes_that_are_misspelt_are_no_second_texts(
    tmp_path: Path, pairs: list[tuple[str, str]], wrong: str
) -> None:
    save_bert(tmp_path, "BertForSequenceClassification", id2label={0: "bad", 1: "good"})
    loaded = load_with_texts(f"hf:{tmp_path}")
    with pytest.raises(SamplesError, match=f"has the label '{wrong}'; the model's classes are bad, good"):
        tokenized(loaded, raw_from_python(pairs))
    texts, _ = tokenized(loaded, raw_from_python([("red", "blue tree"), ("good", "house"), ("green", "bad")]))
    assert texts.pipeline is not None
    assert texts.pipeline.pairs


def test_a_tokenizer_beside_inputs_that_are_no_tokens_is_left_out_unless_it_was_asked_for(tmp_path: Path) -> None:
    """As CLIP's, given photos."""
    save_bert(tmp_path)
    loaded = load_with_texts(f"hf:{tmp_path}")
    photos = TensorSpec(name="pixel_values", dtype="float32", shape=(None, 3, 8, 8))
    exported: Any = SimpleNamespace(inputs=(photos,), outputs=(photos,))
    left = fitted(loaded, exported, asked=False)
    assert (left.pipeline, left.tokenizer) == (None, b"")
    with pytest.raises(InputError, match=r"the model takes pixel_values float32 .* and no tokens"):
        fitted(loaded, exported, asked=True)


def test_texts_for_a_model_without_a_tokenizer_and_texts_for_one_of_pairs(tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match="there are texts in python; give a model that brings its tokenizer"):
        tokenized(load_with_texts(Words()), raw_from_python(["red", "blue"]))
    save_bert(tmp_path, "BertForSequenceClassification", num_labels=1)
    with pytest.raises(SamplesError, match="there are single texts in python, but the model takes pairs"):
        tokenized(load_with_texts(f"st:{tmp_path}"), raw_from_python(["red", "blue"]))
