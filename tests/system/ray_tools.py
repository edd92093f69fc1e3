"""A Ray of this machine that wants a token, with ports and a folder of its own."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from waiting import eventually, free_port

from bench.servers import descendants

TOKENS = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
RAY = Path(sys.executable).with_name("ray")
SETTINGS = {"RAY_metrics_report_interval_ms": "1000"}
"""Metrics that a test waits for come within a second instead of ten."""
OPTIONS = (
    "--include-dashboard=false",
    f"--object-store-memory={2**27}",
    "--disable-usage-stats",
    "--min-worker-port=0",
    "--max-worker-port=0",
)


class Cluster(NamedTuple):
    """The head's process, which brings all others, its address, and where its metrics are."""

    pid: int
    address: str
    metrics: str
    folder: Path
    """With the logs of its processes."""

    def processes(self, name: str) -> list[int]:
        """Those whose command line begins so."""
        found = []
        for pid in descendants(self.pid):
            with suppress(OSError):  # it has ended
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(name.encode()):
                    found.append(pid)
        return found

    @contextmanager
    def joined(self, cpus: int, core: int) -> Iterator[None]:
        """Another node, of one hardware thread, that claims ``cpus`` CPUs."""
        log = (self.folder / "joined.log").open("w+")
        start = ["taskset", "-c", str(core), str(RAY), "start", f"--address={self.address}", "--block"]
        node = subprocess.Popen(
            [*start, f"--num-cpus={cpus}", *OPTIONS[1:]],
            env={**os.environ, **TOKENS},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            assert eventually(lambda: "Ray runtime started" in Path(log.name).read_text(), 120)
            yield
        finally:
            log.close()
            for pid in descendants(node.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            node.wait(60)


@contextmanager
def started_ray(cpus: int, **environment: str) -> Iterator[Cluster]:
    """A cluster of one node that claims ``cpus`` CPUs, whatever the machine has; nothing of it stays."""
    port, client_port, metrics_port, agent_port = (free_port() for _ in range(4))
    folder = Path(tempfile.mkdtemp(prefix="cw-"))  # short: its sockets' paths may have 107 bytes
    log = (folder / "head.log").open("w+")
    start = [RAY, "start", "--head", "--block", f"--temp-dir={folder}/ray"]
    start += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--ray-client-server-port={client_port}"]
    start += [f"--metrics-export-port={metrics_port}", f"--dashboard-agent-listen-port={agent_port}"]
    head = subprocess.Popen(
        [*start, f"--num-cpus={cpus}", *OPTIONS],
        env={**os.environ, **TOKENS, **SETTINGS, **environment},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    family = [head.pid]
    try:
        until = time.monotonic() + 120
        while "Ray runtime started" not in (text := Path(log.name).read_text()) and time.monotonic() < until:
            assert head.poll() is None, text
            time.sleep(0.05)
        family = descendants(head.pid)
        yield Cluster(head.pid, f"127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}/metrics", folder)
        family += descendants(head.pid)
    finally:
        log.close()
        for pid in {*family}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        head.wait(60)
        shutil.rmtree(folder, ignore_errors=True)
