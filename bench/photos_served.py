"""JPEG files sent to the server by clients, beside ``predict`` on the same files.

    python -m bench photos_served [MODEL ...] [--seconds 10]

Takes the photos and artifacts that ``python -m bench photos`` made. For each size: the rate of ``predict``, in a
process of its own, before and after the load; then 8 clients, each of which sends its next photo to .../classify when
it has its answer, while another process asks for the server's health every 20 ms; and the server's memory. Last, 64
clients send photos of 12 megapixels to a server in a cgroup of ``--memory-mib``. All share the cores.
"""

import argparse
import json
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bench.cgroups import MemoryCgroup
from bench.harness import add_results, say
from bench.overload import probed
from bench.photos import MODELS, SIZES, asked_photos, listed, preprocess_of, run
from bench.prober import HEALTH, get
from bench.servers import Server
from bench.wire import MODEL, Load, Wire, post
from corewise.common.stats import quantile

CLIENTS, MANY = 8, 64
PARTS = 4
"""Of a load; memory is read after each."""
WARM_S = 1.0


def top_class(body: bytes, size: int) -> np.ndarray:
    """The number of the first class, from 1."""
    return np.array([json.loads(body)["classes"][0]["class"] + 1], np.float32)


def wired(server: Server, files: Sequence[Path], classes: Sequence[int]) -> Wire:
    """Sends the files to a server, and compares the answers with ``classes``."""
    requests = [post(f"/v2/models/{MODEL}/classify", file.read_bytes()) for file in files]
    return Wire(server.port, requests, [np.array([k + 1], np.float32) for k in classes], None, top_class)


def under_load(server: Server, wire: Wire, clients: int, seconds: float) -> dict[str, Any]:
    """A closed loop in parts, the server's health meanwhile, and its memory after each part."""
    wire.closed(clients, WARM_S)
    prober, loads, memory = probed(server.port, HEALTH, get(HEALTH), seconds), [], [server.memory_bytes()]
    for _ in range(PARTS):
        loads.append(wire.closed(clients, seconds / PARTS))
        memory.append(server.memory_bytes())
    health_ms = [ms for _, _, status, ms in json.loads(prober.communicate()[0]) if status == 200]
    total = Load(seconds=sum(load.seconds for load in loads))
    for load in loads:
        for name in ("offered", "answered", "refused", "dropped", "failed", "wrong", "in_time"):
            setattr(total, name, getattr(total, name) + getattr(load, name))
        total.latencies_ms += load.latencies_ms
    health = {"health_p50_ms": quantile(health_ms, 0.5), "health_p99_ms": quantile(health_ms, 0.99)}
    return {**total.facts(), **health, "probes": len(health_ms), "memory_bytes": memory}


def measure(model: str, size: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model, one size."""
    folder, artifact = asked_photos(size, options), options.folder / f"{model}.cw"
    predict = partial(run, "corewise", artifact, folder, preprocess_of(MODELS[model]))
    before = predict()
    with Server(artifact) as server, closing(wired(server, listed(folder)[0], before["classes"])) as wire:
        load = under_load(server, wire, CLIENTS, options.seconds)
    predicted = [before["per_s"], predict()["per_s"]]
    return {
        "clients": CLIENTS,
        **load,
        "predict_per_s": predicted,
        "of_predict": load["answered_per_s"] / float(np.mean(predicted)),
        "files": len(before["classes"]),
    }


def crowded(model: str, classes: Sequence[int], options: argparse.Namespace) -> dict[str, Any]:
    """Photos of 12 megapixels from many clients, within a limit that the kernel holds."""
    files, limit_bytes = listed(asked_photos("12mp", options))[0], options.memory_mib * 2**20
    with (
        MemoryCgroup("corewise-photos", limit_bytes) as group,
        Server(options.folder / f"{model}.cw", cgroup=group.path) as server,
        closing(wired(server, files, classes)) as wire,
    ):
        load = under_load(server, wire, MANY, options.seconds)
        facts = group.facts()
    return {"clients": MANY, "limit_bytes": limit_bytes, **load, **facts}


def words(record: dict[str, Any]) -> str:
    """A record for people."""
    memory = [round(size / 2**20) for size in record["memory_bytes"]]
    grown = max(later - earlier for earlier, later in pairwise(memory))
    share = f" ({record['of_predict']:.2f} of predict)" if "of_predict" in record else ""
    limit = f", limit {record['limit_bytes'] / 2**20:.0f} MiB, killed {record['killed']}" if "killed" in record else ""
    return (
        f"{record['clients']} clients: {record['answered_per_s']:.1f}/s{share}, wrong {record['wrong']}, refused "
        f"{record['refused'] + record['dropped']}, failed {record['failed']}; health p99 {record['health_p99_ms']:.1f} "
        f"ms; memory {memory} MiB, at most {grown} more a part{limit}"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("models", nargs="*", metavar="MODEL", default=["mobilenet_v2"], help="default: mobilenet_v2")
    parser.add_argument("--sizes", nargs="*", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--photos", type=int, default=300, help="photos of the sets (default: 300)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load (default: 10)")
    parser.add_argument("--memory-mib", type=int, default=1536, help="of the server with many clients (default: 1536)")
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/corewise-photos"), help="where python -m bench photos keeps its files"
    )


def main(options: argparse.Namespace) -> None:
    """Serve each model, each size."""
    path = options.results / "photos_served.json"
    for model in options.models:
        for size in options.sizes:
            record = measure(model, size, options)
            add_results(path, f"{model} {size}", record)
            say(f"{model} {size}, {words(record)}")
        folder = asked_photos("12mp", options)
        classes = run("corewise", options.folder / f"{model}.cw", folder, preprocess_of(MODELS[model]))["classes"]
        record = crowded(model, classes, options)
        add_results(path, f"{model} 12mp crowded", record)
        say(f"{model} 12mp, {words(record)}")
