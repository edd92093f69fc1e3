"""Other people's engines and quantizers: imported so that they send nothing anywhere, and kept off the terminal."""

import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

_FIRST_USE = threading.Lock()
"""OpenVINO 2026.4 makes its table of dtypes when it first needs it, and its bindings wait there for each other forever
if two threads come at the same time: one has Python's lock, and the other the table's."""


def import_openvino() -> Any:
    """OpenVINO without its usage data, ready for several threads.

    Without the package ``openvino_telemetry`` OpenVINO and NNCF cannot send any, nor do they write to the home folder.
    """
    # setdefault: what the user's own code imported stays.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    with _FIRST_USE:
        openvino.Type.f32.to_dtype()
    return openvino


def import_nncf() -> Any:
    """NNCF without its usage data, as ``import_openvino``."""
    import_openvino()
    import nncf

    return nncf


def import_onnxruntime() -> Any:
    """ONNX Runtime without its usage data, for which it also keeps files in the home folder.

    The variable is for its native code, which reads it as it is loaded.
    """
    os.putenv("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def import_onnxruntime_quantization() -> Any:
    """ONNX Runtime's quantizer, as ``import_onnxruntime``."""
    import_onnxruntime()
    import onnxruntime.quantization

    return onnxruntime.quantization


@contextmanager
def quiet() -> Iterator[None]:
    """Run without progress bars, logs and warnings, and leave logging as it was.

    For calls into libraries only. Their errors still arrive, as exceptions do.
    """
    root, silent = logging.getLogger(), logging.NullHandler()
    disabled = logging.root.manager.disable
    # logging.warning() would add a handler for good to a root logger that has none.
    root.addHandler(silent)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.removeHandler(silent)
