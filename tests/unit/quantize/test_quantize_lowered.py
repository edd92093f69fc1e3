"""Quantization behind corrections: Q/DQ programs against their simulation and on engines, int32 biases, saturation."""

import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_nets import Depthwise, Mlp, Residual
from torch import Tensor, nn

from corewise.common.errors import EngineError
from corewise.engines import BuildInputs, engine, qdq
from corewise.engines.onnx_bias import quantize_biases
from corewise.machine import inspect as cpu
from corewise.quantize import state
from corewise.quantize.observers import round_weight, weight_scales
from corewise.quantize.placement import TARGETS, Target
from corewise.quantize.ptq import RUNGS, TOP
from corewise.quantize.quantized import Quantized, Recipe, lower
from corewise.quantize.simulate import Simulation
from corewise.records.build import Build, Plan
from corewise.samples import from_python
from corewise.source import export, save_program

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, from copying a graph

IMAGE, TOKENS = (3, 8, 8), (5, 8)
BATCHES = (1, 2, 5)
PLAN = Plan(threads_per_instance=1, batch=2)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "residual": (Residual, IMAGE, 5),
    "depthwise": (Depthwise, IMAGE, 4),
    "mlp": (Mlp, TOKENS, 3),
}
"""Net, shape of a sample, number of layers."""


class Case:
    """A net with its calibration samples, quantized in 7 bits."""

    def __init__(self, name: str, folder: Path) -> None:
        make, self.shape, self.layers = NETS[name]
        torch.manual_seed(0)
        model = make().eval()
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.running_var, 0.3, 1.0)
                nn.init.uniform_(layer.bias, -0.3, 0.5)
        calibration = from_python(list(np.random.default_rng(0).standard_normal((32, *self.shape), np.float32)))
        exported = export(model, calibration)
        assert exported.program is not None
        save_program(exported.program, folder / "program.pt2")
        self.model = model
        self.material = BuildInputs(
            program=folder / "program.pt2",
            inputs=exported.inputs,
            outputs=exported.outputs,
            operators=dict(Counter(str(n.target) for n in exported.program.graph.nodes if n.op == "call_function")),
            calibration=calibration,
            cpu=replace(cpu.inspect_cpu(), isa=()),  # one without VNNI: 7 bits
            cache=folder,
        )
        # As an engine asks for it, so that engines and these tests share it.
        self.quantized: Quantized = state.calibrated(
            self.material.program, calibration, self.material.cache, Recipe(weight_bits=7)
        )

    def inputs(self, batch: int) -> np.ndarray:
        return np.random.default_rng(batch).standard_normal((batch, *self.shape), np.float32)

    def simulated(self, target: Target, x: np.ndarray) -> np.ndarray:
        module, placement, ranges = self.quantized.placed(target)
        found = Simulation(module, placement.edges, ranges).run((torch.from_numpy(x),))
        return found[0].numpy()

    def build(self, name: str) -> Build:
        return qdq.int8(name, self.material.cpu)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small nets are slower on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=NETS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Case(request.param, tmp_path_factory.mktemp(request.param))


def assert_close(found: np.ndarray, expected: np.ndarray, share: float) -> None:
    """Equal shapes, and no value further away than ``share`` of the largest one expected."""
    assert found.shape == expected.shape
    assert float(np.abs(found - expected).max()) <= share * float(np.abs(expected).max())


# --- the program with Q/DQ pairs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_the_lowered_program_is_what_was_simulated(case: Case, target: Target):
    path, decided = state.quantized_program(
        case.material.program,
        case.material.calibration,
        case.material.inputs,
        case.material.cache,
        case.quantized.recipe,
        target,
    )
    assert (decided.warnings, decided.notes) == (case.quantized.warnings, case.quantized.notes)
    program = state.load_quantized(path)
    names = Counter(str(node.target) for node in program.graph.nodes)
    _, placement, _ = case.quantized.placed(target)
    assert sum(n for name, n in names.items() if "dequantize_per_channel" in name) == case.layers
    assert sum(n for name, n in names.items() if "dequantize_per_tensor" in name) >= len(placement.tensors)
    module = program.module()
    for batch in BATCHES:
        x = case.inputs(batch)
        with torch.no_grad():
            (found,) = module(torch.from_numpy(x))
        # Sums in another order may round one value to the next step of its grid.
        assert_close(found.numpy(), case.simulated(target, x), 1 / 255)


