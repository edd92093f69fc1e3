"""Kills of the driver, the actor and the node of a bulk job on Ray, and what the same command makes of it.

    python -m bench ray_kills ARTIFACT INPUT [--runs 20] [--first 0]

Each run starts the job from the beginning on its own Ray (``--ray local``). At a random moment it kills one of the
job's processes (SIGKILL), or fills the output's disk, a small one of its own, which only root can make: in four runs
after the first part, in the next four while the processes start. Then it gives the same command until it succeeds.
Each row of the inputs must be there once, with the answer of one process without Ray. Writes ray_kills_NAME.json; runs
of other numbers stay in it, so that they can be made in pieces.

INPUT is what ``predict`` takes: a file of texts, or a tar file or folder of images.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as datasets
from pyarrow import Table, parquet

from bench.harness import machine_facts, read_results, say, write_results
from bench.servers import descendants
from corewise import artifact
from corewise.machine.inspect import inspect_cpu

KINDS = {"driver": b"corewise.cli", "actor": b"ray::Answerer", "raylet": b"/raylet/raylet"}
"""What is killed, and what its command line has."""
DISK, DISK_BYTES = "disk", 2**27
BEGUN = ("_part-*.done", "_job.json")
"""What is in the output when a run waits for its random moment."""
BEGIN_S, MOST_TRIES, END_S = 300.0, 5, 30.0
TOLERANCE, TOLERANCE_BF16 = 1e-4, 1e-2
"""Of numbers around 1. Rows meet other rows in another job, and in bf16 kernels for other shapes round otherwise: by
0.003 in MiniLM's vectors."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an artifact of texts or images")
    parser.add_argument("input", type=Path, metavar="INPUT", help="texts or images")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="the number of the first run")
    parser.add_argument("--longest", type=float, default=5.0, help="the longest pause before a kill, in seconds")
    parser.add_argument("--seed", type=int, default=0)


def job(options: argparse.Namespace, output: Path, *more: str) -> list[str]:
    """The command of a job."""
    return [sys.executable, "-m", "corewise.cli", "predict", *map(str, (options.artifact, options.input)), "-o",
            str(output), *more]  # fmt: skip


def of_kind(pids: list[int], sign: bytes) -> list[int]:
    """The processes whose command line has these bytes."""
    found = []
    for pid in pids:
        with suppress(OSError):
            if sign in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def strike(command: list[str], output: Path, kind: str, begun: str, pause_s: float) -> dict[str, Any]:
    """Start the job, wait until a file ``begun`` is there and a while longer, and kill one of its processes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + BEGIN_S
    while not list(output.glob(begun)) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(pause_s)
    family = descendants(process.pid)
    filler = output.with_name("filler")
    if kind == DISK:
        victims = fill(filler)
    else:
        victims = of_kind(family, KINDS[kind])[:1]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
    done = len(list(output.glob("_part-*.done")))
    _, wrong = process.communicate(timeout=BEGIN_S)
    end(family[1:])
    filler.unlink(missing_ok=True)
    last = [line for line in wrong.splitlines() if line.startswith("corewise:")][-1:]
    return {"kind": kind, "after": begun, "pause_s": pause_s, "killed": len(victims), "parts_done": done,
            "returned": process.returncode, "said": last}  # fmt: skip


def fill(path: Path) -> list[int]:
    """Leave nothing free on the disk of a file."""
    with path.open("wb") as file, suppress(OSError):
        while True:
            os.write(file.fileno(), bytes(2**16))
    return [path.stat().st_size]


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A disk of its own for a folder."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def end(pids: list[int]) -> None:
    """Wait for what the driver left, and end what does not end by itself."""
    until = time.monotonic() + END_S
    while pids and time.monotonic() < until:
        pids = [pid for pid in pids if Path(f"/proc/{pid}").exists() and of_kind([pid], b"ray")]
        time.sleep(0.1)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def answers(table: Table) -> dict[int, dict[str, Any]]:
    """The answer of each row. Its input has another name where it was read from another folder."""
    kept = table.drop_columns([name for name in ("row", "input") if name in table.column_names])
    return dict(zip(table.column("row").to_pylist(), kept.to_pylist(), strict=True))


def difference(one: Any, other: Any) -> float:
    """The largest difference of two answers' numbers; infinite if they differ in anything else."""
    if isinstance(one, dict | list) and type(one) is type(other) and len(one) == len(other):
        if isinstance(one, list) and one and isinstance(one[0], float):
            return float(np.abs(np.subtract(one, other)).max())
        pairs = zip(one, other, strict=True) if isinstance(one, list) else ((one[key], other.get(key)) for key in one)
        return max((difference(*pair) for pair in pairs), default=0.0)
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other)
    return 0.0 if one == other else inf


def compare(output: Path, alone: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """What the folder of parts has against the answers of one process."""
    table = datasets.dataset(output).to_table()
    made = answers(table)
    differences = (difference(made[row], alone[row]) for row in made.keys() & alone.keys())
    return {
        "missing": len(alone.keys() - made.keys()),
        "twice": table.num_rows - len(made),
        "foreign": len(made.keys() - alone.keys()),
        "largest_difference": max(differences, default=0.0),
    }


def main(options: argparse.Namespace) -> None:
    """Kill something in each run."""
    sound = artifact.read(options.artifact)
    path = options.results / f"ray_kills_{options.artifact.name.removesuffix('.cw')}.json"
    runs = {run["number"]: run for run in read_results(path).get("runs", ())}
    kinds = [*KINDS, DISK]
    with tempfile.TemporaryDirectory(prefix="corewise-") as name:
        alone = Path(name) / "alone.parquet"
        subprocess.run(job(options, alone), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        expected = answers(parquet.read_table(alone))
        for number in range(options.first, options.first + options.runs):
            place, kind = Path(name) / f"disk-{number}", kinds[number % len(kinds)]
            with small_disk(place) if kind == DISK else nullcontext():
                place.mkdir(exist_ok=True)
                output = place / "out"
                command = job(options, output, "--ray", "local", "--retune", "0")
                begun = BEGUN[number // len(kinds) % len(BEGUN)]
                pause_s = random.Random(options.seed + number).uniform(0, options.longest)
                run = {"number": number, **strike(command, output, kind, begun, pause_s)}
                tries = 0
                while tries < MOST_TRIES and subprocess.run(command, capture_output=True).returncode:
                    tries += 1
                run |= {"tries": tries + 1, **compare(output, expected), "cpu": inspect_cpu().model,
                        "build": sound.manifest.build.label}  # fmt: skip
            run["sound"] = not (run["missing"] or run["twice"] or run["foreign"]) and (
                run["largest_difference"] <= (TOLERANCE_BF16 if "bf16" in run["build"] else TOLERANCE)
            )
            runs[number] = run
            say(str(run))
            facts = {"artifact": sound.manifest.model, "rows": len(expected)}
            facts["sound"] = all(run["sound"] for run in runs.values())
            write_results(path, {**facts, "runs": [runs[key] for key in sorted(runs)], **machine_facts()})
