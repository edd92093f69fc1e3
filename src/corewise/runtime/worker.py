"""The trial child: a process that builds, opens, runs and times one payload on request.

Started as ``python -m corewise.runtime.worker FD``; requests and answers are JSON lines on that socket. It can crash,
hang or exhaust the memory without harming the run (``client.Worker`` is the other end).
"""

import ctypes
import errno
import os
import shutil
import signal
import socket
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from math import inf
from pathlib import Path
from statistics import median
from typing import assert_never

import numpy as np

from corewise.batching import Answer, Batcher, NotServed, policy_of
from corewise.common.agreement import worst_row_db
from corewise.common.errors import CorewiseError
from corewise.common.references import describe
from corewise.engines import Engine, Session, engine
from corewise.machine.inspect import inspect_cpu, throttled_count
from corewise.machine.layouts import assign, warning
from corewise.records.build import Plan
from corewise.records.measurement import LoadRun, Measurement
from corewise.records.pipeline import PhotoRate
from corewise.runtime import messages
from corewise.runtime.instances import Instances, memory_bytes, open_layouts, open_plan
from corewise.runtime.loadgen import check_load, closed_loop, open_loop
from corewise.runtime.measure import (
    Call,
    batch_of,
    calls_of,
    kinds_of,
    measure_instances,
    throughput_per_s,
    time_calls,
    time_in_turns,
    warm_up,
)
from corewise.runtime.messages import Request
from corewise.runtime.photo_rate import measure_photos
from corewise.runtime.workspace import Workspace
from corewise.samples import Samples

