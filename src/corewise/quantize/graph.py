"""An exported program as a graph that can be quantized: batch norms folded, names of the user's layers at hand."""

import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen
from torch.fx.node import map_arg

from corewise.common.errors import EngineError

aten: Any = torch.ops.aten
Key = TypeVar("Key")

CONVOLUTIONS = (
    *(aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding),
    *(aten.conv3d.default, aten.conv3d.padding),
)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
LINEARS = (aten.linear.default,)
LAYERS = (*CONVOLUTIONS, *TRANSPOSED, *LINEARS)
NORMS = (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)
IDENTITIES = (aten.dropout.default, aten.detach.default, aten.alias.default)
"""``clone`` and ``contiguous`` are none: a view behind them needs the order that they make."""
CHECKS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)
PRODUCTS = (aten.addmm.default, aten.mm.default, aten.matmul.default)
TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default)
MATRIX_PRODUCTS = (aten.matmul.default, aten.bmm.default)
ATTENTION = (aten.scaled_dot_product_attention.default,)
PART_OF = "corewise_part_of"
"""In a node's ``meta``: the name of the attention that it is a part of."""


def plain_graph(program: ExportedProgram) -> GraphModule:
    """The program as a module without guards and checks; flat tensors in, a tuple of tensors out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        if any(_mutates(node) for node in program.graph.nodes):
            program = program.run_decompositions({})
        module = program.module()
    assert isinstance(module, GraphModule)
    module.graph.set_codegen(CodeGen())
    for node in list(module.graph.nodes):
        if node.op == "call_module" or node.target in CHECKS:  # a module here holds the program's guards
            module.graph.erase_node(node)
        elif node.target in IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    return module


def folded(program: ExportedProgram) -> GraphModule:
    """The program ready for quantization.

    Batch norms are folded into the convolutions before them, matrix products with a transposed parameter are
    ``linear``, and each layer has parameters of its own, ``<node>_weight`` and ``<node>_bias``: a correction of one
    layer never changes another. Layers that see constants alone, as Swin V2 has for its table of positions, are values,
    and so are weights that are computed of constants, as weight norm does.
    It computes what the program computes. Raises ``EngineError`` for control flow.
    """
    for node in program.graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            raise EngineError(
                f"corewise's quantizer cannot look into a part of the model ({node.target})",
                "leave out control flow and autocast, or use an engine's own quantizer",
            )
    module = plain_graph(program)
    for node in list(module.graph.nodes):
        if node.target in PRODUCTS:
            _to_linear(module, node)
    compute_constants(module)
    for node in module.graph.nodes:
        if node.target in LAYERS and parameter(module, node.args[1]) is not None:
            _own_parameters(module, node)
    for node in list(module.graph.nodes):
        if node.target in NORMS:
            _fold(module, node)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def layers(module: GraphModule) -> list[Node]:
    """The convolutions and linears with parameters of their own, in the order they run."""
    return [n for n in module.graph.nodes if n.target in LAYERS and parameter(module, n.args[1]) is not None]


def root(parents: dict[Key, Key], key: Key) -> Key:
    """What stands for all that ``parents`` ties to ``key`` (union-find); a new key stands for itself."""
    while parents.setdefault(key, key) != key:
        key = parents[key]
    return key


def is_float(node: Node) -> bool:
    """Whether the node's value is a floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def products(module: GraphModule) -> list[Node]:
    """The products of two computed matrices, as attention has them."""
    multiplying = (node for node in module.graph.nodes if node.target in MATRIX_PRODUCTS)
    return [n for n in multiplying if all(a.op != "get_attr" and is_float(a) for a in n.args[:2])]


def attentions(module: GraphModule) -> list[Node]:
    """The attentions that ``split_attention`` takes apart.

    All operands are computed, and neither is the mask a flag nor are heads shared.
    """
    attending = (node for node in module.graph.nodes if node.target in ATTENTION)
    plain = (n for n in attending if not arguments(n)["is_causal"] and not arguments(n)["enable_gqa"])
    return [n for n in plain if all(isinstance(a, Node) and a.op != "get_attr" for a in n.args[:3])]


def split_attention(module: GraphModule) -> dict[str, str | None]:
    """Replace each of ``attentions`` by its two matrix products with a softmax between them.

    Of the new values, by name and in order, the name of the one that has their range, and ``None`` for shares, which
    are from 0 to 1. Source: torch's documentation of ``scaled_dot_product_attention``.
    """
    operands: dict[str, str | None] = {}
    for node in attentions(module):
        operands |= _split(module, node)
    module.recompile()
    return operands


