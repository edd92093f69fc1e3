"""An OpenVINO model opened for a plan: compiled for fixed batches, shared by the plan's instances."""

import copy
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from corewise.common.errors import EngineError
from corewise.engines import denormals
from corewise.engines.base import PixelScale, chunks, run_cut
from corewise.engines.libraries import import_openvino
from corewise.machine.inspect import inspect_cpu
from corewise.machine.layouts import limited_by_quota
from corewise.records.build import Build, Plan
from corewise.records.jsonable import from_json

INT32 = np.iinfo(np.int32)
MODEL = "model.xml"
DYNAMIC = -1
GROUP = 128
"""Columns of a row that share a scale when int8-dynamic rounds activations. With 32 columns MiniLM's outputs came a
little nearer to fp32's (cosine 0.9985 instead of 0.9973) and it ran at 0.83 of the speed (Zen 4). Layers with fewer
columns stay in floating point."""


SETTINGS = "openvino.json"
"""Beside the model: what compiling it here has shown. Payloads of older versions have none."""
PIXELS = "pixels.json"
"""Beside the model: the scale of pixels that it takes in place of its input; without it, it takes none."""
PRECISION_HINTS = {"fp32": "f32", "bf16": "bf16"}
WHERE = re.compile(r"Exception from \S+:\d+:|Check '.*' failed at \S+:\d+:")
CAUSE_LENGTH = 300


class OpenVinoSession:
    """A model compiled for batches of 1, 2, 4, ... and the plan's, each when it is first needed.

    With a dynamic batch int8 ResNet-50 ran at 23 images/s where a static one ran at 37 (Zen 3, 2026.4). If other
    dimensions are dynamic too, a static batch gained nothing (MiniLM), and one compiled model takes every batch.
    """

    def __init__(self, model: Path, build: Build, plan: Plan, config: Mapping[str, Any] = MappingProxyType({})) -> None:
        self._shared = _Compiled(model, build, plan, config)
        self._sizes = self._shared.sizes
        self._requests: dict[tuple[int, bool], Any] = {}
        self._for_batch(plan.batch)

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run a batch of any size, cut and padded to compiled sizes."""
        rows = len(inputs[0])
        return run_cut(self._call, inputs, chunks(rows, self._sizes or [rows]))

    def _call(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        request = self._for_batch(len(inputs[0]), pixels=self._shared.takes_pixels and inputs[0].dtype == np.uint8)
        # For a missing input OpenVINO reuses the one of the call before.
        if len(inputs) != len(request.model_inputs):
            raise ValueError(f"{len(inputs)} inputs instead of {len(request.model_inputs)}")
        for array in inputs:
            _check_integers(array)
        with explained("run this batch", "give inputs of the shapes that the model was exported with"):
            outputs = request.infer(inputs, share_inputs=True, share_outputs=False)
        return [outputs[index] for index in range(len(request.model_outputs))]

    def _for_batch(self, rows: int, *, pixels: bool = False) -> Any:
        size = rows if self._sizes else DYNAMIC
        if (size, pixels) not in self._requests:
            self._requests[size, pixels] = self._shared.compiled(size, pixels=pixels).create_infer_request()
        return self._requests[size, pixels]

    def another(self) -> "OpenVinoSession":
        """Requests of its own to the same compiled models, which run one request on each of their streams."""
        other = copy.copy(self)
        other._requests = {}
        return other

    def models(self, rows: int) -> tuple[Any, Any]:
        """The model as it was read, and the runtime model that takes ``rows`` rows."""
        return self._shared.model, self._for_batch(rows).get_compiled_model().get_runtime_model()

    def close(self) -> None:
        """Drop the requests, and the compiled models unless other instances use them."""
        self._requests.clear()
        self.__dict__.pop("_shared", None)


class _Compiled:
    """The compiled models of one file by their batch; several threads may ask for one.

    OpenVINO pins each stream to cores of its own, except under a CPU quota, which limits time and not placement.
    Denormals are treated as the opening thread treats them.
    """

    def __init__(self, model: Path, build: Build, plan: Plan, config: Mapping[str, Any]) -> None:
        self._core = import_openvino().Core()
        with explained(f"read {model.name}"):
            self.model: Any = self._core.read_model(str(model))
        with _on_all_cpus():
            cpu = inspect_cpu()
        threads = plan.threads_per_instance * plan.instances
        self._instances = plan.instances
        self._config: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": plan.instances,
            "INFERENCE_PRECISION_HINT": PRECISION_HINTS["bf16" if in_bf16(build, model.parent) else "fp32"],
            "ENABLE_CPU_PINNING": not limited_by_quota(cpu),
            "ENABLE_HYPER_THREADING": threads > cpu.usable_cores,
            "CPU_DENORMALS_OPTIMIZATION": denormals.flushed(),
            **config,
        }
        if build.precision == "int8-dynamic":
            self._config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = GROUP
        free = any(dim.is_dynamic for port in self.model.inputs for dim in list(port.get_partial_shape())[1:])
        self.sizes = [] if free else [*(2**k for k in range((plan.batch - 1).bit_length())), plan.batch]
        scale = model.parent / PIXELS
        self._scale = from_json(PixelScale, json.loads(scale.read_text())) if scale.exists() else None
        self._models: dict[tuple[int, bool], Any] = {}
        self._lock = threading.Lock()

    @property
    def takes_pixels(self) -> bool:
        """Whether it is compiled for pixels too."""
        return self._scale is not None

    def compiled(self, size: int, *, pixels: bool = False) -> Any:
        """The model for batches of ``size``, or ``DYNAMIC``. Raises ``EngineError`` if streams are missing."""
        with self._lock, _on_all_cpus():
            if (size, pixels) not in self._models:
                model = self.model.clone()
                reshape_batch(model, size)
                if pixels and self._scale is not None:
                    model = _of_pixels(model, self._scale)
                with explained("compile this model"):
                    self._models[size, pixels] = self._core.compile_model(model, "CPU", self._config)
                streams = self._models[size, pixels].get_property("NUM_STREAMS")
                if streams != self._instances:
                    raise EngineError(
                        f"OpenVINO has {streams} streams here, not one for each of {self._instances} instances",
                        f"use at most {streams} instances",
                    )
            return self._models[size, pixels]


def _check_integers(array: np.ndarray) -> None:
    """Raise ``EngineError`` for integers of 64 bits that OpenVINO's CPU plugin, which has 32, would change."""
    if array.dtype == np.int64 and array.size and not INT32.min <= array.min() <= array.max() <= INT32.max:
        raise EngineError(f"OpenVINO has integers of 32 bits, and an input has {array.max()}", "use another engine")


