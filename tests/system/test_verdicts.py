"""The gate on outputs of real engines: int8 that loses a part of the outputs is rejected, int8 that keeps it is not."""

import numpy as np
import pytest
import torch
from builders import requirements, said
from torch import nn

from corewise.accuracy.gate import AccuracyGate
from corewise.accuracy.metrics import resolve
from corewise.accuracy.outputs import Outputs
from corewise.engines import BuildInputs, engine
from corewise.engines.qdq import int8
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build, Plan
from corewise.samples import from_python
from corewise.source import export, operators, save_program

pytestmark = pytest.mark.usefixtures("few_resamples")


class Detector(nn.Module):
    """Boxes in pixels and scores in 0..1 in one output (N, 4 + 3, 100), as YOLO exports have it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.SiLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.SiLU())
        self.boxes, self.scores = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 3, 1)
        rows, columns = torch.meshgrid(torch.arange(10), torch.arange(10), indexing="ij")
        self.register_buffer("centers", torch.stack([columns, rows]).reshape(1, 2, 100) * 64.0 + 32)

    def forward(self, x):
        hidden = self.stem(x)
        boxes = self.boxes(hidden).flatten(2)
        centers = self.centers + 32 * torch.tanh(boxes[:, :2])
        sizes = 64 * torch.exp(torch.tanh(boxes[:, 2:]))
        return torch.cat([centers, sizes, (60 * self.scores(hidden).flatten(2) - 4).sigmoid()], 1)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """What builds are made from, the inputs of the holdout, and the gate with fp32's outputs in it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("detector")
    samples = from_python([torch.randn(3, 40, 40) for _ in range(40)])
    exported = export(Detector().eval(), samples)
    save_program(exported.program, folder / "program.pt2")
    (folder / "cache").mkdir()
    material = BuildInputs(
        program=folder / "program.pt2",
        inputs=exported.inputs,
        outputs=exported.outputs,
        operators=operators(exported.program),
        calibration=samples.take(range(16)),
        cpu=inspect_cpu(),
        cache=folder / "cache",
    )
    holdout = samples.take(range(16, 40))
    _, inputs = next(holdout.batches(24))
    with torch.no_grad():
        reference = exported.module(*map(torch.from_numpy, inputs))[0].numpy()

    def gate(metric=None):
        gate = AccuracyGate(metric and resolve(metric), holdout, exported.output_structure, requirements(), 0)
        gate(Outputs((reference,)))
        return gate

    return material, inputs, gate


def outputs_of(material, inputs, build, folder):
    made = engine(build.engine)
    made.build(material, build, folder)
    session = made.open(folder, build, Plan(threads_per_instance=1, batch=len(inputs[0])))
    try:
        return Outputs(tuple(session.run(list(inputs))))
    finally:
        session.close()


def test_int8_that_loses_a_detectors_scores_is_rejected(detector, tmp_path):
    """ONNX Runtime's own int8 gives boxes and scores, which it concatenates, one scale."""
    material, inputs, gate = detector
    outputs = outputs_of(material, inputs, Build(engine="onnxruntime", precision="int8"), tmp_path)
    fidelity, verdict = gate()(outputs)
    assert fidelity.cosine > 0.9
    assert not verdict.passed
    assert (fidelity.worst_group.name, fidelity.worst_group.passed) == ("output_0[:, 4:7]", False)
    assert "concordance" in said(verdict.reason)
    assert gate("cosine")(outputs)[1].rule in ("drop", "floor")
    assert gate("detections")(outputs)[0].value < 0.5


def test_int8_that_keeps_them_passes(detector, tmp_path):
    material, inputs, gate = detector
    fidelity, verdict = gate()(outputs_of(material, inputs, int8("onnxruntime", material.cpu), tmp_path))
    assert verdict.passed, said(verdict.reason)
    assert {group.name for group in fidelity.groups} == {"output_0[:, 0:4]", "output_0[:, 4:7]"}
    assert min(group.sqnr_db for group in fidelity.groups) > 17
    assert np.isfinite(fidelity.worst_sample_db)
