"""The ranges of a served model's inputs: checked in requests, listed in metadata."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from corewise.artifact import Artifact
from corewise.artifact.checks import InputChecks, input_ranges
from corewise.common.errors import InputError
from corewise.records.build import TensorSpec
from corewise.records.ranges import InputRange
from corewise.serving import protocol
from corewise.serving.protocol import ProtocolError


class Values:
    """Checks the values of requests and describes the allowed ones. Thread-safe."""

    def __init__(self, found: Artifact, *, check_finite: bool = False) -> None:
        """``check_finite`` refuses NaN and infinities."""
        self._inputs: tuple[TensorSpec, ...] = found.manifest.inputs
        self.ranges = input_ranges(found)
        self._checks = InputChecks(self._inputs, self.ranges, check_finite=check_finite)

    @property
    def notes(self) -> tuple[str, ...]:
        """A warning if integers are not checked."""
        integers = [spec.name for spec in self._inputs if "int" in spec.dtype]
        if self.ranges is not None or not integers:
            return ()
        return (
            f"the ranges of the integer inputs {', '.join(integers)} are not known, so their values are not checked; "
            "make the artifact again with corewise optimize",
        )

    def check(self, inputs: Sequence[np.ndarray]) -> None:
        """Raise ``ProtocolError`` if a value lies outside of the model's tables, or is not finite."""
        try:
            self._checks.check(inputs)
        except InputError as error:
            raise ProtocolError(error.what, error.fix) from error

    def described(self, others: Sequence[TensorSpec] = ()) -> list[dict[str, Any]]:
        """The inputs as the model's metadata lists them, with their ranges as ``parameters``.

        ``others`` are what a request may have in place of all of them.
        """
        ranges = self.ranges or [InputRange()] * len(self._inputs)
        listed = protocol.described(self._inputs)
        for description, each in zip(listed, ranges, strict=True):
            if parameters := _parameters(each):
                description["parameters"] = parameters
        instead = {"parameters": {"replaces_other_inputs": True}}
        return listed + [{**description, **instead} for description in protocol.described(others)]


def _parameters(allowed: InputRange) -> dict[str, int]:
    """``minimum`` and ``maximum`` of the whole input's values, and ``maximum_size_1`` of dimension 1."""
    found: dict[str, int] = {}
    for values in allowed.values:
        if values.axis is None:
            found |= {} if values.low is None else {"minimum": values.low}
            found |= {} if values.high is None else {"maximum": values.high}
    return found | {f"maximum_size_{axis}": most for axis, most in enumerate(allowed.longest) if most is not None}
