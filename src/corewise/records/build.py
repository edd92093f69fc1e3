"""What is made (a build), how it is run (a plan), and what was seen to run in int8."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Scalar = str | int | float | bool


Precision = Literal["fp32", "bf16", "int8", "int8-dynamic"]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, numpy dtype name and shape of one input or output; ``None`` is a dynamic dimension.

    Dimension 0 is always the batch.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]


IGNORED = "ignored"
"""The option of builds that names layers to stay in floating point, separated by spaces (``quantize.placement``)."""


REVERTED = "returned"
"""The option of builds that give so many layers back to floating point, those that cost most accuracy first."""


FIXED_BATCH = "fixed_batch"
"""The option of builds whose program takes exactly that many rows a call (``source.Exported.fixed_batch``)."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """What is expensive to make: an engine's payload at one precision with its options."""

    engine: str
    precision: Precision
    options: tuple[tuple[str, Scalar], ...] = ()
    """Sorted (name, value) pairs, e.g. ``(("backend", "onednn"), ("reduce_range", True))``."""

    @property
    def label(self) -> str:
        """One word for people and folders: ``torch-int8/int8/backend=onednn``."""
        return "/".join((self.engine, self.precision, *(f"{name}={value}" for name, value in self.options)))

    def option(self, name: str, default: Scalar) -> Scalar:
        """The option's value, or ``default``."""
        return dict(self.options).get(name, default)

    @property
    def fixed_batch(self) -> int | None:
        """How many rows its program takes a call; ``None`` where any number."""
        return int(self.option(FIXED_BATCH, 0)) or None

    def with_option(self, name: str, value: Scalar) -> "Build":
        """The build with that option's value."""
        return replace(self, options=tuple(sorted({**dict(self.options), name: value}.items())))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a build is run. One build is measured under many plans."""

    threads_per_instance: int
    instances: int = 1
    batch: int = 1

    def __post_init__(self) -> None:
        if min(self.threads_per_instance, self.instances, self.batch) < 1:
            raise ValueError(f"there is no plan of {self.label}: threads, instances and batch are 1 or more")

    @property
    def label(self) -> str:
        """``2 threads x 1, batch 16``."""
        return f"{self.threads_per_instance} threads x {self.instances}, batch {self.batch}"


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What an opened int8 payload was seen to run: proof that it did not silently stay in fp32."""

    layers: int
    """Convolutions and linears in the program, and those products of two activations that were quantized."""
    int8: int
    """How many of them ran in int8."""
    kernels: tuple[tuple[str, int], ...]
    """How often each kernel runs a layer, by the runtime's names, e.g. ``(("Convolution/u8", 53),)``; sorted."""
    fell_back: tuple[str, ...] = ()
    """Layers that the payload quantizes and that ran in fp32 all the same, as far as the runtime tells."""

    @classmethod
    def tally(cls, ran: Sequence[tuple[str, bool]], fell_back: Sequence[str] = ()) -> "Receipt":
        """The receipt of layers given as (kernel, whether it is int8)."""
        kernels = Counter(kernel for kernel, _ in ran)
        return cls(
            layers=len(ran),
            int8=sum(int8 for _, int8 in ran),
            kernels=tuple(sorted(kernels.items())),
            fell_back=tuple(fell_back),
        )

    @property
    def words(self) -> str:
        """``int8: 53 of 54 convolutions and linears, 0 fell back``."""
        return f"int8: {self.int8} of {self.layers} convolutions and linears, {len(self.fell_back)} fell back"
