"""Photos in, answers out: one artifact for large JPEGs, and what it says about files, in Python and served."""

import base64
import errno
import hashlib
import io
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import said
from command_line import command
from PIL import Image, ImageFilter
from pyarrow import parquet
from serving_tools import ARTIFACT, Server, serving
from torch import nn

import corewise
from corewise import artifact as corewise_artifact
from corewise._version import __version__
from corewise.cluster import messages
from corewise.cluster.actor import Answerer
from corewise.common import stats
from corewise.common.errors import SamplesError
from corewise.common.nested import flatten
from corewise.engines import engine
from corewise.engines.openvino import OpenVino
from corewise.machine.inspect import inspect_cpu
from corewise.pipeline import ClassAnswer, ImageAsk
from corewise.pipeline.job import Job, folder_of, run_job
from corewise.records.build import Build, Plan, TensorSpec
from corewise.records.measurement import Measurement
from corewise.records.pipeline import PhotoPlan
from corewise.records.reason import ReasonKind
from corewise.records.report import Preprocess
from corewise.runtime import race
from corewise.runtime.client import InProcess
from corewise.samples import read
from corewise.samples.folders import list_images
from corewise.samples.image_files import sharpness_left
from corewise.samples.images import ImageReader, normalize_pixels
from corewise.samples.texts import Columns
from corewise.search import elastic, end_to_end, finals, search, trial, tuning
from corewise.search.pixels import scale_of
from corewise.search.trial import SearchContext

SMALL = Preprocess(resize=36, crop=32)
NAMES = ("dark", "red", "bright")


