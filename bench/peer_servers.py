"""The other servers that ``peers.py`` loads, each as its own documentation has it: eager PyTorch or an artifact in it.

    python -m bench.peer_servers fastapi|ray --port P [--artifact ART]

``fastapi`` is what people write first: no batching. Ray Serve batches up to 8 requests, waiting 10 ms for more, and so
does LitServe (``peer_litserve.py``).
"""

import argparse
import os
import threading
from pathlib import Path

import numpy as np

from bench.harness import example

BATCH, WAIT_S = 8, 0.01
SHAPE = (3, 224, 224)


class Model:
    """ResNet-50, or an artifact whose one input is float32 of a fixed shape."""

    def __init__(self, artifact: str | None) -> None:
        self._shape: tuple[int, ...] = SHAPE
        if artifact:
            import corewise
            from corewise.artifact import read

            loaded = corewise.load(artifact)
            self._shape = read(Path(artifact)).manifest.inputs[0].shape[1:]
            self._run = lambda x: np.asarray(loaded(x))
        else:
            import torch

            model = example("resnet50", "build")().eval()

            def eager(x: np.ndarray) -> np.ndarray:
                with torch.inference_mode():
                    answer: np.ndarray = model(torch.from_numpy(x)).numpy()
                return answer

            self._run = eager
        self.run(np.zeros((1, *self._shape), np.float32))

    def run(self, x: np.ndarray) -> np.ndarray:
        """One batch."""
        return self._run(x)

    def row(self, body: bytes) -> np.ndarray:
        """What a request holds."""
        return np.frombuffer(body, np.float32).reshape(self._shape)


def fastapi(port: int, artifact: str | None) -> None:
    """A route that runs the model, one request after the other."""
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.concurrency import run_in_threadpool

    model, app, one_by_one = Model(artifact), FastAPI(), threading.Lock()

    def run(row: np.ndarray) -> np.ndarray:
        with one_by_one:  # at the same time each call would have all threads, and all would be slower
            return model.run(row[None].copy())

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        return Response((await run_in_threadpool(run, model.row(await request.body()))).tobytes())

    uvicorn.run(app, port=port, log_level="warning", access_log=False)


def ray(port: int, artifact: str | None) -> None:
    """Ray Serve's ``@serve.batch``, one replica that has all cores."""
    import time

    import ray as runtime
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import Response

    threads = len(os.sched_getaffinity(0))

    @serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": threads})
    class Served:
        def __init__(self) -> None:
            import torch

            torch.set_num_threads(threads)  # Ray's workers have OMP_NUM_THREADS set to their CPUs, or 1
            self.model = Model(artifact)

        @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT_S)
        async def many(self, rows: list[np.ndarray]) -> list[np.ndarray]:
            return list(self.model.run(np.stack(rows)))

        async def __call__(self, request: Request) -> Response:
            answer = await self.many(self.model.row(await request.body()))
            return Response(answer.tobytes())

    runtime.init(num_cpus=threads + 2, include_dashboard=False, log_to_driver=False, logging_level="error")
    serve.start(http_options={"port": port, "host": "127.0.0.1"})
    serve.run(Served.bind(), route_prefix="/predict")
    while True:
        time.sleep(1)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options of every server."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--artifact")
    return parser


def main() -> None:
    """Serve until killed."""
    parser = parser_of(__doc__)
    servers = {"fastapi": fastapi, "ray": ray}
    parser.add_argument("server", choices=tuple(servers))
    options = parser.parse_args()
    servers[options.server](options.port, options.artifact)


if __name__ == "__main__":
    main()
