"""optimize in Python: one shared run on real engines, and the cases that end it early."""

import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import said
from torch import nn

import corewise
from corewise.artifact import read
from corewise.artifact.open import verify
from corewise.common import stats
from corewise.common.errors import EngineError, InputError, MetricError, OutputError
from corewise.engines import engine
from corewise.engines.eager import Eager
from corewise.engines.fake import Fake
from corewise.records.build import Build
from corewise.records.events import RaceRound, StageStarted, TrialEnded, TrialStarted
from corewise.records.goal import Slo
from corewise.records.reason import ReasonKind
from corewise.runtime.client import InProcess
from corewise.runtime.race import run_race
from corewise.search.trial import SearchContext


class Digest(nn.Module):
    """A small CNN on a dict of an image and a bias for its classes; a dataclass comes out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(32, 4)

    def forward(self, batch):
        features = self.features(batch["image"]).mean((2, 3))
        return Answer(logits=self.head(features) + batch["extra"]["bias"], features=[features])


@dataclass
class Answer:
    logits: torch.Tensor
    features: list


class Optimist(Fake):
    """Offers builds of a fake engine, whose outputs have nothing to do with the model's."""

    def candidates(self, cpu, operators):
        return tuple(Build(engine=OPTIMIST, precision="int8", options=(("n", n),)) for n in range(2))


class Absent(Fake):
    """Is not installed."""

    def unavailable(self, opening=False):
        return "needs absent: pip install absent"


OPTIMIST = f"{__name__}:Optimist"
ABSENT = f"{__name__}:Absent"


def make_samples(count=60):
    generator = torch.Generator().manual_seed(1)
    model = Digest().eval()
    samples = []
    for _ in range(count):
        inputs = {
            "batch": {
                "image": torch.randn(3, 12, 12, generator=generator),
                "extra": {"bias": torch.randn(4, generator=generator)},
            }
        }
        with torch.no_grad():
            answer = model(
                {"image": inputs["batch"]["image"][None], "extra": {"bias": inputs["batch"]["extra"]["bias"][None]}}
            )
        samples.append((inputs, int(answer.logits.argmax())))
    return samples


SAMPLES = make_samples()
BATCH = {
    "image": torch.stack([inputs["batch"]["image"] for inputs, _ in SAMPLES[:5]]),
    "extra": {"bias": torch.stack([inputs["batch"]["extra"]["bias"] for inputs, _ in SAMPLES[:5]])},
}


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Measure for a moment only, in this process: how fast anything is is not asked here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("corewise.search.trial.MEASURE_S", 0.1)
        patch.setattr("corewise.search.trial.HOPELESS", 0.0)  # on a busy machine any build may look hopelessly slow
        patch.setattr("corewise.search.finals.ROUNDS", stats.MIN_ROUNDS)
        # Measurements of moments often contradict each other, which would run each race twice.
        patch.setattr("corewise.search.search.find_contradiction", lambda *of: None)
        patch.setattr("corewise.search.elastic.REQUESTS", 100)
        patch.setattr("corewise.search.elastic.ROUNDS", 1)
        patch.setattr("corewise.search.elastic.SHORTEST_DUEL_S", 0.05)
        patch.setattr("corewise.search.elastic.DUEL_S", 0.05)
        patch.setattr("corewise.runtime.race.WARM_S", 0.1)
        patch.setitem(run_race.__kwdefaults__, "round_s", 0.05)
        patch.setattr(SearchContext, "client", lambda context, build, share=1.0: InProcess(engine(build.engine)))
        yield


@pytest.fixture(scope="module")
def events():
    return []


@pytest.fixture(scope="module")
def result(quick, events):
    return corewise.optimize(
        Digest(), SAMPLES, max_drop=0.1, engines=("onnxruntime",), objective="latency", on_event=events.append
    )


def expected(batch=BATCH):
    with torch.no_grad():
        return Digest().eval()(batch)


def test_the_report_tells_the_whole_run(result):
    report = result.report
    assert report.trials[0].build == Build(engine="eager", precision="fp32")
    assert {trial.build.engine for trial in report.trials} == {"eager", "onnxruntime"}
    assert {trial.state for trial in report.trials} == {"ok"}
    assert report.samples.calibration + report.samples.holdout == len(SAMPLES)
    assert report.winner.fidelity.metric == "top1"
    assert report.winner.fidelity.baseline_value == 1.0  # the labels are the model's own answers
    assert report.winner.fidelity.drop <= 0.1
    assert {rates.build for rates in report.finals} >= {report.choice.winner, report.trials[0].build}
    plan, elasticity = report.choice.plan, report.choice.elasticity
    assert (elasticity is None) == (plan.threads_per_instance * plan.instances == 1)
    assert elasticity is None or elasticity.plan.wide.threads_per_instance == plan.threads_per_instance * plan.instances
    assert {loser.build for loser in report.choice.losers} == {t.build for t in report.trials} - {report.choice.winner}
    assert report.choice.speedup >= 1
    assert report.peak_memory_bytes > 100e6
    assert report.wall_s > 0


