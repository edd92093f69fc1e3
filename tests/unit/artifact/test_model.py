"""model: nested tensors in and out, and what is told about a wrong call."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from waiting import eventually

from corewise.artifact.model import Model
from corewise.common.errors import EngineError, InputError
from corewise.common.nested import flatten
from corewise.engines.denormals import flushed
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build, Plan, TensorSpec
from corewise.runtime.instances import open_plan


class Doubling:
    """A session that doubles what it is given, notes each call, and tells when two calls overlap.

    ``during`` is called with the inputs while it runs.
    """

    def __init__(self, during=lambda inputs: None):
        self.closed = False
        self.sizes = []
        self.threads = set()
        self.flushed = set()
        self._during = during
        self._busy = threading.Lock()

    def run(self, inputs):
        assert self._busy.acquire(blocking=False), "two calls at once"
        try:
            self.sizes.append(len(inputs[0]))
            self.threads.add(threading.get_ident())
            self.flushed.add(flushed())
            self._during(inputs)
            return [2 * array for array in inputs]
        finally:
            self._busy.release()

    def close(self):
        assert not self._busy.locked(), "closed while it runs"
        self.closed = True


class Doublings:
    """The engine of such sessions, which it keeps."""

    def __init__(self, during=lambda inputs: None):
        self.sessions = []
        self._during = during

    def open(self, folder, build, plan):
        self.opened_flushed = flushed()
        self.sessions.append(Doubling(self._during))
        return self.sessions[-1]


BUILD = Build(engine="fake", precision="fp32")
CPU = inspect_cpu()
ONE = Plan(threads_per_instance=1, batch=1)
FOURS = Plan(threads_per_instance=1, batch=4)
SEVERAL = Plan(threads_per_instance=1, instances=3, batch=4)


@dataclass
class Answer:
    first: object
    rest: object


def make(args, kwargs, output, *specs, engine=None, plan=ONE):
    return Model(
        open_plan(engine or Doublings(), Path("none"), BUILD, plan, CPU),
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
        (X[:0], r"the inputs have \[0\] items; give the same number of each, at least 1"),
        (X.tolist(), r"inputs\[0\] is a list, but a tensor is expected; give a tensor or an array"),
        (None, r"inputs\[0\] is None, but a tensor is expected"),
    ],
)
def test_a_wrong_input_is_told(single, wrong, told):
    with pytest.raises(InputError, match=told):
        single(wrong)


def test_missing_and_unknown_arguments_are_told(single, nested):
    with pytest.raises(InputError, match=r"inputs\[0\] is missing; give one value"):
        single()
    with pytest.raises(InputError, match=r"inputs\[1\] is not expected; give one value"):
        single(X, X)
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


def test_leaving_closes_the_session():
    engine = Doublings()
    with made(engine, ONE):
        assert not engine.sessions[0].closed
    assert engine.sessions[0].closed


# --- under its plan -----------------------------------------------------------------------------------------------


def made(engine, plan):
    return make((X,), {}, X, IMAGE, engine=engine, plan=plan)


def images(count):
    return np.arange(count * 12, dtype=np.float32).reshape(count, 3, 4)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 10])
@pytest.mark.parametrize("plan", [ONE, FOURS, SEVERAL], ids=lambda plan: plan.label)
def test_any_number_of_rows_gives_the_same_answers(plan, rows):
    with made(Doublings(), plan) as model:
        np.testing.assert_array_equal(model(images(rows)), 2 * images(rows))


def test_many_rows_run_in_micro_batches_of_the_plans_batch():
    engine = Doublings()
    with made(engine, FOURS) as model:
        model(images(10))
        assert engine.sessions[0].sizes == [4, 4, 2]
        model(images(3))
        assert engine.sessions[0].sizes == [4, 4, 2, 3]


def test_a_plan_for_single_items_leaves_a_batch_whole():
    engine = Doublings()
    with made(engine, ONE) as model:
        model(images(10))
    assert engine.sessions[0].sizes == [10]


def test_one_instance_runs_in_the_thread_that_calls():
    engine, before = Doublings(), threading.active_count()
    with made(engine, FOURS) as model:
        model(images(10))
        assert threading.active_count() == before
    assert engine.sessions[0].threads == {threading.get_ident()}


@pytest.mark.parametrize("plan", [FOURS, SEVERAL], ids=["one", "several"])
def test_denormals_are_zeros_while_it_opens_and_runs_and_the_callers_own_after(plan):
    engine = Doublings()
    with made(engine, plan) as model:
        model(images(10))
    assert engine.opened_flushed
    assert set().union(*(session.flushed for session in engine.sessions)) == {True}
    assert not flushed()


def test_denormals_are_the_callers_own_after_an_error():
    def fail(inputs):
        raise RuntimeError("broken")

    with made(Doublings(fail), ONE) as model, pytest.raises(RuntimeError, match="broken"):
        model(X)
    assert not flushed()


def test_micro_batches_of_one_call_run_on_all_instances_at_the_same_time():
    together = threading.Barrier(3)
    engine = Doublings(lambda inputs: together.wait(60))  # passes only where three run at once
    with made(engine, SEVERAL) as model:
        np.testing.assert_array_equal(model(images(24)), 2 * images(24))
    assert [session.sizes for session in engine.sessions] == [[4, 4]] * 3
    assert len(set().union(*(session.threads for session in engine.sessions))) == 3


def test_a_call_that_is_alone_is_divided_among_all_instances():
    together = threading.Barrier(3)
    engine = Doublings(lambda inputs: together.wait(60))
    with made(engine, SEVERAL) as model:
        np.testing.assert_array_equal(model(images(5)), 2 * images(5))
    assert sorted(size for session in engine.sessions for size in session.sizes) == [1, 2, 2]


def test_calls_of_several_threads_run_on_several_instances_at_the_same_time():
    together = threading.Barrier(3)
    with made(Doublings(lambda inputs: together.wait(60)), SEVERAL) as model, ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda k: model(images(1) + k), range(6)))
    for k, answer in enumerate(found):
        np.testing.assert_array_equal(answer, 2 * (images(1) + k))


def test_an_instance_that_is_slow_gets_less_to_do_and_the_order_stays():
    others = threading.Semaphore(0)

    def during(inputs):
        if inputs[0][0, 0, 0] == 0:  # the first micro-batch waits until the six others are done
            assert all(others.acquire(timeout=60) for _ in range(6))
        else:
            others.release()

    engine = Doublings(during)
    with made(engine, SEVERAL) as model:
        np.testing.assert_array_equal(model(images(28)), 2 * images(28))
    assert sorted(sum(session.sizes) for session in engine.sessions)[0] == 4


def test_what_one_micro_batch_raises_is_raised_and_the_next_call_runs():
    def during(inputs):
        if inputs[0][0, 0, 0] == 48:
            raise RuntimeError("the second")

    with made(Doublings(during), SEVERAL) as model:
        with pytest.raises(RuntimeError, match="the second"):
            model(images(10))
        np.testing.assert_array_equal(model(images(4)), 2 * images(4))


def test_many_threads_on_several_instances_get_their_own_answers():
    with made(Doublings(), SEVERAL) as model, ThreadPoolExecutor(8) as pool:
        sizes = [1 + k % 13 for k in range(300)]
        found = list(pool.map(lambda k: model(images(sizes[k]) + k), range(300)))
    for k, answer in enumerate(found):
        np.testing.assert_array_equal(answer, 2 * (images(sizes[k]) + k))


def test_closing_waits_for_calls_and_ends_all_threads():
    running, go = threading.Event(), threading.Event()

    def during(inputs):
        running.set()
        assert go.wait(60)

    engine, before = Doublings(during), threading.active_count()
    model = made(engine, SEVERAL)
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(model, images(3))
        assert running.wait(60)
        closing = pool.submit(model.close)
        go.set()
        np.testing.assert_array_equal(answer.result(60), 2 * images(3))
        closing.result(60)
    assert all(session.closed for session in engine.sessions)
    assert eventually(lambda: threading.active_count() <= before)
    model.close()
    for _ in range(2):
        with pytest.raises(EngineError, match="the model was closed; load it again"):
            model(X)


def test_one_instance_that_was_closed_says_so():
    engine = Doublings()
    with made(engine, Plan(threads_per_instance=2)) as model:
        model(X)
    model.close()
    assert all(session.closed for session in engine.sessions)
    with pytest.raises(EngineError, match="the model was closed; load it again"):
        model(X)


def predicting(**runners):
    structure = flatten(((X,), {}))[1]
    return Model(Doubling(), inputs=(IMAGE,), input_structure=structure, output_structure=flatten(X)[1], **runners)


@pytest.mark.parametrize("name", ["top", "score_threshold", "iou_threshold"])
def test_an_option_for_images_is_refused_for_texts(name):
    texts = SimpleNamespace(predict=lambda items, prompt: items)
    with pytest.raises(InputError, match=f"{name} is for images, and the model takes texts; leave out {name}"):
        predicting(texts=texts).predict(["a"], **{name: 1})


def test_a_number_of_classes_is_refused_where_there_are_none():
    images = SimpleNamespace(pipeline=SimpleNamespace(task="boxes"), predict=lambda items, ask: items)
    with pytest.raises(InputError, match="top is a number of classes, and the model gives boxes; leave it out"):
        predicting(images=images).predict([b""], top=3)


class Column:
    """An array as pandas has its columns."""

    def __init__(self, array):
        self._array = array
        self.shape, self.dtype = array.shape, array.dtype

    def __array__(self, dtype=None, copy=None):
        return self._array


def test_other_arrays_are_taken_as_arrays(single):
    found = single(Column(X))
    assert type(found) is np.ndarray
    np.testing.assert_array_equal(found, 2 * X)


def test_an_opened_model_says_why_it_cannot_be_pickled(single):
    with pytest.raises(TypeError, match=r"cannot be copied or pickled; call corewise\.load in each process"):
        pickle.dumps(single)