class Shades(nn.Module):
    """Knows how bright and how red a photo is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        red, green, blue = x.mean((2, 3)).unbind(1)
        light = red + green + blue
        return torch.stack((-light, 3 * red - 2 * (green + blue), light), 1)


def write_photos(folder: Path, count: int) -> None:
    """JPEGs of 400 x 300 in three shades, with soft structure."""
    rng = np.random.default_rng(0)
    shades = ((40, 40, 50), (200, 30, 30), (230, 230, 220))
    for number in range(count):
        coarse = rng.normal(0, 25, (12, 16, 3)) + shades[number % 3]
        image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((400, 300), Image.Resampling.BICUBIC)
        image.filter(ImageFilter.GaussianBlur(1)).save(folder / f"{number:02}.jpg", quality=90)
    lines = [f"{number:02}.jpg,{number % 3}" for number in range(count)]
    (folder / "labels.csv").write_text("\n".join(["file,label", *lines]))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 36)
    return folder


def write_artifact(folder: Path, preprocess: Preprocess, photos: PhotoPlan | None = None) -> Path:
    """An artifact of ``Shades`` for OpenVINO, as if it had been made from such photos."""
    import openvino as ov
    from openvino import opset13 as ops

    x = ops.parameter([-1, 3, 32, 32], np.float32, name="x")
    shades = ops.constant(np.float32([[-1, 3, 1], [-1, -2, 1], [-1, -2, 1]]))
    scores = ops.matmul(ops.reduce_mean(x, np.array([2, 3]), keep_dims=False), shades, False, False)
    model = ov.Model([scores], [x])
    payload = folder.with_name("payload")
    payload.mkdir()
    ov.save_model(model, str(payload / "model.xml"), compress_to_fp16=False)
    build, plan = Build(engine="openvino", precision="fp32"), Plan(threads_per_instance=1, instances=2, batch=4)
    inputs = [normalize_pixels(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8), preprocess)]
    if preprocess.dtype == "uint8":
        OpenVino().take_pixels(payload, scale_of(preprocess))
    with closing(OpenVino().open(payload, build, plan)) as session:
        golden = (inputs, session.run(inputs))
    found = corewise_artifact.read(ARTIFACT)
    measured = (Measurement(plan=plan, latencies_ms=(1.0,), throughput_per_s=4e3, p50_ms=1.0, p99_ms=1.2, spread=0.0),)
    trials = tuple(
        replace(trial, build=build, measurements=measured) if trial.build == found.report.choice.winner else trial
        for trial in found.report.trials
    )
    corewise_artifact.write(
        folder,
        manifest=lambda files: replace(
            found.manifest,
            build=build,
            plan=plan,
            needs=(),
            files=files,
            labels=NAMES,
            preprocess=preprocess,
            photos=photos,
            inputs=(TensorSpec(name="x", dtype="float32", shape=(None, 3, 32, 32)),),
            outputs=(TensorSpec(name="scores", dtype="float32", shape=(None, 3)),),
            input_structure=flatten(((inputs[0],), {}), "x")[1].to_data(),
            output_structure=flatten(inputs[0], "x")[1].to_data(),
            input_ranges=None,
        ),
        payload=payload,
        reference=None,
        golden=golden,
        report=replace(
            found.report, cpu=inspect_cpu(), trials=trials, choice=replace(found.report.choice, winner=build, plan=plan)
        ),
        report_text="",
        report_page="",
    )
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    how = replace(SMALL, decode="scaled", dtype="uint8")
    return write_artifact(tmp_path_factory.mktemp("artifact") / "shades.cw", how)


@pytest.fixture(scope="module")
def fast(artifact: Path) -> Iterator[corewise.Model]:
    with corewise.load(artifact) as model:
        yield model


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[Server]:
    with serving(artifact) as running:
        yield running


def test_the_search_takes_scaled_decoding_where_the_answers_hold(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "MEASURE_S", 0.05)
    monkeypatch.setattr(race, "WARM_S", 0.05)
    monkeypatch.setitem(race.run_race.__kwdefaults__, "round_s", 0.05)
    monkeypatch.setattr(finals, "ROUNDS", stats.MIN_ROUNDS)
    monkeypatch.setattr(search, "find_contradiction", lambda *of: None)  # moments often contradict each other
    for name, value in {"REQUESTS": 100, "ROUNDS": 1, "DUEL_S": 0.05, "SHORTEST_DUEL_S": 0.05}.items():
        monkeypatch.setattr(elastic, name, value)
    for module in (tuning, search):
        monkeypatch.setattr(module, "BATCHES", (1, 8))
    monkeypatch.setattr(end_to_end, "MEASURE_S", 0.05)
    monkeypatch.setattr(SearchContext, "client", lambda context, build, share=1.0: InProcess(engine(build.engine)))
    result = corewise.optimize(
        Shades().eval(), lambda: read(str(photos), SMALL), engines=["eager"], calibration=12, class_names=NAMES
    )
    (reason,) = [note for note in result.report.notes if note.kind == ReasonKind.SCALED_DECODING]
    assert reason.details["photos"] == 24
    assert abs(float(str(reason.details["drop"]))) < 0.01
    assert result.model.predict(photos / "04.jpg").label == "red"
    saved = result.save(tmp_path / "shades.cw")
    assert saved.manifest.photos is not None
    with pytest.raises(SamplesError, match="the list of class names has 2 class names, but the model has 3 classes"):
        result.save(tmp_path / "two.cw", labels=NAMES[:2])
    assert not (tmp_path / "two.cw").exists()
    assert "decoding takes" in said(next(note for note in saved.report.notes if note.kind == ReasonKind.FROM_FILES))
    with corewise.load(saved.folder, photos=True) as model:
        assert model.predict(photos / "04.jpg").label == "red"
    coarse = replace(SMALL, decode="scaled", sharpness=1.041)  # an eighth of 400 pixels, for 48
    assert saved.manifest.preprocess == saved.report.samples.preprocess == coarse


def test_predict_answers_paths_bytes_pictures_and_arrays(fast: corewise.Model, photos: Path) -> None:
    paths = sorted(photos.glob("*.jpg"))[:7]
    answers = fast.predict(paths)
    assert [answer.label for answer in answers] == [NAMES[number % 3] for number in range(7)]
    for answer in answers:
        assert isinstance(answer, ClassAnswer)
        assert next(iter(answer.probabilities)) == answer.label
        assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert fast.predict([str(path) for path in paths]) == answers
    assert fast.predict([path.read_bytes() for path in paths]) == answers
    assert fast.predict(paths[1]) == answers[1]
    assert fast.predict(photos)[:7] == answers
    pictures = [Image.open(path) for path in paths]
    arrays = [np.asarray(picture) for picture in pictures]
    for form in (pictures, arrays):  # decoded already, so in full
        for answer, expected in zip(fast.predict(form), answers, strict=True):
            assert answer.label == expected.label
            assert answer.probability == pytest.approx(expected.probability, abs=0.02)
    assert list(fast.predict(paths[0], top=2).probabilities) == list(answers[0].probabilities)[:2]


def test_predict_reads_an_iterator_as_its_answers_are_taken(fast: corewise.Model, photos: Path) -> None:
    path = next(photos.glob("*.jpg"))
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            yield path

    answers = fast.predict(endless())
    assert next(answers) == next(answers)
    assert taken < 200
    answers.close()


def test_an_image_that_cannot_be_read_is_named_or_set_aside(fast: corewise.Model, photos: Path) -> None:
    good = next(photos.glob("*.jpg"))
    items = [good, b"", good, good.read_bytes()[:900], 3, Path("nowhere.jpg"), good]
    with pytest.raises(corewise.InputError, match=r"image 1 is empty; replace or remove it"):
        fast.predict(items)
    assert fast.images is not None
    pixels = np.asarray(Image.open(good))
    assert (
        fast.predict(bytearray(good.read_bytes())) == fast.predict(memoryview(good.read_bytes())) == fast.predict(good)
    )
    for odd, reason in (
        (pixels.astype(np.float32), r"is a float32 array \(300, 400, 3\), not a path"),
        (pixels[:, :, 0], r"is a uint8 array \(300, 400\), not a path"),
        (pixels[:0], "has no pixels"),
        (Image.open(io.BytesIO(good.read_bytes()[:900])), "is cut off"),
        (io.BytesIO(good.read_bytes()), "is a BytesIO, not a path"),
        (None, "is a NoneType, not a path"),
    ):
        with pytest.raises(corewise.InputError, match=f"image 0 {reason}"):
            fast.predict(odd)
    with pytest.raises(corewise.InputError, match="top is 0; give a whole number, 1 or more"):
        fast.predict(good, top=0)
    with pytest.raises(corewise.InputError, match="a score threshold applies to boxes, and the model gives none"):
        fast.predict(good, score_threshold=0.5)
    answers = list(fast.images.answers(items))
    assert [getattr(answer, "reason", "")[:16] for answer in answers] == [
        "", "is empty", "", "is cut off", "is an int, not a", "cannot be opened", ""
    ]  # fmt: skip
    assert answers[0] == answers[2] == answers[6]


def test_only_large_jpegs_gain_by_scale_and_never_below_the_sharpness_asked_for(photos: Path, tmp_path: Path) -> None:
    scaled = Preprocess(resize=36, crop=32, decode="scaled")
    jpeg = next(photos.glob("*.jpg"))  # 400 x 300
    assert sharpness_left(jpeg, scaled) == pytest.approx(75 / 36)
    for sharpness, left in ((1.0, 37.5 / 36), (1.041, 37.5 / 36), (1.06, 75 / 36), (2.1, 150 / 36), (5.0, None)):
        assert sharpness_left(jpeg, replace(scaled, sharpness=sharpness)) == (left and pytest.approx(left))
    assert sharpness_left(jpeg, Preprocess(resize=160, crop=160, decode="scaled")) is None
    assert sharpness_left(jpeg, SMALL) is None
    Image.open(jpeg).save(tmp_path / "photo.png")
    assert sharpness_left(tmp_path / "photo.png", scaled) is None
    full, small = (ImageReader(how)(jpeg) for how in (SMALL, scaled))
    assert 0 < np.abs(full - small).max() < 0.1


def test_a_node_of_a_cluster_runs_photos_under_their_own_plan(tmp_path: Path) -> None:
    photos = PhotoPlan(plan=Plan(threads_per_instance=1, instances=1, batch=8), decoders=1)
    folder = write_artifact(tmp_path / "shades.cw", SMALL, photos)
    about = folder_of(tmp_path, several=True).about
    about.write_text("{}")
    task = messages.Task(
        version=__version__,
        artifact=folder,
        identity=corewise_artifact.identity(folder),
        output=str(tmp_path),
        job=hashlib.sha256(b"{}").hexdigest(),
        several=True,
        prompt=None,
        ask=ImageAsk(),
        preprocess=None,
        seen=(),
    )
    for given, plan in ((task, photos.plan), (replace(task, ask=None), corewise_artifact.read(folder).manifest.plan)):
        prepared = messages.answer(
            messages.Prepared,
            Answerer(messages.packed(given), keep_cores=lambda cores: inspect_cpu()).prepare(1),
            "here",
        )
        assert (prepared.plan, prepared.source) == (plan, "made here")


def test_a_folder_and_patterns_become_a_file_of_labels(
    artifact: Path, fast: corewise.Model, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "odd" / "loop.jpg").symlink_to("loop.jpg")
    Image.new("RGB", (64, 48), "red").save(tmp_path / "odd" / "two.mpo", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    places = ("broken.jpg", "odd", "photos/0*.jpg")
    ran = subprocess.run(
        command("predict", str(artifact), *places, "-o", "out.parquet", "--top", "2", quick=False),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    assert "3 set aside in out.failed.jsonl" in ran.stdout
    assert "Warning" not in ran.stderr  # Pillow's, about the damaged EXIF data of one photo
    job = Job(
        inputs=tuple(list_images([photos])),
        output=tmp_path / "all.jsonl",
        columns=Columns(),
        prompt=None,
        artifact="",
        ask=ImageAsk(top=2),
    )
    assert fast.images is not None
    assert run_job(job, fast.images) == (36, 0, 0, 0)
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [NAMES[number % 3] for number in range(36)]
    assert [Path(line["input"]).name for line in lines] == [f"{number:02}.jpg" for number in range(36)]
    first = lines[0]
    assert next(one["label"] for one in first["top"]) == first["label"] == "dark"
    assert len(first["top"]) == 2
    table = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["row"] for row in table] == [*range(3, 14)]
    assert table[0]["label"] == "red"
    assert [one["label"] for one in table[1]["top"]] == [one["label"] for one in first["top"]]
    assert table[1]["probability"] == pytest.approx(first["probability"], rel=1e-5)
    failed = [json.loads(line) for line in (tmp_path / "out.failed.jsonl").read_text().splitlines()]
    assert failed == [
        {"row": 0, "input": "broken.jpg", "where": "", "reason": "is not an image that Pillow opens"},
        {"row": 1, "input": "odd/gone.jpg", "where": "", "reason": "cannot be opened: No such file or directory"},
        {"row": 2, "input": "odd/loop.jpg", "where": "", "reason": f"cannot be opened: {os.strerror(errno.ELOOP)}"},
    ]


def expected(model: corewise.Model, path: Path) -> list[dict[str, Any]]:
    """What the server says about a photo, by what ``predict`` says."""
    answer = model.predict(path)
    return [
        {"class": NAMES.index(label), "label": label, "probability": pytest.approx(probability, abs=1e-4)}
        for label, probability in answer.probabilities.items()
    ]


def test_the_server_answers_a_photo_in_every_form_as_predict_does(
    server: Server, fast: corewise.Model, photos: Path
) -> None:
    path = sorted(photos.glob("*.jpg"))[4]
    content = path.read_bytes()
    text = base64.b64encode(content).decode()
    url = "/v2/models/shades/classify"
    forms = [
        server.post(url, content=content),
        server.post(url, files={"image": ("photo.jpg", content, "image/jpeg")}, data={"note": "a part without a file"}),
        server.post(url, json={"image": text}),
        server.post(url, json={"image": f"data:image/jpeg;base64,{text}"}),
    ]
    for answer in forms:
        assert answer.status_code == 200, answer.text
        found = answer.json()["classes"]
        assert all(one.pop("score") is not None for one in found)
        assert found == expected(fast, path)
    two = {"a": ("a.jpg", content), "b": ("b.jpg", content)}
    for answer, status in (
        (server.post(url, files=two), 400),
        (server.post(url, content=b"--x", headers={"content-type": "multipart/form-data; boundary=x"}), 400),
        (server.post(url, content=content, headers={"content-type": "multipart/form-data"}), 400),
        (server.post(url, json={"image": "no base64!"}), 400),
        (server.post(url, json={"picture": text}), 400),
        (server.post(url, json={"image": ""}), 415),
    ):
        assert answer.status_code == status, answer.text


def test_images_go_through_the_open_inference_protocol_as_bytes(
    server: Server, fast: corewise.Model, photos: Path
) -> None:
    import tritonclient.grpc as grpc_client
    import tritonclient.http as http_client

    paths = sorted(photos.glob("*.jpg"))[:3]
    contents = np.array([path.read_bytes() for path in paths], object)
    scores = []
    for client, module in (
        (http_client.InferenceServerClient(server.url.removeprefix("http://")), http_client),
        (grpc_client.InferenceServerClient(server.grpc), grpc_client),
    ):
        tensor = module.InferInput("image", [3], "BYTES")
        tensor.set_data_from_numpy(contents)
        scores.append(client.infer("shades", [tensor]).as_numpy("scores"))
        client.close()
    coded = [base64.b64encode(content).decode() for content in contents]
    body = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [3], "data": coded}]}
    scores.append(np.reshape(server.post("/v2/models/shades/infer", json=body).json()["outputs"][0]["data"], (3, 3)))
    for found in scores:
        np.testing.assert_allclose(found, scores[0], rtol=1e-5)
        assert [NAMES[k] for k in found.argmax(1)] == [answer.label for answer in fast.predict(paths)]
    body["inputs"][0]["data"] = [coded[0], "bm8gaW1hZ2U=", coded[2]]
    assert server.post("/v2/models/shades/infer", json=body).status_code == 415
    many = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [65], "data": ["x"] * 65}]}
    assert server.post("/v2/models/shades/infer", json=many).status_code == 413
    zeros = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3, 32, 32], "data": [0.0] * 3072}]}
    assert server.post("/v2/models/shades/infer", json=zeros).status_code == 200


def prepare(image: Image.Image) -> Any:
    return ImageReader(SMALL)(image)


def test_images_of_a_users_function_need_that_function(tmp_path: Path, photos: Path) -> None:
    folder = write_artifact(tmp_path / "own.cw", Preprocess(function="own.py:prepare"))
    path = next(photos.glob("*.jpg"))
    with corewise.load(folder) as model, pytest.raises(corewise.InputError, match=r"load\(\.\.\., preprocess=function"):
        model.predict(path)
    with corewise.load(folder, preprocess=prepare) as model:
        assert model.predict(path).label in NAMES


def write_odd_files(folder: Path) -> dict[str, bool]:
    """Forty files as collections have them, and whether each is an image: most are, in many forms."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(60, 200, (48, 64, 3), np.uint8)).filter(ImageFilter.GaussianBlur(2))
    for number in range(26):
        photo.save(folder / f"{number:02}.{('jpg', 'png', 'webp', 'bmp', 'tiff')[number % 5]}")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(folder / "rotated.jpg", exif=exif)
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 65535, (48, 64), np.uint16)).save(folder / "sixteen.png")
    Image.fromarray(rng.random((48, 64), np.float32)).save(folder / "floats.tiff")
    photo.save(folder / "animated.gif", save_all=True, append_images=[photo.rotate(90)])
    photo.convert("P").save(folder / "palette.png", transparency=0)
    photo.convert("RGBA").save(folder / "transparent.png")
    photo.convert("1").save(folder / "bits.png")
    photo.resize((400, 3)).save(folder / "long.png")
    photo.resize((1, 1)).save(folder / "dot.png")
    odd = {path.name: True for path in folder.iterdir()}
    (folder / "cut.jpg").write_bytes((folder / "00.jpg").read_bytes()[:400])
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.jpg").write_bytes(b"<html>not found</html>")
    huge = bytearray((folder / "03.bmp").read_bytes())
    huge[18:26] = np.array([40_000, 40_000], "<i4").tobytes()  # its header's width and height
    (folder / "huge.bmp").write_bytes(huge)
    return odd | dict.fromkeys(("cut.jpg", "empty.png", "page.jpg", "huge.bmp"), False)


