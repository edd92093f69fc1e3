"""The table of engines, their offers, chunks, quiet, and the fake."""

import dataclasses
import logging
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corewise.common.errors import EngineError
from corewise.engines import BuildInputs, engine
from corewise.engines.base import chunks, missing, mixes_rows
from corewise.engines.fake import Fake
from corewise.engines.libraries import quiet
from corewise.machine import inspect as cpu
from corewise.records.build import Build, Plan, TensorSpec
from corewise.records.cpu import Cpu
from corewise.samples import from_python

CONVOLUTIONS = {"aten.conv2d.default": 53, "aten.linear.default": 1}
LINEARS = {"aten.linear.default": 37, "aten.embedding.default": 3}
OURS = "quantizer=corewise"


def cpu_with(*isa: str) -> Cpu:
    return dataclasses.replace(cpu.inspect_cpu(), isa=isa)


@pytest.fixture
def material(tmp_path: Path) -> BuildInputs:
    return BuildInputs(
        program=tmp_path / "no.pt2",
        inputs=(TensorSpec(name="x", dtype="float32", shape=(None, 3, 4)),),
        outputs=(
            TensorSpec(name="scores", dtype="float32", shape=(None, 10)),
            TensorSpec(name="tokens", dtype="float32", shape=(None, None, 5)),
        ),
        operators=CONVOLUTIONS,
        calibration=from_python([np.zeros((3, 4), np.float32)] * 2),
        cpu=cpu.inspect_cpu(),
        cache=tmp_path,
    )


def run_fake(material: BuildInputs, folder: Path, batch: np.ndarray, threads: int = 1, **options: float) -> np.ndarray:
    build = Build(engine="fake", precision="int8", options=tuple(sorted(options.items())))
    Fake().build(material, build, folder)
    return Fake().open(folder, build, Plan(threads_per_instance=threads)).run([batch])[0]


def test_engine_by_module_and_class() -> None:
    assert isinstance(engine("corewise.engines.fake:Fake"), Fake)
    assert isinstance(engine("fake"), Fake)


@pytest.mark.parametrize("name", ["tensorrt", "no.such.module:Engine", "corewise.engines.fake:Nothing"])
def test_unknown_engines_are_named(name: str) -> None:
    with pytest.raises(EngineError, match=name):
        engine(name)


def test_missing_names_packages_and_extra() -> None:
    assert missing(("numpy",), "openvino") == ""
    assert missing(("numpy", "no_such_package"), "openvino") == (
        "needs no_such_package: pip install 'corewise[openvino]'"
    )


def test_material_counts_operators(material: BuildInputs) -> None:
    assert material.count("conv|linear") == 54
    assert material.count("softmax") == 0


@given(st.integers(1, 100), st.sets(st.integers(1, 32), min_size=1, max_size=5))
def test_chunks_cover_all_rows_in_order(rows: int, sizes: set[int]) -> None:
    cuts = chunks(rows, sorted(sizes))
    assert [row for start, stop, _ in cuts for row in range(start, stop)] == list(range(rows))
    assert all(size in sizes and stop - start <= size for start, stop, size in cuts)


def test_chunks_pad_the_rest_to_the_smallest_size() -> None:
    assert chunks(11, [1, 2, 4]) == [(0, 4, 4), (4, 8, 4), (8, 11, 4)]
    assert chunks(9, [1, 2, 4]) == [(0, 4, 4), (4, 8, 4), (8, 9, 1)]


