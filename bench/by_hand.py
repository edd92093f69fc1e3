"""The engines as their own documentation shows them: what a user without corewise would write.

They are engines by corewise's protocol, so that ``run_race`` alternates them with corewise's artifact, but they use
nothing of corewise's builds: every option is the tool's default. Calibration sees the same samples.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from corewise.common.errors import SourceError
from corewise.common.references import call_reference
from corewise.engines import BuildInputs
from corewise.records.build import Build, Plan

Arrays = Sequence[np.ndarray]


def factory(build: Build):
    """The user's module, from the build's option ``model``."""
    return call_reference(str(build.option("model", "")), SourceError, "the model").eval()


def example(material: BuildInputs, count: int):
    """The first calibration samples as torch tensors."""
    import torch

    _, arrays = next(material.calibration.batches(count))
    return tuple(torch.from_numpy(np.array(array)) for array in arrays)


class ByHand:
    """What the classes below share."""

    def unavailable(self, opening: bool = False) -> str:
        return ""

    def candidates(self, cpu, operators):
        return ()

    def needs(self, build: Build) -> tuple[str, ...]:
        return ()

    def build(self, material: BuildInputs, build: Build, folder: Path) -> tuple[str, ...]:
        return ()

    def receipt(self, folder: Path, build: Build, plan: Plan, inputs: Arrays) -> None:
        return None


class FunctionSession:
    """A function on arrays as a session."""

    def __init__(self, function) -> None:
        self._function = function

    def run(self, inputs: Arrays) -> list[np.ndarray]:
        return self._function(inputs)

    def close(self) -> None:
        del self._function


class Eager(ByHand):
    """``model(x)`` under inference_mode, the memory format as it is."""

    channels_last = False

    def open(self, folder: Path, build: Build, plan: Plan) -> FunctionSession:
        import torch

        module = factory(build)
        if self.channels_last:
            module = module.to(memory_format=torch.channels_last)

        def run(inputs: Arrays) -> list[np.ndarray]:
            with torch.inference_mode():
                tensors = [torch.from_numpy(array) for array in inputs]
                if self.channels_last:
                    tensors = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
                return [module(*tensors).numpy()]

        return FunctionSession(run)


class EagerChannelsLast(Eager):
    """The same in channels_last, as PyTorch's CPU guide advises for convolutional nets."""

    channels_last = True


class TorchCompile(ByHand):
    """``torch.compile(model)`` with its defaults, under inference_mode."""

    def open(self, folder: Path, build: Build, plan: Plan) -> FunctionSession:
        import torch

        compiled = torch.compile(factory(build))

        def run(inputs: Arrays) -> list[np.ndarray]:
            with torch.inference_mode():
                return [compiled(*(torch.from_numpy(array) for array in inputs)).numpy()]

        return FunctionSession(run)


class TorchFx(ByHand):
    """FX graph mode quantization with the default qconfig mapping of the default backend (x86)."""

    def build(self, material: BuildInputs, build: Build, folder: Path) -> tuple[str, ...]:
        import torch
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        inputs = example(material, 1)
        prepared = prepare_fx(factory(build), get_default_qconfig_mapping("x86"), inputs)
        with torch.no_grad():
            for _, arrays in material.calibration.batches(16):
                prepared(*(torch.from_numpy(np.array(array)) for array in arrays))
            quantized = convert_fx(prepared)
            torch.jit.save(torch.jit.freeze(torch.jit.trace(quantized, inputs)), folder / "model.pt")
        return ()

    def open(self, folder: Path, build: Build, plan: Plan) -> FunctionSession:
        import torch

        module = torch.jit.load(folder / "model.pt")

        def run(inputs: Arrays) -> list[np.ndarray]:
            with torch.no_grad():
                return [module(*(torch.from_numpy(array) for array in inputs)).numpy()]

        return FunctionSession(run)


class OpenVino(ByHand):
    """convert_model, and compile_model with the hint LATENCY, which is the default; fp32."""

    def convert(self, material: BuildInputs, build: Build):
        import openvino

        return openvino.convert_model(factory(build), example_input=example(material, 2))

    def build(self, material: BuildInputs, build: Build, folder: Path) -> tuple[str, ...]:
        """Both hints run the same model, which is converted once."""
        import openvino

        converted = material.cache / f"by-hand-{build.precision}.xml"
        if not converted.exists():
            openvino.save_model(self.convert(material, build), converted, compress_to_fp16=False)
        for suffix in (".xml", ".bin"):
            shutil.copyfile(converted.with_suffix(suffix), folder / f"model{suffix}")
        return ()

    def open(self, folder: Path, build: Build, plan: Plan) -> FunctionSession:
        import openvino

        compiled = openvino.Core().compile_model(folder / "model.xml", "CPU", {"PERFORMANCE_HINT": "LATENCY"})
        return FunctionSession(lambda inputs: [compiled(list(inputs))[0]])