LOAD_SAMPLES = 16
EQUAL_DB = 200.0
ALONE_ROWS = 3
"""Rows whose answers alone are compared with those in a batch."""
MAX_WAITING = 1024
"""Rows that may wait under a load; deadlines, if requests have them, bound the queue first."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LEAST_FREE_BYTES = 2**20
"""A library may report a full disk in words of its own; less free space than this confirms it."""


class TrialChild:
    """Answers requests about one payload at a time."""

    def __init__(self) -> None:
        self._instances: Instances | None = None
        self._opened_by: messages.OpenPayload | None = None
        """The request that opened them."""
        self._calls: tuple[Call, ...] = ()

    def engine(self, name: str) -> Engine:
        """The engine that builds and opens."""
        return engine(name)

    def answer(self, request: Request) -> messages.Answer:
        """Do the request. Raises whatever the engine raises."""
        match request:
            case messages.Prepare():
                return self._prepare(request)
            case messages.BuildPayload():
                return self._build(request)
            case messages.OpenPayload():
                return self._open(request)
            case messages.ObserveInt8():
                return self._observe_int8(request)
            case messages.RunSamples():
                return self._run_samples(request)
            case messages.Measure():
                return self._measure(request)
            case messages.WarmUp():
                return self._warm_up(request)
            case messages.RunRound():
                return self._run_round(request)
            case messages.RunLoad():
                return self._run_load(request)
            case messages.MeasurePhotos():
                return self._measure_photos(request)
            case messages.TimeCalls():
                return self._time_calls(request)
            case _:
                assert_never(request)

    def _prepare(self, request: messages.Prepare) -> messages.Prepared:
        os.sched_setaffinity(0, request.cpus)
        sys.path[:] = request.path
        return messages.Prepared()

    def _build(self, request: messages.BuildPayload) -> messages.BuiltPayload:
        self._close()
        inputs = Workspace(request.workspace).read_build_inputs()
        notes = self.engine(request.build.engine).build(inputs, request.build, request.payload)
        return messages.BuiltPayload(notes=tuple(notes))

    def _open(self, request: messages.OpenPayload) -> messages.OpenedPayload:
        plan, cpu = request.plan, inspect_cpu()
        if request != self._opened_by:
            self._close()
            opener = self.engine(request.build.engine)
            self._instances = open_layouts(opener, request.payload, request.build, plan, cpu, request.wide)
            self._opened_by = request
        return messages.OpenedPayload(
            cpus=assign(cpu, plan.threads_per_instance, plan.instances),
            memory_per_instance_bytes=self._opened().memory_per_instance_bytes,
            warning=warning(cpu, plan.threads_per_instance, plan.instances),
        )

    def _observe_int8(self, request: messages.ObserveInt8) -> messages.ObservedInt8:
        self._close()  # The memory need not hold the model twice.
        inputs = batch_of(Samples.load(request.samples), request.plan.batch)
        build_engine = self.engine(request.build.engine)
        return messages.ObservedInt8(receipt=build_engine.receipt(request.payload, request.build, request.plan, inputs))

    def _run_samples(self, request: messages.RunSamples) -> messages.RanSamples:
        """Writes ``B.rows`` and ``B.K`` for batch B and output K. The median batch leaves the cold first ones out."""
        from safetensors.numpy import save_file

        tensors = {}
        per_s = []
        for number, (rows, arrays) in enumerate(Samples.load(request.samples).batches(request.batch)):
            start = time.perf_counter()
            results = self._opened().run(0, arrays)
            per_s.append(len(rows) / (time.perf_counter() - start))
            tensors[f"{number}.rows"] = rows
            tensors.update({f"{number}.{k}": array for k, array in enumerate(results)})
        save_file(tensors, request.outputs)
        alone_db = self._alone_db(request) if request.alone else EQUAL_DB
        return messages.RanSamples(per_s=median(per_s), alone_db=alone_db)

    def _alone_db(self, request: messages.RunSamples) -> float:
        """Run some rows of the first batch alone too."""
        _, arrays = next(Samples.load(request.samples).batches(request.batch))
        together = self._opened().run(0, arrays)
        rows = range(min(ALONE_ROWS, len(arrays[0])))
        alone = [self._opened().run(0, [array[row : row + 1] for array in arrays]) for row in rows]
        answers = [np.concatenate(outputs) for outputs in zip(*alone, strict=True)]
        return worst_row_db([output[: len(rows)] for output in together], answers)

    def _measure(self, request: messages.Measure) -> Measurement:
        instances = self._opened()
        calls = calls_of(Samples.load(request.samples), request.plan.batch)
        instances.touch(calls[-1])
        measurement = measure_instances(
            instances.each,
            calls,
            request.plan,
            budget_s=request.budget_s,
            memory_per_instance_bytes=instances.memory_per_instance_bytes,
        )
        return replace(measurement, memory_bytes=memory_bytes())

    def _warm_up(self, request: messages.WarmUp) -> messages.Warm:
        self._calls = calls_of(Samples.load(request.samples), request.batch)
        made = self._opened().each(lambda session: warm_up(session, self._calls, budget_s=request.budget_s))
        return messages.Warm(calls=sum(made))

    def _run_round(self, request: messages.RunRound) -> messages.RoundRate:
        """Whole calls; each instance's first call is not timed."""
        instances = self._opened()

        timed = partial(_warm_calls, calls=self._calls, budget_s=request.budget_s)
        before = throttled_count()
        per_s = throughput_per_s(len(self._calls[0][0]), instances.each(timed))
        return messages.RoundRate(per_s=per_s, throttled=throttled_count() - before)

    def _time_calls(self, request: messages.TimeCalls) -> messages.TimedCalls:
        """Which tokens a text has does not matter for its time, so one sample's are repeated."""
        row = Samples.load(request.samples).rows[0]
        calls = [
            tuple(np.tile(np.resize(array, tokens), (rows, 1)) for array in row) for rows, tokens in request.points
        ]
        timed = self._opened().each(lambda session: time_in_turns(session, calls, budget_s=request.budget_s))
        reached = min(map(len, timed))
        medians = (median(second for of_one in timed for second in of_one[call]) for call in range(reached))
        return messages.TimedCalls(ms=tuple(1e3 * second for second in medians))

    def _run_load(self, request: messages.RunLoad) -> LoadRun:
        """Load the open instances through a batcher with requests of one row, some samples of each kind in turn.

        Some answers are checked to be their own request's (``_OwnAnswer``); others' answers count as failed.
        """
        check_load(
            rate_per_s=request.rate_per_s,
            clients=request.clients,
            duration_s=request.duration_s,
            slo_ms=request.slo_ms,
        )
        plan, instances = request.plan, self._opened()
        samples = Samples.load(request.samples)
        rows = self._load_rows(samples, plan)
        own_answer = _OwnAnswer([instances.run(0, row) for row in rows])
        policy = policy_of(
            request.table,
            request.elastic,
            max_batch=plan.batch,
            max_waiting=max(MAX_WAITING, plan.batch, request.clients or 0),
            shared=not instances.mixes_rows,
        )
        timeout_s = inf if request.slo_ms is None else request.slo_ms / 1e3
        before = throttled_count()
        runs = [partial(instances.run, number) for number in range(len(instances))]
        with Batcher(runs, policy) as batcher:
            load = partial(
                open_loop if request.clients is None else closed_loop,
                lambda k: batcher.submit(rows[k % len(rows)], timeout_s=timeout_s),
                plan=plan,
                duration_s=request.duration_s,
                slo_ms=request.slo_ms,
                refusal=NotServed,
                check=own_answer,
            )
            if request.clients is None:
                run = load(rate_per_s=request.rate_per_s, seed=request.seed)
            else:
                run = load(clients=request.clients)
        return replace(run, throttled=throttled_count() - before)

    def _measure_photos(self, request: messages.MeasurePhotos) -> PhotoRate:
        """The payload is opened as ``load`` opens it."""
        self._close()
        opener, plan = self.engine(request.build.engine), request.photos.plan
        session = open_plan(opener, request.payload, request.build, plan, inspect_cpu())
        with closing(session):
            rate = measure_photos(session, request.photos, request.pipeline, request.files, request.budget_s)
            return replace(rate, memory_bytes=memory_bytes())

    def _load_rows(self, samples: Samples, plan: Plan) -> list[tuple[np.ndarray, ...]]:
        """Requests of one row, after calls of all sizes: engines compile for a size when they first meet it."""
        instances, kinds = self._opened(), kinds_of(samples)
        for size in sorted({*(2**k for k in range(plan.batch.bit_length())), plan.batch}):
            for number in range(len(instances)):
                for kind in kinds:
                    instances.run(number, batch_of(kind, size))
        stacks = [next(kind.batches(LOAD_SAMPLES // len(kinds)))[1] for kind in kinds]
        rows = ([tuple(array[i : i + 1] for array in arrays) for i in range(len(arrays[0]))] for arrays in stacks)
        return [row for turn in zip_longest(*rows) for row in turn if row is not None]

    def _opened(self) -> Instances:
        if self._instances is None:
            raise CorewiseError("the worker has no open session", "this is a bug in corewise")
        return self._instances

    def _close(self) -> None:
        if self._instances is not None:
            self._instances.close()
        self._instances = self._opened_by = None


def _warm_calls(session: Session, *, calls: Sequence[Call], budget_s: float) -> list[float]:
    """Seconds of whole calls for ``budget_s``, at least of one pass, after a first call that is not timed."""
    session.run(calls[0])
    return time_calls(session, calls, budget_s=budget_s, min_calls=1)


class _OwnAnswer:
    """Whether an answer is its request's own: no other sample alone has outputs that are nearer to it.

    The outputs need not be equal, because calls of other sizes round differently. Some answers and some of their values
    are checked, because checking takes time from the instances.
    """

    EVERY = 7
    VALUES = 4096
    ROUNDING = 0.1
    """Relative to the output, what is no error between samples that hardly differ: 20 dB, as for golden outputs."""

    def __init__(self, alone: Sequence[Sequence[np.ndarray]]) -> None:
        self._alone = [self._flat(outputs) for outputs in alone]

    def __call__(self, k: int, answer: Answer) -> bool:
        if k % self.EVERY:
            return True
        outputs, own = self._flat(answer.outputs), self._alone[k % len(self._alone)]
        if outputs.shape != own.shape:
            return False
        nearest = min(np.linalg.norm(each - outputs) for each in self._alone if each.shape == own.shape)
        return bool(np.linalg.norm(own - outputs) <= max(nearest, self.ROUNDING * np.linalg.norm(own)))

    def _flat(self, outputs: Sequence[np.ndarray]) -> np.ndarray:
        parts = [output.reshape(-1)[:: -(-output.size // self.VALUES) or 1] for output in outputs]
        return np.nan_to_num(np.concatenate(parts).astype(np.float64))


def peak_memory_bytes() -> int:
    """The peak resident memory of this process (VmHWM); 0 if the kernel does not report it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def serve(channel: socket.socket) -> None:
    """Answer requests until the parent closes the channel."""
    child = TrialChild()
    with channel.makefile("r", encoding="utf-8") as requests:
        for line in requests:
            result = _answer(child, messages.decode_request(line))
            channel.sendall(messages.encode_reply(result, peak_memory_bytes()))


def _answer(child: TrialChild, request: Request) -> messages.Answer | messages.Failure:
    try:
        return child.answer(request)
    except CorewiseError as error:
        return messages.Failure(text=str(error), disk_full=_disk_full(error, request))
    except Exception as error:  # noqa: BLE001 - the trial boundary: whatever an engine raises is the trial's reason
        return messages.Failure(text=describe(error), disk_full=_disk_full(error, request))


def _disk_full(error: BaseException, request: Request) -> bool:
    """Whether an error comes from a full disk, which ends the run and not the trial."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in DISK_FULL:
            return True
        chain = chain.__cause__ or chain.__context__
    folder = getattr(request, "payload", None)
    return folder is not None and folder.exists() and shutil.disk_usage(folder).free < LEAST_FREE_BYTES


if __name__ == "__main__":
    # A hanging child must not outlive a parent that was killed: prctl(PR_SET_PDEATHSIG, SIGKILL), see prctl(2).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    warnings.simplefilter("ignore")
    serve(socket.socket(fileno=int(sys.argv[1])))
