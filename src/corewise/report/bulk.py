"""The lines of ``corewise predict``: what a job would do, how far it is, and what came of it. Pure."""

from corewise.records.bulk import BulkOutlook, BulkProgress, BulkResult, NodeShare
from corewise.report.numbers import counted, duration, rate

EVERY_S = 5.0
"""Seconds between two lines of progress."""
SOURCES = {
    "made here": "the artifact was made on such a machine",
    "tuned before": "found there by corewise retune",
    "tuned now": "found by this job",
    "untuned": "not tuned there",
}
"""Where a plan comes from."""


def outlook_line(outlook: BulkOutlook) -> str:
    """``would answer about 16,000 rows of 2 inputs, of which 4,096 are done, to out.parquet``."""
    if outlook.archives is None:
        what = f"about {counted(outlook.rows, 'row')} of {counted(outlook.inputs, 'input')}"
    else:
        images = outlook.inputs - outlook.archives
        alone = [counted(images, "image")] if images else []
        packed = [f"the images of {counted(outlook.archives, 'tar file')}"] if outlook.archives else []
        what = " and ".join([*alone, *packed])
    done = f", of which {outlook.done_rows:,} {'is' if outlook.done_rows == 1 else 'are'} done"
    return f"would answer {what}{done if outlook.done_rows else ''}, to {outlook.output}"


class ProgressLines:
    """Lines of progress, at most one every ``EVERY_S``."""

    def __init__(self, now_s: float) -> None:
        """``now_s`` is when the job begins."""
        self._told_s = now_s
        self._first: tuple[float, int] | None = None
        self._per_s = 0.0

    def line(self, progress: BulkProgress, now_s: float) -> str:
        """How far it is, or nothing if that was told a moment ago."""
        if self._first is None or (progress.actors == 0 and progress.rows == self._first[1]):
            self._first = now_s, progress.rows  # what a cluster takes to start says nothing about the time left
        since_s, before = self._first
        self._per_s = (progress.rows - before) / (now_s - since_s) if now_s > since_s else 0.0
        if now_s - self._told_s < EVERY_S:
            return ""
        self._told_s = now_s
        if progress.total is None:
            return ", ".join([f"{progress.rows:,} rows", *self._facts(progress)])
        left = [f"{duration((progress.total - progress.rows) / self._per_s)} left"] if self._per_s else []
        return ", ".join([f"{progress.rows:,} of {progress.total:,} rows", *left, *self._facts(progress)])

    def more(self, progress: BulkProgress) -> str:
        """What stands beside a bar that shows the rows and the time left."""
        return ", ".join(self._facts(progress))

    def _facts(self, progress: BulkProgress) -> list[str]:
        facts = [rate(self._per_s)] if self._per_s else []
        if progress.actors is not None:
            facts.append("1 actor" if progress.actors == 1 else f"{progress.actors} actors")
        if progress.lost:
            facts.append(f"{progress.lost} lost")
        return [*facts, f"{progress.failed:,} set aside"] if progress.failed else facts


def result_lines(result: BulkResult) -> tuple[str, ...]:
    """What was done, where and under which plan; which nodes took no part and why."""
    done = result.rows - result.resumed
    speed = rate(done / result.wall_s) if done and result.wall_s else "0/s"
    parts = [f"{result.rows:,} rows to {result.output} in {duration(result.wall_s)} ({speed})"]
    if result.resumed:
        parts.append(f"{result.resumed:,} were done before")
    if result.failed:
        parts.append(f"{result.failed:,} set aside in {result.failed_in}")
    if result.cut:
        parts.append(f"{result.cut:,} cut to the tokens that the model takes")
    nodes = [_share(share) for share in result.nodes if result.resumed < result.rows]
    left_out = [f"took no part: {why}" for why in result.left_out]
    return ("; ".join(parts), *nodes, *left_out, *(f"note: {note}" for note in result.notes))


def _share(share: NodeShare) -> str:
    lost = ", then it was lost" if share.lost else ""
    plan = f"{share.plan.label} ({SOURCES[share.source]})"
    return f"node {share.node}: {share.rows:,} rows under {plan} on {share.machine.label}{lost}"
