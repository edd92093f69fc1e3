"""How many photos a second are answered from their files, and what share of the work is decoding."""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from corewise.engines import Session
from corewise.pipeline import ImageAsk, ImageRunner, rows_of_call
from corewise.records.pipeline import ImagePipeline, PhotoPlan, PhotoRate
from corewise.runtime.instances import whole_calls
from corewise.samples.images import ImageReader


class _TimedReader(ImageReader):
    """Reads images, and notes the time of a core that each took."""

    def __init__(self, pipeline: ImagePipeline) -> None:
        super().__init__(pipeline.preprocess)
        self.seconds: list[float] = []

    def __call__(self, item: Any) -> Any:
        with self._timed():
            return super().__call__(item)

    def sized(self, item: Any) -> tuple[Any, tuple[int, int]]:
        with self._timed():
            return super().sized(item)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started_s = time.thread_time()
        yield
        self.seconds.append(time.thread_time() - started_s)


def measure_photos(
    session: Session, photos: PhotoPlan, pipeline: ImagePipeline, files: Sequence[Path], budget_s: float
) -> PhotoRate:
    """Answer files again and again for so long.

    Args:
        session: The payload under ``photos.plan``, for any number of threads.
        photos: How many decode, and the plan.
        pipeline: What images and outputs are.
        files: At least one.
        budget_s: Seconds, after the calls that fill the queues.
    """
    plan, reader = photos.plan, _TimedReader(pipeline)
    rows = rows_of_call(plan)
    runner = ImageRunner(
        pipeline,
        session.run,
        instances=plan.instances,
        rows=rows,
        reader=reader,
        decoders=photos.decoders,
        whole=whole_calls(session),
    )
    answers = runner.answers(cycle(files), ImageAsk(top=1))
    for _ in islice(answers, 2 * rows * plan.instances):
        pass
    reader.seconds.clear()
    started_s, began_s = time.perf_counter(), time.process_time()
    count = 0
    while (took_s := time.perf_counter() - started_s) < budget_s or not count:
        for _ in islice(answers, rows):
            count += 1
    decoding_s, worked_s = sum(reader.seconds), time.process_time() - began_s
    assert isinstance(answers, Generator)  # to be closed, which ends its threads
    answers.close()
    return PhotoRate(plan=photos, per_s=count / took_s, decoding=min(1.0, decoding_s / worked_s))
