"""The model that the user calls: nested tensors in and out, whatever engine runs them."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np

from corewise.common.errors import InputError
from corewise.common.nested import Structure, match_call, unflatten
from corewise.engines import Session
from corewise.records.build import TensorSpec


class Model:
    """An opened model. Call it as the original: torch tensors give torch tensors, numpy arrays give numpy arrays.

    Thread-safe. It runs the plan that was measured (``instances.open_plan``): calls with many rows in micro-batches, on
    all instances; calls of fewer rows from several threads at the same time, one on each instance. A single call of
    no more than the plan's batch keeps one instance busy. Raises ``InputError`` where arguments are not as when it was
    made.
    """

    def __init__(
        self,
        session: Session,
        *,
        inputs: Sequence[TensorSpec],
        input_structure: Structure,
        output_structure: Structure,
        check_finite: bool = True,
    ) -> None:
        """``session`` takes calls from several threads at the same time.

        With ``check_finite`` a call whose inputs have NaN or infinity is refused: int8 would answer finite numbers.
        """
        self._session = session
        self._inputs = tuple(inputs)
        self._input_structure = input_structure
        self._output_structure = output_structure
        self._check_finite = check_finite

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs for one batch (dimension 0 of every input)."""
        leaves = match_call(self._input_structure, args, kwargs)
        arrays = [_array(leaf, spec) for leaf, spec in zip(leaves, self._inputs, strict=True)]
        if len({len(array) for array in arrays}) > 1 or not len(arrays[0]):
            counts = [len(array) for array in arrays]
            raise InputError(f"the inputs have {counts} items", "give as many of each, at least 1")
        if self._check_finite:
            for array, spec in zip(arrays, self._inputs, strict=True):
                _refuse_not_finite(array, spec)
        outputs: list[Any] = self._session.run(arrays)
        if not isinstance(leaves[0], np.ndarray):
            outputs = [_tensor(array) for array in outputs]
        return unflatten(self._output_structure, outputs)

    def close(self) -> None:
        """Give back memory and threads, when the calls that run have ended."""
        self._session.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _array(leaf: Any, spec: TensorSpec) -> np.ndarray:
    # Told before numpy sees it, which has no bfloat16.
    dtype = str(leaf.dtype).removeprefix("torch.")
    if dtype != spec.dtype:
        raise InputError(f"input {spec.name!r} is {dtype}", f"give {spec.dtype}")
    array: np.ndarray = leaf if isinstance(leaf, np.ndarray) else leaf.detach().cpu().numpy()
    fits = len(array.shape) == len(spec.shape) and all(
        wanted is None or size == wanted for size, wanted in zip(array.shape, spec.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in spec.shape)
        raise InputError(f"input {spec.name!r} has shape {tuple(array.shape)}", f"give ({wanted})")
    return array


def _refuse_not_finite(array: np.ndarray, spec: TensorSpec) -> None:
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return
    row = int(np.argwhere(~np.isfinite(array))[0, 0])
    value = "NaN" if np.isnan(array[row]).any() else "infinity"
    raise InputError(
        f"input {spec.name!r} has {value} in row {row}",
        "give finite numbers, or open the model with check_finite=False where they are meant",
    )


def _tensor(array: np.ndarray) -> Any:
    # Torch is here already: the caller gave tensors.
    import torch

    return torch.from_numpy(array)
