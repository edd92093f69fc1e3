"""model: nested tensors in and out, and what is told about a wrong call."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from corewise.errors import InputError
from corewise.model import Model
from corewise.nested import flatten
from corewise.values import TensorSpec


class Doubling:
    """A session that doubles what it is given, and tells when two calls overlap."""

    def __init__(self):
        self.closed = False
        self._busy = threading.Lock()

    def run(self, inputs):
        assert self._busy.acquire(blocking=False), "two calls at once"
        try:
            return [2 * array for array in inputs]
        finally:
            self._busy.release()

    def close(self):
        self.closed = True


@dataclass
class Answer:
    first: object
    rest: object


def make(args, kwargs, output, *specs):
    return Model(
        Doubling(),
        inputs=specs,
        input_structure=flatten((args, kwargs))[1],
        output_structure=flatten(output)[1],
    )


IMAGE = TensorSpec(name="image", dtype="float32", shape=(None, 3, None))
MASK = TensorSpec(name="mask", dtype="int64", shape=(None, 2))
X = np.ones((1, 3, 4), np.float32)
M = np.ones((1, 2), np.int64)


@pytest.fixture
def single():
    return make((X,), {}, X, IMAGE)


@pytest.fixture
def nested():
    return make((), {"batch": {"image": X, "masks": [M]}}, Answer(X, {"mask": (M,)}), IMAGE, MASK)


def test_numpy_in_numpy_out(single):
    found = single(X)
    assert type(found) is np.ndarray
    np.testing.assert_array_equal(found, 2 * X)


def test_torch_in_torch_out(single):
    found = single(torch.from_numpy(X))
    assert torch.equal(found, 2 * torch.from_numpy(X))


def test_a_parameter_that_requires_grad_and_a_view_are_taken(single):
    x = torch.ones(4, 3, 1, requires_grad=True).transpose(0, 2)
    assert torch.equal(single(x), torch.full((1, 3, 4), 2.0))


def test_nested_inputs_and_dataclass_outputs(nested):
    found = nested(batch={"image": X, "masks": [M]})
    assert isinstance(found, Answer)
    np.testing.assert_array_equal(found.first, 2 * X)
    np.testing.assert_array_equal(found.rest["mask"][0], 2 * M)


def test_any_batch_and_dynamic_size_are_taken(single):
    assert single(np.ones((7, 3, 9), np.float32)).shape == (7, 3, 9)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (X.astype(np.float64), "input 'image' is float64; give float32"),
        (torch.ones(1, 3, 4, dtype=torch.bfloat16), "input 'image' is bfloat16; give float32"),
        (X[0], r"input 'image' has shape \(3, 4\); give \(any, 3, any\)"),
        (np.ones((1, 2, 4), np.float32), r"input 'image' has shape \(1, 2, 4\); give \(any, 3, any\)"),
        (X[:0], r"the inputs have \[0\] items; give as many of each, at least 1"),
        (X.tolist(), r"inputs\[0\] is a list, expected a tensor"),
        (None, r"inputs\[0\] is None, expected a tensor"),
    ],
)
def test_a_wrong_input_is_told(single, wrong, told):
    with pytest.raises(InputError, match=told):
        single(wrong)


def test_missing_and_unknown_arguments_are_told(single, nested):
    with pytest.raises(InputError, match=r"inputs.* missing"):
        single()
    with pytest.raises(InputError, match=r'inputs\["mask"\] is not expected'):
        single(X, mask=M)
    with pytest.raises(InputError, match=r'inputs\["batch"\]\["image"\] is missing; give image, masks'):
        nested(batch={"masks": [M]})


def test_inputs_of_different_batches_are_told(nested):
    with pytest.raises(InputError, match=r"the inputs have \[1, 2\] items"):
        nested(batch={"image": X, "masks": [np.ones((2, 2), np.int64)]})


def test_many_threads_call_one_at_a_time(single):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: single(X), range(400)))  # raises where two calls overlap (Doubling)
    assert len(found) == 400
    assert all(np.array_equal(answer, single(X)) for answer in found)


def test_leaving_closes_the_session(single):
    with single as model:
        assert not model._session.closed
    assert single._session.closed
