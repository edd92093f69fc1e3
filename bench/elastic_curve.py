"""Latency over load, over HTTP, in one picture: an elastic plan, its layouts alone, OpenVINO's hints, and LitServe.

    python -m bench elastic_curve ARTIFACT... [--rounds 2] [--seconds 4] [--texts FILE]
    python -m bench elastic_curve --draw

The client is this process; each server has processes of its own and the same cores, and all take turns, in rounds:

- ``corewise serve`` with the elastic plan, and with each layout of it alone;
- OpenVINO as its Model Server runs it, with the hint LATENCY and with THROUGHPUT, behind the same front: the same
  server, but without calls that requests share (``peer_openvino.py``);
- LitServe around ``corewise.load`` of the same artifact (``peer_litserve.py``), installed in ``--environment``.

One client (idle) and two full calls for each instance (saturated) load the three ways; requests at random times at
``--shares`` of the better layout's saturated rate load all. A server that falls behind gets no higher rate. Requests
are the golden rows, or the lines of ``--texts``. Writes elastic-curve.json, with rate, p50 and p99 of each and the
elastic plan's over those of the better layout, and elastic-curve-NAME.svg; ``--draw`` draws them from the JSON again.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.elastic_loads import Served, in_turns, over_the_better, say_loads
from bench.elastic_picture import Series, picture
from bench.elastic_plans import ELASTIC, MEASURE_S, WAYS, Subject, add_artifacts, copies, subject_of, tune
from bench.harness import TIMEOUT_S, add_results, read_results, say, versions
from bench.overload import Scenario, calm_answers
from bench.peer_openvino import HINTS, hinted_plan
from bench.peers import Peer, python_with, requests_for, version_in
from bench.servers import Server, golden_requests, golden_rows
from bench.wire import Wire, from_base64, from_raw, infer
from corewise.artifact import MANIFEST, digest
from corewise.artifact.open import golden_samples
from corewise.common.errors import CorewiseError
from corewise.records.build import Plan
from corewise.records.measurement import Measurement
from corewise.runtime.client import Worker

Asked = tuple[list[bytes], list[np.ndarray]]
"""Requests, and the flat answer to each."""
LITSERVE = "LitServe, the artifact"
OPENVINO = {hint: f"OpenVINO, {hint}" for hint in HINTS}
SERIES = (
    *(Series(name, key, "chosen" if name == ELASTIC else "other") for name, key in zip(WAYS, "ABC", strict=True)),
    *(Series(name, key, "baseline") for name, key in zip(OPENVINO.values(), "DE", strict=True)),
    Series(LITSERVE, "F", "rejected"),
)


def requests_of(subject: Subject, port: int, texts: list[str]) -> Asked:
    """The golden rows, or texts, whose answers are what the server on that port says when it is idle."""
    if not texts:
        return golden_requests(subject.artifact)
    requests = [infer([("text", "BYTES", np.array([text], object))]) for text in texts]
    calm = Scenario(name="", folder=subject.artifact.folder, make=lambda _: requests, expected=None, read=from_raw)
    return requests, calm_answers(port, calm)


def with_hint(place: Path, subject: Subject, hint: str) -> Path:
    """The artifact as one of the engine with that hint, and measured with it. Raises as ``hinted_plan``."""
    folder = place / f"{hint}.cw"
    shutil.copytree(subject.artifact.folder, folder)
    content = json.loads((folder / MANIFEST).read_text())
    del content["digest"]
    content["build"]["engine"] = HINTS[hint]
    (folder / MANIFEST).write_text(json.dumps({**content, "digest": digest(content)}))
    plan = hinted_plan(subject.payload, subject.artifact.manifest.build, hint, subject.cpu.usable_cores)
    tune(folder, subject, plan, (_measured(place, subject, hint, plan),))
    return folder


def _measured(place: Path, subject: Subject, hint: str, plan: Plan) -> Measurement:
    """Calls of one row; admission asks for their time."""
    golden_samples(subject.artifact).save(samples := place / f"{hint}.safetensors")
    with Worker(cpu=subject.cpu, log=place / f"{hint}.log", timeout_s=TIMEOUT_S) as worker:
        worker.open(subject.payload, replace(subject.artifact.manifest.build, engine=HINTS[hint]), plan)
        return worker.measure(samples, plan, MEASURE_S)


@contextmanager
def openvino(place: Path, subject: Subject, hint: str, asked: Asked) -> Iterator[Wire]:
    """Corewise's server around OpenVINO with a hint."""
    folder = with_hint(place, subject, hint)
    with Server(folder, program="bench.peer_openvino") as server, closing(Wire(server.port, *asked, None)) as wire:
        yield wire


