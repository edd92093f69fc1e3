"""The engine process: opens an artifact's payload, proves it, and runs calls that come through shared memory.

Started by ``remote.Remote`` as ``python -m corewise.serving.child FD``. On that socket comes one JSON line, which says
what to open and names a socket and a piece of shared memory for each instance; one JSON line goes back when all is
open, proven and warm, or why not. Then each instance answers calls on its socket until it is closed.
"""

import ctypes
import json
import mmap
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from corewise import artifact
from corewise.artifact.format import golden_pixels
from corewise.artifact.texts import open_packed
from corewise.common.errors import ArtifactError, CorewiseError
from corewise.common.references import describe
from corewise.engines import Session, engine
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Plan
from corewise.records.cpu import Cpu
from corewise.records.jsonable import from_json
from corewise.runtime.instances import Instances, open_layouts

ALIGNED = 64
KEPT_BYTES = 32 * 2**20
"""Shared memory that an instance keeps from call to call."""


class Slot:
    """A piece of memory that two processes share, for the arrays of one call at a time.

    Raises ``ValueError`` where it is used after it was closed.
    """

    def __init__(self, handle: int) -> None:
        self._file = FileIO(handle, "r+")
        self._size = 0
        self._memory: mmap.mmap | None = None

    def fileno(self) -> int:
        """The file descriptor, to be handed to another process."""
        return self._file.fileno()

    def write(self, arrays: Sequence[np.ndarray], after: Sequence[Any] = ()) -> list[Any]:
        """Copy arrays into it, which grows as they need; returns where they are, for ``read`` of the other side.

        ``after`` is where arrays lie that must stay: outputs may be views of inputs.
        """
        places, end = [], -(-max(map(_end, after), default=0) // ALIGNED) * ALIGNED
        for array in arrays:
            places.append([array.dtype.str, list(array.shape), end])
            end += -(-array.nbytes // ALIGNED) * ALIGNED
        self._fit(end)
        for array, view in zip(arrays, self.read(places), strict=True):
            np.copyto(view, array)
        return places

    def read(self, places: Sequence[Any]) -> list[np.ndarray]:
        """The arrays as they lie there, until the next ``write`` of either side."""
        size = max(map(_end, places), default=0)
        self._fit(size)
        memory = self._memory
        if memory is None:
            if size:
                raise ValueError("the slot was closed")
            return [np.empty(shape, dtype) for dtype, shape, _ in places]
        return [np.ndarray(shape, dtype, memory, at) for dtype, shape, at in places]

    def forget(self, places: Sequence[Any]) -> None:
        """Give back the memory of a call that took much and is over; ``places`` are those of its last arrays."""
        memory = self._memory
        if memory is not None and max(map(_end, places), default=0) > KEPT_BYTES:
            with suppress(OSError):  # some sandboxes cannot
                memory.madvise(mmap.MADV_REMOVE)  # the mappings of both sides stay as they are

    def close(self) -> None:
        """Give it back."""
        self._size, self._memory = 0, None
        self._file.close()

    def _fit(self, size: int) -> None:
        if size <= self._size:
            return
        handle = self._file.fileno()
        if os.fstat(handle).st_size < size:
            os.ftruncate(handle, size)
        # The old mapping goes when the last array in it does.
        self._size = os.fstat(handle).st_size
        self._memory = mmap.mmap(handle, self._size)


def _end(place: Any) -> int:
    dtype, shape, at = place
    return int(at + np.dtype(dtype).itemsize * prod(shape))


class Line:
    """JSON lines over a socket."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self._lines = channel.makefile("rb")

    def send(self, message: dict[str, Any]) -> None:
        """Raises ``OSError`` where the other side is gone."""
        self.channel.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message; ``None`` where the other side is gone. Raises ``TimeoutError``."""
        try:
            line = self._lines.readline()
        except ConnectionError:
            return None
        found: dict[str, Any] | None = json.loads(line) if line.endswith(b"\n") else None
        return found

    def close(self) -> None:
        """Tell the other side that there is no more."""
        with suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)
        self._lines.close()
        self.channel.close()


class _Opened:
    """One instance as a session, for checking golden outputs."""

    def __init__(self, instances: Instances, number: int) -> None:
        self._instances, self._number = instances, number

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self._instances.run(self._number, inputs)

    def close(self) -> None:
        """The instances are closed together."""


def _open(request: dict[str, Any]) -> list[Instances]:
    """The artifact's instances, each proven and warm, and those of its packed program if that is asked for."""
    folder = Path(request["folder"])
    found = artifact.read(folder)
    if artifact.identity(folder) != request["identity"]:
        raise ArtifactError(f"{folder} is another artifact now than when the server opened it", "reload the model")
    plan = from_json(Plan, request["plan"])
    wide = None if request["wide"] is None else from_json(Plan, request["wide"])
    build = found.manifest.build
    cpu = inspect_cpu()
    instances = open_layouts(engine(build.engine), found.folder / artifact.PAYLOAD, build, plan, cpu, wide)
    for number in range(len(instances)):
        artifact.check_golden(found, _Opened(instances, number))
    golden, _ = found.golden()
    # Engines compile for a size when they first meet it.
    for size in sorted({*(2**k for k in range(plan.batch.bit_length())), plan.batch}):
        for given in filter(None, (golden, golden_pixels(found))):
            rows = np.resize(np.arange(len(given[0])), size)
            inputs = [np.ascontiguousarray(array[rows]) for array in given]
            instances.each(partial(_run, inputs))
    return [instances, _open_packed(found, plan, cpu)] if request["packed"] else [instances]


def _open_packed(found: artifact.Artifact, plan: Plan, cpu: Cpu) -> Instances:
    packing = found.manifest.packing
    assert packing is not None  # or it would not be asked for
    instances = open_packed(found, packing, plan, cpu, open_layouts)
    for number in range(len(instances)):
        artifact.check_packed_golden(found, _Opened(instances, number))
    golden, _ = found.packed_golden()
    for size in range(1, packing.rows + 1):
        rows = np.resize(np.arange(len(golden[0])), size)
        instances.each(partial(_run, [np.ascontiguousarray(array[rows]) for array in golden]))
    return instances


def _run(inputs: Sequence[np.ndarray], session: Session) -> None:
    session.run(inputs)


def _answer(channels: Sequence[tuple[Line, Slot]], number: int, session: Session) -> None:
    """Answer one call after the other until the channel is closed.

    This takes the instance's own thread for the rest of its life: handing each call over to it would cost latency.
    """
    line, slot = channels[number]
    while (call := line.receive()) is not None:
        try:
            outputs = session.run(slot.read(call["inputs"]))
            message: dict[str, Any] = {"outputs": slot.write(outputs, call["inputs"])}
        except Exception as error:  # noqa: BLE001 - the request boundary: what an engine raises is the call's answer
            message = {"error": describe(error)}
        try:
            line.send(message)
        except OSError:
            return


def main(handle: int) -> None:
    """Open, prove, tell, and serve until the other side is gone."""
    control = Line(socket.socket(fileno=handle))
    request = control.receive()
    if request is None:
        return
    try:
        opened = _open(request)
    except Exception as error:  # noqa: BLE001 - the request boundary: whatever opening raises is the answer
        with suppress(OSError):
            control.send({"error": str(error) if isinstance(error, CorewiseError) else describe(error)})
        return
    channels = [(Line(socket.socket(fileno=channel)), Slot(memory)) for channel, memory in request["channels"]]
    for instances in opened:
        instances.start_each(partial(_answer, channels[: len(instances)]))
        channels = channels[len(instances) :]
    with suppress(OSError):
        control.send({"ready": True})
        control.receive()  # until it is closed


if __name__ == "__main__":
    # It must not outlive a server that was killed: prctl(PR_SET_PDEATHSIG, SIGKILL), see prctl(2).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    # What ends the server is the server's to handle, though a process manager tells us too: what was accepted is
    # finished first. This process ends with its socket.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    main(int(sys.argv[1]))
