"""An artifact's instances in a process of their own, which is replaced when it dies.

The server's process holds the requests and no engine: a kernel that crashes takes one call with it and not the queue,
and the engine's threads do not share an interpreter with the network's. Arrays cross in shared memory.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from corewise.batching import InstanceDied
from corewise.common.errors import EngineError
from corewise.records.build import Plan
from corewise.records.cpu import Cpu
from corewise.records.jsonable import to_json
from corewise.runtime.client import child_environment
from corewise.serving.child import Line, Slot

OPEN_S = 120.0
HUNG_S = 60.0
"""A call that takes so long never ends: its process is replaced."""
STOPPED_S = 1.0
"""A process that was stopped for so long is replaced."""
DYING_S = 5.0
SETTLED_S = 10.0
"""A process that lived so long did not die of being started."""
LONGEST_PAUSE_S = 30.0


class _Process:
    """One engine process, open and warm. Raises ``EngineError`` with why it is not."""

    def __init__(self, folder: Path, identity: str, plan: Plan, cpu: Cpu, wide: Plan | None, packed: bool) -> None:
        instances = plan.instances + (wide is not None) + (plan.instances if packed else 0)
        pairs = [socket.socketpair() for _ in range(1 + instances)]
        (control, theirs), *channels = pairs
        self._control, self.lines = Line(control), [Line(ours) for ours, _ in channels]
        self.slots = [Slot(os.memfd_create("corewise")) for _ in channels]
        places = [(their.fileno(), slot.fileno()) for (_, their), slot in zip(channels, self.slots, strict=True)]
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "corewise.serving.child", str(theirs.fileno())],
                pass_fds=[theirs.fileno(), *(handle for one in places for handle in one)],
                stdin=subprocess.DEVNULL,
                env=child_environment(cpu),
                start_new_session=True,
            )
        except OSError as error:
            self._give_back()
            raise EngineError(f"no process for {folder}: {error}") from error
        finally:
            for _, their in pairs:
                their.close()
        control.settimeout(OPEN_S)
        plans = {"plan": to_json(plan), "wide": to_json(wide)}
        about = {"folder": str(folder), "identity": identity, **plans, "packed": packed, "channels": places}
        try:
            self._control.send(about)
            answer = self._control.receive()
        except TimeoutError:
            answer = {"error": f"{folder} was not open after {OPEN_S:g} s"}
        except OSError:
            answer = None
        if answer is None:
            answer = {"error": f"the process that opened {folder} {_epitaph(self.process)}"}
        if "error" in answer:
            self.close()
            raise EngineError(answer["error"])
        for line in self.lines:
            line.channel.settimeout(HUNG_S)

    def run(self, instance: int, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One call. Raises ``EngineError`` where it failed and ``InstanceDied`` where the process did."""
        line, slot = self.lines[instance], self.slots[instance]
        try:
            line.send({"inputs": slot.write(inputs)})
            answer = line.receive()
        except TimeoutError:
            self.kill()
            raise InstanceDied(f"a call took more than {HUNG_S:g} s, so its process was killed") from None
        except (OSError, ValueError):  # closed, by the other side or by ours
            answer = None
        if answer is None:
            raise InstanceDied("the process that ran the call died")
        if "error" in answer:
            raise EngineError(answer["error"])
        outputs = [array.copy() for array in slot.read(answer["outputs"])]
        slot.forget(answer["outputs"])
        return outputs

    def wait(self) -> str:
        """Wait until it ends, by itself or because it was stopped (SIGSTOP) and does not go on; how it ended."""
        pid = self.process.pid
        while (told := os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)) is not None:
            if told.si_code not in (os.CLD_STOPPED, os.CLD_TRAPPED):
                break
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG)
            time.sleep(STOPPED_S)
            if _is_stopped(pid):
                self.kill()
                self.process.wait()
                return f"was stopped for {STOPPED_S:g} s, so it was killed"
        self.process.wait()
        return _epitaph(self.process)

    def kill(self) -> None:
        """Kill it, whatever it is doing; ``wait`` returns then."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End it and give back its memory. No call may run."""
        self.kill()
        self.process.wait()
        self._give_back()

    def _give_back(self) -> None:
        for line in (self._control, *self.lines):
            line.close()
        for slot in self.slots:
            slot.close()


