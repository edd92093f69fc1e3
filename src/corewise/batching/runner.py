"""Runs real instances as the policy decides, with a thread for each."""

import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import accumulate, count, pairwise
from math import inf, isnan
from time import monotonic
from typing import NamedTuple, Protocol, Self, TypeVar

import numpy as np

from corewise.batching.policy import Policy
from corewise.batching.requests import WORDS, Dropped, Reason, Refused, Request
from corewise.common.errors import CorewiseError, EngineError, InputError

T = TypeVar("T")
Arrays = Sequence[np.ndarray]
Run = Callable[[Arrays], Arrays]
"""One instance, as ``engines.Session.run``: arrays in and out with the batch as dimension 0; one thread calls it."""


class Joining(Protocol):
    """Which requests share calls, and how an instance answers those that do. Thread-safe."""

    def group(self, inputs: Arrays) -> Hashable:
        """Requests of equal groups share calls."""
        ...

    def answer(self, run: Run, instance: int, requests: Sequence[Arrays]) -> list[list[np.ndarray]]:
        """Each request's outputs, by calls of ``run``, which is the instance of that number."""
        ...


class OneBatch:
    """Requests of the same dtypes and sizes are the rows of one batch."""

    def group(self, inputs: Arrays) -> Hashable:
        """The dtypes, and all dimensions but the rows."""
        return tuple([(array.dtype.str, array.shape[1:]) for array in inputs])

    def answer(self, run: Run, instance: int, requests: Sequence[Arrays]) -> list[list[np.ndarray]]:
        """Each request's rows of every output. Raises ``EngineError`` if the outputs have other numbers of rows."""
        columns = zip(*requests, strict=True)
        outputs = run(requests[0] if len(requests) == 1 else [np.concatenate(column) for column in columns])
        ends = [0, *accumulate(len(inputs[0]) for inputs in requests)]
        if any(len(output) != ends[-1] for output in outputs):
            raise EngineError(f"outputs of {[len(output) for output in outputs]} rows for {ends[-1]} rows of input")
        return [[output[start:stop] for output in outputs] for start, stop in pairwise(ends)]


ONE_BATCH = OneBatch()


class NotServed(CorewiseError):
    """No instance ran the request: it was refused at once or dropped later."""

    def __init__(self, reason: Reason, retry_after_s: float | None = None) -> None:
        super().__init__("the request is not served", WORDS[reason])
        self.reason = reason
        self.retry_after_s = retry_after_s


class CallFailed(CorewiseError):
    """The call that the request was part of raised ``__cause__``."""


class InstanceDied(CorewiseError):
    """What an instance raises when it can run no more."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A request's own rows of the outputs, where its time went, and the call that it was part of."""

    outputs: list[np.ndarray]
    waited_s: float
    ran_s: float
    batch_rows: int
    """Rows of the whole call."""
    instance: int = 0

    @property
    def size_bytes(self) -> int:
        """Size of the outputs."""
        return sum([array.nbytes for array in self.outputs])


class _Job(NamedTuple):
    inputs: Arrays
    submitted_s: float
    future: "Future[Answer]"


