"""Packages of pretrained models, imported when they are asked for."""

import importlib
from typing import Any

import torch

from corewise.common.errors import SourceError


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
