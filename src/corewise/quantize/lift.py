"""From an exported program back to modules.

``torch.export`` turns ``nn.Conv2d`` and its like into calls of ATen operators. PyTorch's FX quantization looks for
modules and for functions of ``torch`` instead; ``lift_program`` puts them back.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from corewise.quantize.graph import CONVOLUTIONS as PLAIN_CONVOLUTIONS
from corewise.quantize.graph import (
    NORMS,
    TRANSPOSED,
    arguments,
    aten,
    compute_constants,
    parameter,
    plain_graph,
    sizes_of,
    transposed,
)

CONVOLUTIONS = (*PLAIN_CONVOLUTIONS, aten.convolution.default, *TRANSPOSED)
CONVOLUTION_LAYERS: dict[tuple[int, bool], type[Any]] = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}
PRODUCTS = (aten.addmm.default, aten.mm.default)
NORM_LAYERS: dict[int, type[Any]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
COPIES = (aten.clone.default, aten.contiguous.default)
"""They only change the order in memory, on which nothing depends here (see ``METHODS``)."""
ACTIVATIONS: dict[Any, Callable[[], nn.Module]] = {
    aten.relu.default: nn.ReLU,
    aten.relu6.default: nn.ReLU6,
    aten.hardswish.default: nn.Hardswish,
    aten.hardsigmoid.default: nn.Hardsigmoid,
    aten.sigmoid.default: nn.Sigmoid,
}
RANGES = (aten.hardtanh.default, aten.clamp.default)
SUMS: dict[Any, Any] = {aten.add.Tensor: operator.add, aten.mul.Tensor: operator.mul}
FUNCTIONS: dict[Any, Any] = {
    **SUMS,
    aten.cat.default: torch.cat,
    aten.max_pool2d.default: nn.functional.max_pool2d,
    aten.avg_pool2d.default: nn.functional.avg_pool2d,
    aten.adaptive_avg_pool2d.default: nn.functional.adaptive_avg_pool2d,
    aten.mean.dim: torch.mean,
    aten.flatten.using_ints: torch.flatten,
    aten.transpose.int: torch.transpose,
    aten.squeeze.dim: torch.squeeze,
    aten.unsqueeze.default: torch.unsqueeze,
}
# Not "view": the outputs of int8 convolutions are channels-last, whatever the program had.
METHODS = {aten.view.default: "reshape", aten.reshape.default: "reshape", aten.permute.default: "permute"}


def lift_program(program: ExportedProgram) -> GraphModule:
    """The program as a module of ``nn`` layers and ``torch`` functions: flat tensors in, a tuple of tensors out.

    Convolutions, dense layers and batch norms over parameters become modules. What follows them (activations,
    poolings, sums, shapes) becomes what FX quantization knows. Anything else stays the ATen operator it is, and so
    stays in fp32. The result computes what the program computes, and shares its parameters.
    """
    module = plain_graph(program)
    compute_constants(module)
    return _Lift(module).run()


class _Lift:
    """Rewrites the graph of ``module`` in place."""

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.graph = module.graph
        self.lifted: set[Node] = set()

    def run(self) -> GraphModule:
        for node in list(self.graph.nodes):
            if node.target in COPIES:
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)
            elif node.op == "call_function":
                self._lift(node)
        self.graph.eliminate_dead_code()
        self.module.delete_all_unused_submodules()
        self.module.recompile()
        return self.module

    def _lift(self, node: Node) -> None:
        """Replace the node by a layer, function or method where there is one for it."""
        target: Any = node.target
        follows = self._follows(node)
        if target in CONVOLUTIONS:
            self._convolution(node)
        elif target is aten.linear.default or target in PRODUCTS:
            self._linear(node)
        elif target in NORMS:
            self._batch_norm(node)
        elif target in ACTIVATIONS and follows:
            self._replace(node, ACTIVATIONS[target](), node.args[0])
        elif target in RANGES and tuple(node.args[1:]) == (0, 6) and follows:
            self._replace(node, nn.ReLU6(), node.args[0])
        elif target in FUNCTIONS and follows:
            node.target = FUNCTIONS[target]
            self.lifted.add(node)
        elif target in METHODS:
            self._method(node, METHODS[target])
        elif target is aten.sym_size.int:
            self._method(node, "size")

    def _follows(self, node: Node) -> bool:
        """Whether every tensor the node takes is the output of something lifted, which int8 can carry on."""
        if node.kwargs or (node.target in SUMS and not all(isinstance(arg, Node) for arg in node.args)):
            return False
        tensors = [n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), int | torch.SymInt)]
        return bool(tensors) and self.lifted.issuperset(tensors)

    def _convolution(self, node: Node) -> None:
        args = arguments(node)
        weight, bias = parameter(self.module, args["weight"]), parameter(self.module, args["bias"])
        if weight is None or (bias is None and args["bias"] is not None):
            return
        padding = _symmetric(args["padding"], weight.shape[2:], args["dilation"])
        if padding is None:
            return
        target: Any = node.target
        rank = weight.dim() - 2
        is_transposed = args.get("transposed", "transpose" in target.name())
        outputs, inputs = weight.shape[0], weight.shape[1] * args["groups"]
        if is_transposed:
            inputs, outputs = weight.shape[0], weight.shape[1] * args["groups"]
        options = {"output_padding": sizes_of(args["output_padding"], rank)} if is_transposed else {}
        layer = CONVOLUTION_LAYERS[rank, is_transposed](
            inputs,
            outputs,
            tuple(weight.shape[2:]),
            stride=sizes_of(args["stride"], rank),
            padding=sizes_of(padding, rank),
            dilation=sizes_of(args["dilation"], rank),
            groups=args["groups"],
            bias=bias is not None,
            device="meta",
            **options,
        )
        self._replace(node, layer, args["input"], weight=weight, bias=bias)

    def _linear(self, node: Node) -> None:
        args = arguments(node)
        if node.target in PRODUCTS:
            bias_node, inputs = (args["self"], args["mat1"]) if "mat1" in args else (None, args["self"])
            weight = transposed(self.module, args["mat2"])
            plain = args.get("beta", 1) == args.get("alpha", 1) == 1
        else:
            bias_node, inputs, weight, plain = args["bias"], args["input"], parameter(self.module, args["weight"]), True
        bias = parameter(self.module, bias_node)
        if weight is None or weight.dim() != 2 or not plain or (bias is None and bias_node is not None):
            return
        if bias is not None and bias.shape != weight.shape[:1]:
            return
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        self._replace(node, layer, inputs, weight=weight, bias=bias)

    def _batch_norm(self, node: Node) -> None:
        args = arguments(node)
        names = ("weight", "bias", "running_mean", "running_var")
        tensors = {name: parameter(self.module, args[name]) for name in names}
        if args.get("training") or any(tensor is None for tensor in tensors.values()):
            return
        rank, features = args["input"].meta["val"].dim(), args["input"].meta["val"].shape[1]
        layer = NORM_LAYERS[rank](features, eps=args["eps"], device="meta")
        layer.num_batches_tracked = None
        if node.target is not aten.batch_norm.default:  # this one returns two empty tensors beside the output
            node = next(user for user in node.users if user.args[1] == 0)
        self._replace(node, layer, args["input"], **tensors)

    def _replace(self, node: Node, layer: nn.Module, value: Any, **tensors: Tensor | None) -> None:
        """Put a call of ``layer``, with these parameters and buffers, in the place of the node."""
        for name, tensor in tensors.items():
            if tensor is not None and name in layer._buffers:
                layer._buffers[name] = tensor.detach()
            elif tensor is not None:
                layer._parameters[name] = nn.Parameter(tensor.detach(), requires_grad=False)
        name = f"layer_{node.name}"
        self.module.add_module(name, layer.eval())
        with self.graph.inserting_before(node):
            call = self.graph.call_module(name, (value,))
        call.meta = node.meta
        node.replace_all_uses_with(call)
        self.graph.erase_node(node)
        self.lifted.add(call)

    def _method(self, node: Node, name: str) -> None:
        if node.args[0] in self.lifted and name != "size":
            self.lifted.add(node)
        node.op, node.target = "call_method", name


def _symmetric(padding: Any, kernel: Sequence[int], dilation: Any) -> Any:
    """Padding in numbers; ``None`` where "same" pads one side more, which the int8 kernels cannot."""
    if not isinstance(padding, str):
        return padding
    if padding == "valid":
        return [0]
    both = [step * (size - 1) for step, size in zip(sizes_of(dilation, len(kernel)), kernel, strict=True)]
    return None if any(total % 2 for total in both) else [total // 2 for total in both]
