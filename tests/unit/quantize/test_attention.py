"""Products of two activations in int8: attention taken apart, placed, and on ONNX Runtime."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from corewise.common.errors import EngineError
from corewise.engines import BuildInputs, engine
from corewise.machine import inspect as cpu
from corewise.quantize import state
from corewise.quantize.graph import aten, attentions, compute, execute, folded, split_attention
from corewise.quantize.quantized import Quantized, Recipe, lower
from corewise.quantize.simulate import Simulation, sqnr_db
from corewise.records.build import Plan
from corewise.samples import from_python
from corewise.source import export, operators, save_program

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, from copying a graph

TOKENS, WIDTH, HEADS = 6, 16, 2
MASKS = ("none", "bool", "float", "causal")


class Attention(nn.Module):
    """Two heads over six tokens; ``mask`` says of which kind, which depends on the input."""

    def __init__(self, mask: str = "none", *, by_hand: bool = False) -> None:
        super().__init__()
        self.mask, self.by_hand = mask, by_hand
        self.into = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        q, k, v = self.into(x).view(-1, TOKENS, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind()
        if self.by_hand:
            mixed = ((q @ k.transpose(-2, -1)) * 0.3).softmax(-1) @ v
        else:
            seen = x.sum(-1) > -3
            mask = None
            if self.mask == "bool":
                mask = seen[:, None, None, :]
            elif self.mask == "float":
                mask = (x.sum(-1) * 0.1)[:, None, None, :]
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=self.mask == "causal")
        return self.out(mixed.transpose(1, 2).reshape(-1, TOKENS, WIDTH))


def samples(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, TOKENS, WIDTH), np.float32)


def material(model: nn.Module, folder: Path) -> BuildInputs:
    calibration = from_python(list(samples(32)))
    exported = export(model.eval(), calibration)
    assert exported.program is not None
    save_program(exported.program, folder / "program.pt2")
    return BuildInputs(
        program=folder / "program.pt2",
        inputs=exported.inputs,
        outputs=exported.outputs,
        operators=operators(exported.program),
        calibration=calibration,
        cpu=cpu.inspect_cpu(),
        cache=folder,
    )


def made(model: nn.Module, folder: Path) -> tuple[BuildInputs, Quantized]:
    found = material(model, folder)
    recipe = Recipe(weight_bits=8 if found.cpu.int8_dot else 7)
    return found, state.calibrated(found.program, found.calibration, found.cache, recipe)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("mask", MASKS)
def test_attention_taken_apart_computes_the_same(mask: str):
    model = Attention(mask).eval()
    exported = export(model, from_python(list(samples(8))))
    assert exported.program is not None
    module = folded(exported.program)
    operands = split_attention(module)
    assert len(operands) == (0 if mask == "causal" else 3)
    assert any(node.target is aten.scaled_dot_product_attention.default for node in module.graph.nodes) == (
        mask == "causal"
    )
    for batch in (1, 3):
        x = torch.from_numpy(samples(batch))
        with torch.no_grad():
            (found,) = execute(module, (x,), compute)
            torch.testing.assert_close(found, model(x))
    assert not attentions(module) or mask == "causal"


@pytest.mark.parametrize("by_hand", [False, True])
def test_products_run_in_int8_on_onnxruntime(by_hand: bool, tmp_path: Path):
    model = Attention("none" if by_hand else "bool", by_hand=by_hand)
    given, quantized = made(model, tmp_path)
    offered = engine("onnxruntime").candidates(given.cpu, given.operators)
    build = next(build for build in offered if build.quantization.attention)
    payload = tmp_path / "payload"
    payload.mkdir()
    engine("onnxruntime").build(given, build, payload)
    plan = Plan(threads_per_instance=1, batch=2)
    x = samples(5)
    receipt = engine("onnxruntime").receipt(payload, build, plan, [x])
    assert receipt is not None
    assert (receipt.layers, receipt.int8, receipt.fell_back) == (4, 4, ())
    session = engine("onnxruntime").open(payload, build, plan)
    found = torch.from_numpy(session.run([x])[0])
    session.close()
    module, placement, ranges = quantized.placed("everywhere", attention=True)
    simulated = Simulation(module, placement.edges, ranges).run((torch.from_numpy(x),))
    with torch.no_grad():
        exact = (model(torch.from_numpy(x)),)
    assert sqnr_db([simulated], [(found,)]) > 30
    assert sqnr_db([exact], [(found,)]) > 20


def test_an_ignored_attention_stays_in_floating_point(tmp_path: Path):
    given, quantized = made(Attention(), tmp_path)
    del given
    whole = quantized.placed("fused", attention=True)[1]
    plain = quantized.placed("fused")[1]
    assert len(whole.edges) == len(plain.edges) + 4
    ignored = ("scaled_dot_product_attention",)  # by its operator: it is in no module of the model's
    assert quantized.placed("fused", ignored, attention=True)[1].edges == plain.edges
    assert quantized.placed("fused", ignored)[1].edges == plain.edges
    with pytest.raises(EngineError, match="matches no layer"):
        quantized.placed("fused", ("scaled_dot",), attention=True)


class Latent(nn.Module):
    """Queries that are parameters, then two attentions on each other's outputs with nothing between."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, 4, WIDTH))
        self.into, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to (batch, 6, width)."""
        attend = nn.functional.scaled_dot_product_attention
        y = self.into(x)
        read = attend(self.latents.expand(x.shape[0], -1, -1), y, y)
        again = attend(y, read, read)
        return self.out(attend(again, again, y))


def test_attentions_on_attentions_and_on_parameters(tmp_path: Path):
    model = Latent()
    given, quantized = made(model, tmp_path)
    x = torch.from_numpy(samples(5))
    module, placement, ranges = quantized.placed("everywhere", attention=True)
    (found,) = Simulation(module, placement.edges, ranges).run((x,))
    with torch.no_grad():
        assert sqnr_db([(model(x),)], [(found,)]) > 15
    example = (torch.from_numpy(samples(2)),)
    lowered = lower(quantized, "everywhere", given.inputs, example, attention=True)
    with torch.no_grad():
        assert sqnr_db([(found,)], [lowered.module()(x)]) > 30


class Keys(nn.Module):
    """Keys that are a parameter, which no sample changes."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.into = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        return nn.functional.scaled_dot_product_attention(self.into(x), self.keys, self.keys)


