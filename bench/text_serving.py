"""Requests of one short text per second, by OpenAI's client: corewise beside FastAPI and infinity.

    python -m bench text_serving [--clients 32] [--rounds 4] [--seconds 8]

MiniLM with its real weights on the sentences of STS-B. All servers are up and take turns: ``corewise serve``, FastAPI
around sentence-transformers with OpenVINO's static int8, and ``infinity-emb`` with PyTorch in an environment of its
own; what does not install or start is left out with the reason. At last corewise answers requests of 2,000 texts beside
the short ones. The clients run in two processes on the same cores. Artifact, exports and environments are those of
``text`` in ``--folder``.
"""

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, NamedTuple, Self

import openai

from bench.harness import ROOT, alternate, machine_facts, ratio_data, ratio_words, say, write_results
from bench.peers import free_port
from bench.servers import START_S, Server, descendants
from bench.text import MODEL, add_max_drop, artifact_of, exported, known_lines, peer_versions, peers_python, stsb
from bench.wire import MODEL as NAME
from corewise.common.stats import quantile, ratio_interval

BULK_TEXTS = 2000
WARM_S = 2.0
PROCESSES = 2
"""Of the clients."""
TORCH = f"torch=={version('torch').partition('+')[0]}"
# infinity-emb asks for typer 0.12, which does not work with click 8.2.
INFINITY = ("infinity-emb[torch,server]", "click<8.2")


class PeerServer:
    """A peer in a process of its own; a context manager."""

    def __init__(self, command: Sequence[str], port: int, log: Path) -> None:
        self.port = port
        with log.open("ab") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)

    def wait(self, text: str) -> None:
        """Until it answers. Raises ``RuntimeError`` if it does not."""
        until_s = time.monotonic() + START_S
        with client_of(openai.OpenAI, self.port) as client:
            while time.monotonic() < until_s and self._process.poll() is None:
                try:
                    client.embeddings.create(model=NAME, input=text)
                except openai.APIError:
                    time.sleep(0.5)
                else:
                    return
        raise RuntimeError(f"it ended with {self._process.poll()} or did not answer in {START_S:g} s")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        family = descendants(self._process.pid)
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            subprocess.run(["kill", "-9", *map(str, family)], check=False)
            self._process.wait()


def client_of(kind: Any, port: int) -> Any:
    """OpenAI's client of a local server, without retries."""
    return kind(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)


class Answered(NamedTuple):
    """What clients of one process got."""

    latencies_ms: list[float]
    failed: int
    cpu_s: float
    """What the clients themselves took of a core."""


async def clients_of(port: int, texts: Sequence[str], clients: int, seconds: float) -> Answered:
    """So many clients that each ask for one text after the other, for so long."""
    latencies_ms: list[float] = []
    failed, numbers = 0, count()
    async with client_of(openai.AsyncOpenAI, port) as client:
        until_s, busy_s = time.monotonic() + seconds, time.process_time()

        async def ask() -> None:
            nonlocal failed
            while (started_s := time.monotonic()) < until_s:
                try:
                    await client.embeddings.create(model=NAME, input=texts[next(numbers) % len(texts)])
                except openai.APIError:
                    failed += 1
                    await asyncio.sleep(0.01)
                else:
                    latencies_ms.append(1e3 * (time.monotonic() - started_s))

        await asyncio.gather(*(ask() for _ in range(clients)))
        return Answered(latencies_ms, failed, time.process_time() - busy_s)


def wait_for_clients(port: int, texts: Sequence[str], clients: int, seconds: float) -> Answered:
    """``clients_of`` for code that does not wait."""
    return asyncio.run(clients_of(port, texts, clients, seconds))


