"""What each layer of a model costs and saves in int8."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from corewise.quantize.sensitivity import LayerSensitivity


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What each layer of a model costs and saves in int8."""

    model: str
    samples: str
    """The source of the samples."""
    calibration: int
    """Number of calibration samples."""
    measured: int
    """Number of other samples, on which the errors were measured."""
    weight_bits: int
    layers: tuple["LayerSensitivity", ...]
    """In the order they run; at least one."""
    returning: tuple[str, ...]
    """The layers' names in the order in which they should go back to floating point."""
    kept: tuple[tuple[str, str], ...]
    """(layer name, why) of those that stay in floating point."""
    notes: tuple[str, ...]
    """What the quantizer decided."""
    timing: str
    """How ``saves_ms`` was measured, or why not."""

    @property
    def sqnr_db(self) -> float:
        """The SQNR of the outputs when every layer is quantized, in decibels."""
        return self.layers[0].everything_db

    @property
    def worst_first(self) -> tuple["LayerSensitivity", ...]:
        """The layers by the error that each adds alone."""
        return tuple(sorted(self.layers, key=lambda layer: -layer.alone))

    @property
    def timed(self) -> bool:
        """Whether any layer's time was measured."""
        return any(layer.saves_ms is not None for layer in self.layers)

    def share(self, layer: "LayerSensitivity") -> float:
        """The layer's part of all multiply-adds."""
        return layer.multiply_adds / max(1, sum(other.multiply_adds for other in self.layers))
