"""Exported programs as files that cannot run code.

A ``.pt2`` is a zip of JSON and raw tensors, but what torch 2.13 does to load and run one executes what a hostile
file holds in it: pickled weights, constants and sample inputs are unpickled; shape expressions go through
``sympy.sympify``, which is ``eval``; tree specs import modules; names are pasted into generated source, and guards
are source. ``load_program`` reads the file first, refuses what is more than data, and drops the guards.
(An operator may be named ``torch.os.system``, but torch's own verifier refuses that.)
"""

import contextlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.pt2_archive import PT2ArchiveReader
from torch.export.pt2_archive._package import load_pt2

from corewise.common.errors import OutputError, SourceError
from corewise.common.references import guard

MODEL = "models/model.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"
PAYLOADS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
RECORD = re.compile(
    rf"{re.escape(MODEL)}|{re.escape(SAMPLE_INPUTS)}|{'|'.join(map(re.escape, PAYLOADS))}"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+|extra/[^/]+"
    r"|archive_format|archive_version|byteorder|\.data/\w+"
)
IDENTIFIER = re.compile(r"\w*", re.ASCII)
PLAIN_TEXT = re.compile(r"[\w.:+ \-]*", re.ASCII)
EXPRESSION = re.compile(r"[\w\s(),.'=+*/-]*", re.ASCII)
EXPRESSION_WORD = re.compile(
    r"Symbol|Integer|Rational|Float|Add|Mul|Pow|Max|Min|Mod|FloorDiv|CleanDiv|CeilDiv|ModularIndexing|PythonMod|Where"
    r"|Identity|FloatTrueDiv|IntTrueDiv|ToFloat|TruncToInt|CeilToInt|FloorToInt|RoundToInt|Equality|Unequality"
    r"|LessThan|StrictLessThan|GreaterThan|StrictGreaterThan|Not|And|Or|true|false|True|False"
    r"|positive|negative|nonnegative|integer|real|finite|precision|[a-z]{1,4}\d+"
)
FIX = "export the model again with torch.export.save, without custom objects or tensor subclasses"


def save_program(program: ExportedProgram, path: Path) -> None:
    """Write ``program`` without its example inputs, which torch would pickle.

    Raises ``OutputError`` where the file cannot be written and ``SourceError`` where the program holds more than
    data (custom objects, tensor subclasses).
    """
    program.example_inputs = None
    # Through memory: on a full disk torch's own writer aborts the process.
    archive = io.BytesIO()
    with guard(SourceError, "the exported program cannot be written as a file", FIX):
        torch.export.save(program, archive)
    try:
        path.write_bytes(archive.getbuffer())
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}", "free space there") from error
    _check(path)


def load_program(path: Path) -> ExportedProgram:
    """The program in a ``.pt2`` file; never unpickles, imports or evaluates what the file holds.

    Raises ``SourceError`` where the file is missing, damaged, of another torch, or holds more than data.
    """
    if not path.is_file():
        raise SourceError(f"there is no file {path}", "check the path")
    _check(path)
    with guard(SourceError, f"{path} cannot be loaded", "export it again with this torch"):
        program = load_pt2(str(path)).exported_programs["model"]
    program.example_inputs = None
    program._guards_code = []
    return program


def operators(program: ExportedProgram) -> dict[str, int]:
    """How often each operator stands in the program's graph, e.g. ``{"aten.conv2d.default": 53}``."""
    return dict(Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function"))


def load_module(path: Path) -> nn.Module:
    """The program in a ``.pt2`` file as a module: flat tensors in, a tuple of flat tensors out."""
    return load_program(path).module()


def _check(path: Path) -> None:
    """Raise ``SourceError`` unless the file is data only. Read by torch's reader, as loading does."""
    with guard(SourceError, f"{path} is not an exported program", "write it with torch.export.save"):
        reader = PT2ArchiveReader(str(path))
        names = reader.get_file_names()
        foreign = [name for name in names if not RECORD.fullmatch(name)]
        if foreign or len(set(names)) != len(names):
            raise SourceError(f"{path} holds {foreign[0] if foreign else 'a record twice'}, which is not data", FIX)
        for record in (*PAYLOADS, MODEL):
            data = json.loads(reader.read_bytes(record))
            problem = next(_problems(data), None)
            if problem:
                raise SourceError(f"{path} holds {problem}", FIX)
            for name, meta in data.get("config", {}).items():
                if meta["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", meta["path_name"]):
                    raise SourceError(f"{path} holds {name} as a pickle, which can run code when opened", FIX)
        examples = reader.read_bytes(SAMPLE_INPUTS)
    if examples:
        # torch tries this too and, where it fails, opens the pickle without the restriction.
        with guard(SourceError, f"the sample inputs in {path} are more than tensors", FIX):
            torch.load(io.BytesIO(examples), weights_only=True)


def _problems(data: Any, key: str = "") -> Iterator[str]:
    """What in a program's JSON could run code, in words."""
    if isinstance(data, dict):
        # A node's metadata (stack traces, module names) is never evaluated.
        if key == "metadata" and all(isinstance(value, str) for value in data.values()):
            return
        for name, value in data.items():
            yield from _problems_in_text(name, "")
            yield from _problems(value, name)
    elif isinstance(data, list):
        for value in data:
            yield from _problems(value, key)
    elif isinstance(data, str):
        yield from _problems_in_text(data, key)


def _problems_in_text(text: str, key: str) -> Iterator[str]:
    if key in ("guards_code", "as_string"):  # dropped after loading; quoted in generated source
        return
    if key == "expr_str":
        words = re.findall(r"[^\W\d]\w*", text)
        if not EXPRESSION.fullmatch(text) or not all(map(EXPRESSION_WORD.fullmatch, words)):
            yield f"the shape {text!r}, which is not a plain expression"
    elif key in ("in_spec", "out_spec"):
        if text:
            yield from _problems_in_tree(json.loads(text)[1])
    elif not (IDENTIFIER if key in ("name", "as_name", "forward_arg_names") else PLAIN_TEXT).fullmatch(text):
        yield f"the name {text!r}, which could be code"


def _problems_in_tree(tree: Any) -> Iterator[str]:
    context = tree["context"]
    with contextlib.suppress(TypeError, ValueError):
        # Decoded and encoded again, so that no escape hides a word.
        context = json.dumps(json.loads(context))
    if tree["type"] == "collections.defaultdict" or "__enum__" in str(context):
        yield f"a {tree['type']} among its inputs or outputs, which imports modules"
    for child in tree["children_spec"]:
        yield from _problems_in_tree(child)