class Batcher:
    """Runs requests on instances as a fresh policy decides, with as many threads as there are instances.

    Each instance runs one call at a time, in any of the threads. ``reopen(i)`` opens instance ``i`` again after it
    raised ``InstanceDied``; if it returns ``None`` or raises, the other instances go on without it. The futures' done
    callbacks run in these threads and must be short.
    """

    def __init__(
        self,
        instances: Sequence[Run],
        policy: Policy,
        *,
        joining: Joining = ONE_BATCH,
        reopen: Callable[[int], Run | None] = lambda instance: None,
    ) -> None:
        self._policy = policy
        self._runs = list(instances)
        self._joining = joining
        self._reopen = reopen
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._losses = threading.Condition(self._lock)
        self._jobs: dict[int, _Job] = {}
        """The waiting jobs by request id."""
        self._lost: list[tuple[_Job, Reason]] = []
        """The dropped jobs whose futures have no result yet."""
        self._idle = 0
        """Threads that wait for work."""
        self._wake_s = inf
        self._closed = False
        self._ids = count()
        for i in range(len(instances)):
            policy.finished(i)
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in instances]
        self._dropper = threading.Thread(target=self._fail_dropped, daemon=True)
        for thread in (*self._threads, self._dropper):
            thread.start()

    @property
    def waiting_rows(self) -> int:
        """Rows in the queue."""
        return self._policy.waiting_rows

    @property
    def slowness(self) -> float:
        """Predicted duration of calls over their measured duration; at least 1."""
        return self._policy.slowness

    def keep_margin(self, margin_s: float) -> None:
        """Admit only requests whose answers should be ready at least this long before their deadlines."""
        self._policy.margin_s = margin_s

    @property
    def instances(self) -> int:
        """How many instances there are now, without those that died."""
        return self._policy.instances

    def expected_s(self, ahead_rows: int = 0) -> float:
        """About how long a row that came now would take, behind all that wait and ``ahead_rows`` more."""
        with self._lock:
            return self._policy.expected_s(monotonic(), ahead_rows)

    def submit(self, inputs: Arrays, *, timeout_s: float = inf, priority: int = 0) -> "Future[Answer]":
        """Queue one request. Those of one group (``joining``) share calls, if the policy's are shared.

        Args:
            inputs: The model's, with the same number of rows (dimension 0), at least 1; do not change them afterwards.
            timeout_s: Seconds from now within which the answer is due.
            priority: A request displaces those of lower priority if there is not time or room for both.

        Returns:
            A future, which raises ``NotServed`` if the request is dropped and ``CallFailed`` if its call fails.
            Cancelling it frees its place in the queue.

        Raises:
            NotServed: The request is refused.
            InputError: The inputs are no batch.
        """
        rows = {array.shape[:1] for array in inputs}
        if len(rows) != 1 or () in rows or (0,) in rows or isnan(timeout_s):
            raise InputError(
                f"inputs of shapes {[array.shape for array in inputs]} and timeout {timeout_s} are not a request",
                "give every input the same first dimension, at least 1, and a number of seconds as the timeout",
            )
        group = self._joining.group(inputs)
        with self._lock:
            now_s = monotonic()
            request = Request(
                id=next(self._ids),
                deadline_s=now_s + timeout_s,
                priority=priority,
                group=group,
                rows=len(inputs[0]),
            )
            decision = self._policy.offer(request, now_s)
            self._lose(decision.dropped)
            if isinstance(decision, Refused):
                raise NotServed(decision.reason, decision.retry_after_s)
            future: Future[Answer] = Future()
            self._jobs[request.id] = _Job(inputs, now_s, future)
            if self._idle:
                self._work.notify()
            if self._policy.next_expiry_s < self._wake_s:
                self._losses.notify()
        future.add_done_callback(lambda done: self._left(request.id) if done.cancelled() else None)
        return future

    def close(self, drain_s: float = inf) -> bool:
        """Refuse new requests, finish accepted ones for at most ``drain_s``, then drop those that still wait.

        Returns whether all accepted requests were finished; calls that still run are not interrupted.
        """
        until_s = monotonic() + drain_s
        with self._lock:
            self._policy.draining = True
            self._work.notify_all()
        for thread in self._threads:
            thread.join(min(max(0.0, until_s - monotonic()), threading.TIMEOUT_MAX))
        with self._lock:
            dropped = self._policy.drop_all("draining")
            self._closed = True
            self._lose(dropped)
            self._work.notify_all()
        self._dropper.join()
        return not dropped and not any(thread.is_alive() for thread in self._threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _serve(self) -> None:
        """The life of a thread."""
        while (taken := self._take()) is not None:
            instance, jobs = taken
            started_s = monotonic()
            requests = [job.inputs for job in jobs]
            answers, error = caught(self._joining.answer, self._runs[instance], instance, requests)
            ran_s, rows = monotonic() - started_s, sum(len(job.inputs[0]) for job in jobs)
            if not isinstance(error, InstanceDied):
                # Before the futures have their results, so that a client that asks again at once finds it idle.
                with self._lock:
                    self._policy.finished(instance, ran_s if error is None else None)
                    self._wake_another()
            for job, outputs in zip(jobs, answers or [[]] * len(jobs), strict=True):
                if error is None:
                    waited_s = started_s - job.submitted_s
                    answer = Answer(outputs=outputs, waited_s=waited_s, ran_s=ran_s, batch_rows=rows, instance=instance)
                    job.future.set_result(answer)
                else:
                    failure = CallFailed(f"the call with this request failed: {error!r}")
                    failure.__cause__ = error
                    job.future.set_exception(failure)
            if isinstance(error, InstanceDied):
                self._replace(instance)

    def _take(self) -> tuple[int, list[_Job]] | None:
        """The next call and its instance as soon as there is one; ``None`` when there will be none."""
        with self._lock:
            while True:
                now_s = monotonic()
                instance = self._policy.turn(now_s)
                if instance is not None:
                    batch = self._policy.next_batch(instance, now_s)
                    self._lose(batch.dropped)
                    taken = [self._jobs.pop(request.id) for request in batch.requests]
                    if jobs := [job for job in taken if job.future.set_running_or_notify_cancel()]:
                        self._wake_another()
                        return instance, jobs
                    if taken:
                        self._policy.finished(instance)
                elif self._policy.draining and not self._policy.waiting_rows:
                    self._work.notify_all()
                    return None
                else:
                    self._idle += 1
                    self._work.wait(_seconds_until(self._policy.look_again_s))
                    self._idle -= 1

    def _wake_another(self) -> None:
        """Have a thread that waits take the next call, if one can start, or look again for one."""
        if self._idle and (self._policy.turn(monotonic()) is not None or self._policy.look_again_s < inf):
            self._work.notify()

    def _replace(self, instance: int) -> None:
        """Open an instance again. Meanwhile admission counts only on the others."""
        with self._lock:
            self._policy.leave(instance)
            self._work.notify()
        run, _ = caught(self._reopen, instance)
        with self._lock:
            if run is not None:
                self._runs[instance] = run
                self._policy.finished(instance)
            elif not self._policy.instances:
                self._lose(self._policy.drop_all("no instance"))

    def _left(self, request_id: int) -> None:
        """Remove the request whose future was cancelled."""
        with self._lock:
            self._policy.cancel(request_id)
            self._jobs.pop(request_id, None)
            self._wake_another()

    def _lose(self, dropped: Sequence[Dropped]) -> None:
        self._lost += [(self._jobs.pop(drop.request.id), drop.reason) for drop in dropped]
        if self._lost or self._closed:
            self._losses.notify()
        if dropped:
            self._wake_another()

    def _fail_dropped(self) -> None:
        """The life of the thread that drops expired requests and fails the futures of all dropped ones."""
        done = False
        while not done:
            with self._lock:
                self._wake_s = self._policy.next_expiry_s
                if not self._lost and not self._closed:
                    self._losses.wait(_seconds_until(self._wake_s))
                self._lose(self._policy.expire(monotonic()))
                lost, self._lost = self._lost, []
                done = self._closed
            for job, reason in lost:  # without the lock, because this runs the futures' callbacks
                if job.future.set_running_or_notify_cancel():
                    job.future.set_exception(NotServed(reason))


def _seconds_until(at_s: float) -> float:
    """How long to wait, as ``threading`` takes it."""
    return min(max(0.0, at_s - monotonic()), threading.TIMEOUT_MAX)


def caught(call: Callable[..., T], *args: object) -> tuple[T | None, BaseException | None]:
    """The result of a call, or its error; SystemExit counts as one, so that every request gets an answer."""
    try:
        return call(*args), None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the request boundary: what an instance raises is the answer
        return None, error
