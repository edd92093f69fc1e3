"""Strings to vectors per second, tokenization included: corewise beside the backends of sentence-transformers.

    python -m bench text [--sets stsb cranfield] [--sentences N] [--rounds 4]

MiniLM with its real weights on the sentences of STS-B and on Cranfield's abstracts. sentence-transformers gets an
environment of its own in ``--folder``, which also keeps artifacts, exports, vectors and finished rounds: the same
command goes on where it was. Each contender is a process that stays; they take turns. A peer has the batch at which it
was fastest on some of the texts, and sorts by length as its ``encode`` does. What the vectors are worth is compared
with its PyTorch backend in fp32: the mean cosine, Spearman's correlation on STS-B and NDCG@10 on Cranfield.
"""

import argparse
import csv
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bench.harness import DATA, ROOT, add_results, alternate, optimize, ratio_data, ratio_words, say
from bench.text_contenders import BACKENDS
from corewise.common.stats import bootstrap_interval, ratio_interval

MODEL = DATA / "weights" / "all-MiniLM-L6-v2"
PEER_PACKAGES = ("sentence-transformers[onnx,openvino]", "datasets", "fastapi", "uvicorn")
BATCHES = (16, 32, 64, 128)
TRIED = 128
"""Texts on which a peer's batch is chosen."""
WARM_S = 5.0
"""Each contender answers the timed texts so long first: corewise opens its packed program only when that has paid."""
KNOWN = 600
"""Texts that ``optimize`` and the static int8 of sentence-transformers are given."""
REFERENCE = "torch"
SAME_VECTORS = ("onnx",)
"""In fp32, so that the vectors are the reference's. OpenVINO computes in bf16 where the CPU does."""
GAIN_AT = 10
Vectors = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class TextSet:
    """One set: the texts whose vectors are judged, those that are timed, and those that models are made with."""

    judged: Sequence[str]
    timed: Sequence[str]
    known: Sequence[str]
    truth: Any = field(repr=False)
    """Scores of neighbouring pairs, (P,); or (queries, documents) of relevance, the documents first in ``judged``."""

    def scores(self, vectors: Vectors) -> NDArray[np.float64]:
        """What the metric is made of: a cosine for each pair, or NDCG@10 for each query."""
        if self.truth.ndim == 1:
            return np.asarray((vectors[::2] * vectors[1::2]).sum(1), np.float64)
        documents = self.truth.shape[1]
        return ndcg(vectors[documents:] @ vectors[:documents].T, self.truth)

    def metric(self, scores: NDArray[np.float64], rows: Any = slice(None)) -> float:
        """Spearman's correlation, or the mean NDCG."""
        if self.truth.ndim == 2:
            return float(scores[rows].mean())
        from scipy.stats import spearmanr

        return float(spearmanr(scores[rows], self.truth[rows]).statistic)


def ndcg(scores: NDArray[Any], relevance: NDArray[Any]) -> NDArray[np.float64]:
    """NDCG@10 of each query (Q,), gain 2^relevance - 1, for scores and relevance (Q, D)."""
    discounts = 1 / np.log2(np.arange(2, GAIN_AT + 2))

    def gains(order: NDArray[Any]) -> NDArray[np.float64]:
        return np.asarray(((2.0 ** np.take_along_axis(relevance, order[:, :GAIN_AT], 1) - 1) * discounts).sum(1))

    return gains(np.argsort(-scores, 1, kind="stable")) / gains(np.argsort(-relevance, 1, kind="stable"))


def stsb(sentences: int | None) -> TextSet:
    """STS-B: pairs of sentences as neighbours."""
    with (DATA / "stsb.csv").open(newline="", encoding="utf-8") as file:
        pairs = list(csv.DictReader(file))
    judged = [pair[key] for pair in pairs for key in ("sentence1", "sentence2")]
    return TextSet(
        judged=judged,
        timed=drawn(judged, sentences),
        known=drawn(judged, KNOWN),
        truth=np.array([float(pair["score"]) for pair in pairs]),
    )