def throughput_session(folder: Path) -> FunctionSession:
    """The hint THROUGHPUT as its documentation asks for: as many requests at a time as the model calls optimal.

    A call's rows are shared among them.
    """
    import openvino

    compiled = openvino.Core().compile_model(folder / "model.xml", "CPU", {"PERFORMANCE_HINT": "THROUGHPUT"})
    queue = openvino.AsyncInferQueue(compiled, 0)  # 0: the optimal number

    def run(inputs: Arrays) -> list[np.ndarray]:
        parts = min(len(queue), len(inputs[0]))
        results: list[np.ndarray] = [np.empty(0)] * parts
        queue.set_callback(lambda request, k: results.__setitem__(k, request.get_output_tensor(0).data.copy()))
        for k, rows in enumerate(zip(*(np.array_split(array, parts) for array in inputs), strict=True)):
            queue.start_async(list(rows), k)
        queue.wait_all()
        return [np.concatenate(results)]

    return FunctionSession(run)


class OpenVinoThroughput(OpenVino):
    """The same with the hint THROUGHPUT."""

    def open(self, folder: Path, build: Build, plan: Plan) -> FunctionSession:
        return throughput_session(folder)


class Nncf(OpenVino):
    """nncf.quantize with its defaults on the OpenVINO model."""

    def convert(self, material: BuildInputs, build: Build):
        import nncf

        model = super().convert(material, build)
        items = [list(arrays) for _, arrays in material.calibration.batches(1)]
        return nncf.quantize(model, nncf.Dataset(items))


class NncfThroughput(Nncf):
    """The same with the hint THROUGHPUT."""

    def open(self, folder: Path, build: Build, plan: Plan) -> FunctionSession:
        return throughput_session(folder)


class Ort(ByHand):
    """torch.onnx.export and InferenceSession with their defaults; fp32."""

    def export(self, material: BuildInputs, build: Build, path: Path) -> None:
        import torch

        inputs = example(material, 2)
        batch = torch.export.Dim("batch")
        torch.onnx.export(
            factory(build),
            inputs,
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            dynamo=True,
            input_names=[spec.name for spec in material.inputs],
        ).save(path)

    def build(self, material: BuildInputs, build: Build, folder: Path) -> tuple[str, ...]:
        self.export(material, build, folder / "model.onnx")
        return ()

    def open(self, folder: Path, build: Build, plan: Plan) -> FunctionSession:
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        return FunctionSession(lambda inputs: session.run(None, dict(zip(names, inputs, strict=True))))


class OrtQuantized(Ort):
    """quant_pre_process and quantize_static with their defaults."""

    def build(self, material: BuildInputs, build: Build, folder: Path) -> tuple[str, ...]:
        from onnxruntime.quantization import CalibrationDataReader, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self.items = material.calibration.batches(1)

            def get_next(self):
                item = next(self.items, None)
                return item and {spec.name: array for spec, array in zip(material.inputs, item[1], strict=True)}

        fp32, prepared = material.cache / "by-hand.onnx", material.cache / "by-hand-prepared.onnx"
        self.export(material, build, fp32)
        quant_pre_process(fp32, prepared, skip_symbolic_shape=True)
        quantize_static(prepared, folder / "model.onnx", Reader())
        return ()


CONTENDERS = {
    "eager": "bench.by_hand:Eager",
    "eager channels_last": "bench.by_hand:EagerChannelsLast",
    "torch.compile": "bench.by_hand:TorchCompile",
    "torch FX int8 (x86)": "bench.by_hand:TorchFx",
    "OpenVINO fp32, LATENCY": "bench.by_hand:OpenVino",
    "OpenVINO fp32, THROUGHPUT": "bench.by_hand:OpenVinoThroughput",
    "OpenVINO int8 (NNCF), LATENCY": "bench.by_hand:Nncf",
    "OpenVINO int8 (NNCF), THROUGHPUT": "bench.by_hand:NncfThroughput",
    "ONNX Runtime fp32": "bench.by_hand:Ort",
    "ONNX Runtime int8 (quantize_static)": "bench.by_hand:OrtQuantized",
}
"""Name to engine; each is raced against corewise's artifact."""


def engine_build(name: str, model: str) -> Build:
    """The build of a contender for the model reference."""
    return Build(engine=CONTENDERS[name], precision="int8" if "int8" in name else "fp32", options=(("model", model),))
