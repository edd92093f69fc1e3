"""Linear layers whose rows int8 rounds too coarsely, and their way back to floating point.

One scale rounds all rows of a layer's input. Some layers of transformers, such as the second one of the first MLP, give
a few tokens values that are a hundred times as large as all others (Sun et al., Massive activations in large language
models, 2024), and little is left of the other tokens. Over all values together the error is small there, so each row
counts by its own. In MiniLM one layer of 36 is such a layer: without it in int8 the mean cosine of its vectors to
fp32's rose from 0.9980 to 0.9984 (STS-B).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from corewise.engines.libraries import import_openvino

COARSE = 0.08
"""The error of a layer's typical row, as a share of the row, from which on the layer stays in floating point."""
MOST = 0.1
"""The share of the layers that may, or one of fewer; the worst ones do."""
LAYERS_AT_ONCE = 16
"""Layers whose inputs and outputs are in memory together."""
PASSED = ("FakeQuantize", "Multiply")
"""What NNCF puts before a layer: the rounding, and the smoothing of channels."""
SMOOTHING = "nncf_smooth_quant"


class _Layer(NamedTuple):
    """A quantized layer, and its weights before."""

    op: Any
    weights: np.ndarray
    """(columns of the input, columns of the output)."""

    @property
    def before(self) -> Any:
        """The input as it comes, before it is smoothed and rounded."""
        source = self.op.input_value(0)
        while _is_passed(source.get_node()):
            source = source.get_node().input_value(0)
        return source


def restore_coarse_layers(model: Any, original: Any, rows: Sequence[Sequence[np.ndarray]]) -> None:
    """Let the layers of a quantized model that round typical rows too coarsely run in floating point.

    Args:
        model: What NNCF made of ``original``, for a batch of one; it is changed.
        original: The model before, whose operations have the same names.
        rows: Inputs, (1, ...) each.
    """
    constant = import_openvino().opset13.constant
    named = {op.get_friendly_name(): op for op in original.get_ops()}
    layers = [
        _Layer(op, _weights(named[op.get_friendly_name()]))
        for op in model.get_ordered_ops()
        if _is_linear(named.get(op.get_friendly_name())) and op.input_value(0).get_node().get_type_name() in PASSED
    ]
    errors = [
        error
        for start in range(0, len(layers), LAYERS_AT_ONCE)
        for error in _errors(model, layers[start : start + LAYERS_AT_ONCE], rows)
    ]
    worst = sorted(range(len(layers)), key=lambda place: -errors[place])[: max(1, int(MOST * len(layers)))]
    coarse = [layers[place] for place in worst if errors[place] > COARSE]
    for layer in coarse:
        transposed = layer.op.get_attributes()["transpose_b"]
        weights = np.ascontiguousarray(layer.weights.T if transposed else layer.weights)
        layer.op.input(0).replace_source_output(layer.before)
        layer.op.input(1).replace_source_output(constant(weights).output(0))
        for bias in _biases(layer.op):  # which NNCF has corrected for what rounding added
            before = next(_biases(named[layer.op.get_friendly_name()]), None)
            if before is not None:
                bias.replace_source_output(constant(before.get_source_output().get_node().get_data()).output(0))
    model.validate_nodes_and_infer_types()


def _errors(model: Any, layers: Sequence[_Layer], rows: Iterable[Sequence[np.ndarray]]) -> list[float]:
    """The error of each layer's typical row: the root of the mean of all rows' squared relative errors."""
    openvino = import_openvino()
    outputs = [output for layer in layers for output in (layer.before, layer.op.output(0))]
    part = openvino.Model([openvino.opset13.result(output) for output in outputs], model.get_parameters())
    request = openvino.Core().compile_model(part, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    squares: list[list[float]] = [[] for _ in layers]
    for row in rows:
        found = request.infer(list(row))
        for number, layer in enumerate(layers):
            exact = found[2 * number] @ layer.weights
            error, power = (np.square(values).sum(-1) for values in (found[2 * number + 1] - exact, exact))
            squares[number] += (error[power > 0] / power[power > 0]).tolist()
    return [float(np.sqrt(np.mean(each))) if each else 0.0 for each in squares]


def _is_passed(op: Any) -> bool:
    kind = op.get_type_name()
    return kind == PASSED[0] or (kind == PASSED[1] and SMOOTHING in op.get_friendly_name())


def _is_linear(op: Any) -> bool:
    """Whether an operation of the model before multiplies rows with a matrix of weights."""
    if op is None or op.get_type_name() != "MatMul" or op.get_attributes()["transpose_a"]:
        return False
    weights = op.input_value(1).get_node()
    return weights.get_type_name() == "Constant" and len(weights.get_output_shape(0)) == 2


def _weights(op: Any) -> np.ndarray:
    found: np.ndarray = op.input_value(1).get_node().get_data()
    return found.T if op.get_attributes()["transpose_b"] else found


def _biases(op: Any) -> Iterator[Any]:
    """The inputs of the additions behind a layer that are constants."""
    for target in op.output(0).get_target_inputs():
        adding = target.get_node()
        if adding.get_type_name() == "Add":
            yield from (each for each in adding.inputs() if _is_constant(each))


def _is_constant(given: Any) -> bool:
    return bool(given.get_source_output().get_node().get_type_name() == "Constant")
