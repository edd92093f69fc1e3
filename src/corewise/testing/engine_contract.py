"""What every engine must do, as tests: subclass ``EngineContract``, name the engine, run pytest.

    class TestMine(EngineContract):
        engine_name = "my.module:MyEngine"

Each of the engine's candidates for this CPU is built for two tiny networks and held against the network itself.
Needs torch and pytest.
"""

import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from corewise.engines.base import BuildInputs, Engine, PixelScale, PixelTaking, Session, engine, mixes_rows
from corewise.machine import inspect as cpu
from corewise.records.build import Build, Plan, Receipt
from corewise.records.jsonable import from_json, to_json
from corewise.samples import from_python

if TYPE_CHECKING:
    from torch import nn

    from corewise.source import Exported

PLAN = Plan(threads_per_instance=2, batch=4)
NETS = {"images": {"aten.conv2d.default": 3, "aten.linear.default": 1}, "text": {"aten.linear.default": 3}}
"""The networks, and which of their operators decide about candidates."""
CONSISTENT_DB = {"fp32": 80.0, "bf16": 30.0, "int8": 30.0, "int8-dynamic": 20.0}
"""SQNR of a batch against its rows alone: the order of sums and dynamic ranges depend on the batch."""
UNMIXED_DB = {"fp32": 80.0, "bf16": 30.0, "int8": 30.0, "int8-dynamic": 30.0}
"""SQNR of a row beside others against the row alone."""
ACCURATE_DB = {"fp32": 80.0, "bf16": 30.0, "int8": 15.0, "int8-dynamic": 15.0}
"""SQNR against the network in fp32; 80 dB is a relative error of 1e-4."""
TORCHSCRIPT_PICKLES = {"data.pkl", "constants.pkl"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A build of one network: the engine, its payload and what the network answers."""

    engine: Engine
    build: Build
    material: BuildInputs
    exported: "Exported"
    payload: Path
    notes: tuple[str, ...]
    littered: tuple[str, ...]
    """Files that building left in the working directory."""

    def open(self) -> Session:
        """The payload under ``PLAN``."""
        return self.engine.open(self.payload, self.build, PLAN)

    def inputs(self, batch: int, seed: int = 0) -> list[np.ndarray]:
        """``batch`` new samples of one shape, like the calibration's first."""
        rng = np.random.default_rng((batch, seed))
        return [_random(rng, array.dtype, (batch, *array.shape)) for array in self.material.calibration.rows[0]]

    def expected(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """What the network answers."""
        import torch

        with torch.no_grad():
            return [tensor.numpy() for tensor in self.exported.module(*map(torch.from_numpy, inputs))]


class EngineContract:
    """The tests. ``engine_name`` is the engine's name in ``ENGINES`` or its ``module:class``."""

    engine_name = ""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One case for each network and candidate, built once."""
        if "case" not in metafunc.fixturenames:
            return
        made = engine(self.engine_name)
        if reason := made.unavailable():
            params = [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="unavailable")]
        else:
            here = cpu.inspect_cpu()
            params = [
                pytest.param((net, build), id=f"{net}-{build.label}")
                for net, operators in NETS.items()
                for build in made.candidates(here, operators)
            ]
        metafunc.parametrize("case", params, indirect=True, scope="class")

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
        """The build, whose payload was moved after it was made."""
        net, build = request.param
        made, folder = engine(cls.engine_name), tmp_path_factory.mktemp("case")
        exported, material = tiny_material(net, tmp_path_factory.getbasetemp() / f"contract-{net}")
        material = replace(material, cache=material.cache / cls.__name__)
        material.cache.mkdir(exist_ok=True)
        elsewhere, payload = folder / "elsewhere", folder / "payload"
        elsewhere.mkdir()
        payload.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(elsewhere)
            notes = made.build(material, build, payload)
        return Case(
            engine=made,
            build=build,
            material=material,
            exported=exported,
            payload=Path(shutil.move(payload, folder / "moved")),
            notes=notes,
            littered=tuple(str(path) for path in elsewhere.rglob("*")),
        )

    @pytest.fixture
    def session(self, case: Case) -> Iterator[Session]:
        """A new session."""
        session = case.open()
        yield session
        session.close()

    def test_availability_is_told_in_words(self) -> None:
        """Empty, or a sentence."""
        assert engine(self.engine_name).unavailable(opening=True) in ("", engine(self.engine_name).unavailable())
        reason = engine(self.engine_name).unavailable()
        assert not reason or " " in reason

    def test_candidates_are_its_own_and_differ(self) -> None:
        """Builds of this engine, each with its own label; what they need is told in words."""
        made = engine(self.engine_name)
        for operators in NETS.values():
            builds = made.candidates(cpu.inspect_cpu(), operators)
            assert {build.engine for build in builds} <= {self.engine_name}
            assert len({build.label for build in builds}) == len(builds)
            assert all(isinstance(name, str) for build in builds for name in made.needs(build))

    def test_candidates_suit_this_cpu(self) -> None:
        """Nothing is offered that this CPU lacks."""
        made, here = engine(self.engine_name), cpu.inspect_cpu()
        special = {"int8_dot": here.int8_dot, "bf16": here.bf16}
        for operators in NETS.values():
            for build in made.candidates(here, operators):
                assert all(special.get(name, here.has(name)) for name in made.needs(build))

    def test_build_writes_its_payload_and_nothing_else(self, case: Case) -> None:
        """Files inside the folder; the program and the working directory stay as they were."""
        assert any(path.is_file() for path in case.payload.rglob("*"))
        assert not any(path.is_symlink() for path in case.payload.rglob("*"))
        assert case.littered == ()
        assert _digest(case.material.program) == case.material.program.with_suffix(".sha256").read_text()
        assert all(isinstance(note, str) and note for note in case.notes)

    def test_payload_holds_no_pickle(self, case: Case) -> None:
        """No pickle file, and none in an archive but TorchScript's, which is read without executing it."""
        for path in case.payload.rglob("*"):
            if not path.is_file():
                continue
            assert path.suffix not in (".pkl", ".pickle", ".pth"), path.name
            assert not _is_pickle(path.read_bytes()[:2]), path.name
            if zipfile.is_zipfile(path):
                assert not _pickles(path), path.name

    @pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 7])
    def test_batch_does_not_change_the_answers(self, case: Case, session: Session, batch: int) -> None:
        """Any batch, also beyond the plan's, gives the rows' own answers."""
        inputs = case.inputs(batch)
        together = session.run(inputs)
        alone = [session.run([array[row : row + 1] for array in inputs]) for row in range(batch)]
        rows = [np.concatenate(outputs) for outputs in zip(*alone, strict=True)]
        _assert_close(together, rows, CONSISTENT_DB[case.build.precision])

    def test_a_row_does_not_depend_on_its_neighbours(self, case: Case, session: Session) -> None:
        """A row beside one that is a hundred times as large has its own answer, unless the build ``mixes_rows``."""
        if mixes_rows(engine(case.build.engine), case.build):
            pytest.skip("the engine says that the rows of such builds depend on each other")
        inputs = case.inputs(2)
        alone = session.run([array[:1] for array in inputs])
        for array in inputs:
            if array.dtype.kind == "f":
                array[1] *= 100
        beside = [output[:1] for output in session.run(inputs)]
        _assert_close(beside, alone, UNMIXED_DB[case.build.precision])

    def test_answers_are_the_networks(self, case: Case, session: Session) -> None:
        """Number, shapes and dtypes of the outputs are the specs', values are close to fp32's."""
        inputs = case.inputs(64)
        outputs = session.run(inputs)
        assert [output.dtype.name for output in outputs] == [spec.dtype for spec in case.material.outputs]
        _assert_close(outputs, case.expected(inputs), ACCURATE_DB[case.build.precision])

    def test_sizes_of_samples_may_differ(self, case: Case, session: Session) -> None:
        """Dimensions that are dynamic in the specs take other sizes from call to call."""
        for row in case.material.calibration.rows[:8]:
            inputs = [array[None] for array in row]
            shapes = [output.shape for output in case.expected(inputs)]
            assert [output.shape for output in session.run(inputs)] == shapes

    @pytest.mark.parametrize("batch", [3, 4, 5])
    def test_earlier_results_stay(self, case: Case, session: Session, batch: int) -> None:
        """A later run changes no array that an earlier one returned."""
        first = session.run(case.inputs(batch))
        before = [output.copy() for output in first]
        session.run(case.inputs(batch, seed=1))
        assert all(map(np.array_equal, first, before))

    @pytest.mark.parametrize("batch", [3, 4])
    def test_inputs_are_only_read(self, case: Case, session: Session, batch: int) -> None:
        """Inputs are not changed and may be read-only, and non-contiguous ones give the same answers."""
        inputs = case.inputs(batch)
        expected = session.run([array.copy() for array in inputs])
        spread = [np.repeat(array, 2, axis=-1)[..., ::2] for array in inputs]
        for array in inputs:
            array.flags.writeable = False
        assert all(map(np.array_equal, session.run(inputs), expected))
        assert all(map(np.array_equal, session.run(spread), expected))
        assert all(map(np.array_equal, inputs, case.inputs(batch)))

    def test_wrong_number_of_inputs_is_refused(self, case: Case, session: Session) -> None:
        """Too few and too many inputs raise."""
        inputs = case.inputs(4)
        for wrong in (inputs[1:], [*inputs, inputs[0]]):
            with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)):
                session.run(wrong)

    def test_receipt_tells_what_runs_in_int8(self, case: Case) -> None:
        """An int8 build's receipt has layers in int8, where the engine can tell; the payload stays as it is."""
        before = {path: _digest(path) for path in case.payload.rglob("*") if path.is_file()}
        receipt = case.engine.receipt(case.payload, case.build, PLAN, case.inputs(PLAN.batch))
        assert {path: _digest(path) for path in case.payload.rglob("*") if path.is_file()} == before
        if case.build.precision in ("fp32", "bf16"):
            assert receipt is None
        if receipt is None:
            return
        # Layers as small as these may be too small to round activations as they come.
        assert receipt.int8 > 0 or (case.build.precision == "int8-dynamic" and receipt.fell_back)
        assert receipt.int8 <= receipt.layers - len(receipt.fell_back)
        assert sum(count for _, count in receipt.kernels) == receipt.layers
        assert from_json(Receipt, to_json(receipt)) == receipt

    def test_pixels_are_answered_as_floats(self, case: Case, tmp_path: Path) -> None:
        """A payload that takes pixels answers them as their normalized floats, in any batch, and floats as before."""
        if not isinstance(case.engine, PixelTaking) or len(case.material.inputs) != 1:
            pytest.skip("payloads of this engine or of this network take no pixels")
        payload = Path(shutil.copytree(case.payload, tmp_path / "payload"))
        scale = PixelScale(mean=(120.0, 110.0, 100.0), std=(60.0, 65.0, 70.0))
        with closing(case.open()) as before:
            inputs = case.inputs(4)
            expected = before.run(inputs)
        assert case.engine.take_pixels(payload, scale).parent == payload
        pixels = np.random.default_rng(0).integers(0, 256, (5, 20, 20, 3), np.uint8)
        mean, std = (np.array(values, np.float32) for values in (scale.mean, scale.std))
        floats = ((pixels - mean) / std).transpose(0, 3, 1, 2)
        with closing(case.engine.open(payload, case.build, PLAN)) as session:
            assert all(map(np.array_equal, session.run(inputs), expected))
            answers = session.run([pixels])
            _assert_close(answers, session.run([np.ascontiguousarray(floats)]), CONSISTENT_DB[case.build.precision])

    def test_sessions_are_independent(self, case: Case, session: Session) -> None:
        """Two sessions of one payload work side by side, and closing one, also twice, leaves the other."""
        other, inputs = case.open(), case.inputs(4)
        expected = session.run(inputs)
        assert all(map(np.array_equal, other.run(inputs), expected))
        other.close()
        other.close()
        assert all(map(np.array_equal, session.run(inputs), expected))


