"""What exporting gives: the model over flat tensors, its program, and what is known of its behaviour."""

import inspect
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from corewise.common import nested
from corewise.common.nested import Structure
from corewise.records.behaviour import BatchMixing, StateChange
from corewise.records.build import TensorSpec


class Flat(nn.Module):
    """``model`` with flat tensors as positional inputs and a flat tuple of tensors as output."""

    def __init__(self, model: nn.Module, inputs: Structure) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.training = False
        self._has_compiled_parts = any(map(_is_compiled, model.modules()))

    def call_model(self, *tensors: Tensor) -> Any:
        """The model's own output for flat inputs."""
        args, kwargs = nested.unflatten(self.inputs, tensors)
        if self._has_compiled_parts and not torch.compiler.is_exporting():
            with torch.compiler.set_stance("force_eager"):
                return self.model(*args, **kwargs)
        return self.model(*args, **kwargs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors of the model's output."""
        leaves = nested.flatten(self.call_model(*tensors), "output")[0]
        # The imaginary part of a conjugate is a view that only remembers its sign, which numpy does not take.
        return tuple(leaf.resolve_neg() if leaf.is_neg() else leaf for leaf in leaves)


@dataclass(frozen=True, kw_only=True, eq=False)
class Exported:
    """A model ready for the engines."""

    program: ExportedProgram | None
    """The export of ``module``, without example inputs; ``None`` where there is none, for the reason ``why_not``."""
    why_not: str
    module: nn.Module
    """The model with flat tensors in and out (``Flat``)."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    output_structure: Structure
    """Puts the flat outputs together again."""
    fixed_batch: int | None = None
    """How many rows ``program`` and ``module`` take a call; ``None``: any number.

    Builds of such a program carry it as the option ``records.build.FIXED_BATCH``.
    """
    why_fixed: str = ""
    """Why the batch is fixed; empty where it is not."""
    mixing: BatchMixing | None = None
    """The model mixes the rows of a batch; its ``fixed_batch`` is 1, so that each is answered as if it were alone."""
    state: StateChange | None = None
    """Each call changes something on which the answers do not depend, e.g. a counter; ``program`` leaves it out."""


def digest(exported: Exported) -> str:
    """sha256 (hex) over what the model computes: its graph (or source code) and its weights."""
    result = sha256()
    if exported.program is not None:
        modules = exported.program.graph_module.modules()
        texts = [module.code for module in modules if isinstance(module, GraphModule)]
        texts.append(str(exported.program.graph_signature))
        tensors: dict[str, Any] = {**exported.program.state_dict, **exported.program.constants}
    else:
        texts = [repr(exported.module), *(_source(module) for module in exported.module.modules())]
        tensors = exported.module.state_dict()
    facts = (exported.inputs, exported.outputs, exported.output_structure, exported.fixed_batch)
    for text in (*texts, *map(repr, facts)):
        result.update(text.encode())
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, Tensor):
            result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
            result.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def _is_compiled(part: nn.Module) -> bool:
    """Whether ``torch.compile`` compiles it when it is called, which takes long and is of no use here."""
    return getattr(part, "_compiled_call_impl", None) is not None or "_orig_mod" in part._modules


def _source(module: nn.Module) -> str:
    if type(module).__module__.startswith("torch."):
        return ""
    try:
        return inspect.getsource(type(module))
    except (OSError, TypeError):
        return ""
