"""Engines that misbehave, each in one way: ``Build(engine="corewise.testing.engines:Hang", precision="int8")``.

Whatever runs them must end with a failed trial and go on.
"""

import ctypes
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from corewise.engines.base import BuildInputs, Session
from corewise.engines.fake import Fake
from corewise.records.build import Build, Plan, Receipt

RUNGS = 6
RANGE = "range.txt"


class Segfault(Fake):
    """Reads address 0 while building."""

    def build(self, build_inputs: BuildInputs, build: Build, folder: Path) -> tuple[str, ...]:
        """End the process by SIGSEGV."""
        ctypes.string_at(0)
        return super().build(build_inputs, build, folder)


class KilledForMemory(Fake):
    """Ends as the kernel's OOM killer ends a process."""

    def build(self, build_inputs: BuildInputs, build: Build, folder: Path) -> tuple[str, ...]:
        """End the process by SIGKILL."""
        os.kill(os.getpid(), signal.SIGKILL)
        return super().build(build_inputs, build, folder)


class Hang(Fake):
    """Never finishes building."""

    def build(self, build_inputs: BuildInputs, build: Build, folder: Path) -> tuple[str, ...]:
        """Sleep for ever."""
        while True:
            time.sleep(3600)


class RaisesInBuild(Fake):
    """Raises what no engine should."""

    def build(self, build_inputs: BuildInputs, build: Build, folder: Path) -> tuple[str, ...]:
        """Raise ``RuntimeError``."""
        raise RuntimeError("no kernel for aten.frobnicate")


class NanOutputs(Fake):
    """Answers NaN."""

    def open(self, folder: Path, build: Build, plan: Plan) -> Session:
        """Open a session whose outputs are NaN."""
        return _NanSession(super().open(folder, build, plan))


class CrashesInRun(Fake):
    """Builds and opens, and reads address 0 when it is run."""

    def open(self, folder: Path, build: Build, plan: Plan) -> Session:
        """Open a session that ends the process by SIGSEGV."""
        return _CrashingSession(super().open(folder, build, plan))


class SilentFp32(Fake):
    """Claims int8 and runs in fp32."""

    def receipt(self, folder: Path, build: Build, plan: Plan, inputs: Sequence[np.ndarray]) -> Receipt | None:
        """Not one of 54 layers in int8."""
        names = [f"layer{number}" for number in range(54)]
        return Receipt.tally([("Convolution/f32", False)] * len(names), names)


class Layered(Fake):
    """Has 16 layers, all in int8 but those that ``reverted_layers`` counts; they divide its noise by four each.

    Each rung that is missing of corewise's quantizer doubles it.
    """

    def open(self, folder: Path, build: Build, plan: Plan) -> Session:
        """Open a session with the noise that is left."""
        options = build.quantization
        missing = 0 if options.rung is None else RUNGS - options.rung
        noise = float(build.option("noise", 0.0)) * 2**missing / 4**options.reverted_layers
        return super().open(folder, replace(build, options=(("noise", noise),)), plan)

    def receipt(self, folder: Path, build: Build, plan: Plan, inputs: Sequence[np.ndarray]) -> Receipt | None:
        """As many layers in int8 as it was made with."""
        returned = build.quantization.reverted_layers
        return Receipt.tally([("Convolution/u8", number >= returned) for number in range(16)])


class Narrow(Fake):
    """Cuts its inputs off where the calibration samples ended, as int8 with narrow ranges does."""

    def build(self, build_inputs: BuildInputs, build: Build, folder: Path) -> tuple[str, ...]:
        """Write down the extremes of the samples' first input too."""
        seen = np.concatenate([row[0].ravel() for row in build_inputs.calibration.rows])
        (folder / RANGE).write_text(f"{seen.min()} {seen.max()}")
        return super().build(build_inputs, build, folder)

    def open(self, folder: Path, build: Build, plan: Plan) -> Session:
        """Open a session that cuts off what is outside; fp32 cuts off nothing."""
        session = super().open(folder, build, plan)
        low, high = map(float, (folder / RANGE).read_text().split())
        return _CutSession(session, low, high) if build.precision == "int8" else session


class _CutSession:
    def __init__(self, session: Session, low: float, high: float) -> None:
        self._session, self._low, self._high = session, low, high

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        first, *others = inputs
        return self._session.run([np.clip(first, self._low, self._high), *others])

    def close(self) -> None:
        self._session.close()


class _NanSession:
    def __init__(self, session: Session) -> None:
        self._session = session

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.full_like(output, np.nan) for output in self._session.run(inputs)]

    def close(self) -> None:
        self._session.close()


class _CrashingSession(_NanSession):
    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        ctypes.string_at(0)
        return super().run(inputs)
