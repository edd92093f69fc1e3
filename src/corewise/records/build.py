"""Builds, the plans that run them, and receipts of what runs in int8."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

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


@dataclass(frozen=True, kw_only=True)
class QuantizationOptions:
    """How a build in int8 is quantized, and in which precision the rest of it runs."""

    quantizer: Literal["engine", "corewise"] = "engine"
    """Whose quantizer chooses ranges and rounds weights."""
    reduce_range: bool = False
    """Weights in 7 bits, for CPUs that add int8 products in 16 bits (``Cpu.int8_dot``)."""
    rung: int | None = None
    """How many rungs of corewise's quantizer are used (``quantize.ptq.RUNGS``); ``None`` for all."""
    placement: Literal["fused", "everywhere"] = "fused"
    """Where corewise's quantizer puts Q/DQ pairs, for engines that run both placements."""
    attention: bool = False
    """Whether products of two activations are in int8 too."""
    ignored_layers: tuple[str, ...] = ()
    """Layers that stay in floating point: names, or regular expressions (``quantize.placement``)."""
    reverted_layers: int = 0
    """How many layers go back to floating point, those that cost most accuracy for their time first."""
    rest: Literal["fp32", "bf16"] = "fp32"
    """The precision of what is not in int8."""


_PAIR_NAMES = {
    "quantizer": "quantizer",
    "reduce_range": "reduce_range",
    "rung": "rung",
    "placement": "placement",
    "attention": "attention",
    "ignored_layers": "ignored",
    "reverted_layers": "returned",
    "rest": "rest",
}
"""The name in ``Build.options`` of each field of ``QuantizationOptions``, as artifacts and journals have it."""
_IGNORED = _PAIR_NAMES["ignored_layers"]


FIXED_BATCH = "fixed_batch"
"""The option that holds the number of rows of each call (``source.Exported.fixed_batch``)."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """An engine's payload at one precision with its options; expensive to make."""

    engine: str
    precision: Precision
    options: tuple[tuple[str, Scalar], ...] = ()
    """(name, value) pairs, e.g. ``(("backend", "onednn"), ("reduce_range", True))``; sorted, except that int8
    attention comes last."""

    @property
    def label(self) -> str:
        """The build in one word, for people and for names of folders: ``torch-int8/int8/backend=onednn``."""
        return "/".join((self.engine, self.precision, *(f"{name}={value}" for name, value in self.options)))

    @property
    def quantization(self) -> QuantizationOptions:
        """The options that say how it is quantized."""
        pairs: dict[str, Any] = dict(self.options)
        if _IGNORED in pairs:
            pairs[_IGNORED] = tuple(str(pairs[_IGNORED]).split())
        return QuantizationOptions(**{field: pairs[name] for field, name in _PAIR_NAMES.items() if name in pairs})

    def with_quantization(self, options: QuantizationOptions) -> "Build":
        """The build quantized by ``options`` instead of its own; engines' options stay."""
        pairs = {name: value for name, value in self.options if name not in _PAIR_NAMES.values()}
        for field, name in _PAIR_NAMES.items():
            value = getattr(options, field)
            if value != getattr(QuantizationOptions(), field):
                pairs[name] = " ".join(value) if name == _IGNORED else value
        return replace(self, options=tuple(sorted(pairs.items())))

    def option(self, name: str, default: Scalar) -> Scalar:
        """The value of an engine's own option, or ``default``."""
        return dict(self.options).get(name, default)

    @property
    def fixed_batch(self) -> int | None:
        """How many rows its program takes a call; ``None`` for any number."""
        return int(self.option(FIXED_BATCH, 0)) or None

    def with_fixed_batch(self, rows: int) -> "Build":
        """The build of a program that takes exactly ``rows`` rows a call."""
        return replace(self, options=tuple(sorted({**dict(self.options), FIXED_BATCH: rows}.items())))


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
        """``2 threads x 1, batch 16``; ``1 thread x 2, batch 8``."""
        return f"{self.layout_label}, batch {self.batch}"

    @property
    def layout_label(self) -> str:
        """``2 threads x 1``; ``1 thread x 2``."""
        threads = "1 thread" if self.threads_per_instance == 1 else f"{self.threads_per_instance} threads"
        return f"{threads} x {self.instances}"


@dataclass(frozen=True, kw_only=True)
class ElasticPlan:
    """Two layouts of one build that are open at the same time and share the cores, divided as the load needs."""

    wide: Plan
    """One instance with all threads, for a call that is alone."""
    narrow: Plan
    """Several instances that together have as many threads, for many calls and for many rows."""

    def __post_init__(self) -> None:
        threads = self.narrow.threads_per_instance * self.narrow.instances
        if self.wide.instances != 1 or self.narrow.instances < 2 or self.wide.threads_per_instance != threads:
            raise ValueError(
                f"{self.label} is no elastic plan: both layouts need as many threads, one a single instance"
            )

    @property
    def label(self) -> str:
        """``2 threads x 1, batch 16 or 1 thread x 2, batch 8``."""
        return f"{self.wide.label} or {self.narrow.label}"


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What an opened int8 payload runs: proof that it did not silently stay in fp32."""

    layers: int
    """Convolutions and linears in the program, and those products of two activations that were quantized."""
    int8: int
    """How many of them ran in int8."""
    kernels: tuple[tuple[str, int], ...]
    """How often each kernel runs a layer, by the runtime's names, e.g. ``(("Convolution/u8", 53),)``; sorted."""
    fell_back: tuple[str, ...] = ()
    """Layers that the payload quantizes but that ran in fp32, as far as the runtime reports it."""

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
