"""pipeline: texts with more tokens than the model takes are counted, in predict, in jobs and in what they say."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from corewise.common.errors import InputError
from corewise.pipeline import CallLimits, Rejected, TextEncoder, TextRunner
from corewise.pipeline import job as jobs
from corewise.pipeline.job import Done, Job, run_job
from corewise.pipeline.parts import Counts
from corewise.records.build import TensorSpec
from corewise.records.bulk import BulkResult
from corewise.records.pipeline import TextPipeline, TokenInput
from corewise.report.bulk import result_lines
from corewise.samples.texts import Columns

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue"]
MOST = 8
PROCESSORS: dict[str, tuple[Any, int, int]] = {
    # With how many special tokens for a text and for a pair.
    "template": (
        processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        ),
        2,
        3,
    ),
    "bert": (processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)), 2, 3),
    "roberta": (processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2)), 2, 4),
    "none": (None, 0, 0),
}


def encoder_of(processor: str = "template", *, unknown: str | None = "[UNK]", **changes: Any) -> TextEncoder:
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if PROCESSORS[processor][0] is not None:
        made.post_processor = PROCESSORS[processor][0]
    inputs = tuple(
        TokenInput.of(TensorSpec(name=name, dtype="int64", shape=(None, None)))
        for name in ("input_ids", "attention_mask")
    )
    facts: dict[str, Any] = {"task": "vectors", "pooling": "mean", "tokenizer_sha256": "", "inputs": inputs}
    return TextEncoder(TextPipeline(**{**facts, "max_length": MOST, **changes}), made.to_str().encode())


def counts(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """A model: the number of tokens."""
    return [inputs[1].sum(1, keepdims=True).astype(np.float32)]


def runner_of(**changes: Any) -> TextRunner:
    return TextRunner(encoder_of(**changes), counts, instances=1, limits=CallLimits(rows=4))


def words(count: int) -> str:
    return " ".join(["red"] * count)


@pytest.mark.parametrize("task", ["vectors", "tokens"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_text_is_cut_from_one_token_too_many_on(processor: str, side: str, task: str) -> None:
    encoder = encoder_of(processor, truncation=side, task=task)
    room = MOST - PROCESSORS[processor][1]
    lengths = [1, room - 1, room, room + 1, 5 * room]
    found = encoder.encode([words(count) for count in lengths])
    assert [one.is_cut for one in found] == [False, False, False, True, True]
    assert [len(one) for one in found] == [MOST - room + 1, MOST - 1, MOST, MOST, MOST]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_pair_is_cut_whichever_text_is_long(processor: str, side: str) -> None:
    encoder = encoder_of(processor, truncation=side, task="scores", pairs=True)
    room = MOST - PROCESSORS[processor][2]
    pairs = [(1, room - 1), (room - 1, 1), (1, room), (room, 1), (room, room), (1, 5 * room)]
    found = encoder.encode([(words(first), words(second)) for first, second in pairs])
    assert [one.is_cut for one in found] == [False, False, True, True, True, True]


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_text_that_is_full_before_much_that_is_no_token_is_read_to_its_end(side: Any) -> None:
    """Of so many characters, the first ones have exactly as many tokens as the model takes."""
    blank = " " * 9999
    parts = [words(MOST - 2), blank, ""]
    whole, more = ("".join(parts if side == "right" else parts[::-1]) for parts[2] in ("", "blue"))
    encoder = encoder_of(truncation=side)
    assert [one.is_cut for one in encoder.encode([whole, more])] == [False, True]


def test_a_prompt_counts_too() -> None:
    encoder = encoder_of(prompts={"query": "blue "})
    text = words(MOST - 2)
    assert [encoder.encode([text], prompt=prompt)[0].is_cut for prompt in (None, "query")] == [False, True]


def test_predict_says_once_at_its_end_how_many_were_cut() -> None:
    runner = runner_of()
    texts = [words(30) if row % 100 == 7 else "red" for row in range(400)]
    with pytest.warns(UserWarning, match="^4 of 400 texts were cut to the 8 tokens that the model takes; give") as told:
        assert runner.predict(texts).shape == (400, 1)
    assert len(told) == 1
    with pytest.warns(UserWarning, match="^the text was cut to the 8 tokens") as told:
        runner.predict(words(30))
    with pytest.warns(UserWarning, match="^1 of 2 pairs of texts was cut"):
        runner_of(task="scores", pairs=True).predict([("red", "red"), (words(9), "red")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner.predict(["red", words(MOST - 2)])
        runner.predict("red")


def test_an_iterator_says_it_when_its_answers_are_taken() -> None:
    answers: Iterator[Any] = runner_of().predict(iter([words(30), "red", words(9)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [next(answers)[0] for _ in range(3)] == [8, 3, 8]
    with pytest.warns(UserWarning, match="^2 of 3 texts were cut") as told:
        assert list(answers) == []
    assert told[0].filename == __file__


def test_the_warning_is_at_the_callers_line() -> None:
    from corewise.artifact.model import Model
    from corewise.common.nested import Structure

    leaf: Any = Structure("leaf")
    model = Model(None, inputs=(), input_structure=leaf, output_structure=leaf, texts=runner_of())  # type: ignore[arg-type]
    for given in ([words(30)], words(30)):
        with pytest.warns(UserWarning, match="was cut") as told:
            model.predict(given)
        assert told[0].filename == __file__


# Jobs


def job_of(output: Path, source: Path, **changes: Any) -> Job:
    values: dict[str, Any] = {"inputs": (source,), "output": output, "columns": Columns(), "prompt": None}
    return Job(**{**values, "artifact": "a", **changes})


@pytest.mark.parametrize("suffix", [".jsonl", ".npy", ""])
def test_a_job_counts_them_over_interruptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(jobs, "PART_ROWS", 10)
    monkeypatch.setattr(jobs, "FOLDER_PART_ROWS", 10)
    source = tmp_path / "texts.txt"
    long = {3, 9, 10, 24}
    lines = [words(30) if row in long else "null \0 " + words(30) if row == 5 else "red" for row in range(25)]
    source.write_text("\n".join(lines))
    job = job_of(tmp_path / f"out{suffix}", source, folder=not suffix)

    def stop(done: Counts) -> None:
        if done.rows == 10:
            assert done == Counts(10, 1, 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job, runner_of(), on_rows=stop)
    assert job.kept.finished() == {0: Counts(10, 1, 2)}
    assert run_job(job, runner_of()) == Done(25, 10, 1, 4)


def test_the_last_line_of_the_command_says_it() -> None:
    result = BulkResult(output="out.npy", failed_in="", rows=9000, resumed=0, failed=0, wall_s=2.0, cut=1200)
    assert result_lines(result) == (
        "9,000 rows to out.npy in 2 s (4,500/s); 1,200 cut to the tokens that the model takes",
    )


# Items that cannot be tokenized


class Unshown:
    """What Python cannot show."""

    def __repr__(self) -> str:
        raise RuntimeError


def test_items_that_python_cannot_show_have_a_reason_too() -> None:
    nested: list[Any] = []
    for _ in range(10**5):
        nested = [nested]
    items = [nested, Unshown(), ("red", nested), np.arange(10**6), {"text": nested}]
    reasons = [answer.reason for answer in runner_of().answers(items)]
    assert [reason[:10] for reason in reasons] == ["is [[[[[[[", "is <Unshow", "is ('red',", "is array([", "is {'text'"]
    assert all(len(reason) < 100 and "\n" not in reason for reason in reasons)
    pair = runner_of(task="scores", pairs=True)
    assert [answer.reason[:9] for answer in pair.answers([nested, Unshown(), "red"])] == [
        "is [[[[[[",
        "is <Unsho",
        "is 'red',",
    ]


def test_a_text_that_the_tokenizer_refuses_is_set_aside_and_no_other() -> None:
    """Without a token for unknown words, WordLevel has an error for them, as other models of tokenizers have."""
    first, unknown, last = runner_of(unknown=None).answers(["red", "red green", "blue red"])
    assert (first[0], last[0]) == (3, 4)
    assert isinstance(unknown, Rejected)
    assert unknown.reason.startswith("cannot be tokenized: Exception: WordLevel error: ")
    with pytest.raises(InputError, match=r"text 1 cannot be tokenized: .*; correct or remove this text"):
        runner_of(unknown=None).predict(["red", "green"])
    with pytest.raises(InputError, match=r"a text cannot be tokenized: .*; make the artifact again"):
        encoder_of(unknown=None).encode(["green"])
    with pytest.raises(InputError, match="no prompt 'query'"):
        next(runner_of(unknown=None).answers(["green"], prompt="query"))


def test_a_model_that_takes_no_more_than_special_tokens_answers_nothing() -> None:
    (answer,) = runner_of(max_length=1).answers(["red"])
    assert answer == Rejected("has 3 tokens, the model takes 1")
