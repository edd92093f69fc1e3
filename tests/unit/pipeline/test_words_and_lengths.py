"""pipeline: words of tokenizers that split texts otherwise, schemes of labels, single items, windows, one length."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from corewise.common.errors import SamplesError
from corewise.pipeline import CallLimits, TextEncoder, TextRunner, decode, text_samples
from corewise.pipeline.runner import FIRST_ITEMS, MULTIPLE
from corewise.records.build import TensorSpec
from corewise.records.pipeline import TextPipeline, TokenInput
from corewise.samples import raw_from_python

IOB2 = ("O", "B-PER", "I-PER")
IOBES = ("O", "B-PER", "I-PER", "E-PER", "S-PER")
PIECES = ["<unk>", "▁", "▁John", "▁Sm", "ith", ",", "▁(", "Ann", ")", "▁lives", "'", "▁O", "Brien"]


def metaspace() -> Tokenizer:
    """As SentencePiece: XLM-R, DeBERTa, T5."""
    made = Tokenizer(models.Unigram([(piece, -1.0) for piece in PIECES], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return made


def unsplit() -> Tokenizer:
    """As decoders': nothing is split before the merges, so that all tokens belong to one word."""
    letters = ["<unk>", "▁", *"JohnSmitAle,vs"]
    vocabulary = {letter: number for number, letter in enumerate(dict.fromkeys(letters))}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made


