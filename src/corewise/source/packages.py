"""Packages of pretrained models, imported when they are asked for, and the files that say what a model takes."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from corewise.common.errors import SourceError
from corewise.common.references import guard

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
NO_CODE = {"trust_remote_code": False}
"""Given whenever transformers opens something: otherwise it asks on the terminal whether a folder's code may run."""


def import_package(name: str, prefix: str) -> Any:
    """The package ``name``, for references with ``prefix``. Raises ``SourceError`` if it is missing or does not fit."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SourceError(f"{prefix}: models need the package {error.name}", f"pip install {error.name}") from error
    except (ImportError, RuntimeError) as error:
        # torchvision registers operators that must have been compiled for the torch that is installed.
        raise SourceError(
            f"{name} does not fit torch {torch.__version__}: {str(error).partition(chr(10))[0]}",
            f"install the {name} that was built for this torch, from the same package index",
        ) from error


@contextmanager
def without_code(name: str) -> Iterator[None]:
    """Raise ``SourceError`` if transformers refuses what is called so because it would have to run code of it."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise SourceError(
            f"{name} needs code of its own, which corewise does not run",
            "give a factory that returns it, opened with trust_remote_code=True, and --tokenizer tokenizer.json",
        ) from error


def processor_files(name: str) -> list[Path]:
    """The files of a transformers folder, or of a model of the hub, that say how images or recordings become inputs.

    Raises ``SourceError`` where the hub does not answer.
    """
    if Path(name).is_dir():
        return [path for file in PROCESSOR_FILES if (path := Path(name) / file).is_file()]
    hub = import_package("transformers.utils", "hf")
    with guard(SourceError, f"hf:{name} cannot be loaded", "check the name, the network, or give a local folder"):
        found = hub.cached_file(name, PROCESSOR_FILES[0], _raise_exceptions_for_missing_entries=False)
    return [] if found is None else [Path(found)]
