"""The model as it is, in this process: what it answers, and how long it takes."""

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corewise.samples import Samples
from corewise.source.exported import Exported

FEW_ROWS = 4


def row_seconds(exported: Exported, samples: Samples) -> float:
    """Seconds of one row in eager PyTorch, in a call of a few rows that is not the first."""
    _, batch = _few_rows(exported, samples)
    # Calls must not change what the user's model keeps, and its program leaves such changes out.
    module = exported.program.module() if exported.state and exported.program else exported.module
    with torch.no_grad():
        module(*batch)
        start_s = time.perf_counter()
        module(*batch)
    return (time.perf_counter() - start_s) / len(batch[0])


def own_answers(exported: Exported, samples: Samples) -> tuple[NDArray[np.int64], list[NDArray[Any]]]:
    """The numbers of a few of the samples, and the outputs for them of the user's own module."""
    rows, batch = _few_rows(exported, samples)
    with torch.no_grad():
        outputs = exported.module(*batch)
    return rows, [output[: len(rows)].detach().numpy() for output in outputs]


def _few_rows(exported: Exported, samples: Samples) -> tuple[NDArray[np.int64], list[Tensor]]:
    """The numbers of a few samples of one shape, and a call of them, repeated where the batch is fixed."""
    count = exported.fixed_batch or FEW_ROWS
    rows, arrays = next(samples.batches(count))
    batch = [torch.from_numpy(array) for array in arrays]
    if exported.fixed_batch and len(batch[0]) < count:
        batch = [torch.cat([tensor] * count)[:count] for tensor in batch]
    return rows, batch
