"""An artifact of all-MiniLM-L6-v2 with its real weights, fp32 in OpenVINO."""

from pathlib import Path

from serving_tools import openvino_artifact

from bench import harness
from corewise.artifact.checks import program_ranges
from corewise.engines.openvino import OpenVino
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build


def write_minilm(folder: Path) -> None:
    """What ``optimize`` does before and after its search: export, build, and write."""
    cpu = inspect_cpu()
    samples = harness.example("minilm", "samples_ragged")(4)
    with harness.temporary_workspace() as workspace:
        exported, inputs = harness.export_into(workspace, harness.example("minilm", "build")(), samples, samples, cpu)
        payload = workspace.folder / "payload"
        payload.mkdir()
        OpenVino().build(inputs, Build(engine="openvino", precision="fp32"), payload)
        golden = [array[None] for array in samples.rows[0]]
        openvino_artifact(
            folder,
            payload,
            golden,
            inputs=exported.inputs,
            outputs=exported.outputs,
            input_ranges=program_ranges(workspace.program, exported.inputs, [golden]),
            input_structure=samples.structure.to_data(),
            tokenizer=harness.example("minilm", "encoder_folder")() / "tokenizer.json",
            batch=8,
            call_ms=10.0,
        )
