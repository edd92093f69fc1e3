"""Builds and plans: labels and the JSON form, which folders, journals and artifacts depend on."""

from dataclasses import replace

import pytest

from corewise.engines import ENGINES, engine
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build, Plan, QuantizationOptions
from corewise.records.jsonable import from_json, to_json

OPERATORS = {
    "aten.conv2d.default": 3,
    "aten.add.Tensor": 1,
    "aten.linear.default": 4,
    "aten.scaled_dot_product_attention.default": 1,
}
AVX2 = ("avx2", "fma", "f16c")
AVX512_BF16 = (*AVX2, "avx512", "avx512_vnni", "avx512_bf16")
LABELS = {
    AVX2: """
        eager/fp32
        torch-int8/int8/reduce_range=True
        torch-int8/int8-dynamic
        openvino/int8/quantizer=corewise/reduce_range=True
        openvino/int8/placement=everywhere/quantizer=corewise/reduce_range=True
        openvino/int8/reduce_range=True
        openvino/fp32
        inductor/int8/isa=avx2/quantizer=corewise/reduce_range=True
        inductor/fp32/isa=avx2
        onnxruntime/int8/quantizer=corewise/reduce_range=True
        onnxruntime/int8/quantizer=corewise/reduce_range=True/attention=True
        onnxruntime/int8/reduce_range=True
        onnxruntime/int8-dynamic/reduce_range=True
        onnxruntime/fp32
    """,
    AVX512_BF16: """
        eager/fp32
        eager/bf16
        torch-int8/int8
        torch-int8/int8-dynamic
        openvino/int8/quantizer=corewise/rest=bf16
        openvino/int8/rest=bf16
        openvino/int8-dynamic/rest=bf16
        openvino/int8/quantizer=corewise
        openvino/int8/placement=everywhere/quantizer=corewise
        openvino/int8
        openvino/bf16
        openvino/fp32
        inductor/int8/isa=avx512_vnni/quantizer=corewise
        inductor/bf16/isa=avx512_vnni
        inductor/fp32/isa=avx512_vnni
        onnxruntime/int8/quantizer=corewise
        onnxruntime/int8/quantizer=corewise/attention=True
        onnxruntime/int8
        onnxruntime/int8-dynamic
        onnxruntime/fp32
    """,
}
"""The labels of all candidates on two kinds of CPU. Runs, journals and artifacts have them on disk."""
EVERYTHING = QuantizationOptions(
    quantizer="corewise",
    reduce_range=True,
    rung=2,
    placement="everywhere",
    attention=True,
    ignored_layers=("head", r"layers\.0\..*"),
    reverted_layers=4,
    rest="bf16",
)


@pytest.mark.parametrize("isa", LABELS)
def test_labels_of_candidates_stay(isa: tuple[str, ...]) -> None:
    cpu = replace(inspect_cpu(), isa=isa)
    labels = [build.label for name in ENGINES for build in engine(name).candidates(cpu, OPERATORS)]
    assert labels == LABELS[isa].split()


def test_options_are_pairs_in_the_json_form() -> None:
    build = Build(engine="inductor", precision="int8", options=(("isa", "avx2"),)).with_quantization(EVERYTHING)
    assert to_json(build) == {
        "engine": "inductor",
        "precision": "int8",
        "options": [
            ["attention", True],
            ["ignored", r"head layers\.0\..*"],
            ["isa", "avx2"],
            ["placement", "everywhere"],
            ["quantizer", "corewise"],
            ["reduce_range", True],
            ["rest", "bf16"],
            ["returned", 4],
            ["rung", 2],
        ],
    }
    assert from_json(Build, to_json(build)) == build


@pytest.mark.parametrize("options", [QuantizationOptions(), EVERYTHING, QuantizationOptions(rung=0)])
def test_a_build_has_the_options_that_it_was_given(options: QuantizationOptions) -> None:
    plain = Build(engine="torch-int8", precision="int8", options=(("backend", "onednn"),))
    build = plain.with_quantization(options)
    assert build.quantization == options
    assert build.option("backend", "") == "onednn"
    assert build.with_quantization(QuantizationOptions()) == plain


def test_one_thread_is_not_threads() -> None:
    assert Plan(threads_per_instance=1, instances=2, batch=8).label == "1 thread x 2, batch 8"
    assert Plan(threads_per_instance=2, batch=16).label == "2 threads x 1, batch 16"
