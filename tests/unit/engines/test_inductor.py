"""Inductor: its contract, what is compiled, how batches are cut, and machine code that answers as other engines do."""

import json
import os
import re
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compiled import keep, place
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from corewise.common.errors import EngineError
from corewise.engines import BuildInputs, Session, qdq
from corewise.engines.inductor import MANY, ONE, SETTINGS, Inductor, cuts, kernels
from corewise.machine import inspect as cpu
from corewise.records.build import Build, Plan
from corewise.records.cpu import Cpu
from corewise.samples import from_python
from corewise.source import export, save_program
from corewise.testing.engine_contract import Case, EngineContract, tiny_material

CONVOLUTIONS, LINEARS, NEITHER = {"aten.conv2d.default": 5}, {"aten.linear.default": 3}, {"aten.sin.default": 3}
CALLED = {
    "_qconv_pointwise_tensor": 2,
    "_qconv2d_pointwise_binary_tensor": 1,
    "_qlinear_pointwise_binary_tensor": 1,
    "_linear_pointwise": 1,
}
"""The kernels of ``Net`` without its head for a batch of 16."""
LEFT = {"_linear_pointwise": 1, "loop": 1}
ONE_THREAD = Plan(threads_per_instance=1, batch=MANY)
ACCURATE_DB = 20.0
SAME_PROGRAM_DB = 40.0
"""Of one quantized program on two engines: both round to the same grids, and rarely to the neighbour's value."""


class Net(nn.Module):
    """Images and features: three convolutions, the second depthwise, a residual add, two linears, a small one first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 16, 1)
        self.features = nn.Linear(5, 16)
        self.head = nn.Linear(16, 24)

    def forward(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.stem(x))
        x = x + self.pointwise(torch.relu(self.depthwise(x)))
        y = x.mean((2, 3)) + self.features(features)
        return self.head(y), y


def rows(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.uniform(-1, 1, (count, *shape)).astype(np.float32) for shape in ((3, 12, 12), (5,))]


def material(model: nn.Module, folder: Path) -> BuildInputs:
    folder.mkdir()
    calibration = from_python([(arrays, None) for arrays in zip(*rows(32), strict=True)])
    exported = export(model.eval(), calibration)
    assert exported.program is not None, exported.why_not
    save_program(exported.program, folder / "program.pt2")
    return BuildInputs(
        program=folder / "program.pt2",
        inputs=exported.inputs,
        outputs=exported.outputs,
        operators=dict(Counter(str(n.target) for n in exported.program.graph.nodes if n.op == "call_function")),
        calibration=calibration,
        cpu=cpu.inspect_cpu(),
        cache=folder,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Built:
    """A payload, and what it was made from."""

    model: nn.Module
    material: BuildInputs
    build: Build
    payload: Path
    notes: tuple[str, ...]
    littered: tuple[str, ...]
    """Files that building left in the working and the temporary directory."""

    def open(self, plan: Plan = ONE_THREAD) -> Session:
        return Inductor().open(self.payload, self.build, plan)

    def expected(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            return [tensor.numpy() for tensor in self.model(*map(torch.from_numpy, inputs))]


def compiled(model: nn.Module, given: BuildInputs, build: Build, folder: Path) -> Built:
    for name in ("payload", "cwd", "tmp"):
        (folder / name).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "cwd")
        patch.setenv("TMPDIR", str(folder / "tmp"))
        patch.setattr(tempfile, "tempdir", str(folder / "tmp"))
        notes = Inductor().build(given, build, folder / "payload")
    littered = tuple(str(path) for name in ("cwd", "tmp") for path in (folder / name).rglob("*"))
    return Built(model=model, material=given, build=build, payload=folder / "payload", notes=notes, littered=littered)


def build(precision: str) -> Build:
    """Of that precision for this CPU; skips where inductor cannot be used."""
    if (reason := Inductor().unavailable()) or not (offered := Inductor().candidates(cpu.inspect_cpu(), LINEARS)):
        pytest.skip(reason or "inductor offers nothing on this CPU")
    return replace(offered[0 if precision == "int8" else -1], precision=precision)


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """``Net`` in int8 but for its head."""
    wanted, folder = build("int8"), tmp_path_factory.mktemp("int8")
    wanted = replace(wanted, options=(("ignored", "head"), *wanted.options))
    torch.manual_seed(0)
    model = Net()
    return compiled(model, material(model, folder / "material"), wanted, folder)


@pytest.fixture(scope="module")
def cases() -> dict[tuple[str, Build], Case]:
    """What was compiled for the contract: each compilation takes long."""
    return {}


@pytest.fixture(scope="module")
def bf16(cases: dict[tuple[str, Build], Case], tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Texts of any length in bf16, which the compiler also writes for CPUs without it."""
    wanted, folder = build("bf16"), tmp_path_factory.mktemp("bf16")
    if (case := cases.get(("text", wanted))) is not None:
        return Built(
            model=case.exported.module,
            material=case.material,
            build=wanted,
            payload=case.payload,
            notes=case.notes,
            littered=case.littered,
        )
    exported, given = tiny_material("text", folder / "material")
    return compiled(exported.module, given, wanted, folder)


