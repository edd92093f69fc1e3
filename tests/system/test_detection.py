"""A detector end to end: photos in, boxes in their own pixels out, in Python, in files, drawn, served, on the page."""

import base64
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import numpy as np
import pytest
from command_line import command
from PIL import Image
from pyarrow import parquet
from serving_tools import Server, openvino_artifact, serving

import corewise
from corewise.common.nested import flatten
from corewise.pipeline import Detection, ImageAsk, ImageRunner
from corewise.pipeline.job import Job, run_job
from corewise.pipeline.photos import image_pipeline
from corewise.records.build import TensorSpec
from corewise.records.report import Preprocess
from corewise.samples.images import ImageReader
from corewise.samples.texts import Columns

SIDE, WINDOW, STRIDE = 64, 16, 4
NAMES = ("red", "blue")
PREPROCESS = Preprocess(
    resize=SIDE, crop=SIDE, fit="letterbox", mean=(0.0,) * 3, std=(1.0,) * 3, decode="scaled"
)  # fmt: skip
RED, BLUE = (100, 50, 200, 150), (250, 175, 350, 275)
"""Squares in a photo of 400 x 300, on a grid point each when it is letterboxed."""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def write_detector(folder: Path) -> Path:
    """An artifact that finds red and blue squares of 16 pixels, and answers as YOLOv8 does: (N, 4 + 2, cells)."""
    import openvino as ov
    from openvino import opset13 as ops

    x = ops.parameter([-1, 3, SIDE, SIDE], np.float32, name="x")
    weights = np.float32([[1, -0.5, -0.5], [-0.5, -0.5, 1]]).reshape(2, 3, 1, 1)
    colour = ops.relu(ops.convolution(x, weights, [1, 1], [0, 0], [0, 0], [1, 1]))
    mean = ops.avg_pool(colour, [STRIDE, STRIDE], [0, 0], [0, 0], [WINDOW, WINDOW], True)
    cells = (SIDE - WINDOW) // STRIDE + 1
    sure = ops.relu(ops.subtract(ops.multiply(mean, np.float32(2)), np.float32(1)))
    scores = ops.reshape(sure, np.int64([0, 2, cells * cells]), True)
    centres = np.arange(cells, dtype=np.float32) * STRIDE + WINDOW / 2
    across, down = np.meshgrid(centres, centres)
    size = np.full(cells * cells, WINDOW, np.float32)
    boxes = np.stack([across.ravel(), down.ravel(), size, size])[None]
    nothing = ops.multiply(ops.reduce_sum(scores, np.array([1]), keep_dims=True), np.float32(0))
    output = ops.concat([ops.add(nothing, boxes), scores], 1)
    payload = folder.with_name(folder.name + ".payload")
    payload.mkdir()
    ov.save_model(ov.Model([output], [x]), str(payload / "model.xml"), compress_to_fp16=False)
    inputs = [np.random.default_rng(0).random((4, 3, SIDE, SIDE), np.float32)]
    return openvino_artifact(
        folder,
        payload,
        inputs,
        tokenizer=None,
        labels=NAMES,
        preprocess=PREPROCESS,
        inputs=(TensorSpec(name="x", dtype="float32", shape=(None, 3, SIDE, SIDE)),),
        outputs=(TensorSpec(name="output_0", dtype="float32", shape=(None, 6, cells * cells)),),
        input_structure=flatten(((inputs[0],), {}), "x")[1].to_data(),
        output_structure=flatten(inputs[0], "x")[1].to_data(),
        input_ranges=None,
        seen_ranges=None,
    )


def photo(*squares: tuple[tuple[int, int, int, int], str]) -> Image.Image:
    made = Image.new("RGB", (400, 300), (110, 110, 110))
    for box, colour in squares:
        made.paste(colour, box)
    return made


def content(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, subsampling=0, **options)
    return file.getvalue()


BOTH = photo((RED, "red"), (BLUE, "blue"))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detector(tmp_path_factory.mktemp("detector") / "squares.cw")


@pytest.fixture(scope="module")
def fast(artifact: Path) -> Iterator[corewise.Model]:
    with corewise.load(artifact) as model:
        yield model


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[Server]:
    with serving(artifact) as running:
        yield running


def assert_both(found: list[Detection], boxes: tuple[Any, Any] = (RED, BLUE)) -> None:
    assert sorted(one.label for one in found) == ["blue", "red"]
    for one in found:
        assert one.score > 0.8
        assert one.box == pytest.approx(boxes[NAMES.index(one.label)], abs=3)


def test_boxes_are_in_the_photos_own_pixels_however_it_comes(fast: corewise.Model, tmp_path: Path) -> None:
    path = tmp_path / "both.jpg"
    path.write_bytes(content(BOTH))
    for item in (path, str(path), content(BOTH), BOTH, np.asarray(BOTH)):
        assert_both(fast.predict(item))
    assert fast.predict([photo(), BOTH])[0] == []
    # A photo that lies on its side in the file, and says so.
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = content(BOTH.transpose(Image.Transpose.ROTATE_90), exif=exif)
    assert_both(fast.predict(turned))
    large = BOTH.resize((1600, 1200))
    assert_both(fast.predict(content(large)), tuple(tuple(4 * side for side in box) for box in (RED, BLUE)))  # type: ignore[arg-type]