@pytest.mark.parametrize(
    ("isa", "expected"),
    [
        (("avx2",), [f"openvino/int8/{OURS}/reduce_range=True", "openvino/int8/reduce_range=True", "openvino/fp32"]),
        (("avx2", "avx_vnni"), [f"openvino/int8/{OURS}", "openvino/int8", "openvino/fp32"]),
        (
            ("avx512_vnni", "avx512_bf16"),
            [
                f"openvino/int8/{OURS}/rest=bf16",
                "openvino/int8/rest=bf16",
                f"openvino/int8/{OURS}",
                "openvino/int8",
                "openvino/bf16",
                "openvino/fp32",
            ],
        ),
    ],
)
def test_openvino_offers_what_the_cpu_can_do(isa: tuple[str, ...], expected: list[str]) -> None:
    builds = engine("openvino").candidates(cpu_with(*isa), CONVOLUTIONS)
    assert [build.label for build in builds] == expected


def test_openvino_is_offered_both_placements_for_residual_nets() -> None:
    builds = engine("openvino").candidates(cpu_with("avx2"), {**CONVOLUTIONS, "aten.add.Tensor": 3})
    assert [build.label for build in builds] == [
        f"openvino/int8/{OURS}/reduce_range=True",
        f"openvino/int8/placement=everywhere/{OURS}/reduce_range=True",
        "openvino/int8/reduce_range=True",
        "openvino/fp32",
    ]


@pytest.mark.parametrize(
    ("operators", "expected"),
    [
        (CONVOLUTIONS, ["int8", "fp32"]),
        (LINEARS, ["int8", "int8-dynamic", "fp32"]),
        ({"aten.relu.default": 1}, ["int8", "fp32"]),
    ],
)
def test_onnxruntime_offers_dynamic_int8_for_linear_models(operators: dict[str, int], expected: list[str]) -> None:
    builds = engine("onnxruntime").candidates(cpu_with("avx512_vnni"), operators)
    assert [build.label for build in builds] == [f"onnxruntime/{one}" for one in (f"int8/{OURS}", *expected)]


@pytest.mark.parametrize(
    ("isa", "operators", "rests"),
    [
        (("avx512_vnni",), LINEARS, ["fp32"]),
        (("avx512_vnni", "avx512_bf16"), LINEARS, ["bf16"]),
        (("amx_int8", "amx_bf16"), LINEARS, ["fp32"]),
        (("avx2",), LINEARS, []),
        (("avx512_vnni",), CONVOLUTIONS, []),
    ],
)
def test_openvino_offers_dynamic_int8_for_linear_models_where_it_runs_in_int8(
    isa: tuple[str, ...], operators: dict[str, int], rests: list[str]
) -> None:
    builds = engine("openvino").candidates(cpu_with(*isa), operators)
    dynamic = Build(engine="openvino", precision="int8-dynamic")
    assert [build.quantization.rest for build in builds if build.precision == "int8-dynamic"] == rests
    assert engine("openvino").needs(dynamic) == ("int8_dot",)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_full_range_int8_needs_32_bit_sums(name: str) -> None:
    made = engine(name)
    assert made.needs(Build(engine=name, precision="int8")) == ("int8_dot",)
    assert made.needs(Build(engine=name, precision="int8", options=(("reduce_range", True),))) == ()
    assert made.needs(Build(engine=name, precision="fp32")) == ()


def test_instances_of_onnxruntime_need_a_folder_for_a_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    plan = Plan(threads_per_instance=1, instances=2)
    with pytest.raises(EngineError, match=r"its weights through temporary files: FileNotFoundError: .*; set TMPDIR"):
        engine("onnxruntime").open(tmp_path, Build(engine="onnxruntime", precision="fp32"), plan)


def test_onnxruntime_refuses_what_no_onnx_file_holds(material: BuildInputs, tmp_path: Path) -> None:
    with material.program.open("wb") as file:
        file.truncate(2**31)  # sparse: takes no space
    with pytest.raises(EngineError, match="over 2 GB"):
        engine("onnxruntime").build(material, Build(engine="onnxruntime", precision="fp32"), tmp_path)


def test_quiet_keeps_everything_off_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet():
        print("progress")
        warnings.warn("opset", stacklevel=1)
        logging.warning("please consider")
    assert capsys.readouterr() == ("", "")


