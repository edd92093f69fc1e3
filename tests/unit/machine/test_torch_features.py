"""What is looked for in torch's files is what importing torch would find."""

import importlib

import pytest

from corewise.machine.torch_features import INT8_PASSES, has_fx_quantization, int8_passes

MODULES = {
    "torch": "torch._inductor.fx_passes.quantization",
    "torchao": "torchao.quantization.pt2e.inductor_passes.x86",
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_int8_fusions_are_where_they_are_said_to_be() -> None:
    pytest.importorskip("torchao")
    package = int8_passes()
    assert package in MODULES
    assert callable(getattr(importlib.import_module(MODULES[package]), INT8_PASSES))
    if package == "torchao":
        assert not hasattr(importlib.import_module(MODULES["torch"]), INT8_PASSES)


def test_fx_quantization_is_found_if_it_imports() -> None:
    assert has_fx_quantization() == (importlib.util.find_spec("torch.ao.quantization.quantize_fx") is not None)
