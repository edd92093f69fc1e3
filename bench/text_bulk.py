"""``corewise predict`` on 100,000 short texts: its memory and rate, and what kills leave of its answers.

    python -m bench text_bulk ARTIFACT [--rows 100000] [--rounds 2] [--kills 10]

The sentences of STS-B again and again, one row in ``BAD_EVERY`` empty. In turns, each in a process of its own whose
clock starts when its model is open: ``corewise.predict`` from a file of texts to a Parquet file, and the loaded
model's ``predict`` of the same texts in memory. Then the command is killed (SIGKILL) at random moments and given again,
until it ends by itself: each row must be answered once, or set aside once, as without kills.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import parquet

from bench.harness import alternate, machine_facts, ratio_data, ratio_words, read_results, say, write_results
from bench.text import stsb
from corewise import artifact
from corewise.common.stats import ratio_interval

BAD_EVERY = 9973
WARM = 2048
"""Texts that the model in memory answers before its clock starts: two windows of the runner."""
PAUSE_S = (1.0, 8.0)
"""From a start to its kill: before the model is open as well as long after."""


def texts_of(rows: int) -> list[str]:
    """Short texts; some are empty, which no model answers."""
    sentences, pick = stsb(None).judged, random.Random(0)
    return ["" if row % BAD_EVERY == BAD_EVERY - 1 else pick.choice(sentences) for row in range(rows)]


def in_memory(folder: Path, lines: Path) -> dict[str, Any]:
    """The rate of the loaded model on the texts that are not empty."""
    import corewise

    texts = [text for line in lines.read_text().splitlines() if (text := json.loads(line)["text"])]
    with corewise.load(folder) as model:
        model.predict(texts[:WARM])
        started_s = time.perf_counter()
        model.predict(texts)
        return {"per_s": len(texts) / (time.perf_counter() - started_s)}


def from_files(folder: Path, lines: Path, output: Path) -> dict[str, Any]:
    """The rate of ``corewise.predict``, and its memory as its parts are done."""
    import corewise

    clock: list[float] = []
    memory: list[int] = []

    def on_progress(progress: corewise.BulkProgress) -> None:
        clock.append(time.perf_counter())
        # Not its share of shared pages, for which the kernel looks through all of them: 1 % of the job's time.
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    result = corewise.predict(folder, lines, output, on_progress=on_progress)
    rate = (result.rows - result.failed) / (time.perf_counter() - clock[0])
    return {"per_s": rate, "failed": result.failed, "memory_bytes": memory[1:]}


def in_a_process(kind: str, *places: Path) -> dict[str, Any]:
    """What one of the functions above says, run in a process of its own."""
    code = f"import json, sys; from pathlib import Path; from bench.text_bulk import {kind}; "
    code += f"print(json.dumps({kind}(*map(Path, sys.argv[1:]))))"
    if kind == "from_files":
        for left in (places[-1], _failed(places[-1])):  # of the round before
            left.unlink(missing_ok=True)
    command = [sys.executable, "-c", code, *map(str, places)]
    said: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return said


def killed(folder: Path, lines: Path, output: Path, kills: int, seed: int) -> list[dict[str, Any]]:
    """Give the command and kill it at random moments, so often or until it ends by itself; what each kill found."""
    command = [sys.executable, "-m", "corewise.cli", "predict", str(folder), str(lines), "-o", str(output), "--quiet"]
    pauses, found = random.Random(seed), []
    parts = output.with_name(f"{output.name}.parts")
    for _ in range(kills):
        pause_s = pauses.uniform(*PAUSE_S)
        process = subprocess.Popen(command)
        time.sleep(pause_s)
        ended = process.poll()
        if ended is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        found.append({"pause_s": pause_s, "ended": ended, "parts_done": len(list(parts.glob("part-*.done")))})
        say(str(found[-1]))
        if ended is not None:
            break
    if not output.exists():
        subprocess.run(command, check=True)
    return found


def compare(whole: Path, resumed: Path, texts: Sequence[str]) -> dict[str, Any]:
    """What kills changed: rows that are missing, there twice or set aside otherwise, and the largest difference."""
    expected, made = parquet.read_table(whole), parquet.read_table(resumed)
    rows = made.column("row").to_numpy()
    good = [row for row, text in enumerate(texts) if text]
    failed = _failed(resumed)  # not there if no row was set aside
    lines = failed.read_text().splitlines() if failed.exists() else []
    aside = [json.loads(line)["row"] for line in lines]
    sound = np.array_equal(rows, good) and np.array_equal(rows, expected.column("row").to_numpy())
    return {
        "missing": len(set(good) - set(rows.tolist())),
        "twice": len(rows) - len(set(rows.tolist())),
        "foreign": len(set(rows.tolist()) - set(good)),
        "set_aside_as_expected": aside == [row for row, text in enumerate(texts) if not text],
        "largest_difference": float(np.abs(_vectors(made) - _vectors(expected)).max()) if sound else None,
    }


def _vectors(table: Any) -> np.ndarray:
    flat: np.ndarray = table.column("vector").combine_chunks().flatten().to_numpy()
    return flat.reshape(len(table), -1)


def _failed(output: Path) -> Path:
    return output.with_name(f"{output.stem}.failed.jsonl")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an artifact that makes vectors of texts")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)


def main(options: argparse.Namespace) -> None:
    """Measure, then kill. A number of 0 leaves that out; what the file of results has of it stays."""
    path = options.results / "text_bulk.json"
    sound = artifact.read(options.artifact)
    texts = texts_of(options.rows)
    with tempfile.TemporaryDirectory(prefix="corewise-bench-") as name:
        lines, whole = Path(name) / "texts.jsonl", Path(name) / "whole.parquet"
        lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        record: dict[str, Any] = {
            "rows": options.rows,
            "build": sound.manifest.build.label,
            "plan": sound.manifest.plan.label,
        }
        if options.rounds:
            turns = {
                "files": partial(in_a_process, "from_files", options.artifact, lines, whole),
                "memory": partial(in_a_process, "in_memory", options.artifact, lines),
            }
            rounds = alternate(options.rounds, turns)
            rates = {kind: [one["per_s"] for one in facts] for kind, facts in rounds.items()}
            memory = [one["memory_bytes"] for one in rounds["files"]]
            ratio = ratio_data(ratio_interval(rates["files"], rates["memory"]))
            record |= {"per_s": rates, "files_over_memory": ratio, "memory_bytes": memory}
            say(f"from files {ratio_words(ratio)} of the rate in memory; {rates}")
        elif options.kills:
            in_a_process("from_files", options.artifact, lines, whole)
        if options.kills:
            resumed = Path(name) / "resumed.parquet"
            kills = killed(options.artifact, lines, resumed, options.kills, options.seed)
            record |= {"kills": kills, "after_kills": compare(whole, resumed, texts)}
            say(str(record["after_kills"]))
    write_results(path, {**read_results(path), **record, **machine_facts()})
