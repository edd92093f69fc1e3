"""What a bulk job says about itself: before it runs, while it runs, and when it is done."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from corewise.records.build import Plan
from corewise.records.tuned import Machine

PlanSource = Literal["made here", "tuned before", "tuned now", "untuned"]
"""Where a plan comes from: the search that made the artifact, an earlier ``retune``, this job, or another machine."""


@dataclass(frozen=True, kw_only=True)
class BulkOutlook:
    """What a job would do."""

    inputs: int
    rows: int
    """About how many: the lines of texts, and of images the inputs; done ones included."""
    done_rows: int
    output: str
    archives: int | None = None
    """How many inputs are tar files, whose images nobody has counted; ``None`` for texts."""


@dataclass(frozen=True, kw_only=True)
class BulkProgress:
    """How far a job is."""

    rows: int
    """Rows that are done, those of an earlier run included."""
    total: int | None
    """About how many there are; ``None`` if nobody has counted them, as the images of tar files."""
    failed: int
    """Rows that were set aside."""
    actors: int | None = None
    """Processes of the cluster that answer; ``None`` on one machine."""
    lost: int = 0
    """Processes of the cluster that ended before their time."""


OnProgress = Callable[[BulkProgress], None]


@dataclass(frozen=True, kw_only=True)
class NodeShare:
    """What one process on a node of the cluster did of a job."""

    node: str
    pid: int
    machine: Machine
    plan: Plan
    source: PlanSource
    rows: int
    lost: bool = False
    """Whether it ended before its time; another one did its rows again."""


@dataclass(frozen=True, kw_only=True)
class BulkResult:
    """The outcome of a job: rows read, those of an earlier run among them, and rows set aside with their reasons."""

    output: str
    """The file, or the folder of Parquet files."""
    failed_in: str
    """The file of rows set aside, or the folder that has one for each part."""
    rows: int
    resumed: int
    failed: int
    wall_s: float
    nodes: tuple[NodeShare, ...] = ()
    """Only with Ray, as is ``left_out``."""
    left_out: tuple[str, ...] = ()
    """The nodes that took no part, each with the reason and the fix."""
    notes: tuple[str, ...] = ()
    cut: int = 0
    """Texts that were cut to the tokens that the model takes, those of an earlier run included."""
