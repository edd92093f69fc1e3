"""The program of an artifact that answers several texts in one row, opened when it is first needed."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from corewise.engines import Session
from corewise.records.pipeline import Packing
from corewise.runtime.instances import OpenedHere, closed, whole_calls


class LaterOpened:
    """A ``PackedProgram`` that takes memory and time only once many texts come. Thread-safe."""

    def __init__(self, packing: Packing, opener: Callable[[], Session]) -> None:
        """``opener`` opens the program of which ``packing`` says what its calls are like."""
        self.packing = packing
        self._opener = opener
        self._process = OpenedHere()
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._closed = False

    def run(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """One call: int64 (rows, tokens) for ids, positions and segments -> [float32 (rows, texts, D)].

        Raises ``EngineError`` if the model was closed, and in a process that was forked later.
        """
        self._process.check()
        with self._lock:
            if self._closed:
                raise closed()
            session = self._session = self._session or self._opener()
        return whole_calls(session)(inputs)

    def close(self) -> None:
        """Free it when the running calls have ended; a forked child leaves that to its parent."""
        if self._process.is_other:
            return
        with self._lock:
            self._closed = True
            if self._session is not None:
                self._session.close()
