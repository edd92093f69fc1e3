"""What a server does when more is asked than it can do: answers in time, refusals, its health, and how it recovers.

    python -m bench overload tensors=digits.cw images=mobilenet_v2.cw texts=minilm.cw [--seconds 60]

Each KIND=ARTIFACT is served in turn. ``tensors`` sends one golden row a request, ``images`` JPEGs of each of
``--sides`` to .../classify, ``texts`` one sentence. The capacity is what a closed loop of ``--clients`` is answered per
second, before and after each load. The loads are requests at random times (a Poisson process) at each of
``--multiples`` of it, with a deadline of ``--deadline-ms``, from this process; another process asks for the server's
health every 20 ms, and for an answer every 100 ms, until 5 s after the load. The cores are shared by all: "cores used"
says how many of them each took during the load.
Writes overload.json: goodput is answers in time, and "recovered" the time from the load's end until all answers are.

``--peers`` puts LitServe, Ray Serve and FastAPI around each artifact of ``tensors`` too, as their own documentation has
it (for 224 x 224 images only). They know no deadlines, so what they answer is counted by when it comes. A peer is
started again for each load, because what one leaves behind would be part of the next.
"""

import argparse
import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.harness import ROOT, add_results, say
from bench.peers import Peer, requests_for
from bench.prober import HEALTH
from bench.servers import Server, descendants, golden_rows
from bench.wire import MODEL, Load, Read, Wire, from_base64, from_raw, infer, post, request
from corewise import artifact
from corewise.common.stats import quantile

