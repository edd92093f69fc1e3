"""What padding costs a text model, and what grouping texts by their length saves: STS-B's sentences on one server.

    python -m bench padding [--budget 2m] [--rounds 4] [--clients 32]

Makes an artifact of MiniLM with its tokenizer and serves it. The same sentences, in their order, are sent in a closed
loop, in alternating rounds: as text (padded to a multiple of 8 tokens; equal lengths share calls), as tokens padded to
the longest sentence, and as tokens without padding. Writes padding.json.
"""

import argparse
import csv
import http.client
import random
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.harness import DATA, ROOT, alternate, machine_facts, optimize, say, temporary_workspace, write_results
from bench.servers import Server
from bench.wire import INFER, Wire, infer
from corewise import artifact

SENTENCES = 1000
ROUND_S = 6.0
TOKENIZER = DATA / "weights" / "all-MiniLM-L6-v2" / "tokenizer.json"
BY_LENGTH, PADDED, UNPADDED = "text, by length", "padded to the longest", "not padded"
Requests = dict[str, list[bytes]]


def optimize_options(budget: str) -> tuple[str, ...]:
    """What ``corewise optimize`` is given beside the model: sentences of their own lengths, and the tokenizer."""
    samples = ("--samples", "bench.subjects:sentences_ragged", "--metric", "cosine", "--tokenizer", str(TOKENIZER))
    return (*samples, "--engine", "openvino", "--engine", "onnxruntime", "--budget", budget)


def requests() -> tuple[Requests, int]:
    """The same sentences in the three ways, and the tokens of the longest."""
    from tokenizers import Tokenizer

    with open(DATA / "stsb.csv", newline="", encoding="utf-8") as file:
        pairs = list(csv.DictReader(file))
    # The file goes from short captions to long news, so the first sentences would all be short.
    sentences = [pair[key] for pair in pairs for key in ("sentence1", "sentence2")]
    sentences = random.Random(0).sample(sentences, SENTENCES)
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokens = [tokenizer.encode(sentence).ids for sentence in sentences]
    longest = max(map(len, tokens))
    return {
        BY_LENGTH: [infer([("text", "BYTES", np.array([sentence], object))]) for sentence in sentences],
        PADDED: [as_tokens(ids, longest) for ids in tokens],
        UNPADDED: [as_tokens(ids, len(ids)) for ids in tokens],
    }, longest


def as_tokens(ids: list[int], length: int) -> bytes:
    """A request with the tokens, padded to ``length``."""
    padded, mask = np.zeros((1, length), np.int64), np.zeros((1, length), np.int64)
    padded[0, : len(ids)], mask[0, : len(ids)] = ids, 1
    return infer([("input_ids", "INT64", padded), ("attention_mask", "INT64", mask)])


def answers(port: int, sent: list[bytes]) -> list[np.ndarray]:
    """The answers to the requests, sent one after the other."""
    outputs, connection = [], http.client.HTTPConnection("127.0.0.1", port)
    for request in sent:
        head, _, body = request.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
        connection.request("POST", INFER, body, fields)
        answer = connection.getresponse()
        data = answer.read()
        outputs.append(np.frombuffer(data[int(answer.headers["Inference-Header-Content-Length"]) :], np.float32))
    return outputs


def load(folder: Path, sent: Requests, clients: int, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """The facts of each round, for each way to send the sentences."""

    def round_of(wire: Wire) -> dict[str, Any]:
        return wire.closed(clients, ROUND_S).facts()

    with Server(folder) as server:
        # The right answer is what the model says of a sentence alone, without padding.
        expected = answers(server.port, sent[UNPADDED])
        wires = {way: Wire(server.port, requests, expected, None) for way, requests in sent.items()}
        return alternate(rounds, {way: partial(round_of, wire) for way, wire in wires.items()})


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("--budget", default="2m", help="of the search")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--clients", type=int, default=32)


def main(options: argparse.Namespace) -> None:
    """Make the artifact, serve it, and put it under load."""
    with temporary_workspace() as workspace:
        folder = workspace.folder / "minilm.cw"
        optimize(folder, f"{ROOT}/examples/minilm.py:build", *optimize_options(options.budget))
        manifest = artifact.read(folder).manifest
        sent, longest = requests()
        loads = load(folder, sent, options.clients, options.rounds)
    rates = {way: median(facts["answered_per_s"] for facts in rounds) for way, rounds in loads.items()}
    result = {
        "build": manifest.build.label,
        "plan": manifest.plan.label,
        "clients": options.clients,
        "longest_tokens": longest,
        **machine_facts(),
        "loads": loads,
        "answered_per_s": rates,
        "gain": rates[BY_LENGTH] / rates[PADDED],
    }
    write_results(options.results / "padding.json", result)
    for way, rounds in loads.items():
        p99_ms = median(facts["p99_ms"] for facts in rounds)
        wrong = sum(facts["wrong"] + facts["failed"] for facts in rounds)
        say(f"{way:24s} {rates[way]:8.1f}/s, p99 {p99_ms:6.1f} ms, {wrong} wrong")
    say(f"by length: {result['gain']:.2f}x of padded to the longest ({longest} tokens)")