class Remote:
    """The instances of an artifact's plan, wherever their process is just now. Thread-safe, but for each instance.

    The one on all cores of an elastic plan has the number after the others, and after it come those of the packed
    program, if that is open: it shares the cores of the others, so either runs and not both.
    """

    def __init__(
        self,
        folder: Path,
        identity: str,
        plan: Plan,
        cpu: Cpu,
        *,
        wide: Plan | None = None,
        packed: bool = False,
        on_death: Callable[[str], None] = lambda epitaph: None,
    ) -> None:
        """Open the artifact in ``folder`` as long as it is the one of that ``artifact.identity``.

        Raises ``EngineError`` with why it cannot be. ``on_death`` is called with how a process ended.
        """
        self._open = partial(_Process, folder, identity, plan, cpu, wide, packed)
        self._on_death = on_death
        self._changed = threading.Condition()
        self._process: _Process | None = self._open()
        self._closed = False
        self.restarts = 0
        self._keeper = threading.Thread(target=self._keep, name="engine-keeper", daemon=True)
        self._keeper.start()

    @property
    def pid(self) -> int | None:
        """The process's id, if there is one now."""
        process = self._process
        return None if process is None else process.process.pid

    @property
    def alive(self) -> bool:
        """Whether calls can run now."""
        return self._process is not None

    def run(self, instance: int, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One call on an instance, which waits while its process is replaced.

        Raises ``EngineError`` where the call failed, ``InstanceDied`` where its process died or all is closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._process is not None or self._closed, HUNG_S)
            process = self._process
        if process is None:
            raise InstanceDied("no process runs the model")
        try:
            return process.run(instance, inputs)
        except InstanceDied:
            # Not to be asked again, though the keeper may not know yet that it is gone.
            process.kill()
            with self._changed:
                self._changed.wait_for(lambda: self._process is not process, DYING_S)
            raise

    def wait(self) -> bool:
        """Wait until calls can run again; whether they can."""
        with self._changed:
            self._changed.wait_for(lambda: self._process is not None or self._closed)
            return self._process is not None

    def close(self) -> None:
        """End the process. Calls that run raise ``InstanceDied``."""
        with self._changed:
            self._closed = True
            process, self._process = self._process, None
            self._changed.notify_all()
        if process is not None:
            process.kill()
        self._keeper.join()
        if process is not None:
            process.close()

    def _keep(self) -> None:
        """Replace the process whenever it dies; where that fails, again after a longer and longer pause."""
        pause_s = 0.0
        while not self._closed:
            process, started_s = self._process, time.monotonic()
            if process is not None:
                epitaph = process.wait()
                with self._changed:
                    if self._closed:
                        return
                    self._process = None
                    self._changed.notify_all()
                self._on_death(epitaph)
                process.close()
                if time.monotonic() - started_s > SETTLED_S:
                    pause_s = 0.0
            with self._changed:
                if self._changed.wait_for(lambda: self._closed, pause_s):
                    return
            pause_s = min(LONGEST_PAUSE_S, max(0.5, 2 * pause_s))
            try:
                made: _Process | None = self._open()
            except (EngineError, OSError) as error:
                self._on_death(str(error))
                continue
            with self._changed:
                if not self._closed:
                    self._process, made = made, None
                    self.restarts += 1
                self._changed.notify_all()
            if made is not None:
                made.close()


def _is_stopped(pid: int) -> bool:
    """Whether the process stands still, by its state in /proc/PID/stat, see proc(5)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


def _epitaph(process: "subprocess.Popen[bytes]") -> str:
    try:
        code = process.wait(DYING_S)
    except subprocess.TimeoutExpired:
        return "closed its channel and did not end"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
