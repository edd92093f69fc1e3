"""Metrics of one's own: functions of outputs and labels, higher is better.

    corewise optimize examples/digits.py:build --samples examples/digits.py:samples \
        --metric examples/custom_metric.py:macro_recall --max-drop 0.01 -o digits-recall.cw

``outputs`` is what the model returns, as NumPy arrays for all held-out samples; ``labels`` is what the samples came
with.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def macro_recall(outputs: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The mean over classes of the share of their samples that are recognized: a rare class counts like any other.

    ``outputs`` (N, classes) scores, ``labels`` (N,). One number for all samples; corewise resamples them to find its
    confidence interval.
    """
    right = outputs.argmax(axis=1) == labels
    return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))


def confident(outputs: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[Any]:
    """Whether each answer is right and at least half of the probability: one score for each sample, (N,).

    A score for each sample makes the interval of the drop exact: both builds answered the same samples.
    """
    scores = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    probability = (scores / scores.sum(axis=1, keepdims=True)).max(axis=1)
    return (outputs.argmax(axis=1) == labels) & (probability >= 0.5)
