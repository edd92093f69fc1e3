"""What the torch engines share: threads, and the way from and to numpy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with ``count`` intra-op threads and put the caller's number back."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def from_numpy(array: np.ndarray) -> torch.Tensor:
    """The array as a tensor; without a copy where it is writable (torch warns about read-only memory)."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def to_numpy(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Tensors as arrays; bf16, which numpy lacks, as float32."""
    return [(t.float() if t.dtype == torch.bfloat16 else t).contiguous().numpy() for t in tensors]