def test_quiet_leaves_logging_as_it_was() -> None:
    handlers, disabled = list(logging.getLogger().handlers), logging.root.manager.disable
    with pytest.raises(KeyError), quiet():
        raise KeyError("passes through")
    assert (logging.getLogger().handlers, logging.root.manager.disable) == (handlers, disabled)


def test_fake_depends_on_its_input_row_by_row(material: BuildInputs, tmp_path: Path) -> None:
    batch = np.random.default_rng(0).standard_normal((6, 3, 4), np.float32)
    together = run_fake(material, tmp_path, batch)
    assert together.shape == (6, 10)
    assert together.dtype == np.float32
    assert np.allclose(together[2:3], run_fake(material, tmp_path, batch[2:3]), atol=1e-6)
    assert len(np.unique(together)) == together.size


def test_fake_has_the_error_it_declares(material: BuildInputs, tmp_path: Path) -> None:
    batch = np.random.default_rng(0).standard_normal((200, 3, 4), np.float32)
    exact, noisy = (run_fake(material, tmp_path, batch, noise=noise) for noise in (0.0, 0.1))
    sqnr_db = 10 * np.log10(np.square(exact).sum() / np.square(noisy - exact).sum())
    assert sqnr_db == pytest.approx(20, abs=2)


@pytest.mark.parametrize(
    ("threads", "batch", "expected_s"),
    [(1, 1, 0.5 + 0.2), (1, 4, 0.5 + 0.8), (2, 4, 0.5 + 0.8 * (0.25 + 0.375)), (4, 4, 0.5 + 0.8 * (0.25 + 0.1875))],
)
def test_fake_takes_the_time_it_declares(
    material: BuildInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, batch: int, expected_s: float
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    options = {"seconds_per_call": 0.5, "seconds_per_item": 0.2, "serial": 0.25}
    run_fake(material, tmp_path, np.zeros((batch, 3, 4), np.float32), threads, **options)
    assert slept == [pytest.approx(expected_s)]


def test_int8_with_the_rest_in_bf16_needs_both() -> None:
    offered = engine("openvino").candidates(cpu_with("avx512_vnni", "avx512_bf16"), LINEARS)
    mixed = [build for build in offered if build.quantization.rest == "bf16"]
    assert [build.precision for build in mixed] == ["int8", "int8", "int8-dynamic"]
    for build in mixed:
        assert engine("openvino").needs(build) == ("int8_dot", "bf16")


@pytest.mark.parametrize(
    ("name", "mixing"), [("onnxruntime", True), ("torch-int8", True), ("openvino", False), ("fake", False)]
)
def test_only_dynamic_int8_with_one_scale_for_a_batch_mixes_rows(name: str, mixing: bool) -> None:
    assert mixes_rows(engine(name), Build(engine=name, precision="int8-dynamic")) == mixing
    assert not mixes_rows(engine(name), Build(engine=name, precision="int8"))


def test_eager_chooses_the_memory_format_of_a_fixed_batch_in_calls_of_that_batch(tmp_path: Path) -> None:
    import torch

    from corewise.engines.eager import Eager
    from corewise.source import save_program

    program = torch.export.export(torch.nn.Conv2d(3, 4, 3).eval(), (torch.zeros(1, 3, 8, 8),))
    save_program(program, tmp_path / "program.pt2")
    spec = TensorSpec(name="x", dtype="float32", shape=(None, 3, 8, 8))
    inputs = BuildInputs(
        program=tmp_path / "program.pt2",
        inputs=(spec,),
        outputs=(spec,),
        operators={},
        calibration=from_python([np.zeros((3, 8, 8), np.float32)] * 6),
        cpu=cpu.inspect_cpu(),
        cache=tmp_path,
    )
    (tmp_path / "payload").mkdir()
    (note,) = Eager().build(inputs, Build(engine="eager", precision="fp32").with_fixed_batch(1), tmp_path / "payload")
    assert "at batch 1" in note
