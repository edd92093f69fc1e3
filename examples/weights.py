"""Where the examples find their weights and data."""

import os
from pathlib import Path

from safetensors.torch import load_file
from torch import nn


def data_folder() -> Path:
    """``COREWISE_DATA``, or ``shared/data`` beside the project."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("COREWISE_DATA", beside))
    if not folder.is_dir():
        raise FileNotFoundError(f"no data in {folder}: set COREWISE_DATA to the folder with the weights")
    return folder


def load_weights(model: nn.Module, name: str) -> nn.Module:
    """Fill ``model`` from ``weights/name`` (cast to fp32) and put it in eval mode."""
    state = load_file(data_folder() / "weights" / name)
    model.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in state.items()})
    return model.eval()