AFTER_S = 5.0
"""The probes go on for so long."""
CALM = 10
"""So many answers in time in a row, and it has recovered."""
WARM_S = 2.0
ROWS = 16
"""Different images or texts."""
WORDS = (
    "the",
    "a",
    "small",
    "old",
    "server",
    "model",
    "answers",
    "reads",
    "waits",
    "for",
    "every",
    "text",
    "and",
    "while",
)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is sent, and how answers are read."""

    name: str
    folder: Path
    make: Callable[[float | None], list[bytes]]
    """The requests with a deadline in milliseconds."""
    expected: list[np.ndarray] | None
    """Of each request; ``None``: what the calm server answers."""
    read: Read
    peer: str | None = None
    """The package of the server; ``None``: corewise."""


PEERS = {"LitServe": "litserve", "Ray Serve": "ray", "FastAPI": "fastapi"}
HEALTH_OF = {None: HEALTH, "litserve": "/health", "ray": "/-/healthz", "fastapi": "/openapi.json"}
"""FastAPI has no such path: the cheapest that it answers by itself."""


def jpeg(side: int, seed: int) -> bytes:
    """A picture of soft shapes, as large for its pixels as photos are."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (max(2, side // 16), max(2, side // 16), 3), np.uint8)
    image = Image.fromarray(coarse).resize((side, side * 3 // 4), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def sentence(seed: int) -> str:
    """Some twelve words."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, 12))


def from_classes(body: bytes, size: int) -> np.ndarray:
    """The scores of .../classify."""
    return np.array([found["score"] for found in json.loads(body)["classes"]], np.float32)


def scenarios(kind: str, folder: Path, sides: list[int]) -> list[Scenario]:
    """Those of one artifact."""
    found = artifact.read(folder)
    if kind == "tensors":
        name, rows, expected = golden_rows(found)
        return [
            Scenario(
                name=f"{folder.stem} tensors",
                folder=folder,
                make=lambda deadline_ms: [request(name, row, deadline_ms) for row in rows],
                expected=expected,
                read=from_raw,
            )
        ]
    if kind == "texts":
        texts = [np.array([sentence(k)], object) for k in range(ROWS)]
        return [
            Scenario(
                name=f"{folder.stem} texts",
                folder=folder,
                make=lambda deadline_ms: [infer([("text", "BYTES", text)], deadline_ms) for text in texts],
                expected=None,
                read=from_raw,
            )
        ]
    return [_images(folder, side) for side in sides]


def around(scenario: Scenario, label: str, package: str) -> Scenario:
    """The same rows for another server around the same artifact."""
    name, rows, _ = golden_rows(artifact.read(scenario.folder))
    sent, _ = requests_for(package, name, rows, 0.0)
    return replace(
        scenario,
        name=f"{scenario.name}, {label}",
        make=lambda deadline_ms: sent,
        read=from_base64 if package == "litserve" else from_raw,
        peer=package,
    )


def _images(folder: Path, side: int) -> Scenario:
    pictures = [jpeg(side, k) for k in range(ROWS)]

    def make(deadline_ms: float | None) -> list[bytes]:
        limit = f"x-request-timeout-ms: {deadline_ms:g}\r\n" if deadline_ms else ""
        return [post(f"/v2/models/{MODEL}/classify", picture, limit) for picture in pictures]

    size = sum(map(len, pictures)) / len(pictures) / 1024
    return Scenario(
        name=f"{folder.stem} JPEGs of {side} pixels, {size:.0f} KB",
        folder=folder,
        make=make,
        expected=None,
        read=from_classes,
    )


def calm_answers(port: int, scenario: Scenario) -> list[np.ndarray]:
    """What the server answers to each request, one after the other."""
    answers: list[np.ndarray] = []

    def keep(body: bytes, size: int) -> np.ndarray:
        if scenario.read is from_raw:  # texts: the JSON part says how long the one output is
            head, _ = json.JSONDecoder().raw_decode(body.decode("latin-1"))
            size = head["outputs"][0]["parameters"]["binary_data_size"]
        answers.append(scenario.read(body, size))
        return answers[-1]

    for made in scenario.make(None):
        wire = Wire(port, [made], [np.zeros(1, np.float32)], None, _shaped(keep))
        with closing(wire):
            wire.closed(1, 0.0)
    return answers


def _shaped(keep: Read) -> Read:
    """As ``keep``, but what comes back has the shape that nothing is compared with."""

    def read(body: bytes, size: int) -> np.ndarray:
        keep(body, size)
        return np.zeros(1, np.float32)

    return read


def cpu_s(server: int) -> dict[str, float]:
    """User and system time of this process, of the server, and of its engine processes."""

    def seconds(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    _, *engines = descendants(server)
    return {"client": time.process_time(), "server": seconds(server), "engine": sum(map(seconds, engines))}


def probed(port: int, health: str, infer_request: bytes, seconds: float) -> "subprocess.Popen[bytes]":
    """The process that asks how the server is."""
    made = subprocess.Popen(
        [sys.executable, "-m", "bench.prober", str(port), str(seconds), "--health", health],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    assert made.stdin is not None
    made.stdin.write(infer_request)
    made.stdin.close()
    made.stdin = None
    return made


def recovered_s(probes: list[list[Any]], end_s: float, deadline_ms: float) -> float | None:
    """Seconds from the load's end to the first of ``CALM`` answers in time in a row; ``None`` if there are not."""
    after = [(when, status == 200 and ms <= deadline_ms) for when, kind, status, ms in probes if kind == "infer"]
    after = [each for each in after if each[0] >= end_s]
    for k in range(len(after) - CALM + 1):
        if all(good for _, good in after[k : k + CALM]):
            return float(after[k][0] - end_s)
    return None


def overload(
    server: Server | Peer, scenario: Scenario, wire: Wire, rate_per_s: float, options: argparse.Namespace
) -> dict[str, Any]:
    """One load, watched."""
    one = scenario.make(options.deadline_ms)[0]
    prober = probed(server.port, HEALTH_OF[scenario.peer], one, options.seconds + AFTER_S)
    before_s, start_s = cpu_s(server.process.pid), time.monotonic()
    load: Load = wire.open(rate_per_s, options.seconds)
    used_s = {name: after_s - before_s[name] for name, after_s in cpu_s(server.process.pid).items()}
    out, _ = prober.communicate()
    probes = json.loads(out)
    health_ms = [ms for when, kind, _, ms in probes if kind == "health" and start_s <= when < start_s + options.seconds]
    return {
        **load.facts(),
        "rate_per_s": rate_per_s,
        "in_time_per_s": load.in_time / options.seconds,
        "health_p50_ms": quantile(health_ms, 0.5) if health_ms else None,
        "health_p99_ms": quantile(health_ms, 0.99) if health_ms else None,
        "health_failed": sum(status != 200 for _, kind, status, _ in probes if kind == "health"),
        "recovered_s": recovered_s(probes, start_s + options.seconds, options.deadline_ms),
        "cores_used": {name: seconds / load.seconds for name, seconds in used_s.items()},
    }


@contextmanager
def started(scenario: Scenario) -> Iterator[Server | Peer]:
    """The scenario's server, ready."""
    if scenario.peer is None:
        with Server(scenario.folder) as server:
            yield server
        return
    peer = Peer(scenario.peer, scenario.folder.resolve())

    def answers() -> bool:
        with closing(Wire(peer.port, scenario.make(None), scenario.expected or [], None, scenario.read)) as wire:
            return wire.closed(1, 0.2).answered > 0

    try:
        peer.wait(answers)
        yield peer
    finally:
        peer.stop()


def measure(scenario: Scenario, options: argparse.Namespace) -> dict[str, Any]:
    """All loads of a scenario, each between two measurements of the capacity."""
    runs = [options.multiples] if scenario.peer is None else [[multiple] for multiple in options.multiples]
    loads = [load for multiples in runs for load in loaded(scenario, multiples, options)]
    return {"deadline_ms": options.deadline_ms, "seconds": options.seconds, "loads": loads}


def loaded(scenario: Scenario, multiples: list[float], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The loads of one server."""
    loads: list[dict[str, Any]] = []
    with started(scenario) as server:
        expected = scenario.expected or calm_answers(server.port, scenario)
        with (
            closing(Wire(server.port, scenario.make(None), expected, None, scenario.read)) as calm,
            closing(
                Wire(server.port, scenario.make(options.deadline_ms), expected, options.deadline_ms, scenario.read)
            ) as urgent,
        ):

            def capacity() -> float:
                load = calm.closed(options.clients, max(1.0, options.seconds / 4))
                return load.answered / load.seconds

            calm.closed(options.clients, WARM_S)
            before = capacity()
            for multiple in multiples:
                load = overload(server, scenario, urgent, multiple * before, options)
                after = capacity()
                # A peer still answers what nobody waits for any more.
                around_it = before if scenario.peer else (before + after) / 2
                loads.append({"multiple": multiple, "capacity_per_s": [before, after], **load})
                loads[-1]["goodput_of_capacity"] = load["in_time_per_s"] / around_it
                say(_line(loads[-1]))
                before = after
    return loads


def _line(load: dict[str, Any]) -> str:
    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} ms"

    recovered = load["recovered_s"]
    return (
        f"  x{load['multiple']:g}: {load['goodput_of_capacity']:.1%} of {load['capacity_per_s'][0]:.0f}/s in time; "
        f"refused {load['refused']} (p99 {ms(load['refusal_p99_ms'])}), dropped {load['dropped']}, "
        f"failed {load['failed']}, wrong {load['wrong']}; health p99 {ms(load['health_p99_ms'])}; "
        f"recovered {'not' if recovered is None else f'in {recovered:.1f} s'}; "
        f"cores used: {', '.join(f'{name} {used:.2f}' for name, used in load['cores_used'].items())}"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("served", nargs="+", metavar="KIND=ARTIFACT", help="tensors=, images= or texts=")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each load")
    parser.add_argument("--multiples", type=float, nargs="+", default=[1.2, 2.0, 5.0], metavar="X")
    parser.add_argument("--deadline-ms", type=float, default=500.0)
    parser.add_argument("--clients", type=int, default=16, help="of the closed loop")
    parser.add_argument("--sides", type=int, nargs="+", default=[224, 640, 1600], help="of the images, in pixels")
    parser.add_argument("--peers", action="store_true", help="other servers around the artifacts of tensors= too")


def main(options: argparse.Namespace) -> None:
    """Load each."""
    for told in options.served:
        kind, _, folder = told.partition("=")
        if kind not in ("tensors", "images", "texts") or not Path(folder).is_dir():
            sys.exit(f"{told!r} is not tensors=ARTIFACT, images=ARTIFACT or texts=ARTIFACT")
        asked = scenarios(kind, Path(folder), options.sides)
        if options.peers and kind == "tensors":
            asked += [around(asked[0], label, package) for label, package in PEERS.items()]
        for scenario in asked:
            say(scenario.name)
            if scenario.peer and importlib.util.find_spec(scenario.peer) is None:
                say(f"  {scenario.peer} is not installed")
                continue
            add_results(options.results / "overload.json", scenario.name, measure(scenario, options))
