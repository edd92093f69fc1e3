"""The contract suite over the engines that come with corewise."""

from importlib.util import find_spec

from corewise.testing.engine_contract import EngineContract


class TestEager(EngineContract):
    engine_name = "eager"


if find_spec("corewise.engines.torch_int8"):

    class TestTorchInt8(EngineContract):
        engine_name = "torch-int8"


class TestOpenVino(EngineContract):
    engine_name = "openvino"


class TestOnnxRuntime(EngineContract):
    engine_name = "onnxruntime"
