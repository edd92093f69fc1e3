"""corewise predict on a real Ray of two CPUs: actors and drivers that are killed, and what is wrong in one line."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pytest
from command_line import command
from ray_tools import TOKENS, Cluster, started_ray
from serving_tools import write_bulk_job
from waiting import eventually

import corewise

ROWS = 12_000
RAY = Path(sys.executable).with_name("ray")

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of tokens, and a file of texts of which one has a null byte."""
    made = tmp_path_factory.mktemp("cluster")
    write_bulk_job(made, ROWS)
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> np.ndarray:
    """The answers of one process."""
    corewise.predict(folder / "words.cw", folder / "texts.txt", folder / "alone.npy")
    made: np.ndarray = np.load(folder / "alone.npy")
    return made


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A Ray of two CPUs that wants a token."""
    with started_ray(2) as cluster:
        yield cluster


def start(folder: Path, cluster: Cluster, output: str, *more: str) -> subprocess.Popen[str]:
    typed = command("predict", "words.cw", "texts.txt", "-o", output, "--ray", cluster.address, *more, quick=False)
    return subprocess.Popen(
        typed, cwd=folder, env={**os.environ, **TOKENS}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def parts_done(output: Path) -> int:
    return len(list(output.glob("_part-*.done")))


def check_rows(output: Path, alone: np.ndarray) -> None:
    """Each row is there once, with the answer of one process."""
    table = pyarrow.dataset.dataset(output).to_table()
    rows = table.column("row").to_numpy()
    assert sorted(rows) == [row for row in range(ROWS) if row != 7]
    np.testing.assert_allclose(np.stack(table.column("vector").to_numpy()), alone[rows], atol=1e-5)
    (failed,) = (json.loads(line) for path in output.glob("_part-*.failed") for line in path.read_text().splitlines())
    assert (failed["row"], failed["where"]) == (7, "line 8")
    assert not list(output.glob("_new-*"))


def test_a_driver_and_then_an_actor_that_are_killed_lose_no_row(
    folder: Path, alone: np.ndarray, cluster: Cluster
) -> None:
    output = folder / "out"
    first = start(folder, cluster, "out", "--retune", "0")
    assert eventually(lambda: parts_done(output) or first.poll() is not None, 240)
    first.kill()
    first.communicate(timeout=240)
    assert first.returncode == -signal.SIGKILL, "it was not done yet"
    assert eventually(lambda: not cluster.processes("ray::Answerer"), 240), "its actor ends with it"

    before = parts_done(output)
    second = start(folder, cluster, "out", "--retune", "0")
    assert eventually(lambda: parts_done(output) > before or second.poll() is not None, 240)
    for pid in cluster.processes("ray::Answerer"):
        os.kill(pid, signal.SIGKILL)
    said, wrong = second.communicate(timeout=240)
    assert second.returncode == 0, wrong
    assert f"{ROWS:,} rows to " in said
    assert re.search(r"[\d,]+ were done before; 1 set aside", said)
    assert re.search(r"node .*: [\d,]+ rows under 1 thread x 1, batch 4 \(.*, then it was lost\n", said)
    check_rows(output, alone)


def test_a_cluster_is_not_used_without_its_token(folder: Path, cluster: Cluster) -> None:
    with_none = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    typed = command("predict", "words.cw", "texts.txt", "-o", "none", "--ray", cluster.address, quick=False)
    done = subprocess.run(
        typed, cwd=folder, env={**with_none, "HOME": str(folder)}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "Ray" in line
    assert "token" in line


@pytest.mark.slow
def test_each_kind_of_node_runs_its_own_plan(folder: Path, tmp_path: Path, cluster: Cluster) -> None:
    """Beside the cluster's node of two CPUs one of one CPU, and one that is told that it is older."""
    write_bulk_job(tmp_path, 30 * 1024)
    corewise.predict(tmp_path / "words.cw", tmp_path / "texts.txt", tmp_path / "alone.npy")
    more = []
    try:
        for core, resources in ((0, "{}"), (1, '{"old": 1}')):
            typed = ["taskset", "-c", str(core), str(RAY), "start", f"--address={cluster.address}", "--num-cpus=1",
                     f"--resources={resources}", f"--object-store-memory={2**27}", "--block"]  # fmt: skip
            with (tmp_path / f"log-{core}").open("w") as log:
                more.append(subprocess.Popen(typed, env={**os.environ, **TOKENS}, stdout=log, stderr=log))
        for core in (0, 1):
            assert eventually(lambda core=core: "runtime started" in (tmp_path / f"log-{core}").read_text(), 120)
        script = Path(__file__).with_name("told_machines.py")
        typed = [sys.executable, str(script), cluster.address, "words.cw", "texts.txt", "out"]
        done = subprocess.run(
            typed, cwd=tmp_path, env={**os.environ, **TOKENS}, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
    finally:
        for process in more:
            process.terminate()
            process.wait(60)
    nodes = json.loads(done.stdout.splitlines()[-1])["nodes"]
    assert len({node["pid"] for node in nodes}) == 3
    assert all(node["rows"] for node in nodes)
    machines = {(node["machine"]["model"] == "an older CPU", node["machine"]["hardware_threads"]) for node in nodes}
    assert machines == {(False, 2), (False, 1), (True, 1)}
    sources = sorted(node["source"] for node in nodes)
    assert sources == ["made here", "tuned now", "tuned now"]
    threads = {node["plan"]["threads_per_instance"] * node["plan"]["instances"] for node in nodes}
    assert max(threads) <= 2
    table = pyarrow.dataset.dataset(tmp_path / "out").to_table()
    rows, alone = table.column("row").to_numpy(), np.load(tmp_path / "alone.npy")
    assert sorted(rows) == [row for row in range(30 * 1024) if row != 7]
    np.testing.assert_allclose(np.stack(table.column("vector").to_numpy()), alone[rows], atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "output", "options", "what"),
    [
        ("texts.txt", "a", {"ray": "head"}, "'head' is not an address of a Ray cluster; give local, auto, HOST:PORT"),
        ("texts.txt", "a", {"ray": "127.0.0.1:1"}, "no Ray cluster answers at 127.0.0.1:1; check the address"),
        ("empty.txt", "a", {"ray": "local"}, "there are no rows in .*empty.txt; give at least one"),
        ("table.csv", "a", {"ray": "local", "text": "bodi"}, "has no column 'bodi'; it has body; did you mean 'body'"),
        ("texts.txt", "other", {"ray": "local"}, "other has files that are not from such a job; give another name"),
        ("texts.txt", "a.npy", {"ray": "local"}, "a.npy is the name of a file; give a folder for Parquet files"),
    ],
)
def test_what_is_wrong_is_said_before_a_cluster_starts(
    folder: Path, inputs: str, output: str, options: dict[str, str], what: str
) -> None:
    (folder / "table.csv").write_text("body\nw1\n")
    (folder / "empty.txt").touch()
    (folder / "other").mkdir(exist_ok=True)
    (folder / "other" / "notes.txt").touch()
    with pytest.raises(corewise.CorewiseError, match=what):
        corewise.predict(folder / "words.cw", folder / inputs, folder / output, **options)


def test_a_dry_run_says_what_would_run(folder: Path) -> None:
    typed = command("predict", "words.cw", "texts.txt", "-o", "dry", "--ray", "auto", "--dry-run", quick=False)
    done = subprocess.run(typed, cwd=folder, capture_output=True, text=True)
    assert done.stdout == f"would answer about {ROWS:,} rows of 1 input, to {folder / 'dry'}\n"
    assert not (folder / "dry").exists()
