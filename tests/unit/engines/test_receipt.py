"""The int8 receipt: counts of small nets that are exact, on the runtimes themselves."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from corewise.engines import BuildInputs, engine
from corewise.engines.libraries import quiet
from corewise.machine import inspect as cpu
from corewise.records.build import Build, Plan, Receipt
from corewise.records.jsonable import from_json, to_json
from corewise.samples import Samples, from_python
from corewise.source import export, save_program

PLAN = Plan(threads_per_instance=1, batch=4)
IMAGES = np.random.default_rng(0).standard_normal((16, 3, 12, 12)).astype(np.float32)
WIDE = np.random.default_rng(0).standard_normal((8, 16, 256)).astype(np.float32)
TOKENS = np.random.default_rng(0).standard_normal((16, 6, 8)).astype(np.float32)


class Images(nn.Module):
    """Three convolutions, the second depthwise, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.pointwise(x)).mean((2, 3)))


class Attention(nn.Module):
    """Two linears, and two products of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.output = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(x)
        return self.output((y @ y.transpose(1, 2) / 4).softmax(-1) @ y)


class Wide(nn.Module):
    """Three linears of several groups of columns, two of them alike."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.down = nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.second(torch.relu(self.first(x)))))


class OnlyRelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + 1


EXPORTED: dict[type[nn.Module], BuildInputs] = {}
"""Each net, exported once."""


@pytest.fixture(scope="module", autouse=True)
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    for kind, samples in ((Images, IMAGES), (Attention, TOKENS), (Wide, WIDE), (OnlyRelu, IMAGES)):
        EXPORTED[kind] = material(kind, samples, tmp_path_factory.mktemp(kind.__name__))
    yield
    EXPORTED.clear()


def material(kind: type[nn.Module], samples: np.ndarray, folder: Path) -> BuildInputs:
    torch.manual_seed(0)
    calibration: Samples = from_python(list(samples))
    exported = export(kind().eval(), calibration)
    save_program(exported.program, folder / "program.pt2")
    return BuildInputs(
        program=folder / "program.pt2",
        inputs=exported.inputs,
        outputs=exported.outputs,
        operators=dict(Counter(str(n.target) for n in exported.program.graph.nodes if n.op == "call_function")),
        calibration=calibration,
        cpu=cpu.inspect_cpu(),
        cache=folder,
    )


def receipt(name: str, precision: str, kind: type[nn.Module], folder: Path, rest: str = "") -> Receipt | None:
    """Of the net, quantized by the engine's own quantizer."""
    build = Build(engine=name, precision=precision, options=(("rest", rest),) if rest else ())
    payload = folder / "payload"
    payload.mkdir()
    given = EXPORTED[kind]
    engine(name).build(given, build, payload)
    return engine(name).receipt(payload, build, PLAN, [np.stack([row[0] for row in given.calibration.rows[:4]])])


# --- the value ----------------------------------------------------------------------------------------------------


def test_a_receipt_counts_kernels_and_tells_itself_in_words():
    found = Receipt.tally([("Gemm", False), ("QLinearConv", True), ("QLinearConv", True)], ["head"])
    assert found == Receipt(layers=3, int8=2, kernels=(("Gemm", 1), ("QLinearConv", 2)), fell_back=("head",))
    assert found.words == "int8: 2 of 3 convolutions and linears, 1 fell back"
    assert from_json(Receipt, to_json(found)) == found


