"""onnx_export: what has no form in ONNX."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from torch import Tensor, nn

from corewise.common.errors import EngineError
from corewise.engines.onnx_export import export_onnx
from corewise.samples import from_python
from corewise.source import export


class TakesEigenvalues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x @ x.mT)


def test_a_program_without_a_form_in_onnx_is_told_with_the_operation(tmp_path: Path) -> None:
    program = torch.export.export(TakesEigenvalues(), (torch.randn(2, 3, 3),))
    with pytest.raises(EngineError, match=r"torch cannot make an ONNX model of it: .*eigh") as told:
        export_onnx(program, tmp_path / "model.onnx")
    assert "\x1b" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


class Encoder(nn.Module):
    """T5's, small: behind the transposition of its attention's output ``contiguous`` has nothing to do."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
        self.encoder = transformers.T5EncoderModel(config)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state


@pytest.mark.slow
def test_an_attention_whose_output_is_reshaped_without_a_copy_has_a_form_in_onnx(tmp_path: Path) -> None:
    model, path, random = Encoder().eval(), tmp_path / "model.onnx", np.random.default_rng(0)
    ids, mask = random.integers(0, 64, (4, 16)), np.ones((4, 16), np.int64)
    program = export(model, from_python([{"ids": ids[row], "mask": mask[row]} for row in range(4)])).program
    assert program is not None
    before = [node.target for node in program.graph.nodes]
    export_onnx(program, path)
    assert [node.target for node in program.graph.nodes] == before
    session = onnxruntime.InferenceSession(path)
    (answer,) = session.run(None, dict(zip([one.name for one in session.get_inputs()], (ids, mask), strict=True)))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-4)
