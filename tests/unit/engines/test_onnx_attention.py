"""Guards behind the softmax of an exported attention: dropped where nothing can be NaN, kept where it can."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import Tensor, nn
from torch.export import Dim

from corewise.engines.onnx_attention import drop_guards
from corewise.engines.onnx_export import export_onnx

TOKENS, WIDTH = 6, 8


class Masked(nn.Module):
    """Attention that looks only at the tokens that ``mask`` (batch, tokens) names."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(-1, TOKENS, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v, mask.bool()[:, None, None])


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_an_exported_attention_has_no_guard_and_the_same_answers(tmp_path: Path):
    torch.manual_seed(0)
    model, batch = Masked().eval(), Dim("batch", min=1)
    x, mask = torch.randn(3, TOKENS, WIDTH), (torch.arange(TOKENS)[None] < torch.tensor([[6], [3], [1]])).long()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (x, mask), dynamic_shapes=({0: batch}, {0: batch}), strict=False)
        export_onnx(program, tmp_path / "masked.onnx")
    assert {"Softmax"} <= set(kinds(tmp_path / "masked.onnx"))
    assert "IsNaN" not in kinds(tmp_path / "masked.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "masked.onnx", providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, (x.numpy(), mask.numpy()), strict=True)))
    with torch.no_grad():
        np.testing.assert_allclose(found, model(x, mask).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("hidden", "dropped"), [(-3.4e38, 1), (-np.inf, 0)])
def test_only_what_a_finite_mask_makes_needless_is_dropped(hidden: float, dropped: int, tmp_path: Path):
    nodes = [
        helper.make_node("Where", ["seen", "zero", "hidden"], ["mask"]),
        helper.make_node("Add", ["scores", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["shares"], axis=-1),
        helper.make_node("IsNaN", ["shares"], ["nan"]),
        helper.make_node("Where", ["nan", "zero", "shares"], ["safe"]),
        helper.make_node("Mul", ["safe", "safe"], ["out"]),
    ]
    kind = onnx.TensorProto
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("seen", kind.BOOL, [2, 3]), helper.make_tensor_value_info("scores", 1, [2, 3])],
        [helper.make_tensor_value_info("out", kind.FLOAT, [2, 3])],
        [helper.make_tensor("zero", kind.FLOAT, [], [0.0]), helper.make_tensor("hidden", kind.FLOAT, [], [hidden])],
    )
    path = tmp_path / "guarded.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    before = path.read_bytes()
    assert drop_guards(path) == dropped
    assert ("IsNaN" in kinds(path)) == (dropped == 0)
    assert (path.read_bytes() == before) == (dropped == 0)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    seen, scores = np.array([[True, True, False], [False] * 3]), np.zeros((2, 3), np.float32)
    (found,) = session.run(None, {"seen": seen, "scores": scores})
    # A query that looks at nothing: equal shares by the finite mask, which are no NaN; zeros by the guard.
    np.testing.assert_allclose(found, np.square([[0.5, 0.5, 0], [1 / 3] * 3 if dropped else [0.0] * 3]), atol=1e-6)
    assert drop_guards(path) == 0
