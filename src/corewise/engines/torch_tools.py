"""What the torch engines share: threads, and the way from and to numpy."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.fx import GraphModule

# From glibc's malloc.h; see mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let this process keep the memory that activations free, instead of giving it back and asking again.

    By default glibc maps large blocks at every call, and the kernel clears each page of them: eager MobileNetV2 at
    batch 16 met 10,500 page faults an image and ran at 33 images/s; without them it runs at 70 or more (Zen 3).
    It also depends on which batches ran before, which would make measurements depend on their order. Does nothing
    where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with ``count`` intra-op threads and put the caller's number back.

    The number and the OpenMP team are the calling thread's, and instances in several threads do not disturb each
    other. But a thread's first operation sets its number to what any thread set last (``lazy_init_num_threads`` in
    ATen/Parallel.h): asking for the number is such an operation, and has to come before setting it. Inter-op threads
    are only for ``torch.jit.fork`` and training, and do not start here.
    """
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
    """The array as a tensor, without a copy unless torch would warn (read-only memory) or refuse it (reversed axes)."""
    taken = array.flags.writeable and min(array.strides, default=0) >= 0
    return torch.from_numpy(array if taken else array.copy())


def to_bf16(module: nn.Module) -> nn.Module:
    """The module with its float32 parameters and buffers in bf16.

    Numbers of other types are so for a reason: complex ones would lose their imaginary part, and float64 its digits.
    """
    if isinstance(module, GraphModule):
        for node in list(module.graph.nodes):
            # Before a conversion torch.export notes the type that it saw, float32.
            if node.target is torch.ops.aten._assert_tensor_metadata.default:
                module.graph.erase_node(node)
        module.recompile()
    converted: nn.Module = module._apply(  # type: ignore[no-untyped-call]
        lambda tensor: tensor.bfloat16() if tensor.dtype == torch.float32 else tensor
    )
    return converted


def to_numpy(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Tensors as arrays; bf16, which numpy lacks, as float32."""
    return [(t.float() if t.dtype == torch.bfloat16 else t).detach().contiguous().numpy() for t in tensors]
