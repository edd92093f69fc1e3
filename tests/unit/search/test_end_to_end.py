"""search: the plan from files to answers, chosen among measured ones."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builders import said, trial
from PIL import Image
from safetensors.numpy import save_file

from corewise.common.stats import MIN_ROUNDS
from corewise.engines.openvino import OpenVino
from corewise.records.build import Build, Plan
from corewise.records.goal import Requirements
from corewise.records.measurement import Measurement
from corewise.records.pipeline import PhotoPlan, PhotoRate
from corewise.records.report import Preprocess
from corewise.runtime.client import InProcess
from corewise.runtime.race import ROUNDS, Contender
from corewise.samples import read
from corewise.samples.raw import RawSamples
from corewise.search import end_to_end
from corewise.search.budget import WITH_PHOTOS, Budget, BudgetSplit
from corewise.search.end_to_end import Found, climb, photo_files, plan_photos, reason_of
from corewise.search.finals import _rounds

SMALL = Preprocess(resize=20, crop=16)


def machine(speed: Callable[[PhotoPlan], float]) -> tuple[Callable[[PhotoPlan], PhotoRate], list[PhotoPlan]]:
    """What measures plans by a formula, and the plans that it was asked for."""
    asked: list[PhotoPlan] = []

    def measure(photos: PhotoPlan) -> PhotoRate:
        asked.append(photos)
        return PhotoRate(plan=photos, per_s=speed(photos), decoding=0.7)

    return measure, asked


@pytest.mark.parametrize("cores", [1, 2, 4, 16])
def test_few_plans_are_measured_and_none_twice(cores: int) -> None:
    measure, asked = machine(lambda photos: 100.0)
    own = Plan(threads_per_instance=cores, batch=16)
    found = climb(own, cores, measure)
    assert found is not None
    assert found.best is found.own
    assert asked[0] == PhotoPlan(plan=own, decoders=cores)
    assert len(set(asked)) == len(asked) <= 7
    for photos in asked:
        assert 1 <= photos.plan.threads_per_instance * photos.plan.instances <= cores
        assert photos.decoders >= 1


def test_the_race_leaves_time_for_files_of_photos() -> None:
    plan = Plan(threads_per_instance=1, batch=1)
    measured = Measurement(
        plan=plan, latencies_ms=(500.0,), throughput_per_s=2.0, p50_ms=500.0, p99_ms=500.0, spread=0.0
    )
    build = Build(engine="eager", precision="fp32")
    contenders = [Contender(build=build, plan=plan, payload=Path("payload"))]
    rounds = {}
    for split in (BudgetSplit(), WITH_PHOTOS):
        budget = Budget(total_s=100.0, clock=lambda: 79.5, started_s=0.0)
        context: Any = SimpleNamespace(budget=budget, split=split, kinds=1)
        rounds[split.race] = _rounds(context, contenders, [trial(build, measurements=(measured,))])
    assert rounds == {1.0: ROUNDS, 0.85: MIN_ROUNDS}


def test_each_step_starts_from_the_best_so_far() -> None:
    # Decoding rules: an engine on one of four cores, and as many decoders as cores.
    measure, _ = machine(
        lambda photos: 10.0 * min(photos.decoders, 4) - 5 * photos.plan.threads_per_instance - photos.plan.batch / 8
    )
    found = climb(Plan(threads_per_instance=4, batch=16), 4, measure)
    assert found is not None
    assert found.best.plan == PhotoPlan(plan=Plan(threads_per_instance=1, instances=4, batch=8), decoders=4)


def test_a_little_faster_is_noise_and_a_plan_that_fails_is_left_out() -> None:
    own = Plan(threads_per_instance=2, batch=8)
    measure, _ = machine(lambda photos: 100.0 if photos.plan == own else 102.0)
    found = climb(own, 2, measure)
    assert found is not None
    assert found.best.plan.plan == own
    fails, _ = machine(lambda photos: 150.0)
    found = climb(own, 2, lambda photos: None if photos.plan != own else fails(photos))
    assert found is not None
    assert found.best.plan.plan == own
    assert climb(own, 2, lambda photos: None) is None


def test_other_batches_only_where_the_engine_takes_them() -> None:
    measure, asked = machine(lambda photos: 100.0)
    climb(Plan(threads_per_instance=2, batch=4), 2, measure, batches=False)
    assert {photos.plan.batch for photos in asked} == {4}


def test_the_report_says_what_share_decoding_has() -> None:
    plan = PhotoPlan(plan=Plan(threads_per_instance=1, instances=2, batch=8), decoders=1)
    own, best = (PhotoRate(plan=plan, per_s=per_s, decoding=0.71) for per_s in (100.0, 120.0))
    words = said(reason_of(Found(own, best)))
    assert "120 photos/s" in words
    assert "1 thread decodes beside 1 thread x 2, batch 8, 1.20 times as many" in words
    assert words.endswith("decoding takes 71 % of the processor time")
    assert "times as many" not in said(reason_of(Found(own, own)))


def test_a_folder_of_photos_is_measured_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino as ov
    from openvino import opset13 as ops

    monkeypatch.setattr(end_to_end, "MEASURE_S", 0.01)
    folder, payload = tmp_path / "photos", tmp_path / "payload"
    folder.mkdir()
    payload.mkdir()
    for number in range(9):
        Image.fromarray(np.full((24, 32, 3), 20 * number, np.uint8)).save(folder / f"{number}.jpg")
    x = ops.parameter([-1, 3, 16, 16], np.float32, name="x")
    ov.save_model(ov.Model([ops.reduce_mean(x, np.array([2, 3]))], [x]), str(payload / "model.xml"))
    outputs = tmp_path / "outputs.safetensors"
    save_file({"0.rows": np.arange(9), "0.0": np.zeros((9, 3), np.float32)}, outputs)
    context: Any = SimpleNamespace(
        workspace=SimpleNamespace(payload=lambda build: payload, outputs=lambda build: outputs),
        budget=Budget(),
        cpu=SimpleNamespace(usable_cores=1),
        requirements=Requirements(),
        client=lambda build, share=1.0: nullcontext(InProcess(OpenVino())),
        on_event=lambda event: None,
    )
    choice: Any = SimpleNamespace(
        winner=Build(engine="openvino", precision="fp32"), plan=Plan(threads_per_instance=1, batch=4)
    )
    samples = read(str(folder), SMALL)
    task: Any = SimpleNamespace(holdout=samples, class_names=None, exported=SimpleNamespace(outputs=()))
    found = plan_photos(task, SMALL, choice, context)
    assert found is not None
    assert found.own.plan == PhotoPlan(plan=choice.plan, decoders=1)
    assert found.best.per_s >= found.own.per_s > 0
    assert 0 < found.own.decoding <= 1
    assert len(photo_files(samples)) == 9
    context.requirements = Requirements(memory_limit_bytes=1)
    assert plan_photos(task, SMALL, choice, context) is None
    context.requirements = Requirements()
    context.budget = Budget(total_s=5.0)
    assert plan_photos(task, SMALL, choice, context) is None


def test_samples_that_are_no_files_have_no_such_plan(tmp_path: Path) -> None:
    from corewise.samples.files import image_samples
    from corewise.samples.images import ImageReader

    pictures = RawSamples(kind="image", items=[np.zeros((20, 20, 3), np.uint8)] * 9)
    assert photo_files(image_samples(pictures, ImageReader(SMALL))) == ()