def test_weights_of_the_program_are_int8_on_seven_bits(case: Case):
    path = state.quantized_program(
        case.material.program,
        case.material.calibration,
        case.material.inputs,
        case.material.cache,
        case.quantized.recipe,
        "fused",
    )[0]
    weights = [t for t in state.load_quantized(path).state_dict.values() if t.dtype == torch.int8]
    assert len(weights) == case.layers
    for tensor in weights:
        assert -64 <= int(tensor.min()) <= int(tensor.max()) <= 63
        assert int(tensor.abs().max()) > 31


def test_calibrating_again_reads_what_the_cache_has(case: Case):
    before = {path: path.stat().st_mtime_ns for path in case.material.cache.iterdir()}
    again = state.calibrated(
        case.material.program, case.material.calibration, case.material.cache, Recipe(weight_bits=7)
    )
    assert {path: path.stat().st_mtime_ns for path in case.material.cache.iterdir()} == before
    made = case.quantized
    assert (again.notes, again.ranges, again.sqnr_db) == (made.notes, made.ranges, made.sqnr_db)
    x = case.inputs(3)
    for target in TARGETS:
        module, placement, ranges = again.placed(target)
        found = Simulation(module, placement.edges, ranges).run((torch.from_numpy(x),))[0]
        assert np.array_equal(found.numpy(), case.simulated(target, x))


def tensors(quantized: Quantized) -> dict[str, Tensor]:
    plain = {f"plain {name}": tensor for name, tensor in quantized.plain.state_dict().items()}
    return {**quantized.module.state_dict(), **plain, **{f"scales {k}": v for k, v in quantized.scales.items()}}


def test_climbing_rung_by_rung_from_disk_ends_where_one_run_does(case: Case, tmp_path: Path):
    given, reached = case.material, []
    build: Build | None = qdq.first_rung(case.build("openvino"))
    while build is not None:
        rung = TOP if build.quantization.rung is None else build.quantization.rung
        quantized = state.calibrated(given.program, given.calibration, tmp_path, Recipe(weight_bits=7), rung)
        reached.append(state.rung_reached(tmp_path, Recipe(weight_bits=7), rung))
        assert reached[-1] is not None
        assert reached[-1] >= rung
        build = qdq.climbed(build, tmp_path)
    assert (reached[:2], reached[-1]) == ([0, 1], TOP)
    assert reached == sorted(set(reached))
    whole = case.quantized
    assert (quantized.notes, quantized.ranges, quantized.sqnr_db) == (whole.notes, whole.ranges, whole.sqnr_db)
    climbed, expected = tensors(quantized), tensors(whole)
    assert climbed.keys() == expected.keys()
    assert all(torch.equal(climbed[name], expected[name]) for name in expected)


def test_a_rung_that_changes_nothing_is_passed_by(case: Case, tmp_path: Path):
    given, recipe = case.material, Recipe(weight_bits=7, corrections=("rounding",))
    state.calibrated(given.program, given.calibration, tmp_path, recipe, 2)
    files = {path.stem.rpartition("-")[2] for path in tmp_path.iterdir()}
    assert files == {"1", str(RUNGS.index("rounding"))}
    assert state.rung_reached(tmp_path, recipe, 2) == RUNGS.index("rounding")
    assert state.rung_reached(tmp_path, recipe, TOP) is None


def test_the_first_rung_serves_both_placements_from_one_pass(case: Case, tmp_path: Path):
    given = replace(case.material, cache=tmp_path)
    for name in ("openvino", "onnxruntime"):
        build, payload = qdq.first_rung(case.build(name)), tmp_path / f"payload-{name}"
        payload.mkdir()
        (note,) = engine(name).build(given, build, payload)
        assert re.match(r"\d+\.\d dB, ranges of 16 samples, judged by 4; ranges by", note)
        session = engine(name).open(payload, build, PLAN)
        answer = session.run([case.inputs(5)])[0]
        session.close()
        with torch.no_grad():
            assert_close(answer, case.model(torch.from_numpy(case.inputs(5))).numpy(), 0.15)
    assert [path.name for path in tmp_path.glob("stage-*")] == [f"stage-{Recipe(weight_bits=7).key}-0.safetensors"]


