"""What a server's process would spend on a request if other processes read it: the hand-over, beside HTTP and gRPC.

    python -m bench handover ARTIFACT [--clients 16] [--rounds 4] [--seconds 3]

ARTIFACT has one float32 input. In each round closed loops of ``--clients`` send golden rows over HTTP and over gRPC to
``corewise serve``; then two processes that stand for fronts send the same rows to a process with the same queue and
the same engine process, through shared memory: a message over a unix socket names the requests that lie there, and
one comes back. They do so in messages of all that were answered together ("together"), which is the best that a front
can do, and in one for each request ("apart"). What is recorded is the user and system time of the process with the
queue. Writes handover_NAME.json, see docs/adr/0010.
"""

import argparse
import asyncio
import mmap
import multiprocessing
import os
import resource
import socket
import struct
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.harness import machine_facts, say, write_results
from bench.overload import cpu_s
from bench.servers import Server, golden_rows
from bench.wire import MODEL, Wire, request
from bench.wire_grpc import GrpcConnection, message
from corewise import artifact
from corewise.artifact import tuned
from corewise.machine.inspect import inspect_cpu
from corewise.serving import server
from corewise.serving.host import Host, Options
from corewise.serving.served import Source, Trust
from corewise.serving.tokens import Tokens

FRONTS = 2
SLOT_BYTES = 2**16
"""Of a request's inputs, and as many of its outputs."""
ENTRY = struct.Struct("<IdI")
"""A request's slot, its deadline and its rows."""
WARM_S = 1.5


class Queue:
    """The process with the queue: takes requests from fronts as ``serving`` takes them from its protocols."""

    def __init__(self, folder: Path) -> None:
        options = Options(trust=Trust(everything=True))
        self.host = Host([Source(name=MODEL, version="1", folder=folder)], options, Tokens(()))
        self.host.models.open()
        self.served = self.host.models.find(MODEL, None)
        spec = self.served.inputs[0]
        self.row = tuple(size for size in spec.shape[1:])
        self.values = int(np.prod([size or 1 for size in self.row]))

    def serve(self, channel: socket.socket, arena: mmap.mmap) -> None:
        """Answer what comes from one front."""
        loop = asyncio.get_running_loop()
        done: list[int] = []
        front, metrics, models = self.host.front, self.host.metrics, self.host.models

        def flush() -> None:
            channel.send(struct.pack(f"<{len(done)}I", *done))
            done.clear()

        def answered(slot: int, observed: Any, asked_s: float, waiter: Any) -> None:
            served, answer = self.served, waiter.result()
            end = slot * 2 * SLOT_BYTES + SLOT_BYTES
            for array in answer.outputs:
                np.copyto(np.ndarray(array.shape, array.dtype, arena, end), array)
                end += array.nbytes
            observed(answer)
            observed.__exit__(None, None, None)
            front.leave("", served)
            front.note_sent(answer, asked_s)
            if not done:
                loop.call_soon(flush)
            done.append(slot)

        def read() -> None:
            data = channel.recv(1 << 16)
            for slot, deadline_s, rows in ENTRY.iter_unpack(data):
                array = np.ndarray((rows, *self.row), np.float32, arena, slot * 2 * SLOT_BYTES)
                front.enter("", self.served)
                observed = metrics.request(self.served, "http", {}).__enter__()
                self.served.values.check((array,))
                _, waiter = front.call(models, self.served, (array,), deadline_s)
                waiter.add_done_callback(partial(answered, slot, observed, time.monotonic()))

        channel.setblocking(False)
        loop.add_reader(channel, read)


def own_queue(folder: Path, channels: list[socket.socket], arenas: list[int], control: Any) -> None:
    """The life of that process: ``control`` is told its CPU seconds whenever it asks."""
    sys.setswitchinterval(server.SWITCH_S)

    async def run() -> None:
        queue = Queue(folder)
        queue.host.front.watch_loop()
        for channel, arena in zip(channels, arenas, strict=True):
            queue.serve(channel, mmap.mmap(arena, 0))
        control.send(queue.values)
        ended = asyncio.Event()

        def told() -> None:
            if not control.recv():
                ended.set()
                return
            used = resource.getrusage(resource.RUSAGE_SELF)
            control.send(used.ru_utime + used.ru_stime)

        asyncio.get_running_loop().add_reader(control.fileno(), told)
        await ended.wait()
        queue.host.models.close(0.0)

    with asyncio.Runner(loop_factory=server._fastest_loop) as runner:
        runner.run(run())
    os._exit(0)