def test_photos_that_keep_their_shape_share_calls_by_shape() -> None:
    calls: list[tuple[int, ...]] = []

    def find_red(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """As DETR answers: logits (N, 1, 2) and boxes (N, 1, 4) in shares of the input."""
        calls.append(inputs[0].shape)
        boxes = []
        for photo in inputs[0]:
            rows, columns = np.nonzero((photo[0] > 0.7) & (photo[1] < 0.3))
            low, high = np.array([columns.min(), rows.min()]), np.array([columns.max() + 1, rows.max() + 1])
            boxes.append(np.concatenate([(low + high) / 2, high - low]) / ([*photo.shape[:0:-1]] * 2))
        return [np.tile(np.float32([4, -4]), (len(boxes), 1, 1)), np.float32(boxes)[:, None]]

    how = Preprocess(fit="keep", resize=120, crop=120, longest=200, mean=(0.0,) * 3, std=(1.0,) * 3)
    golden = find_red([np.stack([ImageReader(how)(photo((RED, "red")))])])
    pipeline = image_pipeline(how, golden, ("red",), ["logits", "pred_boxes"])
    wide, high = photo((RED, "red")), photo((RED, "red")).transpose(Image.Transpose.TRANSPOSE)
    long = wide.resize((800, 300))  # becomes 200 x 75
    calls.clear()
    (first, second, third, last) = ImageRunner(pipeline, find_red, instances=1, rows=4).predict(
        [wide, high, wide, long]
    )
    assert sorted(calls) == [(1, 3, 75, 200), (1, 3, 160, 120), (2, 3, 120, 160)]
    for (found,), box in ((first, RED), (second, (50, 100, 150, 200)), (third, RED), (last, (200, 50, 400, 150))):
        assert found.label == "red"
        assert found.box == pytest.approx(box, abs=5)
    of_one_shape = replace(pipeline, shape=(3, 120, 160))
    answers = list(ImageRunner(of_one_shape, find_red, instances=1, rows=4).answers([wide, high]))
    assert len(answers[0]) == 1
    assert answers[1].reason == "becomes an input of (3, 160, 120), and the model takes (3, 120, 160)"


def test_thresholds_say_which_boxes_count(fast: corewise.Model) -> None:
    assert fast.predict(BOTH, score_threshold=1.0) == []
    assert len(fast.predict(BOTH, iou_threshold=0.9)) > 2
    with pytest.raises(corewise.InputError, match=r"the score threshold is 2; give a number from 0 to 1"):
        fast.predict(BOTH, score_threshold=2)


def test_a_folder_becomes_a_table_and_drawn_photos(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name, image in (("a", BOTH), ("b", photo()), ("c", photo((RED, "red")))):
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(content(image))
    ran = subprocess.run(
        command("predict", str(artifact), "photos", "-o", "out.parquet", "--draw", "drawn", quick=False),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [sorted(row["labels"]) for row in rows] == [["blue", "red"], [], ["red"]]
    assert rows[2]["boxes"][0] == pytest.approx(RED, abs=3)
    assert rows[2]["scores"][0] > 0.8
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert [path.name for path in drawn] == ["000000-a.jpg", "000001-b.jpg", "000002-c.jpg"]
    difference = np.abs(np.asarray(Image.open(drawn[2]), np.int16) - np.asarray(photo((RED, "red")), np.int16)).max(2)
    rows_changed, columns_changed = np.nonzero(difference > 60)
    # The lines of the box and the name above it, and nothing far from them.
    assert 95 <= columns_changed.min() <= columns_changed.max() <= 205
    assert 30 <= rows_changed.min() <= rows_changed.max() <= 155
    assert np.abs(np.asarray(Image.open(drawn[1]), np.int16) - 110).max() < 12


def test_tar_files_are_read_as_a_stream_and_hostile_members_set_aside(fast: corewise.Model, tmp_path: Path) -> None:
    good = content(BOTH)
    members: list[tuple[str, bytes, bytes]] = [
        ("deep/a.jpg", good, tarfile.REGTYPE),
        ("../../escape.jpg", good, tarfile.REGTYPE),
        ("link.jpg", b"", tarfile.SYMTYPE),
        ("broken.jpg", good[:200], tarfile.REGTYPE),
        ("notes.txt", b"no image", tarfile.REGTYPE),
        (".hidden.jpg", good, tarfile.REGTYPE),
        ("b.jpg", good, tarfile.REGTYPE),
    ]
    path = tmp_path / "photos.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, data, kind in members:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(data), "/etc/passwd"
            archive.addfile(member, io.BytesIO(data))
    job = Job(
        inputs=(path,),
        output=tmp_path / "out.jsonl",
        columns=Columns(),
        prompt=None,
        artifact="",
        ask=ImageAsk(),
        drawings=tmp_path / "drawn",
    )
    assert fast.images is not None
    assert run_job(job, fast.images) == (5, 0, 3, 0)
    rows = [json.loads(line) for line in job.output.read_text().splitlines()]
    assert [row["input"] for row in rows] == [f"{path}/deep/a.jpg", f"{path}/b.jpg"]
    assert all(sorted(row["labels"]) == ["blue", "red"] for row in rows)
    failed = [json.loads(line) for line in job.failed.read_text().splitlines()]
    assert [(one["input"].removeprefix(f"{path}/"), one["reason"]) for one in failed] == [
        ("../../escape.jpg", "leads out of the archive"),
        ("link.jpg", "is a link"),
        ("broken.jpg", "is cut off"),
    ]
    assert sorted(one.name for one in (tmp_path / "drawn").iterdir()) == ["000000-a.jpg", "000004-b.jpg"]
    with pytest.raises(corewise.InputError, match="image 1 leads out of the archive"):
        fast.predict(path)


def test_the_server_answers_a_photo_in_every_form_as_predict_does(server: Server, fast: corewise.Model) -> None:
    body = content(BOTH)
    text = base64.b64encode(body).decode()
    url = "/v2/models/squares/detect"
    expected = fast.predict(body)
    for answer in (
        server.post(url, content=body),
        server.post(url, files={"image": ("photo.jpg", body, "image/jpeg")}),
        server.post(url, json={"image": text}),
    ):
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert (found["width"], found["height"]) == BOTH.size
        assert [(one["label"], one["class"]) for one in found["objects"]] == [
            (one.label, one.number) for one in expected
        ]
        for one, other in zip(found["objects"], expected, strict=True):
            assert one["box"] == pytest.approx(other.box, abs=0.1)
            assert one["score"] == pytest.approx(other.score, abs=1e-3)
    assert server.post(f"{url}?score_threshold=1", content=body).json()["objects"] == []
    for answer, status in (
        (server.post(f"{url}?score_threshold=2", content=body), 400),
        (server.post(f"{url}?iou_threshold=much", content=body), 400),
        (server.post(url, content=b"no image"), 415),
        (server.post("/v2/models/squares/classify", content=body), 501),
    ):
        assert answer.status_code == status, answer.text
    assert "/v2/models/{name}/detect" in server.get("/openapi.json").json()["paths"]
    assert "squares/detect" in server.get("/docs").text


DROP = """<script>
(async () => {
  const until = async (find) => {
    while (!find()) await new Promise((done) => setTimeout(done, 20));
    return find();
  };
  const zone = await until(() => document.querySelector(".drop"));
  const data = new DataTransfer();
  data.items.add(new File([await (await fetch("/photo.jpg")).blob()], "photo.jpg", { type: "image/jpeg" }));
  zone.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
  const canvas = await until(() => document.querySelector(".answer canvas"));
  const pixel = (x, y) => [...canvas.getContext("2d").getImageData(x, y, 1, 1).data].slice(0, 3);
  const found = { labels: [...document.querySelectorAll(".answer li span")].map((one) => one.textContent),
    size: [canvas.width, canvas.height], inside: pixel(150, 100), left: pixel(100, 100), far: pixel(20, 280),
    wide: document.documentElement.scrollWidth <= innerWidth };
  document.documentElement.append("FOUND" + JSON.stringify(found) + "END");
})();
</script></html>"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
def test_a_photo_dropped_on_the_page_shows_its_boxes(server: Server, tmp_path: Path) -> None:
    page = server.get("/")

    class Between(BaseHTTPRequestHandler):
        """The server's own page and answers, and a script that drops a photo on the page."""

        def log_message(self, *arguments: Any) -> None:
            pass

        def give(self, answer: httpx.Response, body: bytes) -> None:
            self.send_response(answer.status_code)
            for name in ("content-type", "content-security-policy"):
                if name in answer.headers:
                    self.send_header(name, answer.headers[name])
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if self.path == "/photo.jpg":
                self.give(httpx.Response(200, headers={"content-type": "image/jpeg"}), content(BOTH))
            elif self.path == "/":
                self.give(page, page.text.replace("</html>", DROP).encode())
            else:
                answer = httpx.get(f"{server.url}{self.path}")
                self.give(answer, answer.content)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            answer = httpx.post(f"{server.url}{self.path}", content=body)
            self.give(answer, answer.content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Between) as between:
        Thread(target=between.serve_forever, daemon=True).start()
        browser = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-proxy-server"]
        browser += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=8000", "--dump-dom"]
        address = f"http://127.0.0.1:{between.server_address[1]}/"
        done = subprocess.run([*browser, address], capture_output=True, text=True, timeout=120)
        between.shutdown()
    told = re.search("FOUND(.*)END</html>", done.stdout)
    assert told, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(told.group(1))
    assert sorted(found["labels"]) == ["blue", "red"]
    assert found["size"] == [400, 300]
    assert found["wide"]
    assert found["inside"][0] > 200 > 60 > found["inside"][1]  # the photo's red
    assert found["left"] != found["inside"]  # the line of its box
    assert max(abs(channel - 110) for channel in found["far"]) < 12
    assert "answered in" in done.stdout
