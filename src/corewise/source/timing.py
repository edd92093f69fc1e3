"""How long the model takes as it is."""

import time

import torch

from corewise.samples import Samples
from corewise.source.exported import Exported

TIMED_ROWS = 4


def row_seconds(exported: Exported, samples: Samples) -> float:
    """Seconds of one row in eager PyTorch, in a call of a few rows that is not the first."""
    rows = exported.fixed_batch or TIMED_ROWS
    _, arrays = next(samples.batches(rows))
    batch = [torch.from_numpy(array) for array in arrays]
    if exported.fixed_batch and len(batch[0]) < rows:
        batch = [torch.cat([tensor] * rows)[:rows] for tensor in batch]
    # Calls must not change what the user's model keeps, and its program leaves such changes out.
    module = exported.program.module() if exported.state and exported.program else exported.module
    with torch.no_grad():
        module(*batch)
        start_s = time.perf_counter()
        module(*batch)
    return (time.perf_counter() - start_s) / len(batch[0])
