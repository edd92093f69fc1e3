"""Programs as ONNX files."""

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

    with TemporaryDirectory(dir=path.parent) as folder, quiet():
        part = Path(folder) / path.name
        try:
            torch.onnx.export(program, f=part, dynamo=True, external_data=False, verbose=False)
        except OnnxExporterError as error:  # which says how to report it, and only its cause says what it is
            cause = describe(error.__cause__ or error)
            raise EngineError(f"torch cannot make an ONNX model of it: {cause}", "use another engine") from error
        drop_guards(part)
        part.replace(path)
