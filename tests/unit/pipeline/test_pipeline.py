"""pipeline: texts to calls and outputs to answers, with a small tokenizer and a model that is arithmetic."""

import threading
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from corewise.artifact.texts import most_known_id
from corewise.common.errors import ArtifactError, InputError
from corewise.pipeline import (
    CallLimits,
    ClassAnswer,
    CostTable,
    Rejected,
    Span,
    TextEncoder,
    TextRunner,
    cost_points,
    cost_table,
    decode,
    fill,
    infer,
)
from corewise.pipeline.calls import by_tokens
from corewise.pipeline.runner import VECTORS_ITEMS, WINDOW_ITEMS
from corewise.records.build import TensorSpec
from corewise.records.jsonable import from_json, to_json
from corewise.records.pipeline import TextPipeline, TokenInput
from corewise.records.ranges import InputRange, ValueRange
from corewise.serving.protocol import ProtocolError
from corewise.serving.text import TextInput
from corewise.serving.texts import TextRequest

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "green", "house", "tree", "query", ":"]
NAMES = ("input_ids", "attention_mask", "token_type_ids")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    # Settings of the file that must not count: the pipeline's do.
    made.enable_truncation(5)
    made.enable_padding(length=7)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def pipeline_of(**changes: Any) -> TextPipeline:
    inputs = tuple(TokenInput.of(TensorSpec(name=name, dtype="int64", shape=(None, None))) for name in NAMES)
    values: dict[str, Any] = {"task": "vectors", "tokenizer_sha256": "", "inputs": inputs, "max_length": 12}
    return TextPipeline(**{**values, **changes})


def means(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """A model: the mean id, the number of tokens and the mean type, of the tokens that are no padding."""
    ids, mask, types = inputs
    counts = mask.sum(1)
    return [np.stack([(ids * mask).sum(1) / counts, counts, (types * mask).sum(1) / counts], 1).astype(np.float32)]


def runner_of(tokenizer: Path, run: Any = means, *, instances: int = 2, rows: int = 8, **changes: Any) -> TextRunner:
    encoder = TextEncoder(pipeline_of(**changes), tokenizer)
    return TextRunner(encoder, run, instances=instances, limits=CallLimits(rows=rows))


def texts_of(count: int) -> list[str]:
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS[4:9], generator.integers(1, 30))) for _ in range(count)]


# Filling calls


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 400), st.integers(1, 3), st.sampled_from([1, 4, 8]))
def test_each_text_is_in_one_call_within_the_limits(
    lengths: list[int], rows: int, tokens: int, instances: int, multiple: int
) -> None:
    calls = fill(lengths, limits=CallLimits(rows=rows, tokens=tokens), instances=instances, multiple=multiple)
    assert sorted(place for call in calls for place in call.places) == list(range(len(lengths)))
    for call in calls:
        longest = max(lengths[place] for place in call.places)
        assert longest <= call.tokens < longest + multiple
        assert len(call.places) <= min(rows, -(-len(lengths) // instances))
        assert len(call.places) == 1 or len(call.places) * call.tokens <= tokens


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 40), st.booleans())
def test_calls_have_few_numbers_of_rows(lengths: list[int], rows: int, pads: bool) -> None:
    limits = CallLimits.of_few_sizes(rows)
    calls = fill(lengths, limits=limits, multiple=4, pads=pads)
    assert sorted(place for call in calls for place in call.places) == list(range(len(lengths)))
    assert {len(call.places) for call in calls} <= {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, rows}
    assert max(limits.sizes) == rows


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 9))
def test_without_padding_a_call_has_texts_of_one_length(lengths: list[int], rows: int) -> None:
    calls = fill(lengths, limits=CallLimits(rows=rows), multiple=4, pads=False)
    assert sorted(place for call in calls for place in call.places) == list(range(len(lengths)))
    assert all({lengths[place] for place in call.places} == {call.tokens} for call in calls)
    # As few as there can be: each length's texts in full calls.
    assert len(calls) == sum(-(-lengths.count(length) // rows) for length in set(lengths))


TABLE = CostTable(rows=(1, 8, 32), tokens=(8, 64), ms=((1.0, 3.0), (2.5, 20.0), (8.0, 90.0)))


@pytest.mark.parametrize("cost", [by_tokens, TABLE])
@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 9))
def test_no_cut_of_the_sorted_texts_is_cheaper(cost: Any, lengths: list[int], rows: int) -> None:
    def price(calls: Sequence[Sequence[int]]) -> float:
        return sum(float(cost(np.array([len(call)]), max(call))[0]) for call in calls)

    taken = price(
        [[lengths[place] for place in call.places] for call in fill(lengths, limits=CallLimits(rows=rows), cost=cost)]
    )
    ordered = sorted(lengths, reverse=True)
    alone = price([[length] for length in lengths])
    fixed = [price([ordered[k : k + size] for k in range(0, len(ordered), size)]) for size in range(1, rows + 1)]
    assert taken <= min([alone, *fixed]) + 1e-6


