"""The command line as a user runs it: whole commands in processes of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import IN_PROCESS, QUICK, command, several
from places import GOLDEN

from corewise import artifact

MODELS = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

def large():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(432, 2048), nn.ReLU(), nn.Linear(2048, 4))

def nan():
    model = build()
    nn.init.constant_(model[0].weight, float("nan"))
    return model

def raises():
    raise RuntimeError("the weights are lost\\\\nand so is the second line")

def nothing():
    return None

def broken_metric(outputs, labels):
    return outputs.no_such_attribute
"""

ENGINES = '''
import os, time
from pathlib import Path
from corewise.engines.fake import Fake
from corewise.records.build import Build

class Stepwise(Fake):
    """Two builds; the second waits where there is a file ``hold``."""
    def candidates(self, cpu, operators):
        return tuple(Build(engine="engines:Stepwise", precision="int8", options=(("n", n),)) for n in range(2))

    def build(self, material, build, folder):
        if build.option("n", 0) == 1 and Path("hold").exists():
            Path("reached").write_text(str(os.getpid()))
            time.sleep(3600)
        return super().build(material, build, folder)
'''

FEW = """
from corewise.engines.onnxruntime import OnnxRuntime
offered = OnnxRuntime.candidates
def few(engine, cpu, operators):
    return tuple(build for build in offered(engine, cpu, operators) if build.precision in ("int8", "fp32")
                 and not build.option("quantizer", ""))
OnnxRuntime.candidates = few
"""
"""One build in int8 and one in fp32."""
STEPWISE = (
    *("optimize", "models.py:build", "--samples", "good.npz", "--engine", "engines:Stepwise"),
    *("--max-drop", "1", "--objective", "latency"),
)


def corewise(*args, cwd, **options):
    return subprocess.run(command(*args, **options), cwd=cwd, capture_output=True, text=True, timeout=300)


def ok(*args, cwd, **options):
    found = corewise(*args, cwd=cwd, **options)
    assert (found.returncode, found.stderr) == (0, ""), found.stderr
    return found.stdout


def save_samples(folder):
    """Files of samples, sound and broken ones."""
    generator = np.random.default_rng(0)
    images = generator.standard_normal((60, 3, 12, 12)).astype(np.float32)
    labels = generator.integers(0, 4, 60)
    for name, arrays in {
        "good": {"x": images, "labels": labels},
        "shape": {"x": images[:, :2], "labels": labels},
        "dtype": {"x": images.astype(np.int64), "labels": labels},
        "empty": {"x": images[:0], "labels": labels[:0]},
        "one": {"x": images[:1], "labels": labels[:1]},
        "range": {"x": images, "labels": labels + 2},
        "fewer": {"x": images, "labels": labels[:-1]},
    }.items():
        np.savez(folder / f"{name}.npz", **arrays)
    (folder / "text.npz").write_text("no archive")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "models.py").write_text(MODELS)
    (folder / "engines.py").write_text(ENGINES)
    save_samples(folder)
    return folder


@pytest.fixture(scope="module")
def optimized(place):
    """What ``optimize`` printed; the artifact is ``made.cw``. Each build has a process of its own."""
    return ok(
        *("optimize", "models.py:build", "--samples", "good.npz", "--engine", "onnxruntime", "--max-drop", "0.2"),
        *("--objective", "latency", "-o", "made.cw"),
        cwd=place,
        before=FEW,
    )


# --- the main job -------------------------------------------------------------------------------------------------


def test_doctor_tells_about_this_machine(place):
    found = json.loads(ok("doctor", "--json", cwd=place, quick=False))
    assert found["cpu"]["cpus"]
    assert "\x1b" not in ok("doctor", cwd=place, quick=False)


