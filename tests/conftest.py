"""What tests of several files share."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The real weights and data: ``COREWISE_DATA``, or ``shared/data`` beside the project."""
    folder = Path(os.environ.get("COREWISE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}: set COREWISE_DATA")
    return folder
