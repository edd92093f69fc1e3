"""Which hardware threads a process computes on, where another program said only how many it may use."""

import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from errno import EEXIST
from pathlib import Path

from corewise.common.errors import OutputError
from corewise.machine.inspect import inspect_cpu
from corewise.machine.layouts import assign, packed
from corewise.records.cpu import Cpu

MOST_NAMES = 9


def chosen_cores(cpu: Cpu, count: int) -> tuple[int, ...]:
    """The ``count`` hardware threads for a process that may use more: physical cores first, node by node. Pure.

    Empty if it may use no more than that, and need not be pinned.
    """
    quota = len(cpu.affinity) if cpu.quota_cores is None else cpu.quota_cores
    if count >= min(len(cpu.affinity), quota):
        return ()
    (chosen,) = assign(replace(cpu, quota_cores=None), count, 1)
    return chosen


def compute_on(count: int) -> Cpu:
    """Have this process compute on ``count`` hardware threads, with all its threads and its children.

    OpenMP's own number of threads, which schedulers set to what they gave, becomes that of the cores; the threads of a
    plan are set by its engine. It must be called before an engine is imported.

    Returns:
        The CPU as this process sees it from now on.
    """
    return _pinned(chosen_cores(inspect_cpu(), count))


class ClaimedCores:
    """Hardware threads that no other process of this user claims: those of a process that shares its machine.

    A claim is a lock on a file of each, so it ends with the process, however that ends.
    """

    def __init__(self, count: int, shared: Path) -> None:
        """``compute_on`` hardware threads that are free by the locks in this user's folder in ``shared``.

        If fewer are free, or the process may use no more anyway, none is claimed.

        Raises ``OutputError`` if no such folder or no lock can be made.
        """
        self._locks: list[int] = []
        cpu = inspect_cpu()
        chosen = chosen_cores(cpu, count)
        try:
            if chosen:
                chosen = self._claim(own_folder(shared), cpu, count) or chosen
        except OSError as error:
            raise OutputError(
                f"cores cannot be claimed in {shared}: {error.strerror}",
                "start Ray's nodes with TMPDIR set to a folder that belongs to their user and has free space",
            ) from error
        self.cpu = _pinned(chosen)

    def close(self) -> None:
        """Give them back; the process stays where it is."""
        while self._locks:
            os.close(self._locks.pop())

    def _claim(self, folder: Path, cpu: Cpu, count: int) -> tuple[int, ...]:
        """The hardware threads that are this process's from now on; none if fewer than ``count`` are free."""
        free: dict[int, int] = {}
        chosen: tuple[int, ...] = ()
        with _locked(folder):
            try:
                for number, lock in self._free(folder, cpu.affinity):
                    free[number] = lock
                if len(free) >= count:
                    chosen = packed(replace(cpu, affinity=tuple(free)), count)
            finally:
                self._locks += [lock for number, lock in free.items() if number in chosen]
                for lock in set(free.values()) - set(self._locks):
                    os.close(lock)
        return chosen

    @staticmethod
    def _free(folder: Path, numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Those that nobody has claimed, with their locks, which are held."""
        for number in numbers:
            lock = os.open(folder / f"cpu{number}", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
            else:
                yield number, lock


def own_folder(shared: Path) -> Path:
    """This user's folder for claims, in a folder where others may have taken its name: then the next name.

    Raises ``OSError`` if it cannot be made.
    """
    for number in range(MOST_NAMES):
        folder = shared / f"corewise-cores-{os.getuid()}{f'-{number}' if number else ''}"
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
            return folder
    raise FileExistsError(EEXIST, f"others have taken the name {folder.name} and those before it", str(shared))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _pinned(chosen: Sequence[int]) -> Cpu:
    for thread in os.listdir("/proc/self/task") if chosen else ():
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread), chosen)
    cpu = inspect_cpu()
    os.environ["OMP_NUM_THREADS"] = str(cpu.usable_cores)
    return cpu
