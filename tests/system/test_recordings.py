"""Recordings in, answers out: from class folders to an artifact, and its answers in Python and in files."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
from command_line import command, several

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
        ("predict", artifact, "odd.tar", "-o", "a.jsonl"): "corewise: odd.tar is a tar file, of which only images are "
        "read; unpack it\n",
        ("predict", artifact, "net.py", "-o", "a.npy"): "corewise: a.npy cannot hold top of several sizes; name it "
        ".parquet or .jsonl\n",
    }
    *outcomes, (code, shown, _) = several([*cases, ("show", artifact)], cwd=folder)
    assert [errors for _, _, errors in outcomes] == list(cases.values())
    assert code == 0
    assert "one channel of 8000 Hz, of their own length" in " ".join(shown.split())
    assert read(artifact).manifest.audio is not None
