"""What tests of several files share."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]

# The same cases every time and no deadline: a busy machine must not fail a test.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The real weights and data: ``COREWISE_DATA``, or ``shared/data`` beside the project."""
    folder = Path(os.environ.get("COREWISE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}: set COREWISE_DATA")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases of inductor's contract that repeat what other ones show: int8 of images, and fp32 of texts."""
    for item in items:
        if "TestInductor" in item.nodeid and re.search(r"text-inductor/int8|images-inductor/fp32", item.nodeid):
            item.add_marker(pytest.mark.slow)