def bytewise() -> Tokenizer:
    """As ModernBERT: tokens of bytes that begin with their space, and a template that trims nothing."""
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(alphabet, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


def encoder_of(tokenizer: Tokenizer, **changes: Any) -> TextEncoder:
    inputs = tuple(
        TokenInput.of(TensorSpec(name=name, dtype="int64", shape=(None, None)))
        for name in ("input_ids", "attention_mask")
    )
    facts: dict[str, Any] = {"task": "tokens", "tokenizer_sha256": "", "inputs": inputs, "max_length": 64}
    return TextEncoder(TextPipeline(**{**facts, **changes}), tokenizer.to_str().encode())


def spans(tokenizer: Tokenizer, text: str, labels: tuple[str, ...], wanted: dict[str, str]) -> list[tuple[str, str]]:
    """The spans of a text whose tokens have the labels ``wanted``, by their text without spaces, and else O."""
    encoder = encoder_of(tokenizer, labels=labels, activation="softmax")
    (tokens,) = encoder.encode([text])
    chosen = [labels.index(wanted.get(text[start:end].strip(), "O")) for start, end in tokens.offsets]
    logits = np.eye(len(labels), dtype=np.float32)[chosen][None] * 9
    (found,) = decode(encoder.pipeline, [logits], [text], [tokens])
    assert all(text[each.start : each.end] == each.text for each in found)
    return [(each.label, each.text) for each in found]


def test_a_words_space_is_no_part_of_its_span() -> None:
    wanted = {"John": "B-PER", "Sm": "I-PER"}
    assert spans(metaspace(), "John Smith, lives", IOB2, wanted) == [("PER", "John Smith")]
    assert spans(bytewise(), "x John Smith", IOB2, {"J": "B-PER", "S": "I-PER", "": "I-PER"}) == [("PER", "John Smith")]


def test_marks_around_a_word_have_labels_of_their_own() -> None:
    assert spans(metaspace(), "John (Ann) lives", IOB2, {"Ann": "B-PER"}) == [("PER", "Ann")]
    assert spans(metaspace(), "lives O'Brien", IOB2, {"O": "B-PER"}) == [("PER", "O'Brien")]


def test_a_text_that_is_one_word_to_its_tokenizer_has_words_all_the_same() -> None:
    (tokens,) = encoder_of(unsplit()).encode(["John lives"])
    assert set(tokens.words) == {0}
    assert spans(unsplit(), "John lives", IOB2, {"J": "B-PER", "": "B-PER"})[0] == ("PER", "John")
    assert spans(bytewise(), "é lives", IOB2, {"é": "B-PER"}) == [("PER", "é")]


@pytest.mark.parametrize(
    ("labels", "text", "wanted", "found"),
    [
        (IOBES, "John Sm Ann", {"John": "B-PER", "Sm": "E-PER", "Ann": "S-PER"}, ["John Sm", "Ann"]),
        (IOBES, "John Sm", {"John": "S-PER", "Sm": "S-PER"}, ["John", "Sm"]),
        (("O", "B-PER", "L-PER", "U-PER"), "John Sm Ann", {"John": "B-PER", "Sm": "L-PER"}, ["John Sm"]),
        (("O", "E-mail", "S"), "John Sm", {"John": "E-mail", "Sm": "E-mail"}, ["John Sm"]),
    ],
)
def test_schemes_of_labels(labels: tuple[str, ...], text: str, wanted: dict[str, str], found: list[str]) -> None:
    words = {word: number for number, word in enumerate(["[UNK]", "John", "Sm", "Ann"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = spans(tokenizer, text, labels, wanted)
    assert [span for _, span in made] == found
    assert {label for label, _ in made} == {"E-mail" if "E-mail" in labels else "PER"}


# One item


def words_encoder(**changes: Any) -> TextEncoder:
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return encoder_of(tokenizer, **{"task": "vectors", "pooling": "mean", "max_length": 12, **changes})


def test_two_texts_are_one_item_for_a_model_of_pairs() -> None:
    def lengths(inputs: Any) -> list[np.ndarray]:
        return [inputs[1].sum(1, keepdims=True).astype(np.float32)]

    encoder = words_encoder(task="scores", pairs=True)
    runner = TextRunner(encoder, lengths, instances=1, limits=CallLimits(rows=4))
    assert runner.predict(("red", "blue red")) == runner.predict(["red", "blue red"]) == 6
    assert runner.predict([["red", "blue"], ["red", "blue red"]]).tolist() == [5, 6]
    assert runner.predict(np.array([["red", "blue"], ["red", "red red"]], object)).tolist() == [5, 6]
    single = TextRunner(words_encoder(task="scores"), lengths, instances=1, limits=CallLimits(rows=4))
    assert single.predict(np.array(["red", "blue red"])).tolist() == [3, 4]


def test_the_first_call_runs_before_many_texts_are_taken() -> None:
    """The stream waits for it: with a first window of usual size it would wait in vain."""
    begun = threading.Event()

    def stream() -> Iterator[str]:
        for number in range(2 * FIRST_ITEMS):
            assert number != FIRST_ITEMS or begun.wait(60)
            yield "red blue"

    def run(inputs: Any) -> list[np.ndarray]:
        begun.set()
        return [inputs[1].sum(1, keepdims=True).astype(np.float32)]

    runner = TextRunner(words_encoder(), run, instances=1, limits=CallLimits(rows=8))
    assert len(list(runner.answers(stream()))) == 2 * FIRST_ITEMS


# One length


@pytest.mark.parametrize(
    ("texts", "changes", "lengths"),
    [
        (["red"] * 3, {}, {4, 4 + MULTIPLE}),
        (["red " * 50] * 3, {}, {12, 12 - MULTIPLE}),
        (["red " * 50] * 3, {"task": "tokens", "pooling": "none"}, {12, 12 - MULTIPLE}),
        (["red " * 50, "red"], {}, {12, 4}),
    ],
)
def test_texts_of_one_length_do_not_fix_the_length_of_the_program(
    tmp_path: Path, texts: list[str], changes: dict[str, Any], lengths: set[int]
) -> None:
    samples = text_samples(words_encoder(**changes), raw_from_python(texts))
    assert {array.shape[0] for row in samples.rows for array in row} == lengths
    assert samples.tokens is not None
    assert samples.tokens.most == 12


def test_a_label_for_each_token_keeps_its_tokens() -> None:
    raw = raw_from_python({"text": ["red blue"] * 3, "label": [[0, 1, 1, 0]] * 3})
    samples = text_samples(words_encoder(task="tokens", pooling="none"), raw)
    assert {row[0].shape[0] for row in samples.rows} == {4}


@pytest.mark.parametrize("labels", [[[0, 1], [1, 1], [0, 0]], [[0, 1], [1], [0, 0, 1, 1, 0, 0, 1]]])
def test_a_label_for_each_word_is_not_one_for_each_token(labels: Any) -> None:
    raw = raw_from_python({"text": ["red blue", "blue", "red"], "label": labels})
    with pytest.raises(
        SamplesError, match=r"sample 0 of python has 2 labels for 4 tokens; give a label for each token"
    ):
        text_samples(words_encoder(task="tokens", pooling="none"), raw)


BLANK = " " * 9999
"""More characters than are read of a text at first, for 12 tokens."""


@pytest.mark.parametrize(
    ("item", "changes", "ids"),
    [
        (BLANK + "red blue", {}, [2, 4, 5, 3]),
        ("red blue" + BLANK, {"truncation": "left"}, [2, 4, 5, 3]),
        (BLANK + "red " * 90, {}, [2, *[4] * 10, 3]),
        ((BLANK + "red", BLANK + "blue"), {"task": "scores", "pairs": True}, [2, 4, 3, 5, 3]),
    ],
)
def test_words_behind_much_that_is_no_token_are_read(item: Any, changes: dict[str, Any], ids: list[int]) -> None:
    encoder = words_encoder(**changes)
    short, found = encoder.encode([("blue", "blue") if encoder.pipeline.pairs else "blue", item])
    assert found.ids.tolist() == ids
    assert set(short.ids.tolist()) == {2, 5, 3}
    assert (found.is_cut, short.is_cut) == (len(ids) == 12, False)


def test_places_of_words_before_much_that_is_no_token() -> None:
    (tokens,) = words_encoder(task="tokens", pooling="none", truncation="left").encode(["red blue" + BLANK])
    assert list(tokens.offsets) == [(0, 0), (0, 3), (4, 8), (0, 0)]