def test_a_cost_table_meets_its_points_and_grows_beyond_them() -> None:
    assert TABLE(np.array([1, 8, 32]), 8).tolist() == [1.0, 2.5, 8.0]
    assert TABLE(np.array([8]), 36)[0] == pytest.approx(11.25)
    assert TABLE(np.array([64]), 128)[0] == pytest.approx(4 * 90.0)
    with pytest.raises(ValueError, match="rising"):
        CostTable(rows=(8, 1), tokens=(8,), ms=((1.0,), (1.0,)))


def test_calls_that_are_timed_have_the_samples_lengths_and_the_cheapest_comes_first() -> None:
    points = cost_points([3, 5, 9, 30, 700], CallLimits(rows=12, tokens=1024), multiple=4)
    assert points[0] == (1, 4)
    # Every length below a block; whole blocks up to the longest; and incomplete ones beside the median.
    assert {tokens for _, tokens in points} == {4, 8, 12, 16, 20, 24, 28, 32, 704}
    assert {rows for rows, _ in points} == {1, 2, 4, 8, 12}
    assert {rows for rows, tokens in points if tokens in (20, 24, 28)} == {12}
    assert [point for point in points if point[1] == 704] == [(1, 704)]
    sizes = [rows * tokens for rows, tokens in points]
    assert sizes == sorted(sizes)
    alike = cost_points([190] * 8, CallLimits(rows=4), multiple=4)
    assert alike == ((1, 192), (2, 192), (4, 192))


def test_what_was_not_timed_costs_in_proportion() -> None:
    table = cost_table({(1, 4): 1.0, (2, 4): 1.5, (1, 8): 1.8, (8, 4): 5.0})
    assert table.rows == (1, 2, 8)
    assert table.tokens == (4, 8)
    assert table.ms == ((1.0, 1.8), (1.5, 3.6), (5.0, 14.4))
    assert from_json(CostTable, to_json(table)) == table
    assert cost_table({(1, 4): 1.0}).ms == ((1.0,),)
    disturbed = cost_table({(1, 4): 9.0, (2, 4): 1.5, (1, 8): 1.8, (2, 8): 3.0})
    assert disturbed.ms == ((1.5, 1.8), (1.5, 3.0))


PROBED = {(1, 16): 16.0, (2, 16): 32.0, (2, 20): 42.0, (2, 24): 48.0, (2, 28): 77.0, (1, 32): 32.0, (2, 32): 64.0}
"""Calls whose last block of 16 tokens costs 1.05 times as much with 4 and 1.375 times as much with 12."""


def test_texts_are_padded_to_whole_blocks_where_those_take_less_time() -> None:
    table = cost_table(PROBED)
    assert table.incomplete == (1.05, 1.0, 1.375)
    assert from_json(CostTable, to_json(table)) == table
    costs = {tokens: float(table(np.array([1]), tokens)[0]) for tokens in (12, 16, 28, 30, 32, 48, 60)}
    assert costs == pytest.approx({12: 16, 16: 16, 28: 38.5, 30: 41.25, 32: 32, 48: 48, 60: 82.5})

    def padded(cost: Any, tokens: int, **more: Any) -> int:
        (call,) = fill([tokens], limits=CallLimits(rows=8), cost=cost, multiple=4, **more)
        return call.tokens

    assert [padded(table, tokens) for tokens in (3, 15, 16, 18, 22, 27, 43, 45)] == [4, 16, 16, 20, 24, 32, 48, 48]
    assert padded(by_tokens, 27) == 28
    assert padded(table, 27, pads=False) == 27


