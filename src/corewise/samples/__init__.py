"""Samples: what a model is calibrated, verified and measured with.

A sample is the input of one item, without batch dimension, with or without a label. ``read`` takes them from a
folder, a file or a user's function, ``from_python`` from Python objects; ``split`` divides them into a
calibration and a holdout part that share nothing. No torch here: tensors are known by their methods.
"""

from corewise.samples.data import Samples, default_calibration, split
from corewise.samples.files import read
from corewise.samples.python import from_python

__all__ = ["Samples", "default_calibration", "from_python", "read", "split"]