def _images() -> "nn.Module":
    """Convolutions with batch norm, a depthwise one, a residual add, a classifier."""
    import torch
    from torch import nn

    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
            self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.BatchNorm2d(16), nn.ReLU6())
            self.pointwise = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
            self.classifier = nn.Linear(16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            x = x + self.pointwise(self.depthwise(x))
            y: torch.Tensor = self.classifier(x.mean((2, 3)))
            return y

    return Images()


def _text() -> "nn.Module":
    """Tokens, in sequences of any length, and features: two inputs, two outputs, linear layers."""
    import torch
    from torch import nn

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, 16)
            self.tokens = nn.Linear(16, 32)
            self.features = nn.Linear(12, 32)
            self.head = nn.Linear(32, 6)

        def forward(self, ids: torch.Tensor, features: torch.Tensor) -> dict[str, torch.Tensor]:
            tokens = torch.relu(self.tokens(self.embedding(ids)))
            return {"scores": self.head(tokens.mean(1) + self.features(features)), "tokens": tokens}

    return Text()


def _random(rng: np.random.Generator, dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(0, 50, shape) if dtype.kind == "i" else rng.standard_normal(shape, np.float32)


def _row(net: str, rng: np.random.Generator, k: int) -> tuple[np.ndarray, ...]:
    """Sample k; texts have 3 to 6 tokens."""
    floats, integers = np.dtype(np.float32), np.dtype(np.int64)
    if net == "images":
        return (_random(rng, floats, (3, 20, 20)),)
    return _random(rng, integers, (3 + k % 4,)), _random(rng, floats, (12,))


@cache
def tiny_material(net: str, folder: Path) -> tuple["Exported", BuildInputs]:
    """The network with 32 calibration samples, exported into ``folder``, once for all engines."""
    import torch

    from corewise.source import export, save_program

    folder.mkdir()
    torch.manual_seed(0)
    model, rng = _images() if net == "images" else _text(), np.random.default_rng(0)
    rows = [_row(net, rng, k) for k in range(32)]
    calibration = from_python([(row, None) for row in rows])
    exported = export(model, calibration)
    assert exported.program is not None, exported.why_not
    save_program(exported.program, folder / "program.pt2")
    (folder / "program.sha256").write_text(_digest(folder / "program.pt2"))
    return exported, BuildInputs(
        program=folder / "program.pt2",
        inputs=exported.inputs,
        outputs=exported.outputs,
        operators=dict(
            Counter(str(node.target) for node in exported.program.graph.nodes if node.op == "call_function")
        ),
        calibration=calibration,
        cpu=cpu.inspect_cpu(),
        cache=folder,
    )


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def _is_pickle(start: bytes) -> bool:
    """A pickle of protocol 2 or later begins with PROTO and its number."""
    return len(start) == 2 and start[0] == 0x80 and 2 <= start[1] <= 5


def _pickles(archive: Path) -> list[str]:
    """The pickles in a zip file that are not TorchScript's."""
    with zipfile.ZipFile(archive) as file:
        names = file.namelist()
        torchscript = any("/code/" in name for name in names)
        allowed = TORCHSCRIPT_PICKLES if torchscript else set()
        starts = {name: file.open(name).read(2) for name in names}
    return [
        name
        for name, start in starts.items()
        if name.rpartition("/")[2] not in allowed and (name.endswith(".pkl") or _is_pickle(start))
    ]


def _assert_close(found: list[np.ndarray], expected: list[np.ndarray], decibels: float) -> None:
    assert [array.shape for array in found] == [array.shape for array in expected]
    for array, reference in zip(found, expected, strict=True):
        noise = float(np.square(array - reference, dtype=np.float64).sum())
        signal = float(np.square(reference, dtype=np.float64).sum())
        assert noise <= signal / 10 ** (decibels / 10)
