"""The user's model before anything runs: whether it is one, and whether its weights are usable."""

from inspect import getattr_static
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from corewise.common.errors import SourceError
from corewise.common.phrases import with_article

MODEL_ITSELF = "give a torch.nn.Module or an ExportedProgram"
QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
"""Where torch keeps the layers that its own quantization leaves."""
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def as_module(model: Any) -> tuple[nn.Module, int | None]:
    """The module to run, in eval mode, and its batch where it is an exported program with a fixed one.

    Decoders of transformers no longer return a cache of keys and values: ``config.use_cache`` is set to False. Raises
    ``SourceError`` where ``model`` is none, or its weights are not plain float32 tensors on the CPU.
    """
    batch = None
    if isinstance(model, ExportedProgram):
        batch = fixed_batch(model)
        module: nn.Module = model.module()
    else:
        module = _unwrapped(model)
        module.eval()  # whose own ``train`` may return nothing
        _without_cache(module)
    for name, part in module.named_modules():
        if type(part).__module__.startswith(QUANTIZED):
            raise SourceError(f"{name} is quantized already ({type(part).__name__})", "give the model in float32")
    for name, parameter in module.named_parameters():
        _check_weight(name, parameter, is_parameter=True)
    for name, buffer in module.named_buffers():
        _check_weight(name, buffer, is_parameter=False)
    return module, batch


def fixed_batch(program: ExportedProgram) -> int | None:
    """The batch that a program was exported with; ``None`` where it is dynamic.

    Raises ``SourceError`` where its inputs have different ones.
    """
    placeholders = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    tensors = {str(name): placeholders.get(str(name)) for name in program.graph_signature.user_inputs}
    shapes = {name: tuple(value.shape) for name, value in tensors.items() if isinstance(value, Tensor)}
    sizes = {shape[0] if shape and isinstance(shape[0], int) else None for shape in shapes.values()}
    if len(sizes) > 1 or () in shapes.values():
        raise SourceError(
            f"the inputs of the exported program do not share a batch: their shapes are {shapes}",
            "export it with the batch as the first dimension of every input",
        )
    return next(iter(sizes), None)


def inner_model(value: Any) -> str:
    """What to do with a wrapper around a module, as a fix: ``give its .model, a DetectionModel``; empty for others."""
    model = getattr(value, "model", None)
    return f"give its .model, {with_article(type(model).__name__)}" if isinstance(model, nn.Module) else ""


def _unwrapped(model: Any) -> nn.Module:
    """The user's own module, without what torch wrapped around it."""
    while isinstance(model, WRAPPERS) or "_orig_mod" in getattr(model, "_modules", ()):
        model = model.module if isinstance(model, WRAPPERS) else model._orig_mod  # the latter is torch.compile's
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise SourceError(f"the model is the class {model.__name__}", f"give an instance: {model.__name__}(...)")
    if not isinstance(model, nn.Module):
        raise SourceError(f"the model is {with_article(type(model).__name__)}", inner_model(model) or MODEL_ITSELF)
    # Such a wrapper (ultralytics' YOLO) may also understand ``eval`` as something else.
    if getattr_static(type(model), "forward", None) is nn.Module.forward and inner_model(model):
        raise SourceError(
            f"the model is {with_article(type(model).__name__)}, which has no forward", inner_model(model)
        )
    return model


def _without_cache(module: nn.Module) -> None:
    for part in module.modules():
        config = getattr(part, "config", None)
        if getattr(config, "use_cache", None) is True:
            config.use_cache = False  # type: ignore[union-attr]


def _check_weight(name: str, tensor: Tensor, *, is_parameter: bool) -> None:
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        raise SourceError(f"{name} has no shape yet: it belongs to a lazy module", "run the model once on a sample")
    if tensor.device.type == "meta":
        raise SourceError(
            f"{name} has no values: it is on the device meta", "load the weights, without init_empty_weights or meta"
        )
    if tensor.device.type != "cpu":
        raise SourceError(f"{name} is on {tensor.device}", "call model.cpu() first")
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise SourceError(f"{name} is sparse ({layout})", "replace it by its .to_dense() first")
    if tensor.is_quantized:
        raise SourceError(f"{name} is quantized already ({tensor.dtype})", "give the model in float32")
    if is_traceable_wrapper_subclass(tensor):  # as torchao's quantize_ leaves them
        raise SourceError(
            f"{name} is {with_article(type(tensor).__name__)}, not a plain tensor",
            "give the model in float32, before it is quantized or sharded",
        )
    if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
        raise SourceError(f"{name} is {tensor.dtype}", "call model.float() first: the fp32 model is the baseline")
    if is_parameter and tensor.is_inference():
        raise SourceError(
            f"{name} was made in inference mode, which torch.export does not take",
            "make the model outside of torch.inference_mode",
        )
    if is_parameter and tensor.dtype == torch.float64:
        raise SourceError(
            f"{name} is torch.float64, in which no fast engine computes",
            "call model.float() first, and give float32 samples",
        )
    if is_parameter and tensor.is_floating_point() and bool(tensor.isnan().any()):
        raise SourceError(f"{name} has NaN", "load the model's weights again: these are damaged")