def cranfield(sentences: int | None) -> TextSet:
    """Cranfield: abstracts with their titles, and queries."""
    rows = {
        name: [json.loads(line) for line in (DATA / "cranfield" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("documents", "queries", "relevance")
    }
    documents = [f"{row['title']} {row['text']}".strip() for row in rows["documents"]]
    places = {row["id"]: place for place, row in enumerate(rows["documents"])}
    numbers = {row["id"]: number for number, row in enumerate(rows["queries"])}
    truth = np.zeros((len(numbers), len(places)))
    for row in rows["relevance"]:
        truth[numbers[row["query"]], places[row["document"]]] = row["relevance"]
    asked = [number for number in range(len(truth)) if truth[number].any()]
    queries = [rows["queries"][number]["text"] for number in asked]
    # One document has neither a title nor a text.
    filled = [document or "empty" for document in documents]
    return TextSet(
        judged=[*filled, *queries], timed=drawn(filled, sentences), known=drawn(filled, KNOWN), truth=truth[asked]
    )


SETS = {"stsb": stsb, "cranfield": cranfield}


def drawn(texts: Sequence[str], count: int | None) -> list[str]:
    """So many of the texts at random, or all."""
    return list(texts) if count is None or count >= len(texts) else random.Random(0).sample(list(texts), count)


class Contender:
    """A process of ``text_contenders``, or of another ``script`` that answers like it; a context manager."""

    def __init__(self, python: Path, name: str, place: Path, script: str = "text_contenders.py") -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        if name == "corewise":
            environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        else:
            environment.pop("PYTHONPATH", None)
        self.name = name
        with (place.parent / f"{name.replace(' ', '-')}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(python), str(ROOT / "bench" / script), name, str(place)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )

    def ask(self, texts: Path, batch: int, vectors: Path | None = None) -> float:
        """Texts per second. Raises ``RuntimeError`` if the process ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"texts": str(texts), "batch": batch, "vectors": str(vectors) if vectors else None}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}; its log is beside the exports")
        said = json.loads(line)
        return float(said["texts"] / said["seconds"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.terminate()
        self._process.wait(30)


def peers_python(folder: Path) -> Path:
    """The Python of the peers' environment, which is made if it is not there: torch as here, the rest by uv."""
    place = folder / "peers"
    python, whole = place / "bin" / "python", place / ".complete"
    if not whole.exists():
        say(f"making the peers' environment {place}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        torch = f"torch=={version('torch').partition('+')[0]}"
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", torch], check=True)
        install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python)]
        subprocess.run([*install, *PEER_PACKAGES], check=True)
        whole.touch()
    return python


def peer_versions(python: Path) -> dict[str, str]:
    """The versions of what the peers run."""
    names = ("sentence-transformers", "optimum-intel", "optimum-onnx", "transformers", "torch", "openvino", "nncf")
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    ended = subprocess.run([str(python), "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, str] = json.loads(ended.stdout)
    return found


def exported(python: Path, folder: Path) -> Path:
    """The folder of the peers' exports, made if it is not there; texts of both sets calibrate the static int8."""
    place = folder / "exports"
    if not (place / ".complete").exists():
        say(f"exporting for the peers into {place}")
        place.mkdir(exist_ok=True)
        texts = [text for pair in zip(stsb(None).known, cranfield(None).known, strict=True) for text in pair]
        parts = os.pathsep.join(map(str, (MODEL, place, written(folder / "known.json", texts))))
        command = [str(python), str(ROOT / "bench" / "text_contenders.py"), "prepare", parts]
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run(command, check=True, env={**clean, "HF_HUB_OFFLINE": "1"})
        (place / ".complete").touch()
    return place


def artifact_of(folder: Path, known: Path, budget: str, max_drop: str) -> Path:
    """corewise's artifact, made if it is not there."""
    place = folder / "minilm.cw"
    if not place.exists():
        optimize(place, f"st:{MODEL}", "--samples", str(known), "--budget", budget, "--max-drop", max_drop)
    return place


def known_lines(folder: Path, found: TextSet) -> Path:
    """The texts that ``optimize`` is given, as a file of samples."""
    lines = folder / "known.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in found.known))
    return lines


def written(path: Path, texts: Sequence[str]) -> Path:
    """Texts as a JSON list."""
    path.write_text(json.dumps(list(texts)))
    return path


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One set: its rounds, as many as are missing, and what the vectors are worth."""
    found = SETS[name](options.sentences)
    folder = options.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = known_lines(folder, found)
    python = peers_python(options.folder)
    exports = exported(python, options.folder)
    places = {
        "corewise": artifact_of(folder, lines, options.budget, options.max_drop),
        **dict.fromkeys(BACKENDS, exports),
    }
    with ExitStack() as stack:
        contenders = {
            each: stack.enter_context(
                Contender(Path(sys.executable) if each == "corewise" else python, each, places[each])
            )
            for each in ("corewise", *options.peers)
        }
        rates, batches = race(contenders, found, folder, options.rounds)
        vectors = {
            each: answered(contender, found, folder, batches[each])
            for each, contender in contenders.items()
            if each not in SAME_VECTORS
        }
    manifest, report = (
        json.loads((places["corewise"] / f"{part}.json").read_text()) for part in ("manifest", "report")
    )
    return {
        "texts": len(found.timed),
        "build": manifest["build"],
        "plan": manifest["plan"],
        "max_drop": report["requirements"]["max_drop"],
        "peers": peer_versions(python),
        "batches": batches,
        "per_s": rates,
        "over": {
            each: ratio_data(ratio_interval(rates["corewise"], rates[each])) for each in rates if each != "corewise"
        },
        "worth": worth(found, vectors),
    }


def race(
    contenders: dict[str, Contender], found: TextSet, folder: Path, rounds: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Texts/s of each contender in each round, and its batch; rounds that an earlier run finished are not repeated."""
    timed = written(folder / f"timed-{len(found.timed)}.json", found.timed)
    few = written(folder / "few.json", drawn(found.timed, TRIED))
    state = folder / f"rounds-{len(found.timed)}.json"
    known = json.loads(state.read_text()) if state.exists() else {"batches": {}, "rounds": []}
    for each, contender in contenders.items():
        contender.ask(few, BATCHES[0])
        if each not in known["batches"]:
            tried = {batch: contender.ask(few, batch) for batch in (BATCHES if each != "corewise" else BATCHES[:1])}
            known["batches"][each] = max(tried, key=lambda batch: tried[batch])
    for each, contender in contenders.items():
        started_s = perf_counter()
        while perf_counter() - started_s < WARM_S:
            contender.ask(timed, known["batches"][each])
    done = [one for one in known["rounds"] if set(contenders) <= set(one)]
    turns = {each: partial(one.ask, timed, known["batches"][each]) for each, one in contenders.items()}
    for _ in range(len(done), rounds):
        done.append({each: per_s for each, (per_s,) in alternate(1, turns).items()})
        known["rounds"] = done
        state.write_text(json.dumps(known))
        say("  ".join(f"{each} {per_s:.0f}/s" for each, per_s in done[-1].items()))
    return {each: [one[each] for one in done] for each in contenders}, {
        each: known["batches"][each] for each in contenders
    }


def answered(contender: Contender, found: TextSet, folder: Path, batch: int) -> Vectors:
    """The vectors of the texts that are judged, at length 1, by a contender or by an earlier run of it."""
    place = folder / f"{contender.name.replace(' ', '-')}.npy"
    if not place.exists():
        contender.ask(written(folder / "judged.json", found.judged), batch, place)
    vectors: Vectors = np.load(place)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def worth(found: TextSet, vectors: dict[str, Vectors]) -> dict[str, dict[str, Any]]:
    """The mean cosine to the reference, and the metric with the interval of its drop."""
    scores = {each: found.scores(made) for each, made in vectors.items()}
    reference = scores[REFERENCE]
    said = {}
    for each, made in scores.items():

        def drop(rows: NDArray[np.intp], made: NDArray[np.float64] = made) -> float:
            return found.metric(reference, rows) - found.metric(made, rows)

        low, high = bootstrap_interval(drop, len(made)) if each != REFERENCE else (0.0, 0.0)
        said[each] = {
            "cosine": float((vectors[each] * vectors[REFERENCE]).sum(1).mean()),
            "metric": found.metric(made),
            "drop": found.metric(reference) - found.metric(made),
            "drop_low": low,
            "drop_high": high,
        }
    return said


def lines_of(name: str, record: dict[str, Any]) -> Iterator[str]:
    """A record for people."""
    yield f"\n{name}, {record['texts']} texts"
    for each, rates in record["per_s"].items():
        ratio = f", corewise is {ratio_words(record['over'][each])} of it" if each in record["over"] else ""
        yield f"  {each:14s} {median(rates):7.1f}/s{ratio}"
    for each, made in record["worth"].items():
        drop = f"{made['drop']:+.4f} [{made['drop_low']:+.4f}, {made['drop_high']:+.4f}]"
        yield f"  {each:14s} cosine {made['cosine']:.4f}, metric {made['metric']:.4f}, drop {drop}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("--sets", nargs="*", choices=tuple(SETS), default=list(SETS))
    parser.add_argument("--peers", nargs="*", choices=tuple(BACKENDS), default=list(BACKENDS), help="default: all")
    parser.add_argument("--sentences", type=int, metavar="N", help="texts that are timed, drawn once (default: all)")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--budget", default="2m", help="of optimize (default: 2m)")
    add_max_drop(parser)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/corewise-text"), help="keeps what the next run needs")


def add_max_drop(parser: argparse.ArgumentParser) -> None:
    """How near corewise's vectors have to be to fp32's."""
    parser.add_argument("--max-drop", default="0.01", help="of the mean cosine, in optimize (default: 0.01)")


def main(options: argparse.Namespace) -> None:
    """Measure each set; the results of others in the file stay."""
    if REFERENCE not in options.peers:
        options.peers = [REFERENCE, *options.peers]
    for name in options.sets:
        record = measure(name, options)
        add_results(options.results / "text.json", name, record)
        for line in lines_of(name, record):
            say(line)