def test_progress_is_told_in_order(result, events):
    kinds = [type(event) for event in events]
    total = len(result.report.trials)
    assert kinds[0] is StageStarted
    assert [event.number for event in events if isinstance(event, TrialStarted)] == [*range(1, total + 1)]
    assert [e.trial.build for e in events if isinstance(e, TrialEnded)] == [t.build for t in result.report.trials]
    # After the last race a twin may still judge a winner in static int8, if that is the one that won.
    last = next(event for event in reversed(events) if isinstance(event, RaceRound))
    assert last.round == last.rounds


def test_the_model_answers_as_the_original(result):
    found = result.model(batch=BATCH)
    assert type(found) is Answer
    assert type(found.features) is list
    exact = expected()
    noise = (found.logits - exact.logits).norm() / exact.logits.norm()
    assert noise < 0.2  # whichever build has won


def test_an_answer_is_not_changed_by_the_next_call(result):
    first = result.model(batch=BATCH).logits
    kept = first.clone()
    result.model(batch={"image": -BATCH["image"], "extra": BATCH["extra"]})
    assert torch.equal(first, kept)


def test_any_batch_is_taken(result):
    for size in (1, 2, 17):
        image = BATCH["image"][:1].expand(size, -1, -1, -1)
        bias = BATCH["extra"]["bias"][:1].expand(size, -1)
        found = result.model(batch={"image": image, "extra": {"bias": bias}})
        assert found.logits.shape == (size, 4)


def test_a_wrong_call_is_told(result):
    with pytest.raises(InputError, match=r'\["extra"\] is missing'):
        result.model(batch={"image": BATCH["image"]})
    with pytest.raises(InputError, match="is float64; give float32"):
        result.model(batch={"image": BATCH["image"].double(), "extra": BATCH["extra"]})


def test_what_is_saved_is_loaded_and_verified(result, tmp_path):
    result.save(tmp_path / "m.cw")
    with corewise.load(tmp_path / "m.cw") as model:
        assert torch.equal(model(batch=BATCH).logits, result.model(batch=BATCH).logits)
        arrays = {"image": BATCH["image"].numpy(), "extra": {"bias": BATCH["extra"]["bias"].numpy()}}
        np.testing.assert_array_equal(model(batch=arrays).logits, model(batch=BATCH).logits.numpy())
    assert read(tmp_path / "m.cw").manifest.elastic == result.report.choice.elastic
    assert verify(tmp_path / "m.cw").sqnr_db > 20
    assert os.listdir(tmp_path) == ["m.cw"]
    with pytest.raises(OutputError, match="exists already"):
        result.save(tmp_path / "m.cw")


def test_an_artifact_without_reference_is_smaller(result, tmp_path):
    whole = result.save(tmp_path / "whole.cw")
    small = result.save(tmp_path / "small.cw", reference=False)
    assert set(whole.manifest.files) - set(small.manifest.files) == {"reference/program.pt2"}


# --- without a better candidate -----------------------------------------------------------------------------------


def only_images(count=40, labels=None):
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return [(image, None if labels is None else int(labels[i])) for i, image in enumerate(images)]


STRICT_DROP = 0.75
"""Between the fake engine's drop of agreement with ``Tiny`` on ``only_images`` and its interval's upper end."""


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))

    def forward(self, x):
        return self.net(x)


def run(*args, **options):
    return corewise.optimize(*args, **{"objective": "latency", "engines": (OPTIMIST,), **options})


@pytest.fixture(scope="module")
def strict(quick):
    """A run whose candidates pass by their drop and not by its interval."""
    return run(Tiny(), only_images(), max_drop=STRICT_DROP, strict=True)


def test_strict_asks_for_the_whole_interval(strict):
    for trial in strict.report.trials[1:]:
        assert trial.fidelity.drop < STRICT_DROP < trial.fidelity.drop_high
        assert trial.state == "rejected"