# --- the engines' own quantizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("openvino", {"Convolution/u8": 3, "FullyConnected/u8": 1}),
        ("onnxruntime", {"QLinearConv": 3, "QGemm": 1}),
        ("torch-int8", {"quantized::conv2d_relu": 3, "quantized::linear": 1}),
    ],
)
def test_all_layers_of_a_quantized_net_run_in_int8(name: str, kernels: dict[str, int], tmp_path: Path):
    found = receipt(name, "int8", Images, tmp_path)
    assert found is not None
    # With AMX a convolution's kernel may be named after its weights.
    assert sum((Counter({name.replace("/i8", "/u8"): n}) for name, n in found.kernels), Counter()) == kernels
    assert (found.layers, found.int8, found.fell_back) == (4, 4, ())


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("onnxruntime", {"Conv": 3, "DynamicQuantizeMatMul": 1}),
        ("torch-int8", {"aten::conv2d": 3, "quantized::linear_dynamic": 1}),
    ],
)
def test_dynamic_quantization_leaves_convolutions(name: str, kernels: dict[str, int], tmp_path: Path):
    found = receipt(name, "int8-dynamic", Images, tmp_path)
    assert found is not None
    assert dict(found.kernels) == kernels
    assert (found.layers, found.int8, found.fell_back) == (4, 1, ())


@pytest.mark.skipif(not cpu.inspect_cpu().int8_dot, reason="OpenVINO then unpacks the weights")
@pytest.mark.parametrize(
    "rest", ["", pytest.param("bf16", marks=pytest.mark.skipif(not cpu.inspect_cpu().bf16, reason="no bf16 here"))]
)
def test_openvinos_dynamic_int8_is_seen_in_what_onednn_logs(rest: str, tmp_path: Path):
    found = receipt("openvino", "int8-dynamic", Wide, tmp_path, rest)
    assert found is not None
    unpacked = rest == "bf16" and cpu.inspect_cpu().has("amx_bf16")
    assert (found.layers, found.int8, len(found.fell_back)) == ((3, 0, 3) if unpacked else (3, 3, 0))
    assert all(re.search("vnni|amx", kernel) for kernel, _ in found.kernels)


def test_openvinos_int8_is_made_once_for_both_precisions_of_the_rest(tmp_path: Path):
    given, made = replace(EXPORTED[Images], cache=tmp_path), []
    for number, options in enumerate(((("rest", "bf16"),) if cpu.inspect_cpu().bf16 else (), ())):
        build, payload = Build(engine="openvino", precision="int8", options=options), tmp_path / f"payload-{number}"
        payload.mkdir()
        engine("openvino").build(given, build, payload)
        made.append((payload / "model.xml").read_bytes())
        found = engine("openvino").receipt(payload, build, PLAN, [IMAGES[:4]])
        assert found is not None
        assert (found.layers, found.int8, found.fell_back) == (4, 4, ())
        # NNCF finds other ranges for other samples, so what is made anew would not be the same.
        given = replace(given, calibration=from_python(list(2 * IMAGES)))
    assert made[0] == made[1]


OPENVINO_TELLS = 2 if "avx512" in cpu.inspect_cpu().isa else 4
"""With AVX-512 both products are in one kernel with the softmax, which does not tell of them."""


@pytest.mark.parametrize(("name", "layers"), [("openvino", OPENVINO_TELLS), ("onnxruntime", 4), ("torch-int8", 2)])
def test_products_of_activations_count_where_they_are_quantized(name: str, layers: int, tmp_path: Path):
    found = receipt(name, "int8", Attention, tmp_path)
    assert found is not None
    assert (found.layers, found.int8, found.fell_back) == (layers, layers, ())


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_net_without_layers_has_an_empty_receipt(name: str, tmp_path: Path):
    found = receipt(name, "int8", OnlyRelu, tmp_path)
    assert found == Receipt(layers=0, int8=0, kernels=())


@pytest.mark.parametrize("name", ["eager", "openvino", "onnxruntime"])
def test_fp32_has_no_receipt(name: str, tmp_path: Path):
    assert receipt(name, "fp32", Images, tmp_path) is None


# --- layers left out, and layers that fall back -------------------------------------------------------------------


def built(name: str, precision: str, folder: Path) -> Path:
    """The payload of ``Images``."""
    payload = folder / "payload"
    payload.mkdir()
    engine(name).build(EXPORTED[Images], Build(engine=name, precision=precision), payload)
    return payload