def load(channel: socket.socket, arena: int, rows: list[np.ndarray], clients: int, control: Any) -> None:
    """The life of a front that stands for its clients: ``control`` says for how long, and whether one by one."""
    memory = mmap.mmap(arena, 0)
    shown = [np.ndarray(rows[0].shape, np.float32, memory, slot * 2 * SLOT_BYTES) for slot in range(clients)]
    while (told := control.recv()) is not None:
        seconds, is_apart = told
        until_s, answered, out, free = time.monotonic() + seconds, 0, 0, list(range(clients))
        while True:
            if (now_s := time.monotonic()) < until_s:
                entries = []
                for slot in free:
                    np.copyto(shown[slot], rows[(answered + slot) % len(rows)])
                    entries.append(ENTRY.pack(slot, now_s + 10.0, 1))
                for part in entries if is_apart else [b"".join(entries)]:
                    channel.send(part)
                out += len(free)
            if not out:
                break
            data = channel.recv(1 << 16)
            free = [slot for (slot,) in struct.iter_unpack("<I", data)]
            answered, out = answered + len(free), out - len(free)
        control.send(answered)


class Fronts:
    """The process with the queue, and those that stand for fronts."""

    def __init__(self, folder: Path, rows: list[np.ndarray], clients: int) -> None:
        context = multiprocessing.get_context("fork")
        each = clients // FRONTS
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(FRONTS)]
        arenas = [os.memfd_create("handover") for _ in range(FRONTS)]
        for arena in arenas:
            os.ftruncate(arena, each * 2 * SLOT_BYTES)
        self._owner, theirs = context.Pipe()
        self._processes = [
            context.Process(target=own_queue, args=(folder, [one for one, _ in pairs], arenas, theirs), daemon=False)
        ]
        self._fronts = []
        for (_, channel), arena in zip(pairs, arenas, strict=True):
            ours, its = context.Pipe()
            self._fronts.append(ours)
            self._processes.append(context.Process(target=load, args=(channel, arena, rows, each, its)))
        for process in self._processes:
            process.start()
        self._owner.recv()

    def run(self, seconds: float, is_apart: bool) -> tuple[float, float]:
        """Requests a second, and the owner's microseconds a request."""
        before_s = self._used_s()
        for front in self._fronts:
            front.send((seconds, is_apart))
        answered = sum(front.recv() for front in self._fronts)
        return answered / seconds, 1e6 * (self._used_s() - before_s) / answered

    def close(self) -> None:
        """End them."""
        for front in self._fronts:
            front.send(None)
        self._owner.send(False)
        for process in self._processes:
            process.join()

    def _used_s(self) -> float:
        self._owner.send(True)
        return float(self._owner.recv())


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds."""
    cpu = inspect_cpu()
    sound = artifact.read(folder, cpu=cpu)
    name, rows, expected = golden_rows(sound)
    fronts = Fronts(folder.resolve(), rows, options.clients)
    per_s, owner_us = defaultdict(list), defaultdict(list)
    with Server(folder, "--grpc", "127.0.0.1:0") as served:
        http = Wire(served.port, [request(name, row) for row in rows], expected, None)
        messages = [message(name, row) for row in rows]
        rpc = Wire(served.ports["grpc"], messages, expected, None, make=GrpcConnection)

        def over(wire: Wire, seconds: float) -> tuple[float, float]:
            before_s = cpu_s(served.process.pid)["server"]
            found = wire.closed(options.clients, seconds)
            if found.failed + found.refused + found.dropped + found.wrong:
                raise ValueError(f"not all was answered: {found}")
            return found.answered / found.seconds, 1e6 * (
                cpu_s(served.process.pid)["server"] - before_s
            ) / found.answered

        runs = {
            "http": partial(over, http),
            "grpc": partial(over, rpc),
            "together": partial(fronts.run, is_apart=False),
            "apart": partial(fronts.run, is_apart=True),
        }
        for run in runs.values():
            run(WARM_S)
        for k in range(options.rounds):
            for side in list(runs)[:: 1 if k % 2 else -1]:
                rate, us = runs[side](options.seconds)
                per_s[side].append(rate)
                owner_us[side].append(us)
    fronts.close()
    return {
        "artifact": sound.manifest.model,
        "build": sound.manifest.build.label,
        "plan": tuned.fit(sound, cpu).plan.label,
        "clients": options.clients,
        **machine_facts(),
        "per_s": per_s,
        "owner_us": owner_us,
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load")


def main(options: argparse.Namespace) -> None:
    """Measure the artifact."""
    found = measure(options.artifact, options)
    for side, rates in found["per_s"].items():
        say(f"{side:10s} {median(rates):8.0f}/s {median(found['owner_us'][side]):7.1f} us a request in the owner")
    write_results(options.results / f"handover_{options.artifact.name.removesuffix('.cw')}.json", found)
