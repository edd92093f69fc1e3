"""The user's model: loaded, run once, and exported to one program that every engine starts from."""

from corewise.source.export import Exported, Flat, digest, export
from corewise.source.models import load
from corewise.source.program import load_module, load_program, operators, save_program

__all__ = [
    "Exported",
    "Flat",
    "digest",
    "export",
    "load",
    "load_module",
    "load_program",
    "operators",
    "save_program",
]
