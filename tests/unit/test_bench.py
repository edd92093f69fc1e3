"""The benchmarks: each has its command line, and those that fit into a test run from end to end."""

import ast
import io
import json
import os
import socket
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import ndcg_score
from torch import nn

import bench
from bench import __main__, architectures, breadth, harness, overload, subjects, text, wire, wire_grpc

MODULES = sorted(path for path in Path(bench.__file__).parent.glob("*.py"))


def tiny_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)
    )


@pytest.mark.parametrize("name", __main__.BENCHMARKS)
def test_every_benchmark_prints_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = import_module(f"bench.{name}")
    with pytest.raises(SystemExit) as ended:
        harness.parser_of(name, benchmark).parse_args(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: python -m bench {name}")
    assert f"python -m bench {name}" in benchmark.__doc__
    assert "--results" in printed


def test_every_module_with_a_main_of_options_is_a_benchmark() -> None:
    defined = {
        path.stem: {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        for path in MODULES
    }
    assert {name for name, functions in defined.items() if "add_options" in functions} == set(__main__.BENCHMARKS)


def test_functions_are_short() -> None:
    long = [
        f"{path.name}:{node.lineno} {node.name}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60
    ]
    assert not long


def test_benchmarks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    __main__.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(__main__.BENCHMARKS)
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["plans", "nothing"], ["breadth", "--only", "nothing"]])
def test_wrong_arguments_end_with_an_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        __main__.main(arguments)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(harness.RESULTS.rglob("*.json")), ids=lambda path: path.name)
def test_results_are_readable(path: Path) -> None:
    assert harness.read_results(path)


def test_results_of_other_models_stay(tmp_path: Path) -> None:
    path = tmp_path / "results" / "plans.json"
    harness.add_results(path, "first", {"rows": [1]})
    harness.add_results(path, "second", {"rows": [2]})
    results = json.loads(path.read_text())
    assert [results[name]["rows"] for name in results] == [[1], [2]]
    assert results["second"]["cpu"]["affinity"]
    assert results["second"]["versions"]["torch"] == torch.__version__
    assert [file.name for file in path.parent.iterdir()] == ["plans.json"]


def test_rounds_alternate() -> None:
    calls: list[str] = []

    def call(name: str) -> int:
        calls.append(name)
        return len(calls)

    rounds = harness.alternate(2, {name: partial(call, name) for name in "ab"})
    assert calls == ["a", "b", "a", "b"]
    assert rounds == {"a": [1, 3], "b": [2, 4]}


def test_requests_carry_numbers_in_binary_and_texts_in_json() -> None:
    row = np.ones((1, 2), np.float32)
    head, _, body = wire.infer([("x", "FP32", row), ("text", "BYTES", np.array(["a"], object))], 5.0).partition(
        b"\r\n\r\n"
    )
    fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    described = json.loads(body[: int(fields["inference-header-content-length"])])
    assert fields["x-request-timeout-ms"] == "5"
    assert len(body) == int(fields["content-length"])
    assert body.endswith(row.tobytes())
    assert [tensor["name"] for tensor in described["inputs"]] == ["x", "text"]
    assert described["inputs"][1]["data"] == ["a"]


