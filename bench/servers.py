"""``corewise serve`` in a process of its own, and the requests that an artifact's golden samples make."""

import queue
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from bench.wire import MODEL, infer
from corewise.artifact import Artifact
from corewise.serving.protocol import datatype

START_S = 120.0


def serve_command(folder: Path, port: int, program: str = "corewise.cli") -> list[str]:
    """What serves the artifact; port 0 is any free one. ``program`` is a module that takes corewise's command line."""
    address = f"127.0.0.1:{port}"
    return [sys.executable, "-m", program, "serve", f"{MODEL}={folder}", "--http", address, "--trust"]


def descendants(pid: int) -> list[int]:
    """The process and everything that came from it and is alive."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
    family = [pid]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return family


def golden_rows(artifact: Artifact) -> tuple[str, list[np.ndarray], list[np.ndarray]]:
    """The name of the first input, its golden rows of shape (1, ...), and the flat output of each."""
    inputs, outputs = artifact.golden()
    rows = [np.ascontiguousarray(row)[None] for row in inputs[0]]
    return artifact.manifest.inputs[0].name, rows, [row.reshape(-1) for row in outputs[0]]


def golden_requests(artifact: Artifact) -> tuple[list[bytes], list[np.ndarray]]:
    """A request for each golden row, with all inputs, and the flat last output of each, with which answers end."""
    inputs, outputs = artifact.golden()
    names = [spec.name for spec in artifact.manifest.inputs]
    requests = [
        infer([(name, datatype(row), np.ascontiguousarray(row)[None]) for name, row in zip(names, rows, strict=True)])
        for rows in zip(*inputs, strict=True)
    ]
    return requests, [row.reshape(-1) for row in outputs[-1]]


class Server:
    """``corewise serve``, ready; a context manager that ends it."""

    def __init__(self, folder: Path, *more: str, cgroup: Path | None = None, program: str = "corewise.cli") -> None:
        """``more`` are further options of the command line; the server runs in ``cgroup``."""
        start_s = time.monotonic()
        command = [*serve_command(folder.resolve(), 0, program), *more]
        if cgroup is not None:
            command = ["sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec "$@"', str(cgroup), *command]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.ports: dict[str, int] = {}
        try:
            self.port = self._wait()
        except queue.Empty:
            self.process.kill()
            self.process.wait()
            raise TimeoutError(f"the server of {folder} was not ready within {START_S:g} s") from None
        self.ready_s = time.monotonic() - start_s

    def _wait(self) -> int:
        """The port, once the server says that the model is ready."""
        lines: queue.Queue[str] = queue.Queue()
        stream = self.process.stdout
        assert stream is not None

        def read() -> None:
            for line in stream:
                lines.put(line)
            lines.put("")

        def next_line() -> str:
            if not (line := lines.get(timeout=START_S)):
                raise RuntimeError(f"the server ended with {self.process.wait()} before it was ready")
            return line

        threading.Thread(target=read, daemon=True).start()
        for part in next_line().removeprefix("listening: ").split(", "):
            name, _, number = part.partition(" on port ")
            self.ports[name] = int(number)
        while not next_line().startswith("ready:"):
            pass
        return self.ports["http"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait(60)

    def memory_bytes(self) -> int:
        """Resident, of the server and its engine process."""
        sizes = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in descendants(self.process.pid)]
        return sum(int(size.split("Pss:")[1].split()[0]) * 1024 for size in sizes)
