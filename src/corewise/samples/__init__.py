"""Samples: what a model is calibrated, verified and measured with.

A sample is the input of one item, without batch dimension, with or without a label. ``read`` takes them from a
folder, a file or a user's function, ``from_python`` from Python objects; ``split`` divides them into a
calibration and a holdout part that share nothing. ``read_raw`` and ``raw_from_python`` leave texts, images and
recordings as they are (``RawSamples``), for a pipeline to make tensors of. No torch here: tensors are known by their
methods.
"""

from corewise.samples.checks import check_finite
from corewise.samples.data import Samples, default_calibration, split
from corewise.samples.files import read, read_leaving_texts, read_raw
from corewise.samples.labels import check_class_names, read_class_names
from corewise.samples.python import from_python, raw_from_python
from corewise.samples.raw import RawSamples, UnreadableItem

__all__ = [
    "RawSamples",
    "Samples",
    "UnreadableItem",
    "check_class_names",
    "check_finite",
    "default_calibration",
    "from_python",
    "raw_from_python",
    "read",
    "read_class_names",
    "read_leaving_texts",
    "read_raw",
    "split",
]
