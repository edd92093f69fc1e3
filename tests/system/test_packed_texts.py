"""Texts that share rows, from optimize to an artifact that is opened, checked and damaged."""

import json
import math
import shutil
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from builders import requirements, said
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import corewise
from corewise import source
from corewise.artifact import read, tuned
from corewise.common.errors import ArtifactError, EngineError, SourceError
from corewise.pipeline.packing import PackedCall
from corewise.records.build import Plan
from corewise.records.reason import ReasonKind
from corewise.runtime.client import Client
from corewise.runtime.instances import open_plan
from corewise.samples import from_python
from corewise.search import call_costs, optimization, packing
from corewise.search.budget import Budget, Preparation
from corewise.search.packing import judge_packing, reserved_s, row_tokens
from corewise.search.result import Result
from corewise.serving.remote import Remote
from corewise.serving.served import Served, Source, Trust
from corewise.serving.texts import TextRequest

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(60))]


def write_encoder(folder: Path) -> Path:
    """A folder of sentence-transformers: a small BERT with random weights, mean pooling, and vectors of norm 1."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=128, initializer_range=0.3, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    kinds = ("Transformer", "Pooling", "Normalize")
    listed = [
        {"path": f"{number}_{kind}" if number else "", "type": f"sentence_transformers.models.{kind}"}
        for number, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return folder


def texts(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(f"w{word}" for word in random.integers(0, 60, random.integers(2, 20))) for _ in range(count)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


class Recorded(NamedTuple):
    """A search, and what its packing was judged by."""

    result: Result
    judged: tuple[Any, ...]

    def again(self) -> tuple[Any, Any]:
        """What is found out now."""
        return judge_packing(*self.judged)


@pytest.fixture(scope="module")
def recorded(encoder: Path) -> Recorded:
    """The small model in eager PyTorch; packed calls, and opening them, are said to take no time."""
    judged: list[Any] = []

    def judge(*arguments: Any) -> Any:
        judged.extend(arguments)
        return judge_packing(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        for module in (call_costs, packing):
            patch.setattr(module, "FINISHING", 1000.0)  # however slow a busy machine is
        patch.setattr(packing, "_raced", lambda *arguments: (1e6, 1e-3))
        patch.setattr(packing, "perf_counter", lambda: 0.0)
        patch.setattr(optimization, "judge_packing", judge)
        result = corewise.optimize(f"st:{encoder}", texts(120), engines=["eager"], budget_s=12)
    judged[2] = replace(judged[2], budget=Budget())
    return Recorded(result, tuple(judged))


@pytest.fixture(scope="module")
def result(recorded: Recorded) -> Result:
    return recorded.result


@pytest.fixture
def folder(result: Result, tmp_path: Path) -> Path:
    result.save(tmp_path / "packed.cw")
    return tmp_path / "packed.cw"


def packed_calls(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[PackedCall]:
    """The packed calls of a model, as they are made."""
    made: list[PackedCall] = []
    own = model.texts._call

    def call(one: Any, tokens: Any) -> Any:
        made.extend([one] if isinstance(one, PackedCall) else [])
        return own(one, tokens)

    monkeypatch.setattr(model.texts, "_call", call)
    return made


def test_packed_texts_have_the_answers_of_texts_alone(
    result: Result, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (reason,) = [note for note in result.report.notes if note.kind == ReasonKind.PACKS_TEXTS]
    assert reason.details["tokens"] == 64
    asked = texts(300, seed=1)
    asked[7] = "w1 " * 100  # longer than a row
    with corewise.load(folder) as model:
        assert model.texts is not None
        alone = np.stack([model.predict(one) for one in asked])
        calls = packed_calls(model, monkeypatch)
        together = model.predict(asked)
        assert calls
        np.testing.assert_allclose(together, alone, atol=1e-4)
        np.testing.assert_allclose(result.model.predict(asked), alone, atol=1e-4)
    assert corewise.verify(folder).sqnr_db > 50


def test_another_plan_than_the_one_measured_packs_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = read(folder).manifest.plan
    with corewise.load(folder, threads_per_instance=1, instances=3 - min(2, plan.instances)) as model:
        calls = packed_calls(model, monkeypatch)
        assert model.predict(texts(200)).shape == (200, 32)
        assert not calls


def test_a_program_that_is_gone_is_done_without(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with corewise.load(folder) as model:
        shutil.rmtree(folder / "packed" / "payload")
        calls = packed_calls(model, monkeypatch)
        with pytest.warns(UserWarning, match="do not share a row.*is missing"):
            assert model.predict(texts(200)).shape == (200, 32)
        assert model.predict(texts(200)).shape == (200, 32)  # it warned once
        assert not calls


def test_a_program_that_was_exchanged_is_not_opened(folder: Path) -> None:
    with corewise.load(folder) as model:
        file = next((folder / "packed" / "payload").iterdir())
        file.write_bytes(file.read_bytes()[::-1])
        with pytest.warns(UserWarning, match="was altered"):
            assert model.predict(texts(200)).shape == (200, 32)


def test_it_is_opened_when_that_pays(result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert result.packed is not None
    slow = replace(result.packed, packing=replace(result.packed.packing, opening_ms=1e9))
    replace(result, packed=slow).save(tmp_path / "slow.cw")
    with corewise.load(tmp_path / "slow.cw") as model:
        calls = packed_calls(model, monkeypatch)
        assert model.predict(texts(200)).shape == (200, 32)
        assert not calls


def test_it_is_checked_under_the_plan_of_this_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(threads_per_instance=1, batch=2)
    opened: list[Plan] = []

    def open_here(opener: Any, payload: Path, build: Any, plan: Plan, cpu: Any) -> Any:
        opened.append(plan)
        return open_plan(opener, payload, build, plan, cpu)

    monkeypatch.setattr(tuned, "fit", lambda artifact, cpu: tuned.Fit(plan=plan, tuned=None, warnings=()))
    monkeypatch.setattr(sys.modules["corewise.artifact.open"], "open_plan", open_here)
    assert corewise.verify(folder).sqnr_db > 50
    assert [(each.threads_per_instance, each.instances, each.batch) for each in opened] == [(1, 1, 2), (1, 1, 8)]


def set_batch(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Serve with that many rows of a call, whatever the search found to be best on this machine."""
    own = tuned.fit

    def fit(artifact: Any, cpu: Any) -> tuned.Fit:
        found = own(artifact, cpu)
        return replace(found, plan=replace(found.plan, batch=batch), elastic=None)

    monkeypatch.setattr(tuned, "fit", fit)