@pytest.mark.parametrize("missing", [(2, 32), (2, 16)])
def test_without_whole_blocks_beside_them_calls_say_nothing_of_incomplete_ones(missing: tuple[int, int]) -> None:
    table = cost_table({point: ms for point, ms in PROBED.items() if point != missing})
    assert table.incomplete == ()
    assert table(np.array([1]), 28)[0] == pytest.approx(28)


# Texts to answers


@pytest.mark.filterwarnings("ignore:.* cut to the 12 tokens")
def test_answers_are_those_of_each_text_alone_in_order(tokenizer: Path) -> None:
    texts = texts_of(300)
    runner = runner_of(tokenizer)
    together = runner.predict(texts)
    assert together.dtype == np.float32
    np.testing.assert_allclose(together, np.stack([runner.predict(text) for text in texts]), rtol=1e-6)
    # Cut to 12 tokens by the pipeline and not to 5 by the file.
    assert together[:, 1].max() == 12
    np.testing.assert_array_equal(list(runner.predict(iter(texts))), together)


def test_all_instances_are_busy(tokenizer: Path) -> None:
    """Each call waits until another one runs: with one call at a time none would end."""
    meeting = threading.Barrier(2, timeout=60)

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        meeting.wait()
        return means(inputs)

    assert len(runner_of(tokenizer, run, rows=4).predict(["red house"] * 16)) == 16


def test_a_stream_is_read_as_its_answers_are_taken(tokenizer: Path) -> None:
    taken, before = 0, threading.active_count()

    def stream() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "red house"

    answers = runner_of(tokenizer, rows=64).predict(stream())
    assert len(list(islice(answers, 10))) == 10
    assert taken <= 2 * WINDOW_ITEMS
    answers.close()
    assert threading.active_count() <= before


def test_few_texts_are_ahead_if_each_token_has_a_vector(tokenizer: Path) -> None:
    stream = iter(["red house"] * 4096)
    answers = runner_of(tokenizer, pooling="none").answers(stream)
    next(answers)
    answers.close()
    assert len(list(stream)) >= 4096 - 2 * VECTORS_ITEMS


def test_abandoned_answers_end_their_threads(tokenizer: Path) -> None:
    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        time.sleep(0.01)
        return means(inputs)

    answers = runner_of(tokenizer, run).answers(iter(["red"] * 4000))
    next(answers)
    answers.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("corewise-text")]


def test_items_with_a_problem(tokenizer: Path) -> None:
    bad = ["", " \n", "a\0b", "\ud800", "x" * 10_000_000, 3, ("a", "b")]
    reasons = [answer.reason for answer in runner_of(tokenizer).answers(bad) if isinstance(answer, Rejected)]
    assert reasons[:4] == [
        "is empty",
        "is empty",
        "has a null byte at character 1",
        "has half of a surrogate pair at character 0",
    ]
    assert reasons[4].startswith("has 10,000,000 characters")
    assert reasons[5:] == ["is 3, which is not a text", "is ('a', 'b'), where the model takes single texts"]
    mixed = list(runner_of(tokenizer).answers(["red", "", "blue"]))
    assert [isinstance(answer, Rejected) for answer in mixed] == [False, True, False]
    with pytest.raises(InputError, match="text 1 is empty"):
        runner_of(tokenizer).predict(["red", ""])
    assert runner_of(tokenizer).predict([]) == []


def test_a_text_of_which_the_tokenizer_leaves_nothing_is_set_aside(tmp_path: Path) -> None:
    made = Tokenizer(WordLevel({"red": 0, "blue": 1, "[UNK]": 2}, unk_token="[UNK]"))  # without special tokens
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    texts = ["red", "\u200b", "blue"]
    first, nothing, last = runner_of(tmp_path / "tokenizer.json").answers(texts)
    assert (first[0], last[0]) == (0, 1)
    assert nothing == Rejected("has no tokens: the tokenizer removes all of its characters")
    artifact: Any = SimpleNamespace(folder=tmp_path)
    with pytest.raises(ProtocolError, match="text 1 has no tokens"):
        TextInput(artifact, pipeline_of()).tokens(TextRequest(items=texts))


