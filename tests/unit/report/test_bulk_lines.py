"""report.bulk: what predict prints."""

import pytest

from corewise.records.build import Plan
from corewise.records.bulk import BulkOutlook, BulkProgress, BulkResult, NodeShare
from corewise.records.tuned import Machine
from corewise.report.bulk import ProgressLines, outlook_line, result_lines

MACHINE = Machine(model="Zen 3", isa=(), usable_cores=2, hardware_threads=4, quota_cores=None)


def test_what_would_run() -> None:
    outlook = BulkOutlook(inputs=2, rows=16_000, done_rows=4096, output="out")
    assert outlook_line(outlook) == "would answer about 16,000 rows of 2 inputs, of which 4,096 are done, to out"
    single = BulkOutlook(inputs=1, rows=1, done_rows=1, output="out")
    assert outlook_line(single) == "would answer about 1 row of 1 input, of which 1 is done, to out"


@pytest.mark.parametrize(
    ("inputs", "archives", "what"),
    [
        (1, 1, "the images of 1 tar file"),
        (1200, 0, "1,200 images"),
        (3, 2, "1 image and the images of 2 tar files"),
    ],
)
def test_what_would_run_of_images(inputs: int, archives: int, what: str) -> None:
    outlook = BulkOutlook(inputs=inputs, rows=inputs, done_rows=0, output="out", archives=archives)
    assert outlook_line(outlook) == f"would answer {what}, to out"


def test_progress_is_told_every_few_seconds() -> None:
    lines = ProgressLines(100.0)
    assert lines.line(BulkProgress(rows=1000, total=9000, failed=0, actors=1), 101.0) == ""
    told = lines.line(BulkProgress(rows=3000, total=9000, failed=2, actors=2, lost=1), 105.0)
    assert told == "3,000 of 9,000 rows, 12 s left, 500/s, 2 actors, 1 lost, 2 set aside"
    assert lines.line(BulkProgress(rows=4000, total=9000, failed=2), 107.0) == ""


def test_the_time_that_a_cluster_takes_to_start_does_not_count() -> None:
    lines = ProgressLines(100.0)
    for now_s in (100.0, 160.0):
        lines.line(BulkProgress(rows=1000, total=9000, failed=0, actors=0), now_s)
    told = lines.line(BulkProgress(rows=3000, total=9000, failed=0, actors=1), 170.0)
    assert told == "3,000 of 9,000 rows, 30 s left, 200/s, 1 actor"


def test_images_of_tar_files_that_nobody_has_counted_have_no_end_in_sight() -> None:
    lines = ProgressLines(100.0)
    lines.line(BulkProgress(rows=0, total=None, failed=0), 100.0)
    assert lines.line(BulkProgress(rows=2048, total=None, failed=0), 108.0) == "2,048 rows, 256/s"


def test_the_result_says_which_plan_ran_where() -> None:
    share = NodeShare(
        node="a (10.0.0.1:7)",
        pid=7,
        machine=MACHINE,
        plan=Plan(threads_per_instance=1, instances=2, batch=8),
        source="tuned now",
        rows=2000,
    )
    result = BulkResult(
        output="out",
        failed_in="out",
        rows=3000,
        resumed=1000,
        failed=1,
        wall_s=4.0,
        nodes=(share,),
        left_out=("node b: it has corewise 0.1; install 0.2",),
        notes=("slow",),
    )
    assert result_lines(result) == (
        "3,000 rows to out in 4 s (500/s); 1,000 were done before; 1 set aside in out",
        "node a (10.0.0.1:7): 2,000 rows under 1 thread x 2, batch 8 (found by this job) on Zen 3 (2 cores, 4 hardware "
        "threads)",
        "took no part: node b: it has corewise 0.1; install 0.2",
        "note: slow",
    )
