"""The examples: their models are the published ones, and their samples and metrics fit them."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from places import EXAMPLES

from corewise.common.references import find_reference
from corewise.records.report import Preprocess
from corewise.samples import Samples, read, split
from corewise.source import export

IMAGENET = Preprocess()
CAFFE = Preprocess(mean=(0.48501961, 0.45795686, 0.40760392), std=(0.00392157, 0.00392157, 0.00392157))
"""What ResNet-50's weights expect (see its docstring)."""


def example(name: str, function: str = "build") -> Any:
    return find_reference(f"{EXAMPLES / name}.py:{function}", ImportError, "example")


def module(name: str) -> ModuleType:
    return sys.modules[example(name).__module__]


def top1(build: Any, samples: Samples) -> float:
    import torch

    model = build()
    right = 0
    with torch.inference_mode():
        for rows, (inputs,) in samples.batches(20):
            right += int((model(torch.from_numpy(inputs)).argmax(1).numpy() == samples.labels[rows]).sum())
    return right / len(samples)


@pytest.mark.parametrize(
    ("name", "preprocess", "expected"),
    [("resnet50", CAFFE, 0.92), ("mobilenet_v2", IMAGENET, 0.857)],
)
def test_imagenet_models_know_the_photos(
    data_folder: Path, tmp_path: Path, name: str, preprocess: Preprocess, expected: float
) -> None:
    (tmp_path / "images").symlink_to(data_folder / "imagenet-photos" / "images")
    header, *lines = (data_folder / "imagenet-photos" / "labels.csv").read_text().splitlines()
    (tmp_path / "labels.csv").write_text("\n".join([header, *lines[200:240]]))
    assert top1(example(name), read(str(tmp_path), preprocess)) == pytest.approx(expected, abs=0.1)


def test_resnet20_reaches_its_published_accuracy(data_folder: Path) -> None:
    images = read(str(data_folder / "cifar10.npz"), Preprocess(resize=32, crop=32))
    assert len(images) == 3000
    assert top1(example("resnet20"), images.take(range(300))) > 0.9


def test_digits_are_trained_once_and_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    digits = module("digits")
    monkeypatch.setattr(digits, "WEIGHTS", tmp_path / "weights.safetensors")
    monkeypatch.setattr(digits, "EPOCHS", 1)
    monkeypatch.setattr(digits, "CHANNELS", ((1, 4, 2), (4, 8, 2)))
    before = torch.random.get_rng_state()
    trained = digits.build()
    assert torch.equal(before, torch.random.get_rng_state())
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]
    monkeypatch.delattr(digits, "train")
    again = digits.build()
    assert not again.training
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in trained.state_dict().items())


@pytest.mark.slow
def test_digits_are_known() -> None:
    assert top1(example("digits"), example("digits", "samples")()) > 0.98


def test_digits_that_are_trained_on_are_no_samples() -> None:
    train, test, train_labels, test_labels = example("digits", "digits")()
    assert (train.shape, test.shape) == ((1000, 1, 32, 32), (797, 1, 32, 32))
    assert (len(train_labels), len(test_labels)) == (1000, 797)
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}


@pytest.mark.parametrize("function", ["samples", "samples_ragged"])
def test_minilm_samples_are_pairs(data_folder: Path, function: str) -> None:
    sentences = example("minilm", function)()
    assert len(sentences) == 3000
    assert (len({row[0].shape for row in sentences.rows}) == 1) == (function == "samples")
    calibration, holdout = split(sentences, calibration=200, seed=0)
    for part in (calibration, holdout):
        assert (part.groups[::2] == part.groups[1::2]).all()
        assert (part.labels[::2] == part.labels[1::2]).all()
        assert len(set(part.groups[::2])) == len(part) // 2


def test_minilm_is_exported_and_knows_which_sentences_are_alike(data_folder: Path) -> None:
    import torch

    sentences = example("minilm", "samples_ragged")().take(range(160))
    exported = export(example("minilm")(), sentences)
    assert exported.program is not None, exported.why_not
    assert [spec.shape for spec in exported.inputs] == [(None, None), (None, None)]
    assert [spec.shape for spec in exported.outputs] == [(None, 384)]
    embeddings = np.empty((160, 384), np.float32)
    run = exported.program.module()
    for rows, inputs in sentences.batches(32):
        embeddings[rows] = run(*map(torch.from_numpy, inputs))[0].detach().numpy()
    assert np.linalg.norm(embeddings, axis=1) == pytest.approx(1, abs=1e-5)
    assert example("minilm", "spearman")(embeddings, sentences.labels) > 0.75


def test_minilm_padding_changes_nothing(data_folder: Path) -> None:
    import torch

    model = example("minilm")()
    padded, ragged = (example("minilm", name)().rows[7] for name in ("samples", "samples_ragged"))
    with torch.inference_mode():
        one, other = (model(*(torch.from_numpy(array[None]) for array in row)).numpy() for row in (padded, ragged))
    assert one == pytest.approx(other, abs=1e-5)


def test_spearman_ranks_as_scipy_does_with_ties() -> None:
    from scipy.stats import spearmanr

    random = np.random.default_rng(0)
    outputs = random.normal(size=(60, 2)).round()
    outputs[(outputs == 0).all(1)] = 1
    labels = np.repeat(random.integers(0, 4, 30), 2).astype(float)
    left, right = outputs[::2], outputs[1::2]
    cosines = (left * right).sum(1) / (np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1))
    expected = spearmanr(cosines, labels[::2]).statistic
    assert example("minilm", "spearman")(outputs, labels) == pytest.approx(expected, abs=1e-12)


def test_spearman_of_equal_scores_is_undefined() -> None:
    outputs = np.random.default_rng(0).normal(size=(8, 3))
    assert np.isnan(example("minilm", "spearman")(outputs, np.ones(8)))