def _of_pixels(model: Any, scale: PixelScale) -> Any:
    """The model with pixels, uint8 (N, H, W, C), in place of its input, which OpenVINO computes of them."""
    openvino = import_openvino()
    processor = openvino.preprocess.PrePostProcessor(model)
    pixels = processor.input()
    pixels.tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    pixels.model().set_layout(openvino.Layout("NCHW"))
    pixels.preprocess().convert_element_type(openvino.Type.f32).mean(list(scale.mean)).scale(list(scale.std))
    return processor.build()


@contextmanager
def _on_all_cpus() -> Iterator[None]:
    """Run on the hardware threads of the main thread.

    OpenVINO takes the affinity of the thread that compiles first as the affinity of the process, for its whole life.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def in_bf16(build: Build, payload: Path | None = None) -> bool:
    """Whether what is not int8 runs in bf16: as the build asks, unless its ``payload`` fell back to fp32."""
    settings = payload / SETTINGS if payload else None
    if settings and settings.exists() and json.loads(settings.read_text())["rest"] == "fp32":
        return False
    return build.precision == "bf16" or build.quantization.rest == "bf16"


def rest_that_compiles(model: Path, build: Build, plan: Plan) -> tuple[str, ...]:
    """Let the payload run its rest in fp32 if OpenVINO does not compile it in bf16; returns notes.

    Its bf16 does not have a kernel for every graph that int8 leaves: on a Zen 4 it refused ESPCN
    (tanh and pixel shuffle).
    """
    if build.quantization.rest != "bf16":
        return ()
    try:
        OpenVinoSession(model, build, plan).close()
    except EngineError as error:
        (model.parent / SETTINGS).write_text(json.dumps({"rest": "fp32"}))
        return (f"warning: what is not int8 runs in fp32 instead of bf16: {error.what}",)
    return ()


@contextmanager
def explained(doing: str, fix: str = "use another engine or precision") -> Iterator[None]:
    """Turn OpenVINO's error into an ``EngineError`` with its cause, without the places in OpenVINO's source."""
    try:
        yield
    except RuntimeError as error:
        lines = [WHERE.sub("", line).strip() for line in str(error).splitlines()]
        cause = " ".join(filter(None, lines))[:CAUSE_LENGTH].rstrip(". ") or type(error).__name__
        raise EngineError(f"OpenVINO cannot {doing}: {cause}", fix) from error


def reshape_batch(model: Any, size: int) -> None:
    """Set dimension 0 of every input."""
    shapes = {}
    for port in model.inputs:
        shape = port.get_partial_shape()
        shape[0] = size
        shapes[port] = shape
    model.reshape(shapes)


def runtime_info(op: Any, key: str) -> str:
    """What an operation of a runtime model says about itself under ``key``."""
    return str(op.get_rt_info()[key].astype(str))
