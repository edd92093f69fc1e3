"""The program of an artifact that answers several texts in one row, opened when that pays."""

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from corewise.common.errors import CorewiseError, EngineError
from corewise.common.references import guard
from corewise.engines import Session
from corewise.records.pipeline import Packing
from corewise.runtime.instances import OpenedHere, closed, whole_calls


class LazyProgram:
    """A ``PackedProgram`` that takes memory and time only once enough texts have come. Thread-safe."""

    def __init__(self, packing: Packing, opener: Callable[[], Session]) -> None:
        """``opener`` opens the program of which ``packing`` says what its calls are like."""
        self.packing = packing
        self._opener = opener
        self._process = OpenedHere()
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._failed = self._closed = False
        self._missed_ms = 0.0
        """What packing would have saved so far."""

    def pays(self, saved_ms: float) -> bool:
        """Whether it is open. It is opened once packing would have saved as much time as opening takes.

        If it cannot be opened, texts are answered without it, and the call that tried warns.
        Raises ``EngineError`` if the model was closed, and in a process that was forked later.
        """
        self._process.check()
        with self._lock:
            if self._closed:
                raise closed()
            if self._session is None and not self._failed:
                self._missed_ms += saved_ms
                if self._missed_ms >= self.packing.opening_ms:
                    self._open()
            return self._session is not None

    def run(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """One call, after ``pays`` said so: int64 (rows, tokens) for ids, positions and segments -> vectors.

        They are float32 (rows, texts, D). Raises ``EngineError`` as ``pays``.
        """
        self._process.check()
        assert self._session is not None  # or it would not have paid
        return whole_calls(self._session)(inputs)

    def close(self) -> None:
        """Free it when the running calls have ended; a forked child leaves that to its parent."""
        if self._process.is_other:
            return
        with self._lock:
            self._closed = True
            if self._session is not None:
                self._session.close()

    def _open(self) -> None:
        try:
            with guard(EngineError, "the program cannot be opened"):
                self._session = self._opener()
        except CorewiseError as error:
            self._failed = True
            warnings.warn(f"several texts do not share a row, which would be faster: {error}", stacklevel=2)
