"""A memory cgroup of version 1 or 2, which the kernel enforces: root may make one."""

import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


class MemoryCgroup:
    """A group whose processes may have that much memory together; a context manager that removes it when it is empty.

    Raises ``OSError`` where there may be none.
    """

    def __init__(self, name: str, limit_bytes: int) -> None:
        self.version = 2 if (V2 / "cgroup.controllers").exists() else 1
        self.path = (V2 if self.version == 2 else V1) / name
        self.limit_bytes = limit_bytes
        self.path.mkdir(exist_ok=True)
        names = ("memory.max", "memory.swap.max") if self.version == 2 else ("memory.limit_in_bytes",)
        for file, value in zip(names, (limit_bytes, 0), strict=False):
            if (self.path / file).exists():
                (self.path / file).write_text(str(value))

    def facts(self) -> dict[str, Any]:
        """Memory of processes without the cache of files, and how often the kernel killed one for memory."""
        stat = dict(line.split() for line in (self.path / "memory.stat").read_text().splitlines())
        used = int(stat["anon"]) + int(stat["shmem"]) if self.version == 2 else int(stat["rss"]) + int(stat["shmem"])
        events = "memory.events" if self.version == 2 else "memory.oom_control"
        killed = dict(line.split() for line in (self.path / events).read_text().splitlines())["oom_kill"]
        return {"used_bytes": used, "killed": int(killed)}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _ in range(50):
            try:
                self.path.rmdir()
                return
            except OSError:  # a process of it is still ending
                time.sleep(0.1)
