"""Several texts packed into one row beside corewise's own calls: strings to vectors per second, on MiniLM.

    python -m bench packing [--sets stsb cranfield] [--rounds 6] [--budget 60s]

A packed row has ``ROWS`` tokens of several texts: each token sees its own text only (a block-diagonal mask), positions
begin again with each text, and the mean of each text's tokens is taken in the program. So nearly nothing is padding,
and attention is computed over whole rows. The peer is ``predict`` of the usual artifact, which pads length-sorted
neighbours as its measured costs say. Both are made by the same search, tokenize in the same threads, run as many calls
at the same time, and take turns; the packed rows are tried in calls of several sizes first. Writes packing.json.
"""

import argparse
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import corewise
from bench.harness import ROOT, add_results, alternate, optimize, ratio_data, ratio_words, say
from bench.text import MODEL, SETS, add_max_drop, known_lines
from corewise import artifact
from corewise.common.stats import ratio_interval
from corewise.pipeline import TextEncoder
from corewise.samples import Samples, from_python

ROWS = {"stsb": 64, "cranfield": 512}
"""Tokens of a packed row: about four texts of STS-B, and two to three of Cranfield."""
FEWEST_TOKENS = 6
"""Of a text, with its special tokens: how many texts a row has room for."""
MOST_TOKENS = 256
"""Of a text, as the model was trained."""
WINDOW = 1024
"""Texts that are packed together, as many as ``predict`` sorts."""
SIZES = (8, 16, 32, 64)
"""Rows of a call of 64 tokens that are tried; of longer rows as many fewer."""