@pytest.mark.parametrize("model", [Keys(), Attention("causal")])
def test_what_cannot_be_taken_apart_is_told_and_else_quantized_as_ever(model: nn.Module, tmp_path: Path):
    given, quantized = made(model, tmp_path)
    example = (torch.from_numpy(samples(2)),)
    assert lower(quantized, "fused", given.inputs, example)
    with pytest.raises(EngineError, match="no attention whose products can be int8"):
        lower(quantized, "fused", given.inputs, example, attention=True)


def test_rows_that_see_nothing_are_no_nan():
    model = Attention("bool").eval()
    exported = export(model, from_python(list(samples(8))))
    assert exported.program is not None
    module = folded(exported.program)
    split_attention(module)
    with torch.no_grad():
        (found,) = execute(module, (torch.full((2, TOKENS, WIDTH), -1.0),), compute)
    assert bool(found.isfinite().all())


def test_it_is_offered_for_models_with_attention_only():
    here = cpu.inspect_cpu()
    for names, offered in (
        (("aten.linear.default", "aten.scaled_dot_product_attention.default"), True),
        (("aten.linear.default", "aten.matmul.default", "aten.softmax.int"), True),
        (("aten.linear.default", "aten.softmax.int"), False),
        (("aten.conv2d.default", "aten.matmul.default"), False),
    ):
        builds = engine("onnxruntime").candidates(here, dict.fromkeys(names, 1))
        assert any(build.quantization.attention for build in builds) == offered
