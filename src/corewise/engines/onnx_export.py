"""Programs as ONNX files."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from corewise.engines.libraries import quiet
from corewise.engines.onnx_attention import drop_guards

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def export_onnx(program: "ExportedProgram", path: Path) -> None:
    """Write the program as one ONNX file, whole or not at all."""
    import torch

    with TemporaryDirectory(dir=path.parent) as folder, quiet():
        part = Path(folder) / path.name
        torch.onnx.export(program, f=part, dynamo=True, external_data=False, verbose=False)
        drop_guards(part)
        part.replace(path)
