"""The server's log: one JSON object a line, and at most one line a second for refusals."""

import json
import logging
import os
import select
import sys
import threading
import warnings
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime

log = logging.getLogger("corewise.serve")


class JsonLines(logging.Formatter):
    """Time, level and message, with the traceback if there is one. A message that is a JSON object keeps its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
        }
        said = record.getMessage()
        try:
            found = json.loads(said) if said.startswith("{") else None
        except ValueError:
            found = None
        line.update(found if isinstance(found, dict) else {"message": said})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class RefusalLog:
    """Collects refusals for a second and logs them in one line, with a count for each reason. Thread-safe."""

    def __init__(self, period_s: float = 1.0) -> None:
        self._period_s = period_s
        self._lock = threading.Lock()
        self._reasons: Counter[str] = Counter()
        self._last_id = ""
        self._timer: threading.Timer | None = None

    def add(self, reason: str, request_id: str = "") -> None:
        """A request or a connection was refused."""
        if not log.isEnabledFor(logging.INFO):
            return
        with self._lock:
            self._reasons[reason] += 1
            self._last_id = request_id or self._last_id
            if self._timer is None:
                self._timer = threading.Timer(self._period_s, self._write)
                self._timer.daemon = True
                self._timer.start()

    def close(self) -> None:
        """Log what is left."""
        with self._lock:
            timer = self._timer
        if timer is not None:
            timer.cancel()
            self._write()

    def _write(self) -> None:
        with self._lock:
            reasons, last_id = dict(self._reasons.most_common()), self._last_id
            self._reasons.clear()
            self._last_id, self._timer = "", None
        if reasons:
            count = sum(reasons.values())
            line = {"message": f"refused {count}", "refused": count, "reasons": reasons}
            log.info("%s", json.dumps(line | ({"last_id": last_id} if last_id else {})))


class _Handler(logging.Handler):
    """Writes to a file what that takes at once, and goes on: a log that is full, closed or not read ends no server.

    A pipe that is full would hold up whoever logs, which may be the event loop, until somebody reads it.
    """

    def __init__(self, handle: int) -> None:
        super().__init__()
        self._handle = handle
        self._lost, self._is_cut = 0, False

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record's line; if there is no room, it is counted, and the next that has room says so."""
        try:
            lines = [self.format(record)]
        except (TypeError, ValueError):  # its message and arguments do not fit
            self.handleError(record)
            return
        if self._lost:
            lines.insert(0, json.dumps({"message": f"{self._lost} lines of this log are lost: nobody read it"}))
        text = "\n" * self._is_cut + "".join(f"{line}\n" for line in lines)
        written = self._write(text.encode(errors="backslashreplace"))
        self._lost = 0 if written else self._lost + 1

    def _write(self, data: bytes) -> bool:
        """Write it in pieces that a pipe takes whole or not at all; whether there was room for the first."""
        poll = select.poll()
        poll.register(self._handle, select.POLLOUT)
        for start in range(0, len(data), select.PIPE_BUF):
            if not poll.poll(0):
                self._is_cut |= start > 0
                return start > 0
            with suppress(OSError):  # the disk is full, or the other side of the pipe is closed
                os.write(self._handle, data[start : start + select.PIPE_BUF])
        self._is_cut = False
        return True


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether gRPC's record is about anything but a cancelled call or a message over a limit."""
    return "raised in core" not in record.getMessage()


def _stderr() -> int:
    """The file of standard error, also where something else was put in its place."""
    try:
        return sys.stderr.fileno()
    except (OSError, ValueError):
        return 2


def to_stderr(level: str) -> None:
    """Log to standard error from this level on, including all libraries."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_ours)
    # It warns of each form that is none, whose sender is told.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    # Pillow warns of wrong images in ever other words, and Python remembers each.
    warnings.simplefilter("ignore")
    handler = _Handler(_stderr())
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