@pytest.fixture
def session(int8: Built) -> Iterator[Session]:
    session = int8.open()
    yield session
    session.close()


def sqnr_db(found: np.ndarray, expected: np.ndarray) -> float:
    noise = float(np.square(found - expected, dtype=np.float64).sum())
    return 200.0 if noise == 0 else 10 * float(np.log10(np.square(expected, dtype=np.float64).sum() / noise))


# --- the contract -------------------------------------------------------------------------------------------------


class TestInductor(EngineContract):
    engine_name = "inductor"

    @pytest.fixture(autouse=True)
    def kept(
        self,
        cases: dict[tuple[str, Build], Case],
        request: pytest.FixtureRequest,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> None:
        """Keep what took long to compile, for this file and for others."""
        if "case" in request.fixturenames:
            case: Case = request.getfixturevalue("case")
            net = "text" if len(case.material.inputs) > 1 else "images"
            cases[net, case.build] = case
            keep(case.payload, place(tmp_path_factory, net, case.build))


# --- batches ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(0, 20))
def test_cuts_cover_each_row_once(count: int, one_by_one: int) -> None:
    found = cuts(count, one_by_one)
    assert [row for start, stop, _ in found for row in range(start, stop)] == list(range(count))
    assert all(size in (ONE, MANY) and 0 < stop - start <= size for start, stop, size in found)


@given(st.integers(1, 200), st.integers(0, 20))
def test_no_other_cuts_take_less_time(count: int, one_by_one: int) -> None:
    cost = {ONE: 1.0, MANY: one_by_one + 0.5}
    found = sum(cost[size] for _, _, size in cuts(count, one_by_one))
    mixes = [many * cost[MANY] + max(0, count - many * MANY) for many in range(-(-count // MANY) + 1)]
    assert found == min(mixes)


@pytest.mark.parametrize("one_by_one", [0, 1, 5, MANY])
def test_any_batch_has_the_right_rows_however_it_is_cut(int8: Built, one_by_one: int, tmp_path: Path) -> None:
    payload = tmp_path / "payload"
    shutil.copytree(int8.payload, payload)
    settings = json.loads((payload / SETTINGS).read_text())
    (payload / SETTINGS).write_text(json.dumps({**settings, "one_by_one": one_by_one}))
    session = Inductor().open(payload, int8.build, ONE_THREAD)
    for batch in (1, 5, 16, 17, 33):
        inputs = rows(batch, seed=batch)
        for found, expected in zip(session.run(inputs), int8.expected(inputs), strict=True):
            assert found.shape == expected.shape
            assert min(map(sqnr_db, found, expected)) > ACCURATE_DB
    session.close()


# --- the payload --------------------------------------------------------------------------------------------------


def test_building_leaves_packages_and_settings_and_nothing_elsewhere(int8: Built, bf16: Built) -> None:
    assert sorted(path.name for path in int8.payload.iterdir()) == ["batch1.pt2", "batch16.pt2", SETTINGS]
    assert sorted(path.name for path in bf16.payload.iterdir()) == ["any.pt2", SETTINGS]
    assert int8.littered == bf16.littered == ()


def test_notes_tell_the_quantizers_decisions_and_the_batches(int8: Built, bf16: Built) -> None:
    assert "dB without corrections" in int8.notes[0]
    assert re.fullmatch(r"compiled for batches of 1 and 16 \(batch 1 [\d.]+ ms, batch 16 [\d.]+ ms\)", int8.notes[-1])
    assert int8.notes[-2] == "warning: only 3 of 4 quantized layers run in int8 at batch 1"
    assert bf16.notes == ()


def test_kernels_of_a_package_are_counted(int8: Built) -> None:
    assert kernels(int8.payload / f"batch{MANY}.pt2") == CALLED


def test_only_layers_count_among_the_calls_of_a_package(tmp_path: Path) -> None:
    calls = ["_qconv_pointwise_tensor", "bmm_out", "convolution", "addmm_out", "addmm_out", "_softmax"]
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as file:
        file.writestr("a/one.wrapper.cpp", "".join(f"AOTI_CHECK(aoti_torch_cpu_{call}(x, &y));\n" for call in calls))
        file.writestr("a/two.kernel.cpp", "CHECK(aoti_torch_cpu_mm_out(x));")
    assert kernels(tmp_path / "a.pt2") == {"_qconv_pointwise_tensor": 1, "addmm_out": 2, "convolution": 1}


def test_the_receipt_has_ignored_layers_in_fp32(int8: Built, tmp_path: Path) -> None:
    assert json.loads((int8.payload / SETTINGS).read_text())["one_by_one"] >= 1
    settings = {**json.loads((int8.payload / SETTINGS).read_text()), "one_by_one": 1}
    payload = shutil.copytree(int8.payload, tmp_path / "payload")
    (payload / SETTINGS).write_text(json.dumps(settings))
    found = Inductor().receipt(payload, int8.build, ONE_THREAD, rows(MANY))
    assert found is not None
    assert dict(found.kernels) == CALLED
    assert (found.layers, found.int8, found.fell_back) == (5, 4, ())


def test_the_receipt_has_small_linears_as_loops_where_the_batch_is_one(int8: Built) -> None:
    found = Inductor().receipt(int8.payload, int8.build, replace(ONE_THREAD, batch=1), rows(1))
    assert found is not None
    assert dict(found.kernels) == {"_qconv_pointwise_tensor": 2, "_qconv2d_pointwise_binary_tensor": 1, **LEFT}
    assert (found.layers, found.int8, len(found.fell_back)) == (5, 3, 1)


def test_other_precisions_have_no_receipt(bf16: Built) -> None:
    assert Inductor().receipt(bf16.payload, bf16.build, ONE_THREAD, []) is None


def test_closing_takes_back_what_loading_unpacked(int8: Built) -> None:
    def mapped() -> set[str]:
        return set(re.findall(r"/\S+\.wrapper\.so", Path("/proc/self/maps").read_text()))

    before, session = mapped(), int8.open()
    session.run(rows(17))
    unpacked = mapped() - before
    assert unpacked
    assert all(map(os.path.exists, unpacked))
    session.close()
    assert not any(map(os.path.exists, unpacked))


# --- answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_another_engine_answers_the_same_to_the_same_quantized_program(
    int8: Built, session: Session, name: str
) -> None:
    model, _ = qdq.onnx_model(int8.material, int8.build, "fused")
    inputs = rows(64, seed=1)
    if name == "openvino":
        import openvino

        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        theirs = list(openvino.Core().compile_model(str(model), "CPU", exact)(inputs).values())
    else:
        import onnxruntime

        running = onnxruntime.InferenceSession(str(model))
        theirs = running.run(None, dict(zip((put.name for put in running.get_inputs()), inputs, strict=True)))
    for ours, other in zip(session.run(inputs), theirs, strict=True):
        assert sqnr_db(ours, other) > SAME_PROGRAM_DB


def test_bf16_takes_and_gives_what_fp32_does(bf16: Built) -> None:
    session, rng = bf16.open(), np.random.default_rng(0)
    for batch, length in ((1, 3), (2, 9), (16, 1), (33, 4)):
        inputs = [rng.integers(0, 50, (batch, length)), rng.standard_normal((batch, 12), np.float32)]
        for found, expected in zip(session.run(inputs), bf16.expected(inputs), strict=True):
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert 30 < sqnr_db(found, expected) < 80
    session.close()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x, y: [x], "1 inputs instead of 2"),
        (lambda x, y: [x, y, y], "3 inputs instead of 2"),
        (lambda x, y: [x.astype(np.float64), y], r"float64 of shape \(4, 3, 12, 12\) instead of float32 of \(None, 3"),
        (lambda x, y: [x, y[:, :4]], r"shape \(4, 4\)"),
        (lambda x, y: [x[:, :, :, :11], y], r"shape \(4, 3, 12, 11\)"),
        (lambda x, y: [x[0], y], r"shape \(3, 12, 12\)"),
        (lambda x, y: [x[..., None], y], r"shape \(4, 3, 12, 12, 1\)"),
        (lambda x, y: [x, y[:3]], r"shape \(3, 5\)"),
        (lambda x, y: [x, np.float32(1).reshape(())], r"shape \(\)"),
        (lambda x, y: [x[:0], y[:0]], "at least one row"),
    ],
)
def test_wrong_inputs_are_refused(session: Session, change, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        session.run(change(*rows(4)))


# --- what is offered ----------------------------------------------------------------------------------------------

V3 = ("avx2", "fma", "f16c")
V4 = (*V3, "avx512")
AMX = (*V4, "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def cpu_with(*isa: str, architecture: str = "x86_64") -> Cpu:
    return replace(cpu.inspect_cpu(), architecture=architecture, isa=isa)


@pytest.mark.parametrize(
    ("isa", "labels"),
    [
        (V3, ["int8/isa=avx2/quantizer=corewise/reduce_range=True", "fp32/isa=avx2"]),
        ((*V3, "avx_vnni"), ["int8/isa=avx2/quantizer=corewise", "fp32/isa=avx2"]),
        (V4, ["int8/isa=avx512/quantizer=corewise/reduce_range=True", "fp32/isa=avx512"]),
        ((*V4, "avx512_vnni"), ["int8/isa=avx512_vnni/quantizer=corewise", "fp32/isa=avx512_vnni"]),
        (AMX, ["int8/isa=amx/quantizer=corewise", "bf16/isa=amx", "fp32/isa=amx"]),
        (("avx2",), []),
        ((), []),
    ],
)
def test_builds_are_for_what_the_cpu_has_and_need_no_more(isa: tuple[str, ...], labels: list[str]) -> None:
    here = cpu_with(*isa)
    special = {"int8_dot": here.int8_dot, "bf16": here.bf16}
    for operators in (CONVOLUTIONS, LINEARS):
        offered = Inductor().candidates(here, operators)
        assert [build.label for build in offered] == [f"inductor/{label}" for label in labels]
        assert all(special.get(name, here.has(name)) for build in offered for name in Inductor().needs(build))


def test_without_layers_there_is_no_int8() -> None:
    assert [build.precision for build in Inductor().candidates(cpu_with(*V3), NEITHER)] == ["fp32"]


def test_nothing_is_offered_on_arm() -> None:
    arm = cpu_with("neon", "dotprod", "i8mm", "bf16", "sve", "sve2", architecture="aarch64")
    assert Inductor().candidates(arm, CONVOLUTIONS) == ()


def test_needs_are_the_isa_and_what_the_precision_takes() -> None:
    def needs(precision: str, **options: str | bool) -> tuple[str, ...]:
        return Inductor().needs(Build(engine="inductor", precision=precision, options=tuple(options.items())))

    assert needs("fp32") == needs("int8", reduce_range=True) == V3
    assert needs("int8", isa="avx512") == (*V4, "int8_dot")
    assert needs("bf16", isa="amx") == (*AMX, "bf16")
    with pytest.raises(EngineError, match="for the isa 'sse2'; use one of avx2, avx512, avx512_vnni, amx"):
        needs("fp32", isa="sse2")


@pytest.mark.parametrize(
    ("isa", "wanted", "told"),
    [
        (V3, "avx512", "isa 'avx512' on this CPU; use avx2$"),
        (AMX, "avx512", "isa 'avx512' on this CPU; use avx2 or amx"),
        (V3, "sse2", "isa 'sse2' on this CPU"),
        ((), "avx2", "isa 'avx2' on this CPU; use another engine"),
    ],
)
def test_an_isa_that_cannot_be_compiled_for_is_refused(
    isa: tuple[str, ...], wanted: str, told: str, tmp_path: Path
) -> None:
    _, given = tiny_material("images", tmp_path / "material")
    with pytest.raises(EngineError, match=told):
        Inductor().build(
            replace(given, cpu=cpu_with(*isa)),
            Build(engine="inductor", precision="fp32", options=(("isa", wanted),)),
            tmp_path,
        )


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_without_a_compiler_it_is_unavailable_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Inductor().unavailable() == "needs the C++ compiler g++: apt-get install g++"


def test_a_program_that_cannot_be_compiled_is_told(tmp_path: Path) -> None:
    class Pair(nn.Module):
        """Takes no batch of one."""

        def forward(self, x: Tensor) -> Tensor:
            return x - x[1].mean()

    wanted, batch = build("fp32"), torch.export.Dim("batch", min=2)
    _, given = tiny_material("images", tmp_path / "material")
    program = torch.export.export(Pair(), (torch.zeros(4, 3, 20, 20),), dynamic_shapes=({0: batch},))
    save_program(program, tmp_path / "pair.pt2")
    payload = tmp_path / "payload"
    payload.mkdir()
    with pytest.raises(EngineError, match=r"inductor cannot compile this program: .*; use another engine"):
        Inductor().build(replace(given, program=tmp_path / "pair.pt2"), wanted, payload)
    assert list(payload.iterdir()) == []


def test_a_compiler_that_fails_is_told(
    int8: Built, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # After ``int8``: what a compiler can do for vectors is asked once a process, of one that works.
    broken, payload = tmp_path / "bin" / "g++", tmp_path / "payload"
    broken.parent.mkdir()
    payload.mkdir()
    broken.write_text("#!/bin/sh\necho out of memory >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(broken.parent))
    with pytest.raises(EngineError, match=r"inductor cannot compile this program: .*[Cc]ompile.*; use another engine"):
        Inductor().build(int8.material, build("fp32"), payload)
    assert list(payload.iterdir()) == []
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
