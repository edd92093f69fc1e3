"""A calibrated graph as a program with Q/DQ pairs: torchao's PT2E flow with a quantizer that follows our placement."""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from corewise.quantize.graph import output_axis
from corewise.quantize.observers import LEVELS, QParams
from corewise.quantize.placement import Placement
from corewise.records.build import TensorSpec


@contextmanager
def _unheard() -> Iterator[None]:
    """Without warnings and without log messages below an error."""
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# torchao reports CUDA libraries that do not fit, and torch what torchao does. Importing it registers its operators.
logging.getLogger("torchao").setLevel(logging.ERROR)
with _unheard():
    from torchao.quantization.pt2e import PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import (
        FixedQParamsQuantizationSpec,
        QuantizationAnnotation,
        QuantizationSpec,
        Quantizer,
    )


class PerChannelGivenScales(PerChannelMinMaxObserver):  # type: ignore[misc]
    """A torchao observer of weights whose scales are known already: corrections round weights to them.

    Its name starts as it does because torchao passes the channel axis to such observers only.
    """

    def __init__(self, *, scales: Tensor, **options: Any) -> None:
        super().__init__(**options)
        self.scales = scales

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The scales given, and zero points of 0."""
        return self.scales, torch.zeros(len(self.scales), dtype=torch.int64)


class PlacementQuantizer(Quantizer):  # type: ignore[misc]
    """torchao's ``Quantizer`` protocol for a ``Placement``: u8 values by ``ranges``, s8 weights by ``scales``."""

    def __init__(
        self, placement: Placement, ranges: Mapping[str, QParams], scales: Mapping[str, Tensor], bits: int
    ) -> None:
        self._placement, self._ranges, self._scales, self._bits = placement, ranges, scales, bits

    def annotate(self, model: GraphModule) -> GraphModule:
        """Say for each consumer which of its inputs it reads rounded."""
        nodes = {node.name: node for node in model.graph.nodes}
        specs: dict[str, dict[Any, Any]] = {}
        for producer, consumer in self._placement.edges:
            q = self._ranges[producer]
            specs.setdefault(consumer, {})[nodes[producer]] = FixedQParamsQuantizationSpec(
                dtype=torch.uint8,
                scale=q.scale,
                zero_point=q.zero_point,
                quant_min=0,
                quant_max=LEVELS,
                qscheme=torch.per_tensor_affine,
            )
        for layer in self._placement.layers:
            node = nodes[layer.node]
            top = 2 ** (self._bits - 1)
            specs[layer.node][node.args[1]] = QuantizationSpec(
                dtype=torch.int8,
                observer_or_fake_quant_ctr=PerChannelGivenScales.with_args(scales=self._scales[layer.node]),
                quant_min=-top,
                quant_max=top - 1,
                qscheme=torch.per_channel_symmetric,
                ch_axis=output_axis(node),
            )
        for name, inputs in specs.items():
            nodes[name].meta["quantization_annotation"] = QuantizationAnnotation(
                input_qspec_map=inputs, _annotated=True
            )
        return model

    def validate(self, model: GraphModule) -> None:
        """Every placement is valid for our engines."""


def with_qdq(
    module: GraphModule,
    placement: Placement,
    ranges: Mapping[str, QParams],
    scales: Mapping[str, Tensor],
    bits: int,
    inputs: Sequence[TensorSpec],
    example: Sequence[Tensor],
) -> ExportedProgram:
    """The module as a program with Q/DQ pairs and int8 weights; the dimensions that ``inputs`` leaves open stay so."""
    with _unheard(), torch.no_grad():
        prepared = prepare_pt2e(module, PlacementQuantizer(placement, ranges, scales, bits))
        converted = convert_pt2e(prepared)
        batch = Dim("batch", min=1)
        dims = tuple(
            {k: Dim.DYNAMIC if k else batch for k, size in enumerate(spec.shape) if size is None} for spec in inputs
        )
        program = torch.export.export(converted, tuple(example), dynamic_shapes=dims, strict=False)
    program.example_inputs = None
    return program
