"""The journal: an append-only file of finished trials, so that an interrupted run resumes."""

import fcntl
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from corewise.common.errors import OutputError
from corewise.records.build import Build
from corewise.records.jsonable import from_json, to_json
from corewise.records.reason import Reason, ReasonKind
from corewise.records.schema_1 import upgrade_trial
from corewise.records.trial import Trial

SCHEMA = 2
"""Schema 2 has reasons as data; lines of schema 1, which have sentences, are read too."""
READABLE = (1, SCHEMA)
TOLD = 24
"""Characters of a value that is short enough to be told; a digest is not."""


class Journal:
    """Finished trials of one run; each line is flushed to the disk before the next trial starts.

    The first line holds the run's key: a journal of another model, samples, options or versions is overwritten. The
    line has the key's ``parts`` too, each by its name, for ``set_aside``. A last line that was cut off by a crash is
    ignored. Raises ``OutputError`` if another process holds the journal or the disk is full.
    """

    def __init__(self, path: Path, key: str, parts: Mapping[str, str] = MappingProxyType({})) -> None:
        self.set_aside: Reason | None = None
        """What differs from an earlier run whose finished trials are not used; ``None`` if there are none."""
        self._path = path
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise OutputError(
                f"another corewise is working in {path.parent}", "wait for it or give another output"
            ) from error
        head, trials = self._read()
        if head.get("key") == key:
            self._trials = trials
        else:
            if trials:
                self.set_aside = _set_aside(head.get("parts", {}), parts, len(trials))
            self._trials = {}
            self._file.truncate(0)
            self._append({"schema": SCHEMA, "key": key, "parts": dict(parts)})

    @property
    def empty(self) -> bool:
        """Whether no trial is finished."""
        return not self._trials

    def get(self, build: Build) -> Trial | None:
        """The finished trial of the build, if there is one."""
        return self._trials.get(build)

    def add(self, trial: Trial) -> None:
        """Keep a finished trial."""
        self._append(to_json(trial))
        self._trials[trial.build] = trial

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _read(self) -> tuple[dict[str, Any], dict[Build, Trial]]:
        """The first line and the trials; nothing of a file that is no journal."""
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        head: Any = None
        with suppress(ValueError):
            head = json.loads(lines[0])
        if len(lines) < 2 or not isinstance(head, dict) or head.get("schema") not in READABLE:
            return {}, {}
        trials: dict[Build, Trial] = {}
        end = len(lines[0]) + 1
        for line in lines[1:-1]:
            try:
                data = json.loads(line)
                trial = from_json(Trial, upgrade_trial(data) if "explored" in data else data)
            except (ValueError, KeyError, TypeError, AttributeError):
                break
            trials[trial.build] = trial
            end += len(line) + 1
        self._file.truncate(end)
        return head, trials

    def _append(self, data: object) -> None:
        try:
            self._file.write(json.dumps(data).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            # Closing tries to write once more what did not fit.
            with suppress(OSError):
                self._file.close()
            raise OutputError(
                f"the journal {self._path} cannot be written: {error.strerror}",
                "free space and run the same command to resume",
            ) from error


def _set_aside(earlier: Mapping[str, str], now: Mapping[str, str], count: int) -> Reason:
    """Why ``count`` finished trials of an earlier run do not count."""
    differing = []
    for name in {**now, **earlier}:
        before, value = earlier.get(name, ""), now.get(name, "")
        if before != value:
            told = 0 < len(before) <= TOLD and 0 < len(value) <= TOLD
            differing.append(f"{name} ({before}, now {value})" if told else name)
    return Reason.of(ReasonKind.EARLIER_TRIALS_UNUSED, count=count, differing=differing if earlier else [])
