"""What padding costs a text model, and what grouping texts by their length saves: STS-B's sentences on one server.

    python bench/padding.py [--budget 2m] [--rounds 4] [--clients 32]

Makes an artifact of MiniLM with its tokenizer and serves it. The same sentences, in their order, in a closed loop, are
sent in rounds as text (padded to a multiple of 8 tokens; equal lengths share calls), and as tokens padded to the
longest sentence, or not padded at all. Writes bench/results/padding.json.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from serving import Server  # noqa: E402
from subjects import DATA, ROOT  # noqa: E402
from wire import Wire, post  # noqa: E402

from corewise import artifact  # noqa: E402
from corewise.machine.inspect import inspect_cpu  # noqa: E402
from corewise.records.jsonable import to_json  # noqa: E402

SENTENCES = 1000
ROUND_S = 6.0
TOKENIZER = DATA / "weights" / "all-MiniLM-L6-v2" / "tokenizer.json"


def optimize(folder: Path, budget: str) -> None:
    """The artifact, made of sentences of their own lengths."""
    model = f"{ROOT}/examples/minilm.py"
    command = [sys.executable, "-m", "corewise.cli", "optimize", f"{model}:build", "--budget", budget]
    command += ["--samples", f"{HERE}/padding.py:ragged", "--metric", "cosine", "--tokenizer", str(TOKENIZER)]
    command += ["--engine", "openvino", "--engine", "onnxruntime", "-o", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)


def ragged() -> Any:
    """The first 150 pairs, each sentence with its own length."""
    sys.path.insert(0, str(ROOT / "examples"))
    import minilm

    return minilm.samples_ragged(150)


def infer(tensors: list[tuple[str, str, np.ndarray]]) -> bytes:
    """A request for one row; texts in JSON, tokens as binary tensors."""
    described, tail = [], b""
    for name, datatype, array in tensors:
        one: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if datatype == "BYTES":
            one["data"] = array.tolist()
        else:
            one["parameters"] = {"binary_data_size": array.nbytes}
            tail += array.tobytes()
        described.append(one)
    text = json.dumps({"inputs": described, "parameters": {"binary_data_output": True}}).encode()
    return post("/v2/models/bench/infer", text + tail, f"inference-header-content-length: {len(text)}\r\n")


def requests() -> tuple[dict[str, list[bytes]], int]:
    """The same sentences in the three ways, and the tokens of the longest."""
    import csv

    from tokenizers import Tokenizer

    with open(DATA / "stsb.csv", newline="", encoding="utf-8") as file:
        pairs = list(csv.DictReader(file))
    # The file goes from short captions to long news, so not the first ones.
    sentences = [pair[key] for pair in pairs for key in ("sentence1", "sentence2")]
    sentences = random.Random(0).sample(sentences, SENTENCES)
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokens = [tokenizer.encode(sentence).ids for sentence in sentences]
    longest = max(map(len, tokens))

    def as_tokens(ids: list[int], length: int) -> bytes:
        padded, mask = np.zeros((1, length), np.int64), np.zeros((1, length), np.int64)
        padded[0, : len(ids)], mask[0, : len(ids)] = ids, 1
        return infer([("input_ids", "INT64", padded), ("attention_mask", "INT64", mask)])

    return {
        "text, by length": [infer([("text", "BYTES", np.array([one], object))]) for one in sentences],
        "padded to the longest": [as_tokens(ids, longest) for ids in tokens],
        "not padded": [as_tokens(ids, len(ids)) for ids in tokens],
    }, longest


def main() -> None:
    """Make it, serve it, load it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="2m")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--clients", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="corewise-padding-") as name:
        folder = Path(name) / "minilm.cw"
        optimize(folder, options.budget)
        found = artifact.read(folder)
        ways, longest = requests()
        server = Server(folder)
        try:
            # What is right is what the model says of a sentence alone, unpadded.
            expected = reference(server.port, ways["not padded"])
            wires = {way: Wire(server.port, sent, expected, None) for way, sent in ways.items()}
            loads: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
            for _ in range(options.rounds):
                for way, wire in wires.items():
                    loads[way].append(wire.closed(options.clients, ROUND_S).facts())
        finally:
            server.process.terminate()
            server.process.wait(60)
    rates = {way: median(load["answered_per_s"] for load in rounds) for way, rounds in loads.items()}
    result = {
        "build": found.manifest.build.label,
        "plan": found.manifest.plan.label,
        "clients": options.clients,
        "longest_tokens": longest,
        "cpu": to_json(inspect_cpu()),
        "loads": loads,
        "answered_per_s": rates,
        "gain": rates["text, by length"] / rates["padded to the longest"],
    }
    (HERE / "results" / "padding.json").write_text(json.dumps(result, indent=1) + "\n")
    for way, rounds in loads.items():
        p99_ms = median(load["p99_ms"] for load in rounds)
        wrong = sum(load["wrong"] + load["failed"] for load in rounds)
        print(f"{way:24s} {rates[way]:8.1f}/s, p99 {p99_ms:6.1f} ms, {wrong} wrong")
    print(f"by length: {result['gain']:.2f}x of padded to the longest ({longest} tokens)")


def reference(port: int, sent: list[bytes]) -> list[np.ndarray]:
    """The answers to requests one by one."""
    import http.client

    made, connection = [], http.client.HTTPConnection("127.0.0.1", port)
    for one in sent:
        head, _, body = one.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
        connection.request("POST", "/v2/models/bench/infer", body, fields)
        answer = connection.getresponse()
        data = answer.read()
        made.append(np.frombuffer(data[int(answer.headers["Inference-Header-Content-Length"]) :], np.float32))
    return made


if __name__ == "__main__":
    main()
