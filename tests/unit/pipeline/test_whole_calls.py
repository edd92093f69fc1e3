"""Calls of photos: those that have others beside them are not divided among instances that wait for photos."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from threading import Barrier, Lock
from typing import Any

import numpy as np
import pytest

from corewise.common.errors import EngineError
from corewise.pipeline import ImageRunner
from corewise.records.build import Build, Plan
from corewise.records.pipeline import ImagePipeline
from corewise.records.report import Preprocess
from corewise.runtime.instances import Alone, Instances, Pool, whole_calls

PIPELINE = ImagePipeline(task="vectors", preprocess=Preprocess(resize=8, crop=8))
PHOTO = np.zeros((8, 8, 3), np.uint8)
BUILD = Build(engine="counting", precision="fp32")


class Counting:
    """An engine whose sessions note how many rows each call has."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self._lock = Lock()

    def open(self, folder: Path, build: Build, plan: Plan) -> "Counting":
        return self

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        with self._lock:
            self.rows.append(len(inputs[0]))
        return [inputs[0].reshape(len(inputs[0]), -1)]

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("photos", "alone", "beside"), [(1, [1], []), (4, [4], []), (13, [4], [1, 4, 4])])
def test_only_a_call_without_others_may_be_divided(photos: int, alone: list[int], beside: list[int]) -> None:
    divided, kept = Counting(), Counting()
    runner = ImageRunner(PIPELINE, divided.run, instances=2, rows=4, whole=kept.run)
    assert len(runner.predict([PHOTO] * photos)) == photos
    assert (divided.rows, sorted(kept.rows)) == (alone, beside)


def test_a_pool_keeps_a_call_whole_where_it_is_asked_to() -> None:
    engine: Any = Counting()
    plan = Plan(threads_per_instance=1, instances=2, batch=4)
    inputs = [np.arange(12, dtype=np.float32).reshape(4, 3)]
    with closing(Pool(Instances(engine, Path(), BUILD, plan, [(), ()]), plan.batch)) as pool:
        for run, rows in ((pool.run, [2, 2]), (pool.run_whole, [4]), (whole_calls(pool), [4])):
            engine.rows.clear()
            np.testing.assert_array_equal(run(inputs)[0], inputs[0])
            assert engine.rows == rows
        engine.rows.clear()
        assert len(pool.run_whole([np.zeros((10, 3), np.float32)])[0]) == 10
        assert engine.rows == [10]  # also if it is more than the plan's batch


def test_one_instance_keeps_a_call_whole_where_it_is_asked_to() -> None:
    engine: Any = Counting()
    inputs = [np.arange(15, dtype=np.float32).reshape(5, 3)]
    with closing(Alone(engine, Path(), BUILD, Plan(threads_per_instance=2, batch=2))) as session:
        for run, rows in ((session.run, [2, 2, 1]), (session.run_whole, [5]), (whole_calls(session), [5])):
            engine.rows.clear()
            np.testing.assert_array_equal(run(inputs)[0], inputs[0])
            assert engine.rows == rows
    with pytest.raises(EngineError, match="closed"):
        session.run_whole(inputs)


def test_instances_are_busy_at_the_same_time_with_whole_calls() -> None:
    together = Barrier(2)

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        if len(inputs[0]) == 2:
            together.wait(30)
        return [inputs[0].reshape(len(inputs[0]), -1)]

    runner = ImageRunner(PIPELINE, run, instances=2, rows=2, whole=run)
    assert len(runner.predict([PHOTO] * 8)) == 8