def test_every_file_gets_the_same_verdict_in_samples_predict_and_the_server(
    server: Server, fast: corewise.Model, tmp_path: Path
) -> None:
    verdicts = write_odd_files(tmp_path / "odd")
    assert len(verdicts) == 40
    paths = [tmp_path / "odd" / name for name in sorted(verdicts)]
    good = [path.name for path in paths if verdicts[path.name]]
    samples = read(str(tmp_path / "odd"), SMALL)
    assert [Path(name).name for name in samples.names or ()] == good
    assert fast.images is not None
    answers = dict(zip([path.name for path in paths], fast.images.answers(paths), strict=True))
    assert [name for name, answer in answers.items() if isinstance(answer, ClassAnswer)] == good
    for path in paths:
        answer, told = answers[path.name], server.post("/v2/models/shades/classify", content=path.read_bytes())
        assert told.status_code == (200 if verdicts[path.name] else 413 if path.stem == "huge" else 415), told.text
        if isinstance(answer, ClassAnswer):
            assert told.json()["classes"][0]["label"] == answer.label
            assert told.json()["classes"][0]["probability"] == pytest.approx(answer.probability, abs=1e-4)


def test_pixels_are_another_form_of_the_input(server: Server) -> None:
    import tritonclient.grpc as grpc_client
    import tritonclient.http as http_client

    listed = server.get("/v2/models/shades").json()["inputs"]
    assert [(one["name"], one["datatype"], one["shape"]) for one in listed] == [
        ("x", "FP32", [-1, 3, 32, 32]), ("image", "BYTES", [-1]), ("pixels", "UINT8", [-1, 32, 32, 3])
    ]  # fmt: skip
    pixels = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), np.uint8)
    floats = normalize_pixels(pixels, SMALL)
    for client, module in (
        (http_client.InferenceServerClient(server.url.removeprefix("http://")), http_client),
        (grpc_client.InferenceServerClient(server.grpc), grpc_client),
    ):
        scores = []
        for name, datatype, array in (("x", "FP32", floats), ("pixels", "UINT8", pixels), ("pixels", "UINT8", pixels)):
            tensor = module.InferInput(name, list(array.shape), datatype)
            tensor.set_data_from_numpy(array)
            scores.append(client.infer("shades", [tensor]).as_numpy("scores"))
        client.close()
        np.testing.assert_allclose(scores[1], scores[0], rtol=1e-4, atol=1e-4)
        assert np.array_equal(scores[1], scores[2])
    body = {"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [128] * 3072}]}
    assert server.post("/v2/models/shades/infer", json=body).status_code == 200
    for wrong in ({"shape": [1, 3, 32, 32]}, {"datatype": "FP32"}, {"data": [256] * 3072}):
        body["inputs"][0] |= wrong
        assert server.post("/v2/models/shades/infer", json=body).status_code == 400


def test_golden_outputs_prove_both_forms_of_the_input(artifact: Path) -> None:
    assert corewise.verify(artifact).sqnr_db > 80
