"""Biases of quantized layers in int32, as ONNX Runtime's int8 kernels take them."""

from pathlib import Path
from typing import Any

import numpy as np

LAYERS = ("Conv", "Gemm")
INT32_MAX = 2**31 - 1
BIAS_MAX = 2**30
"""Room for the kernel's sums: 2**30 / 255 / 128 = 32896 products."""


def quantize_biases(path: Path) -> int:
    """Store the float bias of each convolution and Gemm between Q/DQ pairs as int32; returns how many there were.

    The scale is the input's times the weight's, so that the bias is added to the kernel's sums as it is
    (ONNX, "QLinearConv"). A bias that would not fit stays in fp32. Rewrites the file.
    """
    import onnx

    model = onnx.load(path)
    graph = model.graph
    made = {name: node for node in graph.node for name in node.output}
    tensors = {tensor.name: tensor for tensor in graph.initializer}

    def scale(name: str) -> Any:
        node = made.get(name)
        tensor = tensors.get(node.input[1]) if node is not None and node.op_type == "DequantizeLinear" else None
        return None if tensor is None else onnx.numpy_helper.to_array(tensor)

    def widen(name: str, x_scale: Any, values: Any) -> None:
        """Give channels whose bias would not fit a coarser grid; next to that bias their weights are nothing."""
        quantized, scales = (tensors[tensor] for tensor in made[name].input[:2])
        steps, old = onnx.numpy_helper.to_array(quantized), onnx.numpy_helper.to_array(scales)
        new = np.maximum(old, (np.abs(values) / x_scale / BIAS_MAX).astype(np.float32))
        if old.ndim == 1 and len(old) == len(values) == len(steps) and (new > old).any():
            ratio = (old / new).reshape(-1, *[1] * (steps.ndim - 1))
            quantized.CopyFrom(onnx.numpy_helper.from_array(np.rint(steps * ratio).astype(np.int8), quantized.name))
            scales.CopyFrom(onnx.numpy_helper.from_array(new, scales.name))

    nodes, count = [], 0
    for node in graph.node:
        bias = tensors.get(node.input[2]) if node.op_type in LAYERS and len(node.input) > 2 else None
        scales = [step for name in node.input[:2] if bias is not None and (step := scale(name)) is not None]
        if bias is not None and bias.data_type == onnx.TensorProto.FLOAT and len(scales) == 2:
            widen(node.input[1], scales[0], onnx.numpy_helper.to_array(bias))
            scales[1] = scale(node.input[1])
            product = (scales[0] * scales[1]).astype(np.float32).reshape(-1)
            values = onnx.numpy_helper.to_array(bias)
            steps = np.rint(values.astype(np.float64) / product)
            if len(product) in (1, len(values)) and np.abs(steps).max(initial=0) <= INT32_MAX:
                names = [f"{node.name}_bias_{part}" for part in ("int32", "scale", "zero_point", "dequantized")]
                zeros = np.zeros(len(product), np.int32)
                for name, array in zip(names, (steps.astype(np.int32), product, zeros), strict=False):
                    graph.initializer.append(onnx.numpy_helper.from_array(array, name))
                nodes.append(onnx.helper.make_node("DequantizeLinear", names[:3], names[3:], axis=0, name=names[3]))
                node.input[2] = names[3]
                count += 1
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    onnx.save(model, path)
    return count
