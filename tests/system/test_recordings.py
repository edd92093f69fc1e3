"""Recordings in, answers out: from class folders to an artifact, and its answers in Python and in files."""

import base64
import io
import json
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from command_line import command, several
from serving_tools import Server, serving

import corewise
from corewise.artifact import read

NET = '''
import math
import torch

class Tones(torch.nn.Module):
    """The energy at 500 and at 1,500 Hz of recordings (N, frames) of 8,000 Hz."""

    def __init__(self):
        super().__init__()
        phase = 2 * math.pi * torch.arange(64) / 8000 * torch.tensor([[500.0], [1500.0]])
        self.filters = torch.nn.Conv1d(1, 4, 64, bias=False)
        self.filters.weight.data = torch.stack([phase.sin(), phase.cos()], 1).reshape(4, 1, 64)

    def forward(self, x):
        return self.filters(x.unsqueeze(1)).square().mean(2).reshape(-1, 2, 2).sum(2)

def build():
    return Tones().eval()
'''


def write_tone(path: Path, frequency_hz: float, rate_hz: int, seconds: float, subtype: str = "PCM_16") -> None:
    frames = 0.5 * np.sin(2 * np.pi * frequency_hz * np.arange(round(rate_hz * seconds)) / rate_hz)
    soundfile.write(path, np.stack([frames, frames], 1), rate_hz, subtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones of three rates and lengths in class folders, and ``net.py``."""
    made = tmp_path_factory.mktemp("recordings")
    (made / "net.py").write_text(NET)
    for name, frequency_hz in (("bass", 500), ("treble", 1500)):
        (made / "tones" / name).mkdir(parents=True)
        for number in range(12):
            path = made / "tones" / name / f"{number}.{('wav', 'flac')[number % 2]}"
            write_tone(path, frequency_hz, (8000, 16_000, 44_100)[number % 3], 0.1 + 0.1 * (number % 2), "PCM_24")
    return made


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Path:
    (folder / "names.txt").write_text("bass\ntreble\n")
    options = "--samples tones --sample-rate 8000 --labels names.txt --metric top1 --engine eager --quiet -o tones.cw"
    optimize = command("optimize", "net.py:build", *options.split(), in_process=True)
    done = subprocess.run(optimize, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "tones.cw"


def test_answers_are_right_at_every_rate_and_length(artifact: Path, folder: Path, tmp_path: Path) -> None:
    write_tone(tmp_path / "long.wav", 1500, 48_000, 0.7)
    with corewise.load(artifact) as model:
        answers = model.predict([tmp_path / "long.wav", *sorted((folder / "tones" / "bass").iterdir())])
        assert [answer.label for answer in answers] == ["treble", *["bass"] * 12]
        frames = np.int16(8000 * np.sin(np.pi * 3 / 8 * np.arange(1600)))
        assert model.predict([(frames, 8000)])[0].label == "treble"
        with pytest.raises(corewise.InputError, match="a prompt goes before texts, and the model takes recordings"):
            model.predict([(frames, 8000)], prompt="query")


def test_a_job_answers_a_folder_and_sets_broken_files_aside(artifact: Path, folder: Path, tmp_path: Path) -> None:
    for number in range(5):
        write_tone(tmp_path / f"{number}.wav", (500, 1500)[number % 2], 16_000, 0.1 + number / 10)
    (tmp_path / "5.wav").write_bytes((tmp_path / "0.wav").read_bytes()[:100])
    (tmp_path / "6.flac").write_bytes(b"no recording")
    write_tone(tmp_path / "7.wav", 500, 8000, 0.01)
    done = corewise.predict(artifact, tmp_path, tmp_path / "out.jsonl", top=1)
    assert (done.rows, done.failed) == (8, 3)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == ["bass", "treble", "bass", "treble", "bass"]
    aside = [json.loads(line)["reason"] for line in Path(done.failed_in).read_text().splitlines()]
    assert aside[0] == "is cut off"
    assert aside[1].startswith("cannot be decoded: ")
    assert aside[2] == "has 0.01 s, less than the shortest sample, 0.1 s"


def test_the_command_line_says_what_is_wrong_and_what_there_is(artifact: Path, folder: Path) -> None:
    optimize = ("optimize", "net.py:build", "--samples", "tones", "-o", "new.cw", "--quiet")
    (folder / "odd.tar").write_bytes(b"")
    cases = {
        optimize: "corewise: there are recordings in tones, and nothing says which rate the model takes; give it with "
        "--sample-rate, such as --sample-rate 16000, or in Python give arrays\n",
        ("predict", artifact, "tones", "-o", "a.jsonl", "--text", "body"): "corewise: --text has no meaning for "
        f"recordings, which {artifact} takes; leave out --text\n",
        ("predict", artifact, "odd.tar", "-o", "a.jsonl"): "corewise: odd.tar is a tar file, and only images are read "
        "from tar files; unpack it\n",
        ("predict", artifact, "net.py", "-o", "a.npy"): "corewise: a.npy cannot hold classes with their "
        "probabilities; name it .parquet or .jsonl\n",
    }
    *outcomes, (code, shown, _) = several([*cases, ("show", artifact)], cwd=folder)
    assert [errors for _, _, errors in outcomes] == list(cases.values())
    assert code == 0
    assert "one channel of 8000 Hz, of their own length" in " ".join(shown.split())
    assert read(artifact).manifest.audio is not None


# --- the server


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[Server]:
    with serving(artifact, "--trust") as running:
        yield running


CLASSIFY = "/v2/models/tones/classify"


def a_wav(frames: np.ndarray, *, rate_hz: int, claims: int | None = None, float_bits: bool = False) -> bytes:
    """A WAV file of (frames, channels), written by hand, so that its header may say anything."""
    data, width = frames.tobytes(), frames.dtype.itemsize
    channels = frames.shape[1]
    kind = (3 if float_bits else 1, channels, rate_hz, rate_hz * channels * width % 2**32, channels * width, 8 * width)
    size = len(data) if claims is None else claims
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, *kind, b"data", size)
    return head + data


def a_flac(frames: int, rate_hz: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(frames, np.int16), rate_hz, format="FLAC")
    return file.getvalue()


def test_the_server_names_a_recording_however_it_comes(server: Server, tmp_path: Path) -> None:
    write_tone(tmp_path / "a.wav", 1500, 44_100, 0.3)
    write_tone(tmp_path / "a.flac", 1500, 48_000, 0.3)
    for path in (tmp_path / "a.wav", tmp_path / "a.flac"):
        content = path.read_bytes()
        in_json = {"audio": base64.b64encode(content).decode()}
        answers = [
            server.post(CLASSIFY, content=content, headers={"content-type": "audio/wav"}),
            server.post(CLASSIFY, files={"audio": (path.name, content)}),
            server.post(CLASSIFY, json=in_json),
            server.post(CLASSIFY, json={"audio": "data:audio/wav;base64," + in_json["audio"]}),
        ]
        for answer in answers:
            assert answer.status_code == 200, answer.text
            assert [one["label"] for one in answer.json()["classes"]] == ["treble", "bass"]
            assert answer.json()["classes"][0]["score"] == pytest.approx(answers[0].json()["classes"][0]["score"])
    assert server.post(CLASSIFY, json={"image": "AAAA"}).json()["error"].startswith("the body has no audio; send")


def test_the_open_inference_protocol_takes_recordings(server: Server, tmp_path: Path) -> None:
    from tritonclient import grpc, http

    listed = server.get("/v2/models/tones").json()["inputs"]
    assert [(one["name"], one["datatype"]) for one in listed] == [("x", "FP32"), ("audio", "BYTES")]
    for number, hz in enumerate((500, 1500)):
        write_tone(tmp_path / f"{number}.wav", hz, 16_000, 0.2)
    contents = np.array([(tmp_path / f"{number}.wav").read_bytes() for number in range(2)], object)
    for kind, port in ((http, server.url.removeprefix("http://")), (grpc, server.grpc)):
        with kind.InferenceServerClient(port) as client:
            asked = kind.InferInput("audio", [2], "BYTES")
            asked.set_data_from_numpy(contents)
            answer = client.infer("tones", [asked]).as_numpy("output_0")
            assert answer.argmax(1).tolist() == [0, 1]
    body = {"name": "audio", "shape": [2], "datatype": "BYTES", "data": [""] * 2}
    long = (tmp_path / "0.wav").read_bytes() + b"\0"
    body["data"] = [base64.b64encode(one).decode() for one in (long, a_wav(np.zeros((4000, 1), "i2"), rate_hz=8000))]
    refused = server.post("/v2/models/tones/infer", json={"inputs": [body]})
    assert (refused.status_code, refused.json()["error"]) == (
        400,
        "the recordings differ in length, and the model does not cut or pad them; send one per request",
    )


def test_broken_recordings_are_refused_in_one_line(server: Server) -> None:
    second = np.zeros((8000, 1), np.int16)
    hours = bytearray(a_flac(8000, 8000))
    hours[18:26] = (int.from_bytes(hours[18:26], "big") >> 36 << 36 | 36_000 * 8000).to_bytes(8, "big")
    cases: list[tuple[bytes, int, str]] = [
        (b"", 415, "is empty"),
        (b"no recording", 415, "cannot be decoded: it is not a WAV, FLAC, Ogg, MP3 or AIFF file"),
        (a_wav(second, rate_hz=8000)[:300], 415, "is cut off"),
        (a_wav(second, rate_hz=8000, claims=36_000 * 16_000), 415, "is cut off"),
        (bytes(hours), 413, "has 288,000,000 samples in its channels, the server takes"),
        (a_flac(8000, 8000)[:60], 415, "cannot be decoded: "),
        (a_wav(second, rate_hz=0), 415, "cannot be decoded: "),
        (a_wav(second[:0], rate_hz=8000), 415, "has no frames"),
        (a_wav(np.full((8000, 1), np.nan, np.float32), rate_hz=8000, float_bits=True), 415, "has NaN or infinite"),
        (a_wav(second, rate_hz=999_999), 415, "has 999,999 frames per second, which is not a rate of recordings"),
        (a_wav(second[:80], rate_hz=8000), 415, "has 0.01 s, less than the shortest sample, 0.1 s"),
        # Two hours of silence in 200 KB.
        (a_flac(57_600_000, 8000), 413, "frames at 8000 Hz, the server takes 16,777,216"),
    ]
    for content, status, what in cases:
        answer = server.post(CLASSIFY, content=content)
        assert (answer.status_code, what in answer.json()["error"]) == (status, True), (what, answer.text)
        assert answer.json()["error"].startswith("the recording ")
        assert "0x" not in answer.text
    odd = np.int16(8000 * np.sin(2 * np.pi * 500 * np.arange(384_000) / 384_000))
    for content in (
        a_wav(np.repeat(odd[:, None], 32, 1)[:96_000], rate_hz=384_000),
        a_wav(odd[: 383_987 // 2, None], rate_hz=383_987),
    ):
        answer = server.post(CLASSIFY, content=content)
        assert answer.json()["classes"][0]["label"] == "bass", answer.text
    assert server.get("/v2/health/ready").status_code == 200
