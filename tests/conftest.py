"""What tests of several files share."""

import os
import re
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]
LONGEST = ("test_cli.py", "test_engines.py", "test_inductor.py", "test_docs.py", "test_text_serving.py")
"""The files that take longest come first, so that no worker is left with one of them at the end."""

# What inductor compiles around its kernels need not be fast; nor need it wait for an optimizing compiler.
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")
BESIDE_OTHERS = "PYTEST_XDIST_WORKER" in os.environ
if BESIDE_OTHERS:
    # Threads of torch that wait for others of their team give up their core, here and in the processes of tests.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")

# The same cases every time, no deadline, and no limit on how long cases take to be made: a busy machine must not fail
# a test.
settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The real weights and data: ``COREWISE_DATA``, or ``shared/data`` beside the project."""
    folder = Path(os.environ.get("COREWISE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}: set COREWISE_DATA")
    return folder


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw rough intervals fast, for tests that do not look at them."""
    from corewise.common import stats

    monkeypatch.setitem(stats.bootstrap_interval.__kwdefaults__, "resamples", stats.FEWEST_RESAMPLES)


def pytest_runtest_setup() -> None:
    """Let torch compute on one thread where another worker's tests run beside these.

    Teams of threads that wait for each other on cores that others use take several times as long.
    """
    torch = sys.modules.get("torch")
    if torch is not None and BESIDE_OTHERS:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and mark the cases of inductor's contract that repeat what other tests show.

    The contract is kept by texts in fp32; ``test_inductor.py`` has images in int8 and texts in bf16.
    """
    for item in items:
        if "TestInductor" in item.nodeid and re.search(r"text-inductor/int8|images-inductor", item.nodeid):
            item.add_marker(pytest.mark.slow)
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
