"""A job's progress as Ray's own metrics, which its dashboard and its Prometheus endpoints show with ``ray_`` before."""

from corewise.records.bulk import BulkProgress, OnProgress

HELP = {
    "rows": "Rows of the job that are done, those of an earlier run included.",
    "rows_expected": "About how many rows the job has.",
    "failed_rows": "Rows that were set aside.",
    "actors": "Processes that answer.",
    "lost_actors": "Processes that ended before their time.",
}


def with_metrics(on_progress: OnProgress, output: str) -> OnProgress:
    """Also set the gauges ``corewise_job_rows`` and so on, whose tag ``output`` says which job it is.

    For a process that is connected to the cluster as one of its nodes.
    """
    from ray.util.metrics import Gauge

    gauges = {name: Gauge(f"corewise_job_{name}", text, ("output",)) for name, text in HELP.items()}
    tags = {"output": output}

    def tell(progress: BulkProgress) -> None:
        values = (progress.rows, progress.total, progress.failed, progress.actors or 0, progress.lost)
        for gauge, value in zip(gauges.values(), values, strict=True):
            if value is not None:
                gauge.set(value, tags)
        on_progress(progress)

    return tell
