"""The requests to a trial process and its answers: one frozen record each, serialized only here.

A request is one line of JSON with the name of its record under ``request``; an answer is one line with the record
under ``answer`` or a ``Failure`` under ``failure``, and the process's peak memory beside it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from corewise.batching import ElasticTables, LatencyTable
from corewise.records.build import Build, Plan, Receipt
from corewise.records.jsonable import from_json, to_json
from corewise.records.measurement import LoadRun, Measurement
from corewise.records.pipeline import ImagePipeline, PhotoPlan, PhotoRate

A = TypeVar("A")


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Run on these hardware threads only, and import the user's code from ``path``."""

    cpus: tuple[int, ...]
    path: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class BuildPayload:
    """Write the payload of ``build`` into the empty folder ``payload``, from the inputs in ``workspace``."""

    workspace: Path
    build: Build
    payload: Path


@dataclass(frozen=True, kw_only=True)
class OpenPayload:
    """Open the instances of ``plan``, and the one of ``wide``, unless they are those that are open."""

    payload: Path
    build: Build
    plan: Plan
    wide: Plan | None = None


@dataclass(frozen=True, kw_only=True)
class ObserveInt8:
    """Observe what a payload runs in int8; this closes what is open."""

    payload: Path
    build: Build
    plan: Plan
    samples: Path


@dataclass(frozen=True, kw_only=True)
class RunSamples:
    """Run all samples on one instance in calls of ``batch`` rows, and write the outputs to ``outputs``."""

    samples: Path
    batch: int
    outputs: Path
    alone: bool = True
    """Whether some rows are run alone too, to compare their answers."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Time the open instances, all at work, under ``plan``."""

    samples: Path
    plan: Plan
    budget_s: float


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """Warm the open instances up for ``RunRound``."""

    samples: Path
    batch: int
    budget_s: float


@dataclass(frozen=True, kw_only=True)
class RunRound:
    """Run one round of an alternating race."""

    budget_s: float


@dataclass(frozen=True, kw_only=True)
class RunLoad:
    """Put load on the open instances: at a rate, or by a number of clients."""

    samples: Path
    plan: Plan
    table: LatencyTable
    duration_s: float
    rate_per_s: float | None = None
    clients: int | None = None
    slo_ms: float | None = None
    seed: int = 0
    elastic: ElasticTables | None = None
    """The tables of an elastic plan, whose narrow layout is ``plan``."""


@dataclass(frozen=True, kw_only=True)
class MeasurePhotos:
    """Answer photos from their files for so long; this closes what is open."""

    payload: Path
    build: Build
    photos: PhotoPlan
    pipeline: ImagePipeline
    files: tuple[Path, ...]
    budget_s: float


@dataclass(frozen=True, kw_only=True)
class TimeCalls:
    """Time calls of texts on the open instances, all at work and in turns: ``points`` are rows and tokens.

    ``samples`` are rows of tokens. Of the last points some are left out where ``budget_s`` is too short for them.
    """

    samples: Path
    points: tuple[tuple[int, int], ...]
    budget_s: float


Request = (
    Prepare
    | BuildPayload
    | OpenPayload
    | ObserveInt8
    | RunSamples
    | Measure
    | WarmUp
    | RunRound
    | RunLoad
    | TimeCalls
    | MeasurePhotos
)
_REQUESTS: dict[str, type[Request]] = {kind.__name__: kind for kind in get_args(Request)}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The process runs on the hardware threads that it was given."""


@dataclass(frozen=True, kw_only=True)
class BuiltPayload:
    """The payload is written; ``notes`` are the engine's remarks for the report."""

    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class OpenedPayload:
    """The instances are open."""

    cpus: tuple[tuple[int, ...], ...]
    """The hardware threads of each instance."""
    memory_per_instance_bytes: int
    """What opening the second instance added."""
    warning: str
    """Set if there are more threads than can compute at once."""


@dataclass(frozen=True, kw_only=True)
class ObservedInt8:
    """What ran in int8; ``None`` if the engine cannot say."""

    receipt: Receipt | None


@dataclass(frozen=True, kw_only=True)
class RanSamples:
    """The outputs are written."""

    per_s: float
    """Items per second of the median batch."""
    alone_db: float
    """How near the answers of some rows alone are to their answers in a batch (``agreement.worst_row_db``)."""


@dataclass(frozen=True, kw_only=True)
class Warm:
    """The instances are warm after ``calls`` calls."""

    calls: int


@dataclass(frozen=True, kw_only=True)
class RoundRate:
    """Items per second over one round, and how often the cgroup throttled the process in it."""

    per_s: float
    throttled: int


@dataclass(frozen=True, kw_only=True)
class TimedCalls:
    """Milliseconds of the median call of each point that there was time for, at least of the first."""

    ms: tuple[float, ...]


Answer = (
    Prepared
    | BuiltPayload
    | OpenedPayload
    | ObservedInt8
    | RanSamples
    | Measurement
    | Warm
    | RoundRate
    | LoadRun
    | PhotoRate
    | TimedCalls
)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The request failed inside the process."""

    text: str
    disk_full: bool = False


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answered request."""

    answer: Any
    """The answer's plain data; ``read`` makes the record of it."""
    failure: Failure | None
    peak_memory_bytes: int

    def read(self, kind: type[A]) -> A:
        """The answer as a record of that kind."""
        return from_json(kind, self.answer)


def encode_request(request: Request) -> bytes:
    """The request as one line."""
    return json.dumps({"request": type(request).__name__, **to_json(request)}).encode() + b"\n"


def decode_request(line: str) -> Request:
    """The request of one line."""
    data = json.loads(line)
    return from_json(_REQUESTS[data.pop("request")], data)


def encode_reply(result: Answer | Failure, peak_memory_bytes: int) -> bytes:
    """The answer or failure as one line."""
    failed = isinstance(result, Failure)
    data = {
        "answer": None if failed else to_json(result),
        "failure": to_json(result) if failed else None,
        "peak_memory_bytes": peak_memory_bytes,
    }
    return json.dumps(data).encode() + b"\n"


def decode_reply(line: str) -> Reply:
    """The answered request of one line."""
    return from_json(Reply, json.loads(line))