def test_a_token_that_the_model_has_no_row_for_is_set_aside(tokenizer: Path) -> None:
    ranges = [InputRange(values=(ValueRange(low=0, high=high),)) for high in (7, 1, 1)]
    most_id = most_known_id(pipeline_of(), ranges)
    encoder = TextEncoder(pipeline_of(), tokenizer, most_id=most_id)
    runner = TextRunner(encoder, means, instances=1, limits=CallLimits(rows=8))
    red, query, house = runner.answers(["red", "blue query", "house"])
    assert query == Rejected("has the token 9, but the model knows 0 to 7")
    assert (red[1], house[1]) == (3, 3)
    assert most_known_id(pipeline_of(), None) is None


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"text": ["red"]}, "dict, which has columns"),
        ({"input_ids": [[4]], "attention_mask": [[1]]}, r"tokens; call the model itself .* model\(\*\*tokens\)"),
        (SimpleNamespace(columns=["text"]), "SimpleNamespace, which has columns"),
        (b"red", "given bytes; give a text"),
        (None, "given NoneType"),
        (Path("texts.txt"), "for files there is corewise.predict"),
    ],
)
def test_what_gives_no_texts(tokenizer: Path, items: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        runner_of(tokenizer).predict(items)


def test_pairs(tokenizer: Path) -> None:
    runner = runner_of(tokenizer, task="scores", pairs=True, activation="sigmoid")
    scores = runner.predict([("red house", "tree"), ("red", "blue tree house")])
    assert scores.shape == (2,)
    encoded = runner.encoder.encode([("red house", "tree")])[0]
    assert encoded.ids.tolist() == [2, 4, 7, 3, 8, 3]
    assert encoded.types.tolist() == [0, 0, 0, 0, 1, 1]
    with pytest.raises(InputError, match="pair of texts 0 is 'red', where the model takes pairs of texts"):
        runner.predict(["red"])


def test_inputs_are_padded_and_typed_as_the_model_has_them(tokenizer: Path) -> None:
    specs = [("mask", "int32"), ("position_ids", "int64"), ("ids", "int64")]
    inputs = tuple(TokenInput.of(TensorSpec(name=name, dtype=dtype, shape=(None, None))) for name, dtype in specs)
    encoder = TextEncoder(pipeline_of(inputs=inputs, pad_id=9), tokenizer)
    mask, positions, ids = encoder.collate(encoder.encode(["red", "red blue"]))
    assert (mask.dtype, ids.dtype) == (np.int32, np.int64)
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert ids.tolist() == [[2, 4, 3, 9], [2, 4, 5, 3]]
    fixed = TextEncoder(pipeline_of(fixed_length=6), tokenizer)
    assert fixed.collate(fixed.encode(["red"]))[0].shape == (1, 6)


def test_truncation(tokenizer: Path) -> None:
    text = "red " * 20 + "tree"
    right, left = (TextEncoder(pipeline_of(truncation=side), tokenizer) for side in ("right", "left"))
    assert right.encode([text])[0].ids.tolist() == [2, *[4] * 10, 3]
    assert left.encode([text])[0].ids.tolist() == [2, *[4] * 9, 8, 3]
    with pytest.raises(InputError, match="text 1 has 23 tokens, the model takes 12"):
        right.encode(["red", text], truncate=False)


def test_prompts(tokenizer: Path) -> None:
    prompts = {"query": "query: ", "document": ""}
    encoder = TextEncoder(pipeline_of(prompts=prompts, default_prompt="query"), tokenizer)
    assert encoder.encode(["red"])[0].ids.tolist() == [2, 9, 10, 4, 3]
    assert encoder.encode(["red"], prompt="document")[0].ids.tolist() == [2, 4, 3]
    with pytest.raises(InputError, match="no prompt 'passage'; its prompts are: query, document"):
        encoder.encode(["red"], prompt="passage")
    with pytest.raises(InputError) as caught:
        encoder.encode(["red"], prompt="x" * 10**6)
    assert len(str(caught.value)) < 200


def test_classes(tokenizer: Path) -> None:
    logits = np.array([[1.0, 3.0], [2.0, 2.0]], np.float32)
    made = pipeline_of(task="classes", labels=("bad", "good"), activation="softmax")
    first, _ = decode(made, [logits], ["a", "b"], [])
    assert isinstance(first, ClassAnswer)
    assert first.label == "good"
    assert first.probability == pytest.approx(1 / (1 + np.exp(-2)))
    assert sum(first.probabilities.values()) == pytest.approx(1)
    several = decode(pipeline_of(task="classes", activation="sigmoid"), [logits], ["a", "b"], [])[0]
    assert several.probabilities == pytest.approx({"LABEL_0": 0.7310586, "LABEL_1": 0.9525741})
    named = decode(pipeline_of(task="classes", labels=("same", "same")), [logits], ["a", "b"], [])[0]
    assert (named.probability, named.probabilities) == (3.0, {"same": 3.0})
    turned = decode(pipeline_of(task="classes", labels=("same", "same")), [logits[:, ::-1]], ["a", "b"], [])[0]
    assert turned.probabilities == {"same": turned.probability}


def test_spans(tokenizer: Path) -> None:
    labels = ("O", "B-COLOUR", "I-COLOUR", "B-PLACE")
    encoder = TextEncoder(pipeline_of(task="tokens", labels=labels, activation="softmax"), tokenizer)
    text = "red blue  house tree green"
    tokens = encoder.encode([text])
    wanted = [0, 1, 2, 3, 0, 1, 0]
    logits = np.eye(4, dtype=np.float32)[wanted][None] * 9
    (spans,) = decode(encoder.pipeline, [np.pad(logits, ((0, 0), (0, 3), (0, 0)))], [text], tokens)
    assert [(span.label, span.start, span.end, span.text) for span in spans] == [
        ("COLOUR", 0, 8, "red blue"),
        ("PLACE", 10, 15, "house"),
        ("COLOUR", 21, 26, "green"),
    ]
    assert all(isinstance(span, Span) and 0.99 < span.probability < 1 for span in spans)


def test_spans_at_the_end_of_a_text_of_which_only_the_end_is_read(tokenizer: Path) -> None:
    pipeline = pipeline_of(task="tokens", labels=("O", "B-COLOUR"), truncation="left")
    text = "tree " * 1000 + "blue"
    (tokens,) = TextEncoder(pipeline, tokenizer).encode([text])
    logits = np.eye(2, dtype=np.float32)[[int(number == 5) for number in tokens.ids]][None]
    ((span,),) = decode(pipeline, [logits], [text], [tokens])
    assert (span.start, span.end, span.text) == (5000, 5004, "blue")


def test_vectors_of_tokens_without_their_padding(tokenizer: Path) -> None:
    runner = runner_of(tokenizer, lambda inputs: [inputs[0][..., None].astype(np.float32)])
    short, long = runner.predict(["red", "red blue green"])
    assert (short.shape, long.shape) == ((3, 1), (5, 1))


# The record


def test_the_record_survives_json_and_refuses_what_it_does_not_know() -> None:
    made = pipeline_of(prompts={"query": "query: "}, labels=("a",), fixed_length=4)
    assert from_json(TextPipeline, to_json(made)) == made
    with pytest.raises(ValueError, match="stemming"):
        from_json(TextPipeline, {**to_json(made), "stemming": True})
    with pytest.raises(ValueError, match="task"):
        from_json(TextPipeline, {**to_json(made), "task": "poems"})


def test_inferring(tokenizer: Path, tmp_path: Path) -> None:
    inputs = [TensorSpec(name=name, dtype="int64", shape=(None, None)) for name in NAMES]
    scores = [TensorSpec(name="logits", dtype="float32", shape=(None, 2))]
    made = infer(tokenizer, inputs, scores, labels=("a", "b"))
    assert (made.task, made.max_length, made.activation) == ("classes", 512, "softmax")
    assert [each.role for each in made.inputs] == ["ids", "mask", "types"]
    fixed = infer(tokenizer, [TensorSpec(name="ids", dtype="int32", shape=(None, 64))], scores)
    assert (fixed.task, fixed.pooling, fixed.max_length, fixed.fixed_length) == ("vectors", "own", 64, 64)
    with pytest.raises(InputError, match=r"the model takes x float32 .* and no tokens"):
        infer(tokenizer, [TensorSpec(name="x", dtype="float32", shape=(None, 8))], scores)
    words = tmp_path / "vocab.txt"
    words.write_text("[PAD]\n[UNK]\n")
    with pytest.raises(InputError, match=r"vocab\.txt is not a tokenizer"):
        infer(words, inputs, scores)
    other = tmp_path / "tokenizer.json"
    other.write_text('{"model": {"type": "Poems"}}')
    with pytest.raises(ArtifactError, match="is not a tokenizer"):
        TextEncoder(pipeline_of(), other)


def test_the_open_inference_protocol_pads_nothing_for_a_model_without_a_mask(tokenizer: Path) -> None:
    ids = TokenInput.of(TensorSpec(name="input_ids", dtype="int64", shape=(None, None)))
    pipeline = pipeline_of(inputs=(ids,), tokenizer=tokenizer.name)
    artifact: Any = SimpleNamespace(folder=tokenizer.parent)
    text = TextInput(artifact, pipeline)
    alike, unlike = (np.array(texts, object) for texts in ([b"red", b"blue"], [b"red", b"red house"]))
    assert text.arrays([alike])[0].tolist() == [[2, 4, 3], [2, 5, 3]]
    with pytest.raises(ProtocolError, match="from 3 to 4 tokens, and the model takes no attention mask"):
        text.arrays([unlike])


def test_a_prompt_goes_before_texts_and_not_before_token_ids(tokenizer: Path) -> None:
    artifact: Any = SimpleNamespace(folder=tokenizer.parent)
    text = TextInput(artifact, pipeline_of(tokenizer=tokenizer.name, prompts={"query": "query: "}))
    assert len(text.tokens(TextRequest(ids=[[2, 4, 3]]))[0]) == 3
    with pytest.raises(ProtocolError, match="before texts and not before token ids; send texts"):
        text.tokens(TextRequest(ids=[[2, 4, 3]], prompt="query"))


def test_token_ids_are_cut_where_the_request_says(tokenizer: Path) -> None:
    artifact: Any = SimpleNamespace(folder=tokenizer.parent)
    text = TextInput(artifact, pipeline_of(tokenizer=tokenizer.name, max_length=3))
    rows = [[2, 4, 3], [2, 4, 5, 6, 3]]
    with pytest.raises(ProtocolError, match="row 1 has 5 tokens, the model takes 3; send it in parts, or ask for"):
        text.tokens(TextRequest(ids=rows))
    cut = {side: text.tokens(TextRequest(ids=rows, truncate=side)) for side in ("right", "left")}
    assert [each.ids.tolist() for each in cut["right"]] == [[2, 4, 3], [2, 4, 5]]
    assert [each.ids.tolist() for each in cut["left"]] == [[2, 4, 3], [5, 6, 3]]


def test_a_token_that_the_model_does_not_know_is_named_by_its_row_of_the_request(tokenizer: Path) -> None:
    artifact: Any = SimpleNamespace(folder=tokenizer.parent)
    ranges = [InputRange(values=(ValueRange(low=0, high=high),)) for high in (7, 1, 1)]
    text = TextInput(artifact, pipeline_of(tokenizer=tokenizer.name), ranges)
    with pytest.raises(ProtocolError, match="row 21 has the token 8, but the model knows 0 to 7; send ids of the"):
        text.tokens(TextRequest(ids=[[2, 7, 3], [2, 8, 3]]), 20)
    with pytest.raises(ProtocolError, match="text 21 has the token 8, but the model knows 0 to 7"):
        text.tokens(TextRequest(items=["red", "tree"]), 20)


def test_one_long_text_among_many_short_ones_is_refused_before_it_is_padded(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact: Any = SimpleNamespace(folder=tokenizer.parent)
    text = TextInput(artifact, pipeline_of(tokenizer=tokenizer.name))
    monkeypatch.setattr("corewise.serving.text.MOST_PADDED_TOKENS", 100)
    assert len(text.arrays([np.array([b"red"] * 20, object)])[0]) == 20
    with pytest.raises(ProtocolError, match=r"21 texts, padded to the \d+ tokens of the longest"):
        text.arrays([np.array([b"red"] * 20 + [b"red house " * 5], object)])