def test_help_doctor_and_samples_that_are_not_there_do_not_import_torch(place):
    code = """
import sys
from corewise.cli import app
from corewise.common.errors import SamplesError

for command in ("doctor", "optimize --help", "optimize models.py:build --samples none.npz -o m.cw"):
    try:
        app(command.split(), standalone_mode=False)
    except SamplesError as error:
        print(error)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=place, check=True, capture_output=True, timeout=60)
    assert done.stdout.endswith(b"there is no file none.npz; check the path\n")


def test_optimize_tells_its_progress_in_plain_lines_when_piped(optimized, place):
    lines = optimized.splitlines()
    assert "\x1b" not in optimized
    assert lines[0] == "reading the samples"
    assert any(line.startswith("1/") and "eager/fp32" in line for line in lines)
    assert any("onnxruntime/fp32" in line for line in lines)
    assert "the other builds, the fastest first" in lines
    assert "notes" not in lines
    assert [line.split()[0] for line in lines[-5:] if not line.startswith(" ")][-3:] == ["accuracy", "saved", "next"]
    assert lines[-1] in ("next      corewise serve made.cw", "next      corewise show made.cw")
    assert not (place / "made.cw.work").exists()


def test_show_has_what_was_promised(optimized, place):
    found = json.loads(ok("show", "made.cw", "--json", cwd=place))
    assert set(found["plan"]) == {"threads_per_instance", "instances", "batch"}
    for key in (
        *("throughput_per_s", "baseline_throughput_per_s", "speedup", "speedup_low", "speedup_high"),
        *("baseline_value", "value", "drop", "drop_low", "drop_high"),
    ):
        assert isinstance(found[key], int | float), key
    assert found["metric"] == "top1"
    assert found["speedup"] >= 1
    assert found["drop"] <= 0.2
    assert {trial["label"] for trial in found["trials"]} >= {"eager/fp32", "onnxruntime/fp32"}
    assert all(
        trial["state"] in ("ok", "failed", "rejected", "pruned") and trial["reason"] for trial in found["trials"]
    )
    (chosen,) = [trial for trial in found["trials"] if trial["chosen"]]
    assert (chosen["engine"], chosen["precision"]) == (found["engine"], found["precision"])


def test_show_is_for_people_too(optimized, place):
    assert "\x1b" not in ok("show", "made.cw", cwd=place)
    assert ok("show", "made.cw", "--markdown", cwd=place) == (place / "made.cw" / "report.md").read_text() + "\n"
    assert ok("show", "made.cw", "--html", "page.html", cwd=place) == "wrote page.html\n"
    assert (place / "page.html").read_text() == (place / "made.cw" / "report.html").read_text()


def test_verify_finds_it_sound(optimized, place):
    found = json.loads(ok("verify", "made.cw", "--json", cwd=place))
    assert found["sqnr_db"] > 20
    assert "made.cw is sound and fits this CPU" in ok("verify", "made.cw", cwd=place)


def test_bench_races_it_against_eager(optimized, place):
    found = json.loads(ok("bench", "made.cw", "--against", "eager", "--json", cwd=place))
    ratio = found["ratio"]
    assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
    assert [rates["build"]["engine"] for rates in found["rates"]][1] == "eager"
    assert len({len(rates["per_s"]) for rates in found["rates"]}) == 1


# --- bad input ----------------------------------------------------------------------------------------------------

REFUSED = {
    "no file": ({"model": "none.py:build"}, "model factory: there is no file none.py; check the path"),
    "no factory": ({"model": "models.py:bild"}, "models.py has no function 'bild'; did you mean 'build'?"),
    "no reference": ({"model": "models.py"}, "'models.py' does not name a model; give module:factory"),
    "factory raises": ({"model": "models.py:raises"}, "models.py:raises failed: RuntimeError: the weights are lost"),
    "factory of nothing": ({"model": "models.py:nothing"}, "models.py:nothing returned None, not a torch.nn.Module"),
    "NaN outputs": ({"model": "models.py:nan"}, "has NaN"),
    "no samples": ({"samples": "none.npz"}, "there is no file none.npz; check the path"),
    "name too long": ({"samples": "n" * 300}, "File name too long; check the path"),
    "text": ({"samples": "text.npz"}, "text.npz cannot be read"),
    "wrong shape": ({"samples": "shape.npz"}, "the model does not take the samples, in a batch"),
    "wrong dtype": ({"samples": "dtype.npz"}, "the model does not take the samples, in a batch"),
    "empty": ({"samples": "empty.npz"}, "no samples"),
    "one sample": ({"samples": "one.npz"}, "one.npz has 1 sample; give at least 2"),
    "labels out of range": ({"samples": "range.npz"}, "the model's classes are 0..3"),
    "fewer labels": ({"samples": "fewer.npz"}, "labels"),
    "metric raises": ({"metric": "models.py:broken_metric"}, "the metric 'broken_metric' failed: AttributeError"),
    "unknown metric": ({"metric": "top2"}, "no metric is named 'top2'; use top5, top1"),
    "unknown engine": (
        {"engine": "tvm"},
        "no engine is named 'tvm'; use one of eager, torch-int8, openvino, inductor, onnxruntime or module:class\n",
    ),
    "negative drop": (
        {"max-drop": "-1"},
        "corewise: --max-drop is -1; give 0 or more, e.g. 0.01 for one point of top-1",
    ),
    "no drop": ({"max-drop": "1%"}, "--max-drop is 1%; give 0 or more"),
    "no number": ({"mean": "a,b"}, "--mean is a,b; give numbers with commas"),
    "std of 0": ({"std": "1,0,1"}, "--std 1,0,1 does not fit; give 3 numbers for RGB or 1 for grey"),
    "crop too large": ({"crop": "300", "resize": "256"}, "--crop 300 is more than --resize 256; give a smaller --crop"),
    "crop of what is kept": (
        {"crop": "30", "fit": "keep"},
        "--crop makes squares, and --fit keep makes none; leave out one of them",
    ),
    "no time": ({"budget": "5x"}, "--budget is 5x; give a time above 0: 90s, 5m or 1h"),
    "no timeout": ({"timeout": "0"}, "--timeout is 0; give a time above 0"),
    "no size": ({"memory-limit": "-2G"}, "--memory-limit is -2G; give a size: 500M, 2G or 64MiB"),
    "no limit": ({"slo-ms": "0"}, "--slo-ms is 0; give a number above 0, e.g. 100"),
    "unknown objective": ({"objective": "speed"}, "--objective is speed; give throughput, latency or slo"),
    "slo without a limit": ({"objective": "slo"}, "--objective slo needs --slo-ms; add --slo-ms"),
    "limit without slo": (
        {"objective": "latency", "slo-ms": "9"},
        "--slo-ms does not go with --objective latency; leave out one of them",
    ),
    "no seed": ({"seed": "-1"}, "--seed is -1; give a whole number, 0 or more"),
    "no calibration": ({"calibration": "0"}, "--calibration is 0; give a whole number, 1 or more"),
    "no tokenizer": ({"tokenizer": "none.json"}, "there is no file none.json; give a tokenizer.json"),
    "no labels": ({"labels": "none.txt"}, "none.txt cannot be read: No such file or directory; give a text file"),
    "too much calibration": ({"calibration": "60"}, "60 of 60 samples cannot be for calibration"),
    "output exists": ({"output": "models.py"}, "models.py exists already; remove it or give another name with -o"),
    "no plain name": ({"output": "no\nfolder\x1b[31m/m.cw"}, "there is no folder no folder [31m; create it"),
    "no folder": ({"output": "none/m.cw"}, "there is no folder none; create it"),
    "unwritable": ({"output": "/proc/m.cw"}, "/proc/m.cw cannot be written"),
}


@pytest.fixture(scope="module")
def refusals(place):
    """Every bad command, in one process to import torch once: name to (exit code, stdout, stderr)."""

    def arguments(name, changes):
        options = {"samples": "good.npz", "output": f"{name}.cw", "engine": "engines:Stepwise", **changes}
        model = options.pop("model", "models.py:build")
        flags = [part for key, value in options.items() for part in (f"--{key}", value)]
        return ["optimize", model, *flags, "--quiet"]

    found = several([arguments(name, changes) for name, (changes, _) in REFUSED.items()], place, before=IN_PROCESS)
    return dict(zip(REFUSED, found, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line_with_the_fix(refusals, place, name):
    code, output, errors = refusals[name]
    assert (code, output) == (2, "")
    assert errors.startswith("corewise: ")
    assert errors.count("\n") == 1, errors
    assert REFUSED[name][1] in errors
    assert not (place / f"{name}.cw").exists()
    assert not [entry for entry in os.listdir(place) if entry.startswith(".")]


def test_a_damaged_artifact_is_refused_by_every_command(optimized, place):
    shutil.copytree(place / "made.cw", place / "damaged.cw")
    with (place / "damaged.cw" / "golden.safetensors").open("ab") as file:
        file.write(b"!")
    commands = [(name, "damaged.cw") for name in ("show", "verify", "bench", "retune")]
    found = several([*commands, ("loadtest", "damaged.cw", "--clients", "1")], place)
    for code, output, errors in found:
        assert (code, output) == (2, "")
        assert errors.startswith("corewise: damaged.cw/golden.safetensors is truncated or altered")
        assert errors.count("\n") == 1


def test_what_is_no_artifact_is_refused(optimized, place):
    told = {
        ("show", "none.cw"): "none.cw does not exist",
        ("verify", "."): "is not an artifact",
        ("bench", "made.cw", "--against", "tvm"): "no engine is named 'tvm'",
    }
    for words, (code, output, errors) in zip(told.values(), several(told, place), strict=True):
        assert (code, output) == (2, "")
        assert words in errors
        assert errors.count("\n") == 1


def test_wrong_usage_exits_with_2(place):
    for code, output, errors in several([("optimize",), ("show",), ("optimise",), ("show", "a.cw", "--jsn")], place):
        assert (code, output) == (2, "")
        assert "Usage: " in errors
        assert "Traceback" not in errors


# --- streams ------------------------------------------------------------------------------------------------------

ARTIFACT = GOLDEN / "schema-1"
SHOWS = (("show", ARTIFACT), ("show", ARTIFACT, "--json"), ("doctor",), ("optimize", "--help"))


@pytest.mark.parametrize("args", SHOWS, ids=str)
def test_a_device_without_space_ends_it_with_one_line(args):
    with open("/dev/full", "w") as full:
        done = subprocess.run(command(*args, quick=False), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "corewise: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize("args", SHOWS, ids=str)
def test_a_reader_that_is_gone_ends_it_without_a_word(args):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        done = subprocess.run(command(*args, quick=False), stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("args", SHOWS, ids=str)
def test_signs_that_the_terminal_lacks_are_replaced(args):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command(*args, quick=False), capture_output=True, timeout=60, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    shown = done.stdout.decode("ascii")
    if args == ("show", ARTIFACT):
        assert "+ chosen" in shown
    if "--help" in args:
        assert "+- Goal ---" in shown


def test_errors_are_told_where_standard_output_is_closed():
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command("show", "none.cw", quick=False)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (closed.returncode, closed.stderr.count("\n")) == (2, 1)
    assert "none.cw does not exist" in closed.stderr


def test_progress_that_cannot_be_written_ends_the_search(place):
    """And is not taken for a failed trial or for a full disk, which is what an ``OSError`` in a search usually is."""
    with open("/dev/full", "w") as full:
        wanted = command(*STEPWISE, "-o", "unseen.cw")
        done = subprocess.run(wanted, cwd=place, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "corewise: standard output cannot be written: No space left on device\n"
    assert not (place / "unseen.cw").exists()


# --- interruptions ------------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_was_done_and_the_same_command_resumes(place):
    wanted = (*STEPWISE, "-o", "stepwise.cw", "--json")
    (place / "hold").touch()
    with subprocess.Popen(
        command(*wanted), cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        wait_for((place / "reached").exists)
        os.kill(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert output == ""
    assert "finished trials are kept in stepwise.cw.work; the same command resumes" in errors
    assert "Traceback" not in errors
    assert not (place / "stepwise.cw").exists()
    child = (place / "reached").read_text()
    wait_for(lambda: not Path(f"/proc/{child}").exists())

    (place / "hold").unlink()
    found = corewise(*wanted, cwd=place, in_process=True)
    assert found.returncode == 0
    resumed = [line.partition(": ")[0] for line in found.stderr.splitlines() if line.endswith("(resumed)")]
    assert resumed == ["eager/fp32", "engines:Stepwise/int8/n=0"]
    # The engine answers with anything, so the gate may reject its builds.
    states = [trial["state"] for trial in json.loads(found.stdout)["trials"]]
    assert len(states) == 3
    assert set(states) <= {"ok", "pruned", "rejected"}
    assert not (place / "stepwise.cw.work").exists()


def test_sigterm_leaves_nothing_behind(tmp_path):
    wanted = ("loadtest", GOLDEN / "schema-2", "--clients", "1", "--duration", "60s")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command(*wanted, quick=False), env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: list(tmp_path.glob("*/log")))
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in errors
    assert not os.listdir(tmp_path)


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, and the program that sets its size, in MiB; for root only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "corewise-test", folder]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder, lambda mib: ("!", "mount", "-o", f"remount,size={mib}m", folder)
    subprocess.run(["umount", folder], check=True)


def builds(journal):
    """The builds of the finished trials: one whose plans were searched has a line more."""
    return {json.dumps(json.loads(line)["build"]) for line in journal.splitlines()[1:]}


def test_a_full_disk_is_told_and_loses_no_trial(place, small_disk):
    disk, resize = small_disk
    wanted = (*STEPWISE, "-o", disk / "large.cw", "--quiet")
    wanted = tuple("models.py:large" if part == "models.py:build" else part for part in wanted)
    journal = disk / "large.cw.work" / "journal.jsonl"
    look, look_into = ("!", "ls", disk), ("!", "cat", journal)
    # The program takes 3.5 MiB: once for all trials, once as the baseline's payload, once in the artifact.
    _, empty, left, _, small, kept, trials, _, roomy, made = several(
        [resize(2), wanted, look, resize(9), wanted, look, look_into, resize(20), wanted, look],
        place,
        before=QUICK + IN_PROCESS,
    )
    for code, output, errors in (empty, small):
        assert (code, output) == (2, "")
        assert errors.startswith("corewise: ")
        assert "free space" in errors
        assert errors.count("\n") == 1
    assert (left[1], kept[1]) == ("", "large.cw.work\n")
    assert len(builds(trials[1])) == 3
    assert roomy == [0, "", ""]
    assert made[1] == "large.cw\n"
    assert artifact.read(disk / "large.cw").report.trials
