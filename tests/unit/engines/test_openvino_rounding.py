"""Layers of transformers that int8 would round too coarsely."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import build_inputs
from torch import Tensor, nn

from corewise.engines import engine
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build, Plan, QuantizationOptions
from corewise.samples import from_python

pytest.importorskip("nncf")
PLAN = Plan(threads_per_instance=1, batch=4)
INT8 = Build(engine="openvino", precision="int8").with_quantization(
    QuantizationOptions(reduce_range=not inspect_cpu().int8_dot)
)


class Block(nn.Module):
    """Attention of each token to all, and two linear layers beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(tokens, tokens, tokens) + self.second(F.relu(self.first(tokens)))


@pytest.mark.parametrize(("largest", "int8"), [(1, 2), (300, 1)])
def test_a_layer_stays_in_floating_point_if_it_would_round_most_rows_coarsely(
    largest: float, int8: int, tmp_path: Path
) -> None:
    """The first token of each row is scaled up by ``largest``."""
    torch.manual_seed(0)
    model = Block().eval()
    rows = np.random.default_rng(0).standard_normal((24, 8, 16)).astype(np.float32)
    rows[:, 0] *= largest
    given = build_inputs(model, from_python(list(rows)), tmp_path)
    (folder := tmp_path / "payload").mkdir()
    opener = engine("openvino")
    opener.build(given, INT8, folder)
    receipt = opener.receipt(folder, INT8, PLAN, (rows[:4],))
    assert receipt is not None
    assert receipt.int8 == int8
    session = opener.open(folder, INT8, PLAN)
    try:
        (answer,) = session.run((rows[:4],))
    finally:
        session.close()
    exact = model(torch.from_numpy(rows[:4])).detach().numpy()
    assert np.abs(answer - exact)[:, 0].max() < 0.05 * np.abs(exact[:, 0]).max()
