"""The server's log: one JSON object a line, and at most one line a second for refusals."""

import json
import logging
import threading
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


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to standard error, and goes on if that is full or closed: a log that nobody can read ends no server."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(SystemExit):  # how the command line ends where a standard stream cannot be written
            super().emit(record)


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether gRPC's record is about anything but a cancelled call or a message over a limit."""
    return "raised in core" not in record.getMessage()


def to_stderr(level: str) -> None:
    """Log to standard error from this level on, including all libraries."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_ours)
    # It warns of each form that is none, whose sender is told.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    handler = _Handler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