@contextmanager
def litserve(subject: Subject, folder: Path, environment: Path) -> Iterator[Wire]:
    """LitServe around the elastic artifact in ``folder``. Raises ``RuntimeError`` if it does not run."""
    spec = subject.artifact.manifest.inputs
    if len(spec) > 1 or spec[0].dtype != "float32" or None in spec[0].shape[1:]:
        raise RuntimeError("its requests here are one float32 input of a fixed shape")
    name, rows, expected = golden_rows(subject.artifact)
    requests, _ = requests_for("litserve", name, rows, 0.0)
    peer = Peer("litserve", folder, python_with("litserve", environment))
    try:
        with closing(Wire(peer.port, requests, expected, None, from_base64)) as wire:
            peer.wait(lambda: wire.closed(1, 0.2).answered > 0)
            yield wire
    finally:
        peer.stop()


def peers(subject: Subject, place: Path, folder: Path, options: argparse.Namespace, asked: Asked) -> dict[str, Any]:
    """What opens each other server; ``folder`` holds the elastic artifact."""
    if options.alone:
        return {}
    hints = {name: openvino(place, subject, hint, asked) for hint, name in OPENVINO.items()}
    return {**hints, LITSERVE: litserve(subject, folder, options.environment)}


def measure(subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """All loads on all servers."""
    texts = options.texts.read_text().splitlines() if options.texts else []
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="corewise-bench-")))
        folders = stack.enter_context(copies(subject))
        ports = {name: stack.enter_context(Server(folder)).port for name, folder in folders.items()}
        asked = requests_of(subject, ports[ELASTIC], texts)
        served = partial(Served, crowd=subject.crowd, seconds=options.seconds)
        wires = {name: stack.enter_context(closing(Wire(port, *asked, None))) for name, port in ports.items()}
        ways, others = {name: served(wire) for name, wire in wires.items()}, {}
        for name, peer in peers(subject, place, folders[ELASTIC], options, asked).items():
            try:
                others[name] = served(stack.enter_context(peer))
            except (CorewiseError, RuntimeError, OSError, ValueError) as error:
                left_out[name] = " ".join(str(error).split())
                say(f"  {name} is left out: {left_out[name]}")
        shares = {f"{share:.0%}": share for share in options.shares}
        loads = in_turns(options.rounds, ways, others, shares)
    installed = {"litserve": version_in(options.environment, "litserve")} if LITSERVE in others else {}
    return {
        **subject.facts,
        "seconds": options.seconds,
        "shares": shares,
        "texts": len(texts),
        "peers": {**versions(("openvino",)), **installed},
        "left_out": left_out,
        "loads": loads,
        "over": over_the_better(loads),
    }


def draw(results: Path, name: str, record: Mapping[str, Any]) -> None:
    """Write the picture of one artifact."""
    path = results / f"elastic-curve-{name}.svg"
    words = {name: f"corewise, {record['layouts'].get(name, name)}" for name in WAYS}
    series = [one._replace(words=words.get(one.name, one.name)) for one in SERIES]
    path.write_text(picture(series, record["loads"], record["shares"]))
    say(f"drawn to {path}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    add_artifacts(parser, rounds=2, seconds=4.0, nargs="*")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 1 / 3, 2 / 3, 0.9], metavar="SHARE")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="a text a line, for an artifact that takes texts")
    parser.add_argument("--alone", action="store_true", help="without the other servers")
    parser.add_argument("--environment", type=Path, default=Path("/tmp/corewise-litserve"), metavar="FOLDER")
    parser.add_argument("--draw", action="store_true", help="only draw what was measured")


def main(options: argparse.Namespace) -> None:
    """Measure and draw; the results of other artifacts stay."""
    path = options.results / "elastic-curve.json"
    if options.draw:
        for name, record in read_results(path).items():
            draw(options.results, name, record)
        return
    if not options.artifacts:
        sys.exit("give an artifact, or --draw")
    for folder in options.artifacts:
        subject = subject_of(folder)
        record = measure(subject, options)
        add_results(path, subject.name, record)
        draw(options.results, subject.name, record)
        say_loads(record["loads"], record["over"])
