"""onnx_export: what has no form in ONNX."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from corewise.common.errors import EngineError
from corewise.engines.onnx_export import export_onnx


class TakesEigenvalues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x @ x.mT)


def test_a_program_without_a_form_in_onnx_is_told_with_the_operation(tmp_path: Path) -> None:
    program = torch.export.export(TakesEigenvalues(), (torch.randn(2, 3, 3),))
    with pytest.raises(EngineError, match=r"torch cannot make an ONNX model of it: .*eigh") as told:
        export_onnx(program, tmp_path / "model.onnx")
    assert "\x1b" not in str(told.value)
    assert list(tmp_path.iterdir()) == []
