"""serving.files: a file as the body, in a form, or as base64, in the ways in which clients write these."""

import base64
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from corewise.records.report import AudioPreprocess, Preprocess
from corewise.serving import files, images, recordings
from corewise.serving.protocol import Limits, ProtocolError

CONTENT = np.random.default_rng(0).bytes(1000)
JSON = "application/json"
FORM = "multipart/form-data; boundary=b"


@pytest.mark.parametrize(
    "text",
    [
        base64.b64encode(CONTENT),
        base64.encodebytes(CONTENT).replace(b"\n", b"\\n"),  # Python's, and Android's
        base64.encodebytes(CONTENT).replace(b"\n", b"\\r\\n"),
        base64.urlsafe_b64encode(CONTENT),
        base64.urlsafe_b64encode(CONTENT).rstrip(b"="),
        b"data:image/jpeg;base64," + base64.b64encode(CONTENT),
    ],
)
def test_base64_as_clients_write_it(text: bytes) -> None:
    assert files.content(b'{"image": "%s"}' % text, JSON, "image") == CONTENT
    raw = text.replace(b"\\r", b"\r").replace(b"\\n", b"\n")
    assert files.unpacked(raw) == CONTENT


@pytest.mark.parametrize("text", ["no base64!", "AAAAA", "<svg/>", "data:image/svg+xml,%3Csvg", "%FF"])
def test_what_is_not_base64_is_told(text: str) -> None:
    with pytest.raises(ProtocolError, match=r'the image is not base64; send \{"image": "<base64>"\}'):
        files.content(b'{"image": "%s"}' % text.encode(), JSON, "image")


def test_a_file_of_text_is_not_taken_for_base64() -> None:
    """A PNM's digits and line breaks are all of base64's alphabet."""
    for body in (b"P2\n2 1\n255\n0 200\n", b"P3 1 1 255 1 2 3", b"\xff\xd8\xff\xe0", b"GIF89a\x01\x00", b"BM\0\0"):
        assert files.unpacked(body) == body


def part(disposition: str, data: bytes, *headers: str) -> bytes:
    lines = "".join(f"{line}\r\n" for line in (f"Content-Disposition: form-data; {disposition}", *headers))
    return b"--b\r\n" + lines.encode() + b"\r\n" + data + b"\r\n"


TEXT = part('name="note"', b"a note")
NAMED = 'name="picture"; filename="cat.jpg"'


@pytest.mark.parametrize(
    "parts",
    [
        part('name="picture"', CONTENT),
        part(NAMED, CONTENT),
        TEXT + part(NAMED, CONTENT, "Content-Type: image/jpeg"),
        part('name="filename"', b"cat.jpg") + part(NAMED, CONTENT),  # a field that is called so
        part("name=picture; filename*=UTF-8''k%C3%A4tzchen.jpg", CONTENT) + TEXT,
        part('name="a"; filename=""', b"", "Content-Type: application/octet-stream") + part(NAMED, CONTENT) + TEXT,
        part('name="a"; filename=""', CONTENT) + TEXT,
        part('NAME="a"; FileName="cat.jpg"', CONTENT) + TEXT,
    ],
)
def test_the_file_of_a_form_is_found(parts: bytes) -> None:
    assert files.content(parts + b"--b--\r\n", FORM, "image") == CONTENT


@pytest.mark.parametrize(
    ("parts", "count"), [(TEXT + TEXT, 0), (part(NAMED, b"a") + part('name="b"; filename="b"', b"b"), 2)]
)
def test_a_form_has_one_file(parts: bytes, count: int) -> None:
    with pytest.raises(ProtocolError, match=f"the form has {count} files; send one file per request"):
        files.content(parts + b"--b--\r\n", FORM, "image")


def jpeg(size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "JPEG")
    return file.getvalue()


def wav(seconds: float) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(round(8000 * seconds)), 8000, format="WAV")
    return file.getvalue()


def test_of_several_files_the_one_that_is_wrong_is_named() -> None:
    how = Preprocess(resize=8, crop=8)
    served: Any = SimpleNamespace(name="m", manifest=SimpleNamespace(preprocess=how), photos=None)
    with pytest.raises(ProtocolError, match="image 2 is cut off"):
        images.batch([jpeg(), jpeg(), jpeg()[:300]], served)
    with pytest.raises(ProtocolError, match="the image is empty"):
        images.batch([b""], served)
    with pytest.raises(ProtocolError, match="image 1 has 30x10 pixels, over 64"):
        images.work(jpeg((30, 10)), files.file_name("image", 1, 3), served, Limits(pixels=64))
    large = io.BytesIO()
    Image.new("RGB", (800, 600)).save(large, "JPEG", progressive=True)
    scaled: Any = SimpleNamespace(
        name="m", manifest=SimpleNamespace(preprocess=Preprocess(resize=36, crop=32, decode="scaled")), photos=None
    )
    work = images.work(large.getvalue(), "the image", scaled, Limits())
    assert work.decoding_bytes == 8 * 100 * 75 + 2 * 3 * 800 * 600
    with pytest.raises(ProtocolError, match="the image takes 2,940,000 bytes to decode, the server has 2,400,000"):
        images.work(large.getvalue(), "the image", scaled, Limits(bodies_bytes=800_000))
    sound = AudioPreprocess(rate_hz=8000, shortest=800)
    audio: Any = SimpleNamespace(preprocess=sound, takes=lambda shape: True, shape=())
    served = SimpleNamespace(name="m", audio=audio, takes_files=True)
    with pytest.raises(ProtocolError, match=r"recording 1 has 0\.05 s, less than"):
        recordings.batch([wav(0.2), wav(0.05)], served)
    with pytest.raises(ProtocolError, match="recording 0 cannot be decoded"):
        recordings.batch([b"nothing at all", wav(0.2)], served)