def test_the_baseline_wins_where_no_candidate_is_accurate_enough(strict):
    report = strict.report
    assert report.choice.winner == report.trials[0].build
    assert report.choice.speedup == 1
    assert "no int8 build was accurate enough" in said(report.choice.reason)
    assert report.winner.fidelity.metric == "agreement"
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(strict.model(x), Tiny()(x).detach())


class Slow(Eager):
    """Offers a build that is right and takes its time."""

    def candidates(self, cpu, operators):
        return (Build(engine=f"{__name__}:Slow", precision="fp32"),)

    def open(self, folder, build, plan):
        session = super().open(folder, build, plan)
        run = session.run

        def slowly(inputs):
            time.sleep(0.02)
            return run(inputs)

        session.run = slowly
        return session


def test_a_slower_candidate_does_not_win(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = run(Tiny(), only_images(), max_drop=1.0, engines=(f"{__name__}:Slow",))
    assert result.report.choice.winner == result.report.trials[0].build
    assert result.report.trials[1].state == "ok"

    # What a run needed on disk goes with its result.
    assert len(list(tmp_path.glob("corewise-*"))) == 1  # torch keeps a folder of its own there
    del result
    assert list(tmp_path.glob("corewise-*")) == []


# --- interrupted runs ---------------------------------------------------------------------------------------------


def interrupted_after(number, work, samples, **options):
    """Run until ``number`` trials are done; the builds that were run."""
    done = []

    def tell(event):
        if isinstance(event, TrialEnded):
            done.append(event)
            if len(done) == number:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Tiny(), samples, work=work, on_event=tell, **options)
    return done


def test_an_interrupted_run_resumes_with_what_was_done(tmp_path):
    work, samples = tmp_path / "m.cw.work", only_images()
    first = interrupted_after(2, work, samples, max_drop=1.0)
    assert [event.resumed for event in first] == [False, False]

    again = interrupted_after(3, work, samples, max_drop=1.0)
    assert [event.resumed for event in again] == [True, True, False]
    assert [event.trial for event in again[:2]] == [event.trial for event in first]

    # A run that differs in what it asks for starts anew.
    changed = interrupted_after(1, work, samples, max_drop=0.5)
    assert [event.resumed for event in changed] == [False]


def test_a_metric_that_raises_at_last_keeps_the_trials(tmp_path):
    calls = Counter()

    def metric(outputs, labels):
        calls["n"] += 1
        if calls["n"] == calls["last"]:
            raise ZeroDivisionError("no more")
        return (outputs.argmax(1) == labels).astype(float)

    samples = only_images(labels=[0] * 40)
    calls["last"] = 5  # two for each trial, of which two are done
    with pytest.raises(
        MetricError, match=r"the metric 'metric' failed: ZeroDivisionError: no more .*test_optimize\.py"
    ):
        run(Tiny(), samples, work=tmp_path / "w", metric=metric, max_drop=1.0)
    again = interrupted_after(3, tmp_path / "w", samples, metric=metric, max_drop=1.0)
    assert [event.resumed for event in again] == [True, True, False]


# --- wrong arguments ----------------------------------------------------------------------------------------------


def no_trial(event):
    assert not isinstance(event, TrialStarted)


def test_wrong_arguments_are_told_before_any_work():
    for options, error, told in (
        ({"max_drop": -0.1}, InputError, "max_drop is -0.1; give 0 or more"),
        ({"max_drop": float("nan")}, InputError, "max_drop is nan"),
        ({"engines": ("torchscript",)}, EngineError, "no engine is named 'torchscript'; use one of eager"),
        ({"objective": "speed"}, InputError, "objective 'speed' is unknown; give throughput, latency, slo"),
        ({"metric": "f7"}, MetricError, "no metric is named 'f7'"),
        ({"objective": "slo"}, InputError, "the objective slo and slo_ms go together"),
        ({"slo_ms": 10.0}, InputError, "the objective slo and slo_ms go together"),
        ({"objective": "slo", "slo_ms": -1.0}, InputError, "the SLO is -1.0 ms; give milliseconds above 0"),
        ({"budget_s": 0.0}, InputError, "the budget is 0.0 s; give seconds above 0"),
        ({"memory_limit_bytes": 0}, InputError, "memory_limit_bytes is 0; give bytes above 0"),
        (
            {"ignored": ("nope",)},
            InputError,
            "ignored layer 'nope' matches no layer; use names as corewise",
        ),
        (
            {"engines": ("fake",)},
            EngineError,
            "engine fake cannot be tried: it has no build for this model",
        ),
        (
            {"engines": (ABSENT,)},
            EngineError,
            "Absent cannot be tried: needs absent: pip install absent",
        ),
        ({"calibration": 40}, InputError, "40 of 40 samples cannot be for calibration"),
        ({"work": Path("/proc/nowhere")}, OutputError, "/proc/nowhere cannot be written"),
    ):
        with pytest.raises(error, match=told):
            run(Tiny(), only_images(), on_event=no_trial, **options)


