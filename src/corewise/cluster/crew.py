"""The nodes of a Ray cluster and the actors on them, as the driver of a job needs them.

One actor for each node, pinned to that node and with all the CPUs that Ray has there: its instances share the model's
weights, and a part that is lost with it is small. Ray restarts nothing: the driver knows what was lost.
"""

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Protocol

from corewise._version import __version__
from corewise.cluster.actor import Answerer
from corewise.cluster.messages import refusal
from corewise.common.errors import EngineError

READER_CPUS = 4
"""The driver's node keeps one of its CPUs for reading the inputs if it has at least this many."""
AT_ONCE = 2
"""Parts that an actor works on."""
IDLE_S = 0.2
"""Between two looks for nodes while there is no actor."""
ABSENT = "No module named 'corewise'"
"""What Ray says of a node that cannot import what it is to run."""


class Node(NamedTuple):
    """A living node of the cluster."""

    id: str
    name: str
    cpus: int
    """What an actor gets there."""


class ActorLost(Exception):
    """An actor's process, or its node, is gone."""


class Crew(Protocol):
    """Who does a job's parts. Handles and calls are opaque values."""

    grows: bool
    """Whether nodes may come."""

    @abstractmethod
    def nodes(self) -> list[Node]:
        """The living nodes."""

    @abstractmethod
    def start(self, node: Node, task: str) -> Any:
        """Begin to start an actor on a node; returns its handle."""

    @abstractmethod
    def call(self, actor: Any, method: str, *arguments: Any) -> Any:
        """Begin a call of one of its methods, which may wait for the start."""

    @abstractmethod
    def wait(self, calls: Sequence[Any], timeout_s: float) -> list[Any]:
        """The calls that have ended, as soon as one has."""

    @abstractmethod
    def result(self, call: Any) -> str:
        """The message that an ended call returned. Raises ``ActorLost``."""

    @abstractmethod
    def stop(self, actor: Any) -> None:
        """End an actor at once."""


class RayCrew:
    """The crew of the cluster that this process is connected to."""

    def __init__(self, reads_on: str | None, *, grows: bool = True) -> None:
        """``reads_on`` is the id of the node on which the inputs are read, if it is one of the cluster's."""
        self._reads_on = reads_on
        self.grows = grows

    def nodes(self) -> list[Node]:
        """The living nodes, each with the CPUs that Ray has there. Raises ``EngineError`` if the cluster is gone."""
        import ray

        with _answering():
            nodes = ray.nodes()
        found = []
        for node in nodes:
            cpus = int(node["Resources"].get("CPU", 0))
            if node["Alive"] and cpus > 0:
                reads = node["NodeID"] == self._reads_on and cpus >= READER_CPUS
                name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}:{node['NodeManagerPort']})"
                found.append(Node(node["NodeID"], name, cpus - reads))
        return found

    def start(self, node: Node, task: str) -> Any:
        """Ask Ray for an actor with all CPUs of the node."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options = {
            "num_cpus": node.cpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": AT_ONCE + 1,  # and one for the question whether it is alive
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=node.id, soft=False),
        }
        with _answering():
            return ray.remote(Answerer).options(**options).remote(task)

    def call(self, actor: Any, method: str, *arguments: Any) -> Any:
        """Begin a call of one of its methods."""
        with _answering():
            return getattr(actor, method).remote(*arguments)

    def wait(self, calls: Sequence[Any], timeout_s: float) -> list[Any]:
        """The calls that have ended."""
        import ray

        if not calls:
            time.sleep(min(timeout_s, IDLE_S))
            return []
        with _answering():
            ended, others = ray.wait(list(calls), num_returns=1, timeout=timeout_s)
            if ended and others:  # of many nodes, several have ended: to ask for each alone would cost the square
                ended += ray.wait(others, num_returns=len(others), timeout=0)[0]
        return list(ended)

    def result(self, call: Any) -> str:
        """The message that an ended call returned, or one of what the actor did not expect. Raises ``ActorLost``."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            return str(ray.get(call))
        except RayTaskError as error:
            cause = error.cause or error
            if ABSENT in str(cause):
                absent = f"install corewise {__version__} on every node"
                return refusal(EngineError("corewise is not installed there", absent))
            what = f"an actor failed: {type(cause).__name__}: {_last_line(cause)}"
            return refusal(EngineError(what, "see the logs of Ray's workers there"))
        except (RayError, ConnectionError) as error:
            raise ActorLost(_last_line(error)) from error

    def stop(self, actor: Any) -> None:
        """Kill it; with a cluster that is gone it has ended."""
        import ray
        from ray.exceptions import RayError

        with suppress(RayError, ConnectionError):
            ray.kill(actor)


@contextmanager
def _answering() -> Iterator[None]:
    """Turn what Ray raises of a cluster that is gone into ``EngineError``."""
    from ray.exceptions import RayError

    try:
        yield
    except (RayError, ConnectionError) as error:
        raise EngineError(
            f"the Ray cluster does not answer any more: {_last_line(error)}",
            "see 'ray status', and run the same command: finished parts are kept",
        ) from error


def _last_line(error: BaseException) -> str:
    """The end of a message: Ray's begin with ids, and say the reason last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
