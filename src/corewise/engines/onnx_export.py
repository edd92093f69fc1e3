"""Programs as ONNX files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from corewise.common.errors import EngineError
from corewise.common.references import describe
from corewise.engines.libraries import quiet
from corewise.engines.onnx_attention import drop_guards

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def export_onnx(program: "ExportedProgram", path: Path) -> None:
    """Write the program as one ONNX file, whole or not at all. Raises ``EngineError`` where ONNX has no form for it."""
    import torch
    from torch.onnx.errors import OnnxExporterError

    from corewise.engines.onnx_rnn import translations
    from corewise.source import recurrent_layers_kept

    with TemporaryDirectory(dir=path.parent) as folder, quiet():
        part = Path(folder) / path.name
        try:
            with _copied_transpositions(program), recurrent_layers_kept():
                torch.onnx.export(
                    program,
                    f=part,
                    dynamo=True,
                    external_data=False,
                    verbose=False,
                    custom_translation_table=translations(),
                )
        except OnnxExporterError as error:  # which says how to report it, and only its cause says what it is
            cause = describe(error.__cause__ or error)
            raise EngineError(f"torch cannot make an ONNX model of it: {cause}", "use another engine") from error
        drop_guards(part)
        part.replace(path)


@contextmanager
def _copied_transpositions(program: "ExportedProgram") -> Iterator[None]:
    """The program with a ``clone`` in place of each ``contiguous`` behind a transposition.

    Behind PyTorch's own attention such a ``contiguous`` does nothing, so that ``torch.onnx`` makes a view of the
    reshape that follows. Then it replaces the attention by one with other strides, which that view does not fit (T5).
    """
    import torch

    aten = torch.ops.aten
    transpositions = (aten.transpose.int, aten.permute.default)
    nodes = program.graph.nodes
    copies = [n for n in nodes if n.target is aten.contiguous.default and n.args[0].target in transpositions]
    given = [node.kwargs for node in copies]
    for node in copies:
        node.target, node.kwargs = aten.clone.default, {"memory_format": torch.contiguous_format}
    try:
        yield
    finally:
        for node, kwargs in zip(copies, given, strict=True):
            node.target, node.kwargs = aten.contiguous.default, kwargs
