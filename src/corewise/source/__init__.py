"""The user's model: loaded, run a few times, and exported to one program that every engine starts from."""

from corewise.source.behaviour import NotRepeatable
from corewise.source.checks import as_module
from corewise.source.exported import Exported, Flat, digest
from corewise.source.exporting import export
from corewise.source.loaded import Loaded
from corewise.source.models import load, load_with_texts
from corewise.source.preprocessing import OwnPreprocess, own_preprocess, read_for
from corewise.source.program import load_module, load_program, operators, save_program
from corewise.source.recurrence import has_recurrent_layers, recurrent_layers_kept
from corewise.source.text_packing import packable, packed_form
from corewise.source.timing import own_answers, row_seconds

__all__ = [
    "Exported",
    "Flat",
    "Loaded",
    "NotRepeatable",
    "OwnPreprocess",
    "as_module",
    "digest",
    "export",
    "has_recurrent_layers",
    "load",
    "load_module",
    "load_program",
    "load_with_texts",
    "operators",
    "own_answers",
    "own_preprocess",
    "packable",
    "packed_form",
    "read_for",
    "recurrent_layers_kept",
    "row_seconds",
    "save_program",
]
