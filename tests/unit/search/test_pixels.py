"""search: whether the engine takes the pixels of photos, judged on OpenVINO itself."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builders import said
from numpy.typing import NDArray

from corewise.engines.eager import Eager
from corewise.engines.openvino import OpenVino
from corewise.records.build import Build, Plan
from corewise.records.goal import Requirements
from corewise.records.reason import ReasonKind
from corewise.records.report import Preprocess
from corewise.runtime.client import InProcess
from corewise.samples import Samples, from_python
from corewise.samples.images import normalize_pixels, restore_pixels
from corewise.search import pixels
from corewise.search.budget import Budget
from corewise.search.pixels import judge_pixels

SMALL = Preprocess(resize=20, crop=16)
BUILD, PLAN = Build(engine="openvino", precision="fp32"), Plan(threads_per_instance=1, batch=4)


def write_payload(folder: Path) -> None:
    """A convolution of an image of 16 x 16, padded, so that a mean left in would show at the borders."""
    import openvino as ov
    from openvino import opset13 as ops

    x = ops.parameter([-1, 3, 16, 16], np.float32, name="x")
    weights = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    y = ops.convolution(x, ops.constant(weights), [1, 1], [1, 1], [1, 1], [1, 1])
    y = ops.reduce_mean(ops.relu(y), np.array([2, 3]), keep_dims=False)
    ov.save_model(ov.Model([y], [x]), str(folder / "model.xml"), compress_to_fp16=False)


def photos(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (count, 16, 16, 3), np.uint8)


def holdout(preprocess: Preprocess = SMALL) -> Samples:
    rows = normalize_pixels(photos(6), SMALL)
    return replace(from_python(list(rows)), preprocess=preprocess)


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    folder = tmp_path / "payload"
    folder.mkdir()
    write_payload(folder)
    return folder


def judged(
    samples: Samples, payload: Path, engine: Any, budget_s: float | None = None, memory_limit_bytes: int | None = None
) -> Any:
    context: Any = SimpleNamespace(
        requirements=Requirements(memory_limit_bytes=memory_limit_bytes),
        workspace=SimpleNamespace(folder=payload.parent, payload=lambda build: payload),
        budget=Budget(total_s=budget_s),
        cpu=SimpleNamespace(usable_cores=1),
        client=lambda build, share=1.0: nullcontext(InProcess(engine)),
    )
    choice: Any = SimpleNamespace(winner=BUILD, plan=PLAN, throughput_per_s=1000.0)
    return judge_pixels(samples, choice, context, engine)


def test_pixels_are_restored_exactly_or_not_at_all() -> None:
    shown = photos(2)
    planes = normalize_pixels(shown, SMALL)
    restored = restore_pixels(planes, SMALL)
    assert restored is not None
    assert restored.dtype == np.uint8
    assert np.array_equal(restored, shown)
    planes[0, 0, 0, 0] += 0.001
    assert restore_pixels(planes, SMALL) is None
    assert restore_pixels(np.full_like(planes, np.nan), SMALL) is None
    assert restore_pixels(planes[:, :1], SMALL) is None


@pytest.mark.parametrize("batch", [1, 4])
def test_openvino_answers_pixels_as_it_answers_floats(payload: Path, batch: int) -> None:
    plan, shown = Plan(threads_per_instance=1, batch=batch), photos(5)
    floats = normalize_pixels(shown, SMALL)
    before = OpenVino().open(payload, BUILD, plan)
    (expected,) = before.run([floats])
    before.close()
    levels = pixels.scale_of(SMALL)
    OpenVino().take_pixels(payload, levels)
    session = OpenVino().open(payload, BUILD, plan)
    (of_pixels,), (of_floats,) = session.run([shown]), session.run([floats])
    session.close()
    assert np.array_equal(of_floats, expected)
    np.testing.assert_allclose(of_pixels, expected, rtol=1e-4, atol=1e-4)


def test_the_payload_takes_pixels_where_they_are_faster(payload: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "ROUND_S", 0.001)
    for rates, kind in (((100.0, 200.0), ReasonKind.TAKES_PIXELS), ((200.0, 100.0), ReasonKind.TAKES_FLOATS)):
        monkeypatch.setattr(pixels, "_rates", lambda *arguments, rates=rates: rates)
        monkeypatch.setattr(pixels, "_normalizing_s", lambda *arguments: 0.0)
        reason = judged(holdout(), payload, OpenVino())
        assert reason.kind == kind
        assert reason.details["decibels"] > 80
        assert "times as many" in said(reason)
        assert (payload / "pixels.json").exists() == (kind == ReasonKind.TAKES_PIXELS)
    assert sorted(path.name for path in payload.iterdir()) == ["model.bin", "model.xml"]
    monkeypatch.setattr(pixels, "_rates", lambda *arguments: (100.0, 200.0))
    assert judged(holdout(), payload, OpenVino(), memory_limit_bytes=1).kind == ReasonKind.TAKES_FLOATS


def test_both_ways_are_timed_in_turns(payload: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "ROUND_S", 0.001)
    reason = judged(holdout(), payload, OpenVino())
    assert reason.kind in (ReasonKind.TAKES_PIXELS, ReasonKind.TAKES_FLOATS)
    assert reason.details["ratio"] > 0
    assert reason.details["normalize_ms"] > 0


def test_answers_that_move_keep_the_floats(payload: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(OpenVino):
        def take_pixels(self, folder: Path, scale: Any) -> Path:
            path = super().take_pixels(folder, scale)
            path.write_text(json.dumps({**json.loads(path.read_text()), "mean": [0.0, 0.0, 0.0]}))
            return path

    reason = judged(holdout(), payload, Wrong())
    assert reason.kind == ReasonKind.TAKES_FLOATS
    assert reason.details["decibels"] < 50
    assert said(reason).endswith("photos are normalized before they reach the engine")
    assert not (payload / "pixels.json").exists()


def test_there_is_no_choice_for_other_samples_and_engines_and_without_time(payload: Path) -> None:
    assert judged(holdout(), payload, Eager()) is None
    assert judged(holdout(Preprocess(function="mine:prepare")), payload, OpenVino()) is None
    assert judged(holdout(Preprocess(std=(1.0, 1.0, 1.0))), payload, OpenVino()) is None
    assert judged(holdout(), payload, OpenVino(), budget_s=1.0) is None
    assert not (payload / "pixels.json").exists()