def test_the_top_has_no_rung_above_it(case: Case, tmp_path: Path):
    assert qdq.climbed(case.build("openvino"), tmp_path) is None
    last = case.build("openvino").with_quantization(replace(case.build("openvino").quantization, rung=TOP - 1))
    assert qdq.climbed(last, tmp_path) == case.build("openvino")


def test_ignored_layers_have_their_own_weights_in_the_program(case: Case):
    example = (torch.from_numpy(case.inputs(2)),)
    lowered = lower(case.quantized, "fused", case.material.inputs, example, ("head",))
    assert sum(t.dtype == torch.int8 for t in lowered.state_dict.values()) == case.layers - 1
    with pytest.raises(EngineError, match="ignored"):
        lower(case.quantized, "fused", case.material.inputs, example, (".*",))
    with pytest.raises(EngineError, match="'haed' matches no layer"):
        lower(case.quantized, "fused", case.material.inputs, example, ("haed",))


# --- on engines ---------------------------------------------------------------------------------------------------


def test_engines_run_all_layers_in_int8_and_agree(case: Case, tmp_path: Path):
    answers: dict[str, list[np.ndarray]] = {}
    for name, target in (("onnxruntime", "everywhere"), ("openvino", "fused")):
        build, payload = case.build(name), tmp_path / name
        payload.mkdir()
        assert build.quantization.reduce_range
        assert engine(name).build(case.material, build, payload) == ("; ".join(case.quantized.notes),)
        receipt = engine(name).receipt(payload, build, PLAN, [case.inputs(PLAN.batch)])
        assert receipt is not None
        assert (receipt.layers, receipt.int8, receipt.fell_back) == (case.layers, case.layers, ())
        session = engine(name).open(payload, build, PLAN)
        answers[name] = [session.run([case.inputs(batch)])[0] for batch in BATCHES]
        session.close()
        for batch, answer in zip(BATCHES, answers[name], strict=True):
            # A few steps of the last layers' grids: engines add in other orders and requantize with factors of theirs.
            assert_close(answer, case.simulated(target, case.inputs(batch)), 0.02)
    for one, other, batch in zip(*answers.values(), BATCHES, strict=True):
        assert_close(one, other, 0.03)
        with torch.no_grad():
            assert_close(one, case.model(torch.from_numpy(case.inputs(batch))).numpy(), 0.1)


