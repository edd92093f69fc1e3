"""The models in service, by name and version: opened before the server is ready, replaced without a gap."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from math import inf

import numpy as np

from corewise.batching import Answer, NotServed
from corewise.common.errors import CorewiseError, InputError
from corewise.serving.protocol import ProtocolError
from corewise.serving.served import Served, Source

RELOAD_DRAIN_S = 60.0
"""How long a model that was replaced may take to answer what it had accepted."""

Open = Callable[[Source], Served]


class Models:
    """What is in service. Thread-safe."""

    def __init__(self, sources: Sequence[Source], start: Open) -> None:
        """Nothing is opened yet. Raises ``InputError`` where two have one name and version."""
        seen: set[tuple[str, str]] = set()
        for source in sources:
            if (source.name, source.version) in seen:
                raise InputError(
                    f"two models are named {source.name}, version {source.version}", "give NAME=FOLDER or NAME@2=FOLDER"
                )
            seen.add((source.name, source.version))
        self._sources = {(source.name, source.version): source for source in sources}
        self._start = start
        self._served: dict[tuple[str, str], Served] = {}
        self._found: dict[tuple[str, str | None], Served] = {}
        """What ``find`` found; another dictionary after every change, so that no thread adds to it what was before."""
        self._reloading = threading.Lock()
        self.unloaded: set[tuple[str, str]] = set()
        """Those that were taken out of service."""
        self.stopping = False
        """Whether the server is about to drain: it is not ready any more, and still serves what comes."""
        self.draining = False

    @property
    def names(self) -> list[tuple[str, str]]:
        """Name and version of each."""
        return sorted(self._sources)

    @property
    def served(self) -> list[Served]:
        """Those that are open."""
        return list(self._served.values())

    def engine_pids(self) -> list[int]:
        """The ids of their engine processes."""
        return [pid for one in self.served for pid in one.pids]

    @property
    def ready(self) -> bool:
        """Whether every model answers."""
        wanted = len(self._sources) - len(self.unloaded)
        return (
            not (self.stopping or self.draining)
            and len(self._served) == wanted
            and all(one.ready for one in self.served)
        )

    def open(self) -> None:
        """Open all. Raises what the first that cannot be opened raises; those opened so far are closed."""
        try:
            for key, source in self._sources.items():
                if not self.draining:
                    self._served[key] = self._start(source)
                    self._found = {}
        except CorewiseError:
            self.close(0.0)
            raise

    def versions(self, name: str) -> list[str]:
        """The versions of a model, the newest last. Raises ``ProtocolError`` if there is none."""
        found = [version for other, version in self._sources if other == name]
        if not found:
            known = ", ".join(sorted({other for other, _ in self._sources}))
            raise ProtocolError(f"there is no model {name[:80]!r}", f"there is {known}", 404)
        return sorted(found, key=lambda version: (version.isdigit(), int(version) if version.isdigit() else 0, version))

    def find(self, name: str, version: str | None = None) -> Served:
        """A model; its newest version where none is named. Raises ``ProtocolError``."""
        known = self._found
        served = known.get((name, version))
        if served is None:
            served = known[name, version] = self._find(name, version)
        return served

    def _find(self, name: str, version: str | None) -> Served:
        versions = self.versions(name)
        if version and version not in versions:
            known = f"it has {', '.join(versions)}"
            raise ProtocolError(f"the model {name[:80]} has no version {version[:20]!r}", known, 404)
        loaded = [each for each in versions if (name, each) not in self.unloaded] or versions
        served = self._served.get((name, version or loaded[-1]))
        if served is None and (name, version or loaded[-1]) in self.unloaded:
            raise ProtocolError(f"the model {name} was unloaded", status=404)
        if served is None:
            raise ProtocolError(f"the model {name} is not open yet", "try again later", 503)
        return served

    def submit(
        self,
        name: str,
        version: str | None,
        inputs: Sequence[np.ndarray],
        *,
        timeout_s: float,
        priority: int,
        meant: Served | None = None,
    ) -> "tuple[Served, Future[Answer]]":
        """Queue a request with a model (``Served.submit``), and which one took it.

        Raises ``ProtocolError`` where there is no such model, or one that takes other requests than ``meant``, for
        which this one was read; and ``NotServed`` too while ``draining``.
        """
        while True:
            served = self.find(name, version)
            if meant is not None and served is not meant and not served.takes_as(meant):
                raise ProtocolError(f"the model {name} was replaced meanwhile", "send the request again", 503)
            if self.draining:
                served.statistics.not_served()
                raise NotServed("draining")
            try:
                return served, served.submit(inputs, timeout_s=timeout_s, priority=priority)
            except NotServed as refused:
                # Between finding and asking it, another may have taken its place.
                if refused.reason != "draining" or self.draining or self.find(name, version) is served:
                    raise

    def reload(self, name: str, version: str | None = None) -> Served:
        """Open a model's folder again beside what serves now, and put it in its place when it is proven.

        What the old one accepted it finishes. Raises ``ProtocolError`` for a name that is none, and what opening
        raises: then the old one goes on.
        """
        with self._reloading:
            key = (name, version or self.versions(name)[-1])
            old = None if key in self.unloaded else self.find(*key)
            made = self._start(self._sources[key])
            if self.draining:
                made.close(0.0)
                raise ProtocolError("the server is stopping", status=503)
            self._served[key] = made
            self.unloaded.discard(key)
            self._found = {}
            if old is not None:
                old.close(RELOAD_DRAIN_S)
            return made

    def unload(self, name: str, version: str) -> None:
        """Take a model out of service, when it has finished what it accepted. Raises ``ProtocolError``."""
        with self._reloading:
            served = self.find(name, version)
            self.unloaded.add((name, version))
            del self._served[name, version]
            self._found = {}
            served.close(RELOAD_DRAIN_S)

    def drain(self, drain_s: float = inf) -> bool:
        """Refuse what comes and finish what was accepted, for so long at most; whether all was."""
        self.draining = True
        closing = [_Closing(one, drain_s) for one in self.served]
        for one in closing:
            one.join()
        return all(one.finished for one in closing)

    def close(self, drain_s: float = inf) -> bool:
        """``drain``, and forget them."""
        finished = self.drain(drain_s)
        self._served.clear()
        self._found = {}
        return finished


class _Closing(threading.Thread):
    def __init__(self, served: Served, drain_s: float) -> None:
        super().__init__(daemon=True)
        self._served, self._drain_s = served, drain_s
        self.finished = False
        self.start()

    def run(self) -> None:
        self.finished = self._served.close(self._drain_s)
