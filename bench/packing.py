"""What packing is worth: ``predict`` with several texts in each row, beside the same artifact without, on MiniLM.

    python -m bench packing [--sets stsb cranfield] [--rounds 6] [--budget 2m]

``corewise optimize`` makes the artifact, and packs its texts only if that is faster for them. Both ways are then opened
in one process and take turns, strings to vectors. Writes packing.json, also where the artifact packs nothing.
"""

import argparse
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from bench.harness import add_results, alternate, optimize, ratio_data, ratio_words, say
from bench.text import MODEL, SETS, add_max_drop, known_lines
from corewise.artifact import PAYLOAD, Artifact, read
from corewise.artifact.texts import open_texts
from corewise.common.stats import ratio_interval
from corewise.engines import engine
from corewise.machine.inspect import inspect_cpu
from corewise.pipeline import TextRunner
from corewise.records.jsonable import to_json
from corewise.runtime.instances import open_plan, whole_calls


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both ways on one set, in turns."""
    found = SETS[name](options.sentences)
    folder: Path = options.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / "minilm.cw"
    shutil.rmtree(made, ignore_errors=True)
    judge = ("--metric", "cosine", "--max-drop", options.max_drop, "--budget", options.budget)
    optimize(made, f"st:{MODEL}", "--samples", str(known_lines(folder, found)), *judge)
    artifact = read(made)
    notes = [note for note in artifact.report.notes if "pack" in note.kind.value]
    record = {
        "texts": len(found.timed),
        "build": artifact.manifest.build.label,
        "plan": artifact.manifest.plan.label,
        "packing": to_json(artifact.manifest.packing),
        "notes": [to_json(note) for note in notes],
    }
    if artifact.manifest.packing is None:
        return record
    with ExitStack() as opened:
        packed, alone = (opened.enter_context(closing(runner)) for runner in runners(artifact, opened))
        vectors = [runner.predict(list(found.timed)) for runner in (packed, alone)]
        turns = {
            "packed": partial(rate, packed, found.timed),
            "alone": partial(rate, alone, found.timed),
        }
        rounds = alternate(options.rounds, turns)
    return {
        **record,
        "per_s": rounds,
        "packed_over_alone": ratio_data(ratio_interval(rounds["packed"], rounds["alone"])),
        "mean_cosine": float((vectors[0] * vectors[1]).sum(1).mean()),
    }


def runners(artifact: Artifact, opened: ExitStack) -> tuple[TextRunner, TextRunner]:
    """What answers the artifact's texts: as it is, packed from the first on, and without its packed program."""
    cpu, manifest = inspect_cpu(), artifact.manifest
    assert manifest.packing is not None
    opener = engine(manifest.build.engine)
    payload = artifact.folder / PAYLOAD
    session = opened.enter_context(closing(open_plan(opener, payload, manifest.build, manifest.plan, cpu)))
    ways = (replace(manifest.packing, opening_ms=0.0), None)
    artifacts = (replace(artifact, manifest=replace(manifest, packing=packing)) for packing in ways)
    made = [open_texts(each, whole_calls(session), manifest.plan, cpu) for each in artifacts]
    assert made[0] is not None
    assert made[1] is not None
    return made[0], made[1]


def rate(runner: TextRunner, texts: Sequence[str]) -> float:
    """Texts per second."""
    started_s = perf_counter()
    runner.predict(list(texts))
    return len(texts) / (perf_counter() - started_s)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("--sets", nargs="*", choices=tuple(SETS), default=list(SETS))
    parser.add_argument("--sentences", type=int, metavar="N", help="texts that are timed, drawn once (default: all)")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--budget", default="2m", help="of each search (default: 2m)")
    add_max_drop(parser)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/corewise-packing"), help="keeps the artifacts")


def main(options: argparse.Namespace) -> None:
    """Measure each set; the results of others in the file stay."""
    for name in options.sets:
        record = measure(name, options)
        add_results(options.results / "packing.json", name, record)
        if "per_s" not in record:
            say(f"{name}: texts are not packed")
            continue
        rates = ", ".join(f"{way} {median(rounds):.0f}/s" for way, rounds in record["per_s"].items())
        say(f"{name}: {rates}; packed is {ratio_words(record['packed_over_alone'])} of the other")