class Mixing(nn.Module):
    """Its rows depend on each other, so it runs row by row, and its program has that batch in a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.relu(self.convolution(x)).reshape(x.shape[0], -1)
        return self.head(rows + 0.1 * rows.mean(0))


@pytest.mark.parametrize("name", ["openvino", "onnxruntime", "torch-int8"])
def test_a_program_with_a_fixed_batch_is_calibrated_in_calls_of_that_batch(name: str, tmp_path: Path):
    torch.manual_seed(0)
    model, rows = Mixing().eval(), np.random.default_rng(0).standard_normal((24, 3, 8, 8), np.float32)
    exported = export(model, from_python(list(rows)))
    assert exported.fixed_batch == 1
    save_program(exported.program, tmp_path / "program.pt2")
    given = BuildInputs(
        program=tmp_path / "program.pt2",
        inputs=exported.inputs,
        outputs=exported.outputs,
        operators={},
        calibration=from_python(list(rows)),
        cpu=cpu.inspect_cpu(),
        cache=tmp_path,
    )
    own = Build(engine=name, precision="int8")
    builds = [own] if name == "torch-int8" else [qdq.int8(name, given.cpu), qdq.first_rung(qdq.int8(name, given.cpu))]
    for number, build in enumerate(build.with_fixed_batch(1) for build in builds):
        payload = tmp_path / f"payload-{number}"
        payload.mkdir()
        engine(name).build(given, build, payload)
        session = engine(name).open(payload, build, Plan(threads_per_instance=1, batch=1))
        answers = np.concatenate([session.run([row[None]])[0] for row in rows])
        session.close()
        with torch.no_grad():
            expected = np.concatenate([model(torch.from_numpy(row[None])).numpy() for row in rows])
        # PyTorch's own int8 has seven bits for activations where the CPU has no VNNI.
        assert_close(answers, expected, 0.2 if name == "torch-int8" else 0.1)


# --- biases in int32 ----------------------------------------------------------------------------------------------


def onnx_layer(
    kind: str, folder: Path, bias: list[float], x_scale: float, w_scales: list[float], y_scale: float = 0.0
) -> Path:
    """A Conv or Gemm of three inputs between Q/DQ pairs, all its int8 weights 50: pairs of products fit in 16 bits.

    With a ``y_scale`` its output has a pair too, and ONNX Runtime runs it in int8.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    shape = (len(bias), 3, 1, 1) if kind == "Conv" else (len(bias), 3)
    scales = np.asarray(w_scales, np.float32)
    zero = np.zeros(len(w_scales), np.int8)
    tensors = {
        "x_scale": np.float32(x_scale),
        "x_zero": np.uint8(0),
        "w": np.full(shape, 50, np.int8),
        "w_scale": scales if len(w_scales) > 1 else scales[0],
        "w_zero": zero if len(w_scales) > 1 else zero[0],
        "b": np.asarray(bias, np.float32),
    }
    axis = {"axis": 0} if len(w_scales) > 1 else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "x_scale", "x_zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wd"], **axis),
        helper.make_node(kind, ["xd", "wd", "b"], ["y"], name="layer", **({} if kind == "Conv" else {"transB": 1})),
    ]
    if y_scale:
        tensors |= {"y_scale": np.float32(y_scale), "y_zero": np.uint8(0)}
        nodes[-1].output[0] = "yf"
        nodes += [
            helper.make_node("QuantizeLinear", ["yf", "y_scale", "y_zero"], ["yq"]),
            helper.make_node("DequantizeLinear", ["yq", "y_scale", "y_zero"], ["y"]),
        ]
    dims = ["n", 3, 1, 1] if kind == "Conv" else ["n", 3]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", len(bias), *dims[2:]])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    path = folder / "layer.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def stored_bias(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The layer's bias as it is stored, and its scales where it is int32."""
    import onnx

    graph = onnx.load(path).graph
    onnx.checker.check_model(str(path))
    tensors = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    name = next(node for node in graph.node if node.name == "layer").input[2]
    if name in tensors:
        return tensors[name], None
    read = made[name]
    assert read.op_type == "DequantizeLinear"
    assert not tensors[read.input[2]].any()
    return tensors[read.input[0]], tensors[read.input[1]]


exponents = st.integers(-24, 2)


@settings(max_examples=60)
@example(kind="Conv", bias=[3.0, -1.0], x=-7, w=[-24, -24])
@example(kind="Gemm", bias=[0.0, 127.0], x=-24, w=[0, 0])
@given(
    kind=st.sampled_from(["Conv", "Gemm"]),
    bias=st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=2),
    x=exponents,
    w=st.lists(exponents, min_size=1, max_size=2),
)
def test_an_int32_bias_never_overflows(
    kind: str, bias: list[float], x: int, w: list[int], tmp_path_factory: pytest.TempPathFactory
):
    path = onnx_layer(kind, tmp_path_factory.getbasetemp(), bias, 2.0**x, [2.0**k for k in w])
    largest = float((np.abs(bias) / np.float64([2.0 ** (x + k) for k in w])).max())
    count = quantize_biases(path)
    values, scales = stored_bias(path)
    if scales is None:
        assert count == 0
        assert largest > 2**29
        assert values.dtype == np.float32
        assert np.array_equal(values, np.float32(bias))
    else:
        assert count == 1
        assert values.dtype == np.int32
        error = np.abs(values * scales.astype(np.float64) - np.float64(bias))
        assert bool((error <= 0.5001 * scales + 1e-6 * np.abs(bias)).all())


def answer(path: Path, x: np.ndarray) -> np.ndarray:
    import onnxruntime as ort

    found: np.ndarray = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    return found.reshape(len(x), -1)


@pytest.mark.parametrize("kind", ["Conv", "Gemm"])
@pytest.mark.parametrize("scales", [[0.01], [0.01, 0.003]])
def test_the_int32_bias_gives_the_same_answers(kind: str, scales: list[float], tmp_path: Path):
    path = onnx_layer(kind, tmp_path, [0.7, -2.1], 0.05, scales)
    x = np.random.default_rng(0).random((4, 3, 1, 1) if kind == "Conv" else (4, 3)).astype(np.float32) * 10
    before = answer(path, x)
    assert quantize_biases(path) == 1
    np.testing.assert_allclose(answer(path, x), before, atol=0.05 * max(scales) / 2 + 1e-5)
    assert quantize_biases(path) == 0