def _split(module: GraphModule, node: Node) -> dict[str, str | None]:
    args = arguments(node)
    query, key, mask = args["query"], args["key"], args["attn_mask"]
    scale = query.meta["val"].shape[-1] ** -0.5 if args["scale"] is None else args["scale"]

    def call(name: str, target: Any, *given: Any) -> Node:
        with module.graph.inserting_before(node):
            made = module.graph.create_node("call_function", target, given, name=f"{node.name}_{name}")
        value = target(*map_arg(given, lambda argument: argument.meta["val"]))
        made.meta = {**node.meta, "val": value, PART_OF: node.name}
        return made

    keys = call("keys", aten.transpose.int, key, -2, -1)
    scores = call("scaled", aten.mul.Tensor, call("scores", aten.matmul.default, query, keys), scale)
    if mask is not None and not is_float(mask):
        left_out = call("left_out", aten.logical_not.default, mask)
        # The least number and not -inf, or rows without any place left would be NaN.
        scores = call("masked", aten.masked_fill.Scalar, scores, left_out, torch.finfo(scores.meta["val"].dtype).min)
    elif mask is not None:
        scores = call("masked", aten.add.Tensor, scores, mask)
    shares = call("shares", aten.softmax.int, scores, -1)
    mixed = call("mixed", aten.matmul.default, shares, args["value"])
    node.replace_all_uses_with(mixed)
    module.graph.erase_node(node)
    return {keys.name: key.name, shares.name: None, mixed.name: node.name}


def weight(module: GraphModule, layer: Node) -> Tensor:
    """The layer's weight."""
    own = parameter(module, layer.args[1])
    assert own is not None
    return own


def bias(module: GraphModule, layer: Node) -> Tensor:
    """The layer's bias; zeros are added to the graph where there was none."""
    own = parameter(module, arguments(layer)["bias"])
    if own is not None:
        return own
    w = weight(module, layer)
    added = torch.zeros(w.shape[output_axis(layer)] * (group_count(layer) if layer.target in TRANSPOSED else 1))
    _set_bias(module, layer, added)
    return bias(module, layer)


def group_count(layer: Node) -> int:
    """Groups of a convolution; 1 for a linear."""
    return int(arguments(layer).get("groups", 1))


def output_axis(layer: Node) -> int:
    """The axis of the weight that counts output channels."""
    return 1 if layer.target in TRANSPOSED else 0


def channel_axis(value: Tensor, layer: Node) -> int:
    """The axis of a layer's input or output that counts channels."""
    return value.dim() - 1 if layer.target in LINEARS else 1


def along(channels: Tensor, value: Tensor, axis: int) -> Tensor:
    """One number a channel in a shape that goes with ``value``, whose ``axis`` counts channels."""
    return channels.view([-1 if dim == axis else 1 for dim in range(value.dim())])


def sizes_of(sizes: Sequence[int] | int, rank: int) -> tuple[int, ...]:
    """One size for each spatial dimension; ATen takes a single one for all."""
    listed = [sizes] if isinstance(sizes, int) else list(sizes)
    return tuple(listed) * rank if len(listed) == 1 else tuple(listed)


def layer_name(node: Node) -> str:
    """The user's name of the module that the node came from, e.g. ``layer1.0.conv1``; else the node's own name.

    The parts of an attention have its name.
    """
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(entry[0]) for entry in reversed(list(stack.values()))), "")
    # ``source.export`` wraps the user's model as ``model``.
    return path.removeprefix("model").removeprefix(".") or str(node.meta.get(PART_OF, node.name))


def arguments(node: Node) -> dict[str, Any]:
    """The node's arguments by their names in the operator's schema, defaults included."""
    target: Any = node.target
    schema = target._schema.arguments
    given = dict(zip((argument.name for argument in schema), node.args, strict=False))
    return {argument.name: argument.default_value for argument in schema} | given | dict(node.kwargs)


def parameter(module: GraphModule, node: Any) -> Tensor | None:
    """The tensor that a ``get_attr`` node reads; ``None`` for anything else."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, Tensor) else None


def transposed(module: GraphModule, value: Any) -> Tensor | None:
    """The transpose of a constant matrix; not a second one where it is already the transpose of one."""
    if isinstance(value, Node) and value.target in TRANSPOSES and value.args[1:] in ((), (0, 1), (1, 0), ([1, 0],)):
        return parameter(module, value.args[0])
    matrix = parameter(module, value)
    return None if matrix is None or matrix.dim() != 2 else matrix.t()


Step = Callable[[Node, tuple[Any, ...], dict[str, Any]], Any]


def execute(module: GraphModule, inputs: Sequence[Any], step: Step) -> tuple[Any, ...]:
    """Run the graph node by node and return its outputs; ``step(node, args, kwargs)`` computes each call.

    Values are dropped after their last use, as eager PyTorch would.
    """
    last_use = {used: node for node in module.graph.nodes for used in node.all_input_nodes}
    dead: dict[Node, list[Node]] = {}
    for used, node in last_use.items():
        dead.setdefault(node, []).append(used)
    values: dict[Node, Any] = {}
    given = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = step(node, (next(given),), {})
        elif node.op == "get_attr":
            values[node] = parameter(module, node)
        elif node.op == "output":
            return tuple(map_arg(node.args[0], values.__getitem__))
        else:
            args = map_arg(node.args, values.__getitem__)
            values[node] = step(node, args, map_arg(node.kwargs, values.__getitem__))
        for used in dead.get(node, ()):
            del values[used]
    raise AssertionError("a graph ends with its output")


def compute(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The ``step`` that only runs the node."""
    if node.op == "placeholder":
        return args[0]
    target: Any = node.target
    return target(*args, **kwargs)


