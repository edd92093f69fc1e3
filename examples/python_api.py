"""The Python API from a model to an artifact and back, on a network that is made here.

python examples/python_api.py
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import corewise


class Blend(nn.Module):
    """Two inputs, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 64), nn.Linear(8, 64)
        self.head = nn.Linear(64, 3)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        """Float32 (N, 16) and (N, 8) -> scores (N, 3) and features (N, 64)."""
        features = torch.relu(self.left(left) + self.right(right))
        return {"scores": self.head(features), "features": features}


def main() -> None:
    """Optimize, save, load and call."""
    torch.manual_seed(0)
    model = Blend().eval()
    random = np.random.default_rng(0)
    # One dict for each sample, without the batch dimension: the model is called as model(left=..., right=...).
    samples = [
        {"left": random.standard_normal(16, np.float32), "right": random.standard_normal(8, np.float32)}
        for _ in range(200)
    ]

    # Without labels, a build passes when its outputs stay close to fp32's.
    result = corewise.optimize(model, samples, metric="cosine", max_drop=0.01)
    print(result.headline)
    for label, reason in result.reasons.items():
        print(f"  {label}: {reason}")

    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "blend.cw")
        with corewise.load(Path(folder) / "blend.cw") as fast:
            left, right = torch.randn(5, 16), torch.randn(5, 8)
            answer, expected = fast(left=left, right=right), model(left, right)
            error = (answer["scores"] - expected["scores"]).abs().max().item()
            print(f"tensors in, the same dict of tensors out; largest difference {error:.4f}")


if __name__ == "__main__":
    main()