@pytest.mark.parametrize(
    "bias",
    [
        2.0,
        4.0,
    ],
)
@pytest.mark.parametrize("kind", ["Conv", "Gemm"])
def test_a_dead_channel_with_a_large_bias_is_right_on_onnxruntime(kind: str, bias: float, tmp_path: Path):
    path = onnx_layer(kind, tmp_path, [bias, 1.0], 0.02, [2.0**-24, 0.001], y_scale=0.05)
    quantize_biases(path)
    x = np.random.default_rng(0).random((4, 3, 1, 1) if kind == "Conv" else (4, 3)).astype(np.float32)
    inputs = np.rint(x / 0.02).sum(1).reshape(4, 1) * 0.02
    expected = inputs * 50 * np.array([[2.0**-24, 0.001]]) + np.array([[bias, 1.0]])
    np.testing.assert_allclose(answer(path, x), expected, atol=0.026)


@pytest.mark.parametrize("share", [0.5, 0.9999999])
def test_sums_on_top_of_a_large_bias_do_not_overflow(share: float, tmp_path: Path):
    bias = share * 2.0  # in steps of 2^-30, int32 ends at 2
    path = onnx_layer("Conv", tmp_path, [bias, 0.0], 2.0**-10, [2.0**-20, 2.0**-20], y_scale=0.01)
    quantize_biases(path)
    found = answer(path, np.full((1, 3, 1, 1), 255 * 2.0**-10, np.float32))
    np.testing.assert_allclose(found, [[bias, 0.0]], atol=0.006)


# --- sums in 16 bits ----------------------------------------------------------------------------------------------


def pairs(u: np.ndarray, s: np.ndarray) -> np.ndarray:
    """``vpmaddubsw``: u8 times s8, neighbours added in 16 bits with saturation (Intel SDM, PMADDUBSW)."""
    products = u.astype(np.int32) * s.astype(np.int32)
    return np.clip(products[..., ::2] + products[..., 1::2], -(2**15), 2**15 - 1)


def saturates(u: np.ndarray, s: np.ndarray) -> bool:
    exact = u.astype(np.int32) * s.astype(np.int32)
    return not np.array_equal(pairs(u, s), exact[..., ::2] + exact[..., 1::2])


def levels(weights: Tensor, bits: int) -> np.ndarray:
    """The integers that the kernels get."""
    scales = weight_scales(weights, 0, bits)
    steps = round_weight(weights, scales, 0, bits) / scales.view(-1, 1)
    return steps.round().numpy().astype(np.int8)


def test_eight_bits_saturate_and_seven_never_do():
    first, second = np.meshgrid(np.arange(-128, 128), np.arange(-128, 128))
    weights = np.stack([first.ravel(), second.ravel()], -1).astype(np.int8)
    u = np.array([[0, 0], [0, 255], [255, 0], [255, 255]], np.uint8)[:, None]  # sums are extreme at extremes
    inside = ((weights >= -64) & (weights <= 63)).all(-1)
    assert saturates(u, weights[None])
    assert not saturates(u, weights[inside][None])
    # One step more would do.
    assert saturates(np.full((1, 2), 255, np.uint8), np.array([[65, 64]], np.int8))


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=16, max_size=16), st.integers(0, 2**32 - 1))
def test_weights_of_seven_bits_never_saturate(values: list[float], seed: int):
    u = np.random.default_rng(seed).integers(0, 256, (32, 1, 8), np.uint8)
    u[:8] = 255
    assert not saturates(u, levels(torch.tensor(values).view(2, 8), 7)[None])


def test_a_layer_with_weights_of_eight_bits_is_wrong_in_sixteen():
    weights = torch.tensor([[1.0, 0.9, -1.0, -0.8]])
    u = np.full((1, 4), 255, np.uint8)
    assert saturates(u, levels(weights, 8))
    assert int(pairs(u, levels(weights, 7)).sum()) == 255 * int(levels(weights, 7).astype(int).sum())
    assert int(pairs(u, levels(weights, 8)).sum()) != 255 * int(levels(weights, 8).astype(int).sum())


def test_importing_the_quantizer_prints_nothing() -> None:
    command = [sys.executable, "-c", "import corewise.quantize.state"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")
