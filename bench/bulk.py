"""A bulk job of texts: the plan alone, ``predict`` here, on Ray, and a Ray Data job as one writes it by hand.

    python -m bench bulk ARTIFACT INPUT [--rounds 3]

INPUT is a .txt file, ARTIFACT an OpenVINO artifact of vectors. The contenders take turns, in rounds:

- ``plan``: the calls that ``predict`` makes, with tokens that were made before, on the artifact's instances: nothing is
  read, tokenized or written.
- ``predict``: in this process, to a folder of Parquet files.
- ``ray``: ``predict`` on a Ray of this machine, which runs already, to such a folder.
- ``by hand``: ``ray.data.read_text``, ``map_batches`` of a class that has the same OpenVINO model and tokenizer, and
  ``write_parquet``, all by default; ``by hand, 32`` with batches of 32.

Rates are between the first and the last rows that are done, so that no start counts; ``wall_s`` has the starts.
Writes bulk_NAME.json.
"""

import argparse
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import corewise
from bench.harness import alternate, machine_facts, say, write_results
from corewise.cluster.actor import runner_of
from corewise.common.stats import ratio_interval
from corewise.pipeline import TextRunner
from corewise.pipeline.runner import WINDOW_ITEMS

STORE_BYTES = 2**29


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("input", type=Path, metavar="INPUT")
    parser.add_argument("--rounds", type=int, default=3)


class ByHand:
    """What a user gives to ``map_batches``."""

    def __init__(self, folder: str) -> None:
        import openvino as ov
        from tokenizers import Tokenizer

        self.model = ov.Core().compile_model(f"{folder}/payload/model.xml", "CPU")
        self.tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        self.tokenizer.enable_padding()
        self.tokenizer.enable_truncation(512)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Vectors of one length, and when they were made."""
        encoded = self.tokenizer.encode_batch(list(batch["text"]))
        inputs = [np.array([getattr(one, name) for one in encoded], np.int64) for name in ("ids", "attention_mask")]
        vectors = next(iter(self.model(inputs).values()))
        return {"vector": list(vectors), "made_s": np.full(len(vectors), time.time())}


def by_hand(artifact: Path, source: Path, batch: int | None, output: Path) -> dict[str, float]:
    """The job of a user of Ray Data."""
    import pyarrow.dataset as datasets
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    start_s = time.monotonic()
    sizes = {} if batch is None else {"batch_size": batch}
    rows = ray.data.read_text(str(source))
    made = rows.map_batches(ByHand, fn_constructor_args=(str(artifact),), concurrency=1, **sizes)
    made.write_parquet(str(output))
    wall_s = time.monotonic() - start_s
    times, counts = np.unique(datasets.dataset(output).to_table(["made_s"])["made_s"].to_numpy(), return_counts=True)
    return {"wall_s": wall_s, "rows": int(counts.sum()),
            "per_s": float(counts[1:].sum() / (times[-1] - times[0]))}  # fmt: skip


def job(artifact: Path, source: Path, ray: str | None, output: Path) -> dict[str, float]:
    """``predict``."""
    seen: list[tuple[float, int]] = []

    def on_progress(progress: corewise.BulkProgress) -> None:
        if progress.rows:
            seen.append((time.monotonic(), progress.rows))

    start_s = time.monotonic()
    result = corewise.predict(artifact, source, output, ray=ray, retune_s=0, on_progress=on_progress)
    (first_s, first), (last_s, last) = seen[0], seen[-1]
    return {"wall_s": time.monotonic() - start_s, "rows": result.rows, "per_s": (last - first) / (last_s - first_s)}


class PlanAlone:
    """The calls of a job, ready."""

    def __init__(self, runner: TextRunner, texts: list[str]) -> None:
        self._runner, self._rows, self._calls = runner, len(texts), list[list[np.ndarray]]()
        for start in range(0, len(texts), WINDOW_ITEMS):
            tokens = runner.encoder.encode(texts[start : start + WINDOW_ITEMS])
            for call in runner.calls([len(one) for one in tokens]):
                self._calls.append(runner.encoder.collate([tokens[place] for place in call.places], call.tokens))

    def run(self) -> dict[str, float]:
        """All of them, from as many threads as ``predict`` has."""
        start_s = time.monotonic()
        with ThreadPoolExecutor(self._runner._instances + 1) as pool:
            for _ in pool.map(self._runner._run, self._calls):
                pass
        wall_s = time.monotonic() - start_s
        return {"wall_s": wall_s, "rows": self._rows, "per_s": self._rows / wall_s}


def start_ray() -> None:
    """A cluster that wants a token, in which this process is a driver."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    import ray

    ray.init("local", num_cpus=os.cpu_count(), include_dashboard=False, object_store_memory=STORE_BYTES,
             log_to_driver=False)  # fmt: skip


def main(options: argparse.Namespace) -> None:
    """Let them take turns."""
    texts = [line for line in options.input.read_text().splitlines() if line.strip()]
    numbers = iter(range(10**6))
    start_ray()
    import ray

    with tempfile.TemporaryDirectory(prefix="corewise-") as name, corewise.load(options.artifact) as model:
        alone = PlanAlone(runner_of(model, options.artifact), texts)

        def fresh(run: Callable[..., dict[str, float]], *given: Any) -> dict[str, float]:
            return run(*given, Path(name) / f"out-{next(numbers)}")

        taken = (options.artifact.absolute(), options.input.absolute())
        contenders = {
            "plan": alone.run,
            "predict": partial(fresh, job, *taken, None),
            "ray": partial(fresh, job, *taken, "auto"),
            "by hand": partial(fresh, by_hand, *taken, None),
            "by hand, 32": partial(fresh, by_hand, *taken, 32),
        }
        alone.run()
        seen = alternate(options.rounds, contenders)
    ray.shutdown()
    rates = {name: [run["per_s"] for run in runs] for name, runs in seen.items()}
    table = {name: {"per_s": median(rates[name]), "wall_s": median(run["wall_s"] for run in runs), "runs": runs}
             for name, runs in seen.items()}  # fmt: skip
    ratios = {f"{one} / {other}": ratio_interval(rates[one], rates[other])._asdict()
              for one, other in (("predict", "plan"), ("ray", "predict"), ("predict", "by hand"),
                                 ("predict", "by hand, 32"))}  # fmt: skip
    for name, row in table.items():
        say(f"{name:12s} {row['per_s']:8,.0f} rows/s, {row['wall_s']:.1f} s")
    for name, ratio in ratios.items():
        say(f"{name:24s} {ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]")
    path = options.results / f"bulk_{options.artifact.name.removesuffix('.cw')}.json"
    write_results(path, {"rows": len(texts), "contenders": table, "ratios": ratios, **machine_facts()})