def observed(name: str, payload: Path) -> Receipt:
    found = engine(name).receipt(payload, Build(engine=name, precision="int8"), PLAN, [IMAGES[:4]])
    assert found is not None
    return found


def quantize_onnx(payload: Path, **options: Any) -> None:
    """Quantize ``model.onnx`` by ONNX Runtime, in place."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        feeds = iter([{"tensors_0": IMAGES}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    with quiet():
        quantize_static(
            payload / "model.onnx",
            payload / "model.onnx",
            Reader(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            **options,
        )


def onnx_layers(payload: Path, kind: str) -> list[str]:
    import onnx

    return [node.name for node in onnx.load(payload / "model.onnx").graph.node if node.op_type == kind]


@pytest.mark.parametrize(("kind", "kernel"), [("Conv", "Conv"), ("Gemm", "Gemm")])
def test_onnxruntime_tells_of_a_layer_left_out(kind: str, kernel: str, tmp_path: Path):
    payload = built("onnxruntime", "fp32", tmp_path)
    # The first one: a layer between int8 ones ONNX Runtime quantizes itself when it loads the model.
    quantize_onnx(payload, nodes_to_exclude=onnx_layers(payload, kind)[:1])
    found = observed("onnxruntime", payload)
    assert (found.layers, found.int8, found.fell_back) == (4, 3, ())
    assert dict(found.kernels)[kernel] == 1


def test_onnxruntime_tells_of_a_convolution_that_falls_back(tmp_path: Path):
    payload = built("onnxruntime", "fp32", tmp_path)
    last = onnx_layers(payload, "Conv")[-1]
    # No Q after the last convolution: it has no int8 kernel then.
    quantize_onnx(payload, extra_options={"OpTypesToExcludeOutputQuantization": ["Conv", "Relu"]})
    found = observed("onnxruntime", payload)
    assert (found.layers, found.int8, found.fell_back) == (4, 3, (last,))


def openvino_layers(payload: Path) -> list[str]:
    import openvino as ov

    kinds = ("Convolution", "GroupConvolution", "MatMul")
    operations = ov.Core().read_model(payload / "model.xml").get_ordered_ops()
    return [op.get_friendly_name() for op in operations if op.get_type_name() in kinds]


@pytest.mark.parametrize(("layer", "kernel"), [(1, "Convolution/f32"), (3, "FullyConnected/f32")])
def test_openvino_tells_of_a_layer_left_out(layer: int, kernel: str, tmp_path: Path):
    import nncf
    import openvino as ov

    payload = built("openvino", "fp32", tmp_path)
    model = ov.Core().read_model(payload / "model.xml")
    model.reshape([1, *IMAGES.shape[1:]])
    with quiet():
        scope = nncf.IgnoredScope(names=[openvino_layers(payload)[layer]])
        quantized = nncf.quantize(model, nncf.Dataset([image[None] for image in IMAGES]), ignored_scope=scope)
    quantized.reshape([-1, *IMAGES.shape[1:]])
    other = tmp_path / "other"
    other.mkdir()
    ov.save_model(quantized, other / "model.xml", compress_to_fp16=False)
    found = observed("openvino", other)
    assert (found.layers, found.int8, found.fell_back) == (4, 3, ())
    assert dict(found.kernels)[kernel] == 1


def test_openvino_tells_of_layers_that_fall_back(tmp_path: Path):
    payload = built("openvino", "int8", tmp_path)
    xml = payload / "model.xml"
    # Its kernels know no activations of 16 bits.
    xml.write_text(xml.read_text().replace('levels="256"', 'levels="65536"'))
    found = observed("openvino", payload)
    assert dict(found.kernels) == {"Convolution/f32": 3, "FullyConnected/f32": 1}
    assert (found.layers, found.int8) == (4, 0)
    assert found.fell_back[:3] == tuple(openvino_layers(payload)[:3])
    assert found.fell_back[3].startswith("linear/")
