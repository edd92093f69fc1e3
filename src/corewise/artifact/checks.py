"""Checks a call's inputs against the values and sizes that the model accepts."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from corewise.artifact.format import REFERENCE, Artifact
from corewise.artifact.index_ranges import derive
from corewise.common.errors import ArtifactError, InputError
from corewise.records.build import TensorSpec
from corewise.records.ranges import InputRange, ValueRange


def input_ranges(artifact: Artifact) -> tuple[InputRange, ...] | None:
    """The ranges of an artifact's inputs: those of its manifest, else those of the fp32 program that it carries.

    ``None`` if neither has them: the artifact is older than ranges, or its model cannot be exported.
    """
    if artifact.manifest.input_ranges is not None:
        return artifact.manifest.input_ranges
    if REFERENCE not in artifact.manifest.files:
        return None
    golden, _ = artifact.golden()
    return program_ranges(artifact.folder / REFERENCE, artifact.manifest.inputs, [golden])


def program_ranges(
    program: Path, inputs: Sequence[TensorSpec], batches: Iterable[Sequence[np.ndarray]]
) -> tuple[InputRange, ...] | None:
    """The ranges of the inputs of the program in a ``.pt2`` file (``derive``).

    ``batches`` are inputs that the program accepts. Returns ``None`` if the file is missing or cannot be read, or if a
    range refuses one of the batches and so is wrong.
    """
    if not program.exists():
        return None
    try:
        ranges = derive(program)
        checks = InputChecks(inputs, ranges)
        for batch in batches:
            checks.check(batch)
    except (ArtifactError, InputError):
        return None
    return ranges


class InputChecks:
    """Checks the inputs of each call against the ranges of a model's inputs."""

    def __init__(
        self,
        inputs: Sequence[TensorSpec],
        ranges: Sequence[InputRange] | None,
        *,
        check_finite: bool = False,
    ) -> None:
        """Without ``ranges`` integers are not checked. ``check_finite`` refuses NaN and infinities."""
        ranges = ranges or [InputRange()] * len(inputs)
        self._values = [
            (k, spec.name, allowed)
            for k, (spec, input_range) in enumerate(zip(inputs, ranges, strict=True))
            for allowed in input_range.values
        ]
        self._sizes = [
            (k, spec.name, axis, most)
            for k, (spec, input_range) in enumerate(zip(inputs, ranges, strict=True))
            for axis, most in enumerate(input_range.longest)
            if most is not None
        ]
        self._least_sizes = [
            (k, spec.name, axis, least)
            for k, (spec, input_range) in enumerate(zip(inputs, ranges, strict=True))
            for axis, least in enumerate(input_range.shortest)
            if least is not None
        ]
        self._multiples = [
            (k, spec.name, axis, divisor)
            for k, (spec, input_range) in enumerate(zip(inputs, ranges, strict=True))
            for axis, divisor in enumerate(input_range.multiples)
            if divisor is not None
        ]
        self._floats = [
            (k, spec.name) for k, spec in enumerate(inputs) if check_finite and spec.dtype.startswith("float")
        ]

    def check(self, arrays: Sequence[np.ndarray]) -> None:
        """Raise ``InputError`` with the input's name and the number if one is out of range.

        ``arrays`` must have the model's dtypes and numbers of dimensions.
        """
        for k, name, axis, most in self._sizes:
            if arrays[k].shape[axis] > most:
                raise InputError(
                    f"input {name!r} has size {arrays[k].shape[axis]} in dimension {axis}",
                    f"give at most {most}, the number of positions that the model has",
                )
        for k, name, axis, least in self._least_sizes:
            if arrays[k].shape[axis] < least:
                raise _of_another_size(arrays[k], name, axis, f"at least {least}")
        for k, name, axis, divisor in self._multiples:
            if arrays[k].shape[axis] % divisor:
                raise _of_another_size(arrays[k], name, axis, f"a multiple of {divisor}")
        for k, name, allowed in self._values:
            _check_range(arrays[k], name, allowed)
        for k, name in self._floats:
            _check_finite(arrays[k], name)


def _of_another_size(array: np.ndarray, name: str, axis: int, allowed: str) -> InputError:
    """The error for a size with which the model would take another branch than the one that was exported."""
    return InputError(
        f"input {name!r} has size {array.shape[axis]} in dimension {axis}",
        f"give {allowed}: for other sizes the model takes a branch that no sample has taken",
    )


def _check_range(array: np.ndarray, name: str, allowed: ValueRange) -> None:
    part = array
    if allowed.axis is not None:
        part = array[(slice(None),) * allowed.axis + (slice(allowed.start, allowed.stop),)]
    if not part.size:
        return
    low, high = part.min(), part.max()
    wrong = high if allowed.high is not None and high > allowed.high else low
    if (allowed.high is not None and high > allowed.high) or (allowed.low is not None and low < allowed.low):
        row = int(np.argwhere(part == wrong)[0][0])
        raise InputError(f"input {name!r} has the value {wrong} in row {row}", f"give values {_words(allowed)}")


def _words(allowed: ValueRange) -> str:
    if allowed.low is None:
        return f"of at most {allowed.high}"
    return f"of at least {allowed.low}" if allowed.high is None else f"from {allowed.low} to {allowed.high}"


def _check_finite(array: np.ndarray, name: str) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        # A sum keeps NaN and infinities, and is faster than a test of each number.
        if np.isfinite(np.add.reduce(array, axis=None)):
            return
    places = np.argwhere(~np.isfinite(array))
    if len(places):
        wrong = array[tuple(places[0])]
        raise InputError(f"input {name!r} has the value {wrong} in row {places[0][0]}", "give finite numbers")
