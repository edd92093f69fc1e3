"""Packages that take long to compile, kept for the other test files of one run, whichever worker runs them."""

import os
import shutil
from pathlib import Path
from uuid import uuid4

import pytest

from corewise.records.build import Build


def place(factory: pytest.TempPathFactory, net: str, build: Build) -> Path:
    """Where the payload of a build of that network of the engines' contract lies, if a test has made it."""
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return root / "compiled" / f"{net}-{build.label.replace('/', '-')}"


def keep(payload: Path, to: Path) -> None:
    """Copy a payload there; it appears as a whole."""
    if not to.exists():
        new = to.with_name(f"{to.name}.{uuid4().hex}")
        shutil.copytree(payload, new)
        if to.exists():
            shutil.rmtree(new)
        else:
            new.rename(to)