def test_subjects_name_what_exists() -> None:
    for subject in subjects.SUBJECTS.values():
        place, _, name = subject.model.rpartition(":")
        module = Path(place) if place.endswith(".py") else Path(bench.__file__).with_name(f"{place.split('.')[1]}.py")
        functions = {node.name for node in ast.parse(module.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert name in functions


def test_what_vectors_are_worth() -> None:
    generator = np.random.default_rng(0)
    scores, relevance = generator.standard_normal((6, 40)), generator.integers(0, 5, (6, 40))
    expected = [ndcg_score([2.0**row - 1], [score], k=10) for row, score in zip(relevance, scores, strict=True)]
    np.testing.assert_allclose(text.ndcg(scores, relevance), expected)
    vectors = generator.standard_normal((60, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = (vectors[::2] * vectors[1::2]).sum(1)
    pairs = text.TextSet(judged=(), timed=(), known=(), truth=np.argsort(np.argsort(cosines)).astype(float))
    assert pairs.metric(pairs.scores(vectors)) == pytest.approx(1.0)
    assert pairs.metric(-pairs.scores(vectors)) == pytest.approx(-1.0)


@pytest.fixture
def one_cpu() -> Iterator[None]:
    """Threads of one process that wait for each other are slow on a busy machine, so there is one."""
    allowed, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {min(allowed)})
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, allowed)


@pytest.mark.slow
@pytest.mark.usefixtures("one_cpu")
def test_breadth_measures_a_tiny_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = architectures.Architecture(kind="cnn", make=tiny_cnn, inputs=partial(architectures.images, size=16))
    monkeypatch.setitem(architectures.ARCHITECTURES, "tiny", tiny)
    for seconds in ("WARM_S", "ROUND_S"):
        monkeypatch.setattr(breadth, seconds, 0.02)
    arguments = ["breadth", "--only", "tiny", "--engines", "torch-int8"]
    __main__.main([*arguments, "--results", str(tmp_path)])
    results = json.loads((tmp_path / "breadth.json").read_text())
    committed = json.loads((harness.RESULTS / "breadth.json").read_text())
    assert set(committed) <= set(results)
    (record,) = results["architectures"]
    outcome = record["engines"]["torch-int8"]
    assert outcome["reason"] == ""
    assert outcome["works"]
    assert outcome["int8_share"] == 1
    assert min(outcome["int8_per_s"], outcome["fp32_per_s"]) > 0
    assert set(committed["architectures"][0]["engines"]["torch-int8"]) == set(outcome)


def test_an_overload_is_over_when_answers_are_in_time_again() -> None:
    late = [[float(k), "infer", 200, 900.0] for k in range(3)]
    refused = [[float(k), "infer", 503, 1.0] for k in range(3, 5)]
    good = [[float(k), "infer", 200, 20.0] for k in range(5, 5 + overload.CALM)]
    health = [[4.5, "health", 200, 1.0]]
    assert overload.recovered_s(late + refused + good + health, 2.5, 500.0) == 2.5
    assert overload.recovered_s(late + good, 5.0, 500.0) == 0.0
    assert overload.recovered_s(late + refused, 0.0, 500.0) is None


def test_pictures_of_the_overload_are_jpegs_of_their_size() -> None:
    pictures = {side: overload.jpeg(side, 0) for side in (64, 256)}
    for side, data in pictures.items():
        assert Image.open(io.BytesIO(data)).size == (side, side * 3 // 4)
    assert len(pictures[256]) > 2 * len(pictures[64])


def test_a_grpc_call_is_frames_and_ends_with_its_trailers() -> None:
    frame = wire_grpc.frame
    with socket.create_server(("127.0.0.1", 0)) as listening:
        connection = wire_grpc.GrpcConnection(listening.getsockname()[1])
        server, _ = listening.accept()
        with server, connection.socket:
            server.settimeout(30)
            assert server.recv(1000).startswith(wire_grpc.PREFACE)
            connection.begin(b"asked")
            assert bytes(connection.out).endswith(frame(wire_grpc.DATA, 1, 1, b"\0\0\0\0\5asked"))
            connection.received = frame(wire_grpc.PING, 0, 0, b"12345678") + frame(wire_grpc.HEADERS, 4, 1, b"\x88")
            assert connection.answer() is None
            assert server.recv(1000) == frame(wire_grpc.PING, wire_grpc.ACK, 0, b"12345678")
            answer = frame(wire_grpc.DATA, 0, 1, b"\0\0\0\0\6answer") + frame(wire_grpc.HEADERS, 5, 1, b"trailers")
            connection.received += answer[:20]
            assert connection.answer() is None
            connection.received += answer[20:]
            assert connection.answer() == (200, b"answer")
            connection.begin(b"again")
            connection.received += frame(wire_grpc.HEADERS, 5, 3, b"an error")
            assert connection.answer() == (0, b"")