def load(
    processes: ProcessPoolExecutor, port: int, texts: Sequence[str], clients: int, seconds: float
) -> dict[str, Any]:
    """So many clients in ``PROCESSES`` processes: one alone would be the slowest part, as its threads share a lock."""
    shares = [clients * (k + 1) // PROCESSES - clients * k // PROCESSES for k in range(PROCESSES)]
    running = [processes.submit(wait_for_clients, port, texts[k:], share, seconds) for k, share in enumerate(shares)]
    found = [one.result() for one in running]
    latencies_ms = [ms for one in found for ms in one.latencies_ms]
    return {
        "answered_per_s": len(latencies_ms) / seconds,
        "p50_ms": median(latencies_ms),
        "p99_ms": quantile(latencies_ms, 0.99),
        "failed": sum(one.failed for one in found),
        "client_cores": sum(one.cpu_s for one in found) / seconds,
    }


def ask_for_many(port: int, texts: Sequence[str], seconds: float) -> list[float]:
    """The seconds of requests of all texts at once, one after the other for so long."""
    took_s = []
    patience = {"x-request-timeout-ms": "60000"}
    with client_of(openai.OpenAI, port) as client:
        until_s = time.monotonic() + seconds
        while (started_s := time.monotonic()) < until_s:
            client.embeddings.create(model=NAME, input=list(texts), extra_headers=patience)
            took_s.append(time.monotonic() - started_s)
    return took_s


def beside_bulk(
    processes: ProcessPoolExecutor, port: int, texts: Sequence[str], clients: int, seconds: float
) -> dict[str, Any]:
    """``load`` while another process asks for ``BULK_TEXTS`` at once."""
    many = [texts[k % len(texts)] for k in range(BULK_TEXTS)]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(ask_for_many, port, many[:1], 0.0).result()
        bulk = pool.submit(ask_for_many, port, many, seconds)
        found = load(processes, port, texts, clients, seconds)
        return {**found, "bulk_s": bulk.result()}


def infinity_command(folder: Path, port: int) -> list[str]:
    """What starts infinity, installed if it is not there. Raises ``RuntimeError`` where that fails."""
    place = folder / "infinity"
    whole = place / ".complete"
    if not whole.exists():
        say(f"making infinity's environment {place}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        python = str(place / "bin" / "python")
        uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python]
        for command in ([python, "-m", "pip", "install", "--quiet", TORCH], [*uv, *INFINITY, TORCH]):
            ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if ended.returncode:
                raise RuntimeError(f"infinity-emb does not install: {ended.stdout.strip().splitlines()[-1]}")
        whole.touch()
    options = ["--model-id", str(MODEL), "--served-model-name", NAME, "--engine", "torch", "--device", "cpu"]
    address = ["--host", "127.0.0.1", "--port", str(port), "--url-prefix", "/v1", "--no-bettertransformer"]
    return [str(place / "bin" / "infinity_emb"), "v2", *options, *address]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All servers in alternating rounds."""
    folder: Path = options.folder
    found = stsb(None)
    folder.mkdir(parents=True, exist_ok=True)
    python = peers_python(folder)
    (folder / "stsb").mkdir(exist_ok=True)
    known = known_lines(folder / "stsb", found)
    exports = exported(python, folder)
    artifact = artifact_of(folder / "stsb", known, options.budget, options.max_drop)
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        processes = stack.enter_context(ProcessPoolExecutor(PROCESSES, get_context("spawn")))
        ports = {"corewise": stack.enter_context(Server(artifact)).port}
        commands = {
            "FastAPI, OpenVINO int8": lambda port: [
                str(python),
                str(ROOT / "bench" / "peer_texts.py"),
                str(exports),
                str(port),
            ],
            "infinity": lambda port: infinity_command(folder, port),
        }
        for name, command in commands.items():
            port = free_port()
            try:
                peer = stack.enter_context(PeerServer(command(port), port, folder / f"{name.split(',')[0]}.log"))
                peer.wait(found.timed[0])
            except RuntimeError as error:
                left_out[name] = str(error)
                say(f"{name}: {error}")
            else:
                ports[name] = port
        for port in ports.values():
            load(processes, port, found.timed, options.clients, min(WARM_S, options.seconds))
        turns = {
            name: partial(load, processes, port, found.timed, options.clients, options.seconds)
            for name, port in ports.items()
        }
        rounds = alternate(options.rounds, turns)
        beside = beside_bulk(processes, ports["corewise"], found.timed, options.clients, options.seconds)
    rates = {name: [one["answered_per_s"] for one in facts] for name, facts in rounds.items()}
    over = {name: ratio_data(ratio_interval(rates["corewise"], rates[name])) for name in rates if name != "corewise"}
    return {
        "clients": options.clients,
        **machine_facts(),
        "peers": peer_versions(python),
        "left_out": left_out,
        "rounds": rounds,
        "over": over,
        "beside_bulk": beside,
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each round (default: 8)")
    parser.add_argument("--budget", default="2m", help="of optimize (default: 2m)")
    add_max_drop(parser)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/corewise-text"), help="keeps what the next run needs")


def main(options: argparse.Namespace) -> None:
    """Put all servers under load."""
    record = measure(options)
    write_results(options.results / "text_serving.json", record)
    for name, facts in record["rounds"].items():
        rate = median(one["answered_per_s"] for one in facts)
        p99_ms, failed = median(one["p99_ms"] for one in facts), sum(one["failed"] for one in facts)
        ratio = f", corewise is {ratio_words(record['over'][name])} of it" if name in record["over"] else ""
        say(f"{name:24s} {rate:8.1f}/s, p99 {p99_ms:6.1f} ms, {failed} failed{ratio}")
    beside = record["beside_bulk"]
    say(f"beside {len(beside['bulk_s'])} requests of {BULK_TEXTS} texts: p99 {beside['p99_ms']:.1f} ms")