def _mutates(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _to_linear(module: GraphModule, node: Node) -> None:
    args = arguments(node)
    if node.target is aten.addmm.default:
        given, matrix, added = args["mat1"], transposed(module, args["mat2"]), args["self"]
        own = parameter(module, added)
        plain = args["beta"] == args["alpha"] == 1 and own is not None
        if not plain or matrix is None or own is None or own.shape != matrix.shape[:1]:
            return
    else:
        given, added = args["self"], None
        matrix = transposed(module, args["other" if node.target is aten.matmul.default else "mat2"])
    if matrix is None or matrix.dim() != 2 or parameter(module, given) is not None:
        return
    read = _attribute(module, node, f"{node.name}_matrix", matrix.detach().clone(memory_format=torch.contiguous_format))
    with module.graph.inserting_before(node):
        linear = module.graph.call_function(aten.linear.default, (given, read, added))
    linear.meta = node.meta
    node.replace_all_uses_with(linear)
    module.graph.erase_node(node)


def compute_constants(module: GraphModule) -> None:
    """Put values in place of layers whose inputs are the same in each call, and of weights and biases that are."""
    values: dict[Node, Any] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and (value := parameter(module, node)) is not None:
            values[node] = value.detach()
        elif _is_pure(node) and node.all_input_nodes and all(used in values for used in node.all_input_nodes):
            with torch.no_grad():
                values[node] = compute(node, *(map_arg(part, values.__getitem__) for part in (node.args, node.kwargs)))
            if node.target in LAYERS:
                read = _attribute(module, node, f"{node.name}_constant", values[node])
                read.meta = node.meta
                node.replace_all_uses_with(read)
                values[read] = values[node]
        elif node.target in LAYERS:
            for place, kind in ((1, "weight"), (2, "bias")):
                used = node.args[place] if len(node.args) > place else None
                if isinstance(used, Node) and used in values and used.op != "get_attr":
                    read = _attribute(module, node, f"{node.name}_computed_{kind}", values[used])
                    node.update_arg(place, read)
                    values[read] = values[used]


def _is_pure(node: Node) -> bool:
    if node.target is operator.getitem:
        return True
    return node.op == "call_function" and isinstance(node.target, OpOverload) and not (_mutates(node) or _draws(node))


def _draws(node: Node) -> bool:
    """Whether the operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in node.target.tags  # type: ignore[union-attr]


def _own_parameters(module: GraphModule, layer: Node) -> None:
    names = arguments(layer)
    own = weight(module, layer).detach().clone()
    added = parameter(module, names["bias"])
    layer.update_arg(1, _attribute(module, layer, f"{layer.name}_weight", own))
    if added is not None:
        _set_bias(module, layer, added.detach().clone())


def _set_bias(module: GraphModule, layer: Node, value: Tensor) -> None:
    node = _attribute(module, layer, f"{layer.name}_bias", value)
    layer.args = (*layer.args[:2], node, *layer.args[3:])


def _attribute(module: GraphModule, before: Node, name: str, value: Tensor) -> Node:
    module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    with module.graph.inserting_before(before):
        return module.graph.get_attr(name)


def _fold(module: GraphModule, norm: Node) -> None:
    """Fold the batch norm into the convolution before it, if that has no other user."""
    args = arguments(norm)
    layer: Any = norm.args[0]
    names = ("running_mean", "running_var", "weight", "bias")
    mean, var, scale, shift = (parameter(module, args[name]) for name in names)
    foldable = isinstance(layer, Node) and layer.target in (*CONVOLUTIONS, *TRANSPOSED) and len(layer.users) == 1
    if not foldable or mean is None or var is None or args.get("training") or parameter(module, layer.args[1]) is None:
        return
    own, added = weight(module, layer), bias(module, layer)
    factors = torch.rsqrt(var.detach() + args["eps"]) * (1 if scale is None else scale.detach())
    # Output channels: the first axis, or within each group the second one of a transposed convolution.
    groups = group_count(layer) if layer.target in TRANSPOSED else own.shape[0]
    grouped = own.view(groups, -1, own.shape[1], *own.shape[2:]) if layer.target in TRANSPOSED else own.unsqueeze(1)
    grouped.mul_(factors.view(groups, 1, -1, *[1] * (grouped.dim() - 3)))
    added.sub_(mean.detach()).mul_(factors).add_(0 if shift is None else shift.detach())
    users = norm.replace_all_uses_with(layer)
    for user in users:  # a batch norm that returns a tuple is read through getitem
        if norm.target is NORMS[1] and user.target is operator.getitem:
            user.replace_all_uses_with(layer)
            module.graph.erase_node(user)
    module.graph.erase_node(norm)