def test_the_server_packs_the_texts_of_several_requests(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = texts(60, seed=3)
    asked[7] = "w1 " * 100  # longer than a row
    with corewise.load(folder) as model:
        alone = [model.predict(one) for one in asked]
    ran: list[int] = []
    own = Remote.run

    def run(remote: Remote, instance: int, inputs: Any) -> Any:
        ran.append(instance)
        return own(remote, instance, inputs)

    monkeypatch.setattr(Remote, "run", run)
    set_batch(monkeypatch, 8)
    served = Served(Source.of(str(folder)), trust=Trust())
    with closing(served):
        assert served.text is not None
        tokens = served.text.tokens(TextRequest(items=asked))
        futures = [served.submit(served.text.inputs([one], len(one))) for one in tokens]
        for future, expected in zip(futures, alone, strict=True):
            np.testing.assert_allclose(future.result(60).outputs[0], expected[None], atol=1e-4)
        assert any(number >= served.plan.instances for number in ran)
        assert len(ran) < len(asked)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_server_opens_the_packed_program_only_if_requests_may_share_calls(
    folder: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    opened: list[bool] = []

    def remote(*arguments: Any, packed: bool, **options: Any) -> Any:
        opened.append(packed)
        raise EngineError("nothing is opened here")

    set_batch(monkeypatch, batch)
    monkeypatch.setattr("corewise.serving.served.Remote", remote)
    with pytest.raises(EngineError, match="nothing is opened here"):
        Served(Source.of(str(folder)), trust=Trust())
    assert opened == [batch > 1]


def test_a_closed_model_opens_nothing_any_more(folder: Path) -> None:
    model = corewise.load(folder)
    model.close()
    with pytest.raises(corewise.CorewiseError, match="the model was closed"):
        model.predict(texts(200))


@pytest.mark.parametrize("name", ["packed/golden.safetensors", "packed/payload"])
def test_damage_is_found(folder: Path, name: str) -> None:
    path = folder / name
    file = next(path.iterdir()) if path.is_dir() else path
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="was altered"):
        corewise.load(folder)
    shutil.rmtree(folder / "packed")
    with pytest.raises(ArtifactError, match="is missing"):
        corewise.verify(folder)


def test_what_is_not_faster_is_left_out(recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_raced", lambda *arguments: (1e-3, 1e6))
    packed, reason = recorded.again()
    assert packed is None
    assert reason.kind == ReasonKind.PACKING_SLOWER
    replace(recorded.result, packed=None).save(tmp_path / "usual.cw")
    assert not (tmp_path / "usual.cw" / "packed").exists()
    assert read(tmp_path / "usual.cw").manifest.packing is None


def test_a_model_that_takes_longer_to_export_than_there_is_time_is_not_packed(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, choice, context, costs = recorded.judged
    slow = replace(task, preparation=Preparation(export_s=400.0))
    monkeypatch.setattr(packing, "FINISHING", 1.1)
    packed, reason = judge_packing(slow, choice, replace(context, budget=Budget(total_s=300.0)), costs)
    assert packed is None
    assert "the budget had no time" in said(reason)
    assert reserved_s(slow, context.requirements, 300.0) == 0
    assert reserved_s(task, context.requirements, 300.0) > 0


def test_answers_that_are_worse_are_left_out(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "unpacked", lambda call, vectors: np.ones((len(call.places), vectors.shape[-1])))
    packed, reason = recorded.again()
    assert packed is None
    assert reason.kind == ReasonKind.TEXTS_NOT_PACKED
    assert "cosine" in said(reason)


def test_the_row_that_tells_has_several_texts(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    task, *others = recorded.judged
    filling = {"input_ids": np.full(64, 5), "attention_mask": np.ones(64, np.int64)}
    short = [{name: array[:9] for name, array in filling.items()}] * 4
    rows: list[Any] = []
    monkeypatch.setattr(source, "packed_form", lambda module, most, row: rows.append(row))
    packed, reason = judge_packing(replace(task, holdout=from_python([filling, *short])), *others)
    assert packed is None
    assert "does not keep the texts of a row apart" in said(reason)
    assert [int(row[-1].max()) for row in rows] == [4]


def test_no_call_has_more_tokens_than_the_model_takes(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    task, *others = recorded.judged
    longest = max(len(row[0]) for row in task.holdout.rows)
    timed: list[int] = []

    def raced(client: Any, workspace: Any, calls: Any, *arguments: Any) -> tuple[float, float]:
        timed.extend(call.tokens for call in calls)
        return 1e-3, 1e6

    monkeypatch.setattr(packing, "_raced", raced)
    judge_packing(replace(task, pipeline=replace(task.pipeline, max_length=longest)), *others)
    assert max(timed) <= longest


def test_a_model_that_fails_to_be_packed_ends_no_search(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise SourceError("the outputs have NaN", "correct the model")

    monkeypatch.setattr(source, "export", refuse)
    task, *others = recorded.judged
    packed, reason = judge_packing(replace(task, seed=task.seed + 1), *others)
    assert packed is None
    assert "packing them failed: the outputs have NaN" in said(reason)


def test_a_resumed_search_builds_the_packed_program_only_if_it_is_another_one(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []
    own = Client.build

    def build(client: Client, workspace: Any, build: Any, payload: Path) -> Any:
        built.append(payload)
        return own(client, workspace, build, payload)

    monkeypatch.setattr(Client, "build", build)
    monkeypatch.setattr(packing, "_raced", lambda *arguments: (1e6, 1e-3))
    first, _ = recorded.again()
    built.clear()
    again, _ = recorded.again()
    assert not built
    assert first.files.payload == again.files.payload
    np.testing.assert_array_equal(first.files.outputs[0], again.files.outputs[0])
    task, *others = recorded.judged
    judge_packing(replace(task, seed=task.seed + 1), *others)
    assert len(built) == 1


def test_both_ways_are_timed_in_turns(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Client.time_calls

    def until_each_was_timed(client: Client, samples: Path, points: Any, budget_s: float) -> tuple[float, ...]:
        while len(found := own(client, samples, points, budget_s)) < len(points):
            budget_s *= 2  # a machine that is busy now is slower than the recorded costs say
        return found

    monkeypatch.setattr(packing, "ROUND_S", 0.01)
    monkeypatch.setattr(Client, "time_calls", until_each_was_timed)
    packed, reason = recorded.again()
    assert 0 < reason.details["ratio"] < math.inf
    assert "times as many texts" in said(reason)
    assert (packed is not None) == (reason.details["ratio"] >= packing.BETTER)


def test_no_rows_are_packed_for_long_texts_or_where_memory_is_limited(recorded: Recorded) -> None:
    task, _, context, _ = recorded.judged
    assert row_tokens(task, context.requirements) == 64
    assert row_tokens(task, replace(context.requirements, memory_limit_bytes=2**30)) is None
    assert row_tokens(task, requirements("latency")) is None
    assert reserved_s(task, context.requirements, 300.0) > packing.PACKING_S
    assert reserved_s(task, context.requirements, 60.0) == 0  # in which it would not be tried
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task.exported.module.model, "poolings", ("max",))
        assert row_tokens(task, context.requirements) is None
    long = np.ones(100, np.int64)
    longer = replace(task, holdout=from_python([{"input_ids": long, "attention_mask": long}] * 2))
    assert row_tokens(longer, context.requirements) is None
