"""PyTorch's FX quantization (``torch.ao.quantization.quantize_fx``): calibrate, convert, and script what comes out."""

import copy
import io
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.ao.quantization import (
    HistogramObserver,
    MinMaxObserver,
    PerChannelMinMaxObserver,
    QConfig,
    get_default_qconfig_mapping,
    per_channel_dynamic_qconfig,
    quantize_dynamic,
    quantize_fx,
)
from torch.ao.quantization.fx.prepare import prepare
from torch.fx import GraphModule

BACKENDS = ("onednn", "x86", "fbgemm", "qnnpack")
OBSERVED_VALUES = 65536
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class SampledHistogram(HistogramObserver):
    """PyTorch's histogram observer on 65,536 evenly spaced values of each tensor.

    On MobileNetV2 and ResNet-50 its ranges are as good as those of all values, at the price of min-max (a third).
    """

    def forward(self, tensor: Tensor) -> Tensor:
        """Observe the tensor and return it."""
        # An odd step does not keep to some columns of an image whose width is even.
        step = max(1, tensor.numel() // OBSERVED_VALUES) | 1
        super().forward(tensor.detach().reshape(-1)[::step])
        return tensor


def backends() -> tuple[str, ...]:
    """The quantized backends worth trying here: what torch was built with, qnnpack on ARM only."""
    supported = torch.backends.quantized.supported_engines
    return tuple(name for name in BACKENDS if name in supported and not (name == "qnnpack" and "x86" in supported))


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Convert and load for this quantized backend, a global of torch; the caller's comes back."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def calibrate(module: GraphModule, batches: Iterable[Sequence[Tensor]], reduce_range: bool) -> GraphModule:
    """A lifted module, fused (batch norms and ReLUs go into convolutions) and with the observed ranges.

    Activations become u8 per tensor, weights s8 per output channel. ``reduce_range`` gives weights 7 bits, so that
    two products fit the 16 bits in which AVX2 adds them (vpmaddubsw: 2 * 255 * 64 < 2**15). PyTorch's own
    ``reduce_range`` takes the bit from the activations instead: it costs more accuracy, and activations beyond
    the calibrated range still have 8 bits and overflow.
    """
    bits = {"quant_min": -64, "quant_max": 63} if reduce_range else {"quant_min": -128, "quant_max": 127}
    per_channel = PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric, **bits)
    per_tensor = MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, **bits)
    mapping = get_default_qconfig_mapping().set_global(_config(per_channel))
    for kind in TRANSPOSED:  # for which the kernels have no scales per channel
        mapping.set_object_type(kind, _config(per_tensor))
    # prepare_fx would trace the module again, which fails at sizes in lists; these are its other two steps.
    fused = quantize_fx._fuse_fx(copy.deepcopy(module), False)
    scopes = {node.name: ("", type(None)) for node in fused.graph.nodes}
    prepared = prepare(fused, mapping, False, scopes, ())
    _absorb_relu6(prepared)
    with torch.no_grad():
        for tensors in batches:
            prepared(*tensors)
    return prepared


def _config(weight: Any) -> Any:
    make: Any = QConfig
    return make(activation=SampledHistogram, weight=weight)


def _absorb_relu6(prepared: GraphModule) -> None:
    """Let the u8 range 0..6 of what stands before it do the work of a ReLU6.

    Without this both have one range, observed before the ReLU6: the part beyond 6 is wasted.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))
    for node in prepared.graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], nn.ReLU6):
            continue
        observed = node.args[0]
        observer, producer = modules.get(str(observed.target)), observed.args[0]
        if not isinstance(observer, SampledHistogram) or len(observed.users) > 1 or len(producer.users) > 1:
            continue
        if all(modules.get(str(value.target)) is not observer for value in producer.all_input_nodes):
            observer.register_forward_pre_hook(_clip_to_6)
            prepared.add_submodule(node.target, nn.Identity())


def _clip_to_6(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].clamp(0, 6),)


def to_int8(prepared: GraphModule) -> GraphModule:
    """The calibrated module in int8, for the current ``backend``."""
    return quantize_fx.convert_fx(copy.deepcopy(prepared))


def to_dynamic_int8(module: GraphModule) -> GraphModule:
    """The lifted module with linear layers in int8 whose inputs are quantized as they come (in 7 bits)."""
    swap: Any = quantize_dynamic
    converted: GraphModule = swap(module, {nn.Linear: per_channel_dynamic_qconfig})
    return converted


def script(module: GraphModule) -> torch.jit.ScriptModule:
    """The module in TorchScript, frozen.

    Scripted, not traced: a trace keeps the batch of its example wherever the graph computes with sizes.
    """
    for node in module.graph.nodes:
        if isinstance(node.target, OpOverload):  # TorchScript knows operators only by the name of all overloads
            node.target = node.target.overloadpacket
    module.recompile()
    frozen: torch.jit.ScriptModule = torch.jit.freeze(torch.jit.script(module.eval()))
    return frozen


def count_kernels(scripted: torch.jit.ScriptModule) -> tuple[int, int]:
    """How many int8 convolutions and int8 linear layers the scripted module runs."""
    kinds = [node.kind() for node in scripted.graph.nodes()]
    convolutions, linears = (
        sum(kind.startswith(f"quantized::{name}") for kind in kinds) for name in ("conv", "linear")
    )
    return convolutions, linears


def save(scripted: torch.jit.ScriptModule, path: Path) -> None:
    """Write the module for ``torch.jit.load``, without the pickled source lines that TorchScript adds for debugging."""
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    with zipfile.ZipFile(buffer) as written, zipfile.ZipFile(path, "w") as kept:
        for name in written.namelist():
            if not name.endswith(".debug_pkl"):
                kept.writestr(name, written.read(name))