def test_an_engine_that_was_asked_for_and_cannot_be_tried_is_an_error():
    class Branches(Tiny):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) > 0 else -super().forward(x)

    with pytest.raises(
        EngineError, match=r"engine openvino cannot be tried: the model cannot be exported \(.*leave it"
    ):
        corewise.optimize(Branches(), only_images(), engines=("openvino",), on_event=no_trial)


def test_a_budget_too_short_for_one_candidate_says_where_the_time_went(monkeypatch):
    monkeypatch.setattr("corewise.search.deadlines.SHORTEST_TOLD_S", 0.0)
    monkeypatch.setattr("corewise.search.deadlines.OVERTIME_S", 0.0)
    with pytest.raises(InputError, match=r"spent before any build was finished: .* took \d+\.\d s") as told:
        run(Tiny(), only_images(), budget_s=0.1)
    for what in ("the baseline", "loading and exporting the model", "reading the samples"):
        assert what in str(told.value)


@pytest.fixture
def short_loads(monkeypatch):
    monkeypatch.setattr("corewise.search.slo.LOAD_S", 0.2)
    monkeypatch.setattr("corewise.search.slo.CONFIRM_S", 0.5)
    monkeypatch.setattr("corewise.search.slo.REQUESTS", 20)


def slo(slo_ms):
    result = run(Tiny(), only_images(), objective="slo", slo_ms=slo_ms)
    assert result.report.requirements.goal == Slo(p99_ms=slo_ms)
    return result.report


@pytest.mark.slow
@pytest.mark.usefixtures("short_loads")
def test_the_rate_that_is_promised_was_held():
    report = slo(200.0)
    certified = report.choice.certified
    if certified is None:  # a machine that is busy beside the test meets no rate
        assert any("nothing is certain to meet p99" in said(warning) for warning in report.choice.warnings)
        return
    assert certified.met
    assert certified == report.winner.loads[-1]
    assert report.choice.plan == certified.plan
    assert "with p99 <= 200 ms" in said(report.choice.reason)


@pytest.mark.slow
@pytest.mark.usefixtures("short_loads")
def test_an_slo_that_nothing_meets_is_told_with_how_close_the_best_came():
    report = slo(0.001)
    assert report.choice.certified is None
    assert "nothing is certain to meet p99 <= 0.001 ms: " in said(report.choice.warnings[0])
    assert all(
        trial.tuned.kind in (ReasonKind.NONE_WITHIN_SLO, ReasonKind.MUCH_SLOWER, ReasonKind.OTHERS_FASTER)
        for trial in report.trials
        if trial.tuned
    )


def test_another_model_in_the_same_folder_shares_nothing(tmp_path):
    images = list(np.random.default_rng(0).standard_normal((20, 3, 8, 8)).astype(np.float32))

    def stop(event):
        if isinstance(event, TrialEnded):
            raise KeyboardInterrupt

    work = tmp_path / "w"
    work.mkdir()
    (work / "journal.jsonl").touch()
    for value in (1.0, 2.0):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval()
        nn.init.constant_(net[0].bias, value)
        (work / "cache").mkdir(parents=True, exist_ok=True)
        (work / "cache" / "model.onnx").write_text("of another model")
        with pytest.raises(KeyboardInterrupt):
            corewise.optimize(net, images, engines=("onnxruntime",), work=work, on_event=stop)
        assert list((work / "cache").iterdir()) == []


def test_a_folder_with_files_of_others_is_no_place_to_work(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    (tmp_path / "cache").mkdir()
    with pytest.raises(OutputError, match=r"holds files that are not corewise's; name a new folder"):
        corewise.optimize(Digest(), SAMPLES, engines=("onnxruntime",), work=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex", "cache"}


def test_bad_input_leaves_no_folder(tmp_path):
    def broken(outputs, labels):
        raise ValueError("no score today")

    with pytest.raises(MetricError, match="no score today"):
        corewise.optimize(Digest(), SAMPLES, metric=broken, engines=("onnxruntime",), work=tmp_path / "w")
    assert not (tmp_path / "w").exists()
