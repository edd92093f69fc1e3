"""search: whether photos may be decoded at a smaller scale, judged by the gate itself."""

import io
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from math import log10
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builders import requirements, said
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file

from corewise.accuracy.gate import AccuracyGate
from corewise.accuracy.outputs import Outputs
from corewise.common.nested import flatten
from corewise.records.build import Build
from corewise.records.report import Preprocess
from corewise.samples import RawSamples, Samples
from corewise.samples.files import image_samples
from corewise.samples.images import ImageReader
from corewise.search.budget import Budget
from corewise.search.decoding import HARDLY_DB, _added_db, choose_decoding

SMALL = Preprocess(resize=36, crop=32)
Net = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def photos(count: int, size: tuple[int, int]) -> RawSamples:
    """JPEGs of noise on grounds of different brightness."""
    rng = np.random.default_rng(0)
    items = []
    for number in range(count):
        pixels = rng.normal(40 + 170 * (number % 2), 40, (size[1], size[0], 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
        items.append(buffer.getvalue())
    return RawSamples(kind="image", items=items)


def brightness(x: NDArray[np.float32]) -> NDArray[np.float32]:
    mean = x.mean((1, 2, 3))
    return np.stack((mean, -mean), 1)


def grain(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """What scaled decoding changes."""
    fine = np.diff(x, axis=3)[:, :, :8, :3].mean(1).reshape(len(x), -1)
    return 100 * np.asarray(fine)


def brightness_and_blur(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(brightness(x) + 2 * np.abs(np.diff(x, axis=3)).mean((1, 2, 3))[:, None])


class Client:
    """Runs a net in place of a trial process."""

    def __init__(self, net: Net) -> None:
        self._net = net

    def open(self, *arguments: Any) -> None: ...

    def run_samples(self, path: Path, batch: int, outputs: Path) -> None:
        rows, (inputs,) = next(Samples.load(path).batches(1000))
        save_file({"0.rows": rows, "0.0": self._net(inputs)}, outputs)


def decided(
    images: RawSamples, net: Net, tmp_path: Path, budget_s: float | None = None
) -> tuple[Preprocess | None, str]:
    """What is decided for a winner whose answers are fp32's."""
    holdout = image_samples(images, ImageReader(SMALL))
    _, (inputs,) = next(holdout.batches(1000))
    outputs = net(inputs)
    _, structure = flatten(outputs, "outputs")
    gate = AccuracyGate(None, holdout, structure, requirements(max_drop=0.01), seed=0)
    gate(Outputs((outputs,)))
    own = tmp_path / "own.safetensors"
    save_file({"0.rows": np.arange(len(outputs)), "0.0": outputs}, own)
    context: Any = SimpleNamespace(
        workspace=SimpleNamespace(folder=tmp_path, payload=lambda build: tmp_path, outputs=lambda build: own),
        budget=Budget(total_s=budget_s),
        cpu=SimpleNamespace(usable_cores=1),
        client=lambda build, share=1.0: nullcontext(Client(net)),
    )
    choice: Any = SimpleNamespace(winner=Build(engine="eager", precision="fp32"), throughput_per_s=2.0)
    decoding = choose_decoding(holdout, choice, gate, context)
    return decoding.preprocess, said(decoding.reason)


def test_it_is_taken_where_the_answers_hold(tmp_path: Path) -> None:
    preprocess, why = decided(photos(20, (320, 240)), brightness, tmp_path)
    # A quarter of 240 pixels, for 36, is the least sharp that was judged.
    assert preprocess == Preprocess(resize=36, crop=32, decode="scaled", sharpness=1.666)
    assert why.startswith("with 20 photos decoded at a smaller scale")
    assert why.endswith("the artifact decodes photos this way")


def test_a_larger_scale_is_taken_where_the_smallest_moves_the_answers(tmp_path: Path) -> None:
    images = photos(20, (320, 288))
    assert decided(images, brightness, tmp_path)[0] == replace(SMALL, decode="scaled", sharpness=1.0)
    preprocess, why = decided(images, brightness_and_blur, tmp_path)
    assert preprocess == replace(SMALL, decode="scaled", sharpness=2.0)  # agreement was 1 at the smallest scale too
    assert why.endswith("the artifact decodes photos this way")


@pytest.mark.parametrize("own_db", [200.0, 20.0, 10.0])
def test_what_decoding_adds_is_told_from_the_winners_own_errors(own_db: float) -> None:
    errors = 10 ** (-own_db / 10) + 10 ** (-28.0 / 10)
    assert _added_db(own_db, -10 * log10(errors)) == pytest.approx(28.0)
    assert _added_db(own_db, own_db) == _added_db(own_db, own_db + 1) == HARDLY_DB


def test_only_photos_that_are_decoded_otherwise_count(tmp_path: Path) -> None:
    large, small = photos(20, (320, 240)), photos(60, (80, 60))
    mixed = RawSamples(kind="image", items=[*large.items, *small.items])
    why = decided(large, brightness_and_blur, tmp_path)[1]
    assert why.startswith("with 20 photos")
    assert decided(mixed, brightness_and_blur, tmp_path)[1] == why


def test_it_is_not_taken_where_they_move(tmp_path: Path) -> None:
    preprocess, why = decided(photos(20, (320, 240)), grain, tmp_path)
    assert preprocess == SMALL
    assert why.endswith("the artifact decodes photos in full")


def test_it_is_not_tried_without_time_to_answer_all_photos(tmp_path: Path) -> None:
    images = photos(20, (320, 240))  # ten seconds of a winner that answers two a second
    preprocess, why = decided(images, brightness, tmp_path, budget_s=9.0)
    assert preprocess == SMALL
    assert why.startswith("the artifact decodes photos in full, because the budget had no time to judge")
    preprocess, _ = decided(images, brightness, tmp_path, budget_s=600.0)
    assert preprocess is not None
    assert preprocess.decode == "scaled"


@pytest.mark.parametrize(("count", "size"), [(20, (80, 60)), (12, (320, 240))])
def test_too_few_or_too_small_photos_prove_nothing(tmp_path: Path, count: int, size: tuple[int, int]) -> None:
    assert decided(photos(count, size), brightness, tmp_path) == (SMALL, "")
