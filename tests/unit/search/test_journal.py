"""journal: what was finished is found again, whatever happened to the process or the disk."""

import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
from builders import said, text

from corewise.common.errors import OutputError
from corewise.records.build import Build, Plan
from corewise.records.measurement import Measurement
from corewise.records.trial import Trial
from corewise.search.journal import Journal
from corewise.search.task import _identity as identity

BUILDS = [Build(engine="fake", precision="int8", options=(("n", n),)) for n in range(3)]
TRIALS = [
    Trial(
        build=build,
        state="ok",
        reason=text("fine"),
        notes=("ümlaut\nand a line",),
        measurements=(
            Measurement(
                plan=Plan(threads_per_instance=2),
                latencies_ms=(1.0, 2.0),
                throughput_per_s=3.0,
                p50_ms=1.5,
                p99_ms=2.0,
                spread=0.1,
            ),
        ),
    )
    for build in BUILDS
]


def write(path, key="key", trials=TRIALS):
    with Journal(path, key) as journal:
        for trial in trials:
            journal.add(trial)


def kept(path, key="key"):
    with Journal(path, key) as journal:
        return [trial for build in BUILDS if (trial := journal.get(build))]


def test_finished_trials_are_found_again(tmp_path):
    write(tmp_path / "j")
    assert kept(tmp_path / "j") == TRIALS


def test_an_added_trial_is_there_at_once(tmp_path):
    with Journal(tmp_path / "j", "key") as journal:
        assert journal.get(BUILDS[0]) is None
        journal.add(TRIALS[0])
        assert journal.get(BUILDS[0]) == TRIALS[0]


def test_what_differs_from_an_earlier_run_is_told(tmp_path):
    path, digest = tmp_path / "j", "0" * 64
    parts = {"the model": digest, "the samples": digest, "the seed": "0", "the metric": "top1"}
    with Journal(path, "key", parts) as journal:
        assert journal.set_aside is None
        journal.add(TRIALS[0])
    with Journal(path, "key", parts) as journal:
        assert journal.set_aside is None
    with Journal(path, "other", parts | {"the samples": "1" * 64, "the seed": "7"}) as journal:
        assert said(journal.set_aside) == (
            "the search starts again: the samples and the seed (0, now 7) changed since the earlier run, "
            "so its 1 finished trial cannot be used"
        )
        assert journal.empty


def test_a_package_that_is_gone_is_named(tmp_path):
    with Journal(tmp_path / "j", "key", {"nncf": "3.4.0", "torch": "2.13.0"}) as journal:
        journal.add(TRIALS[0])
    with Journal(tmp_path / "j", "other", {"torch": "2.13.0"}) as journal:
        assert said(journal.set_aside).startswith("the search starts again: nncf changed since")


def test_a_run_that_finished_no_trial_is_not_missed(tmp_path):
    write(tmp_path / "j", trials=[])
    with Journal(tmp_path / "j", "other") as journal:
        assert journal.set_aside is None


def test_a_journal_that_does_not_say_what_it_is_of_is_set_aside_too(tmp_path):
    write(tmp_path / "j")
    with Journal(tmp_path / "j", "other", {"the seed": "0"}) as journal:
        assert "the versions changed since the earlier run, so its 3 finished trials" in said(journal.set_aside)


def test_the_last_record_of_a_build_counts(tmp_path):
    later = replace(TRIALS[0], state="failed", reason=text("later"))
    write(tmp_path / "j", trials=[*TRIALS, later])
    assert kept(tmp_path / "j") == [later, *TRIALS[1:]]


def test_a_journal_of_another_key_is_started_anew(tmp_path):
    write(tmp_path / "j")
    assert kept(tmp_path / "j", "other") == []
    assert kept(tmp_path / "j") == []


@pytest.mark.parametrize("content", [b"", b"\n", b"no journal\n", b"\xff\xfe\n", b"[1]\n{}\n", b'{"schema": 1}\n'])
def test_what_is_no_journal_is_started_anew(tmp_path, content):
    (tmp_path / "j").write_bytes(content)
    write(tmp_path / "j")
    assert kept(tmp_path / "j") == TRIALS


def test_a_journal_cut_off_anywhere_keeps_its_whole_lines_and_goes_on(tmp_path):
    path = tmp_path / "j"
    write(path, trials=TRIALS[:2])
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    near_ends = {end + step for end in ends for step in (-2, -1, 0, 1)} & set(range(len(whole) + 1))
    for length in sorted(near_ends | set(range(0, len(whole), 50))):
        path.write_bytes(whole[:length])
        complete = sum(end <= length for end in ends)
        with Journal(path, "key") as journal:
            assert sum(journal.get(build) is not None for build in BUILDS) == max(0, complete - 1), length
            journal.add(TRIALS[2])
        with Journal(path, "key") as journal:
            assert journal.get(BUILDS[2]) == TRIALS[2], length


def test_a_damaged_line_ends_the_journal_there(tmp_path):
    path = tmp_path / "j"
    write(path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"ok"', b'"excellent"')
    path.write_bytes(b"".join(lines))
    assert kept(path) == TRIALS[:1]


def test_another_process_at_work_is_told(tmp_path):
    path = tmp_path / "j"
    code = "import sys\nfrom pathlib import Path\nfrom corewise.search.journal import Journal\n"
    code += "with Journal(Path(sys.argv[1]), 'key'):\n    print('locked', flush=True)\n    input()\n"
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(OutputError, match=r"another corewise is working in .*; wait"):
            Journal(path, "key")
        other.communicate("\n")
    assert other.returncode == 0
    assert kept(path) == []


@contextmanager
def file_size_limit(size):
    """No file can grow beyond ``size`` bytes, as on a full disk; over before pytest prints, perhaps to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_loses_only_the_trial_that_did_not_fit(tmp_path):
    path = tmp_path / "j"
    write(path, trials=TRIALS[:2])
    with (
        file_size_limit(path.stat().st_size + 20),
        pytest.raises(OutputError, match="cannot be written: File too large; free space"),
        Journal(path, "key") as journal,
    ):
        journal.add(TRIALS[2])
    assert kept(path) == TRIALS[:2]
    write(path, trials=TRIALS[2:])
    assert kept(path) == TRIALS


def test_a_disk_full_from_the_start_is_told(tmp_path):
    with file_size_limit(0), pytest.raises(OutputError, match="cannot be written"):
        Journal(tmp_path / "j", "key")


@pytest.mark.parametrize("name", ["top1", "recall@5", "ndcg@3", "recall@10"])
def test_a_built_in_metric_is_the_same_in_another_run(name):
    assert identity(name) == name