class Packed(nn.Module):
    """MiniLM on packed rows."""

    def __init__(self, tokens: int) -> None:
        from transformers import BertModel

        super().__init__()
        self.bert = BertModel.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="sdpa")
        self.texts = tokens // FEWEST_TOKENS

    def forward(self, input_ids: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
        """Int64 (N, tokens) each, ``segments`` from 1 on and 0 for padding -> vectors (N, texts, 384)."""
        mask = (segments[:, :, None] == segments[:, None, :])[:, None]
        hidden = self.bert(input_ids, attention_mask=mask, position_ids=positions).last_hidden_state
        numbers = torch.arange(1, self.texts + 1, device=segments.device)
        member = (segments[:, None, :] == numbers[None, :, None]).to(hidden.dtype)
        return nn.functional.normalize(member @ hidden, dim=-1)


class Rows(NamedTuple):
    """Packed rows, and where each text is: ``places[k]`` is the row and the number in it of text k."""

    arrays: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
    places: NDArray[np.int64]


def pack(ids: Sequence[NDArray[Any]], tokens: int) -> Rows:
    """Texts into rows: the longest text that still fits goes first."""
    order = sorted(range(len(ids)), key=lambda k: len(ids[k]))
    lengths = [len(ids[k]) for k in order]
    rows: list[list[int]] = []
    while order:
        room, row = tokens, []
        while len(row) < tokens // FEWEST_TOKENS and (fits := bisect_right(lengths, room)):
            room -= lengths.pop(fits - 1)
            row.append(order.pop(fits - 1))
        rows.append(row)
    arrays = tuple(np.zeros((len(rows), tokens), np.int64) for _ in range(3))
    places = np.zeros((len(ids), 2), np.int64)
    for number, row in enumerate(rows):
        start = 0
        for segment, k in enumerate(row):
            stop = start + len(ids[k])
            arrays[0][number, start:stop] = ids[k]
            arrays[1][number, start:stop] = np.arange(len(ids[k]))
            arrays[2][number, start:stop] = segment + 1
            places[k] = number, segment
            start = stop
    return Rows((arrays[0], arrays[1], arrays[2]), places)


class PackedRunner:
    """Texts to vectors by packed rows. The next window is tokenized and packed while one runs."""

    def __init__(self, fast: Any, encoder: TextEncoder, tokens: int, instances: int, rows: int) -> None:
        self._fast, self._encoder, self._tokens, self._instances, self.rows = fast, encoder, tokens, instances, rows

    def predict(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The vectors (N, D)."""
        windows = [texts[start : start + WINDOW] for start in range(0, len(texts), WINDOW)]
        with ThreadPoolExecutor(self._instances + 1) as pool:
            ahead = [self._start(windows[0], pool)]
            made = []
            for window in [*windows[1:], None]:
                if window is not None:
                    ahead.append(self._start(window, pool))
                packed, running = ahead.pop(0)
                vectors = np.concatenate([future.result() for future in running])
                made.append(vectors[packed.places[:, 0], packed.places[:, 1]])
        return np.concatenate(made)

    def _start(self, texts: Sequence[str], pool: ThreadPoolExecutor) -> tuple[Rows, list[Any]]:
        packed = pack([one.ids for one in self._encoder.encode(texts)], self._tokens)
        calls = range(0, len(packed.arrays[0]), self.rows)
        return packed, [
            pool.submit(self._fast, *(array[start : start + self.rows] for array in packed.arrays)) for start in calls
        ]


def build(name: str) -> nn.Module:
    """The packed model of a set."""
    return Packed(ROWS[name]).eval()


def build_stsb() -> nn.Module:
    """That of STS-B."""
    return build("stsb")


def build_cranfield() -> nn.Module:
    """That of Cranfield."""
    return build("cranfield")


def samples(name: str) -> Samples:
    """Packed rows of the texts that the search is given."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MOST_TOKENS)
    ids = [np.array(one.ids) for one in tokenizer.encode_batch(SETS[name](None).known)]
    names = ("input_ids", "positions", "segments")
    return from_python([dict(zip(names, row, strict=True)) for row in zip(*pack(ids, ROWS[name]).arrays, strict=True)])


def samples_stsb() -> Samples:
    """Those of STS-B."""
    return samples("stsb")


def samples_cranfield() -> Samples:
    """Those of Cranfield."""
    return samples("cranfield")


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both ways on one set, in turns."""
    found = SETS[name](options.sentences)
    folder: Path = options.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    plain, packed = made(name, options)
    if options.only_make:
        return {}
    with corewise.load(plain) as usual, corewise.load(packed) as fast:
        sound = artifact.read(plain)
        encoder = TextEncoder(sound.manifest.pipeline, plain / sound.manifest.pipeline.tokenizer)
        plan = artifact.read(packed).manifest.plan
        tried = {}
        for size in SIZES:
            rows = max(1, size * 64 // ROWS[name])
            runner = PackedRunner(fast, encoder, ROWS[name], plan.instances, rows)
            rate(runner.predict, found.timed[:WINDOW])
            tried[rows] = rate(runner.predict, found.timed[:WINDOW])
        best = max(tried, key=lambda rows: tried[rows])
        runner = PackedRunner(fast, encoder, ROWS[name], plan.instances, best)
        vectors = usual.predict(list(found.timed)), runner.predict(found.timed)
        turns = {
            "calls": partial(rate, usual.predict, list(found.timed)),
            "packed": partial(rate, runner.predict, found.timed),
        }
        rounds = alternate(options.rounds, turns)
    lengths = [len(one) for one in encoder.encode(found.timed)]
    windows = (lengths[start : start + WINDOW] for start in range(0, len(lengths), WINDOW))
    packed_tokens = sum(pack([np.zeros(one) for one in window], ROWS[name]).arrays[0].size for window in windows)
    manifests = {"calls": sound.manifest, "packed": artifact.read(packed).manifest}
    return {
        "texts": len(found.timed),
        "tokens": sum(lengths),
        "packed_tokens": packed_tokens,
        "row_tokens": ROWS[name],
        "builds": {way: manifest.build.label for way, manifest in manifests.items()},
        "plans": {way: manifest.plan.label for way, manifest in manifests.items()},
        "rows_per_s": tried,
        "rows": best,
        "per_s": rounds,
        "packed_over_calls": ratio_data(ratio_interval(rounds["packed"], rounds["calls"])),
        "mean_cosine": float((vectors[0] * vectors[1]).sum(1).mean()),
    }


def made(name: str, options: argparse.Namespace) -> tuple[Path, Path]:
    """The usual artifact and that of packed rows, made if they are not there."""
    folder = options.folder / name
    plain, packed = folder / "plain.cw", folder / "packed.cw"
    judge = ("--metric", "cosine")
    search = ("--engine", options.engine, "--budget", options.budget, "--max-drop", options.max_drop)
    if not plain.exists():
        optimize(plain, f"st:{MODEL}", "--samples", str(known_lines(folder, SETS[name](None))), *judge, *search)
    if not packed.exists():
        this = f"{ROOT}/bench/packing.py"
        optimize(packed, f"{this}:build_{name}", "--samples", f"{this}:samples_{name}", *judge, *search)
    return plain, packed


def rate(predict: Any, texts: Sequence[str]) -> float:
    """Texts per second."""
    started_s = perf_counter()
    predict(texts)
    return len(texts) / (perf_counter() - started_s)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("--sets", nargs="*", choices=tuple(SETS), default=list(SETS))
    parser.add_argument("--sentences", type=int, metavar="N", help="texts that are timed, drawn once (default: all)")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--engine", default="openvino", help="of both artifacts (default: openvino)")
    parser.add_argument("--budget", default="60s", help="of each search (default: 60s)")
    parser.add_argument("--only-make", action="store_true", help="make the artifacts, which takes all cores, and end")
    add_max_drop(parser)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/corewise-packing"), help="keeps the artifacts")


def main(options: argparse.Namespace) -> None:
    """Measure each set; the results of others in the file stay."""
    for name in options.sets:
        record = measure(name, options)
        if not record:
            continue
        add_results(options.results / "packing.json", name, record)
        rates = ", ".join(f"{way} {median(rounds):.0f}/s" for way, rounds in record["per_s"].items())
        say(f"{name}: {rates}; packed is {ratio_words(record['packed_over_calls'])} of it")
