"""corewise makes a PyTorch model run as fast on this CPU as the CPU allows, and proves it.

    result = corewise.optimize(model, samples, metric="top1", max_drop=0.01)
    result.model(x)
    result.save("resnet50.cw")
    fast = corewise.load("resnet50.cw")
    fast(x)

Importing corewise imports neither torch nor an engine.
"""

from typing import TYPE_CHECKING, Any

from corewise._version import __version__
from corewise.common.errors import CorewiseError

if TYPE_CHECKING:
    from corewise.artifact.open import load
    from corewise.search.optimization import optimize
    from corewise.search.result import Result
    from corewise.search.retuning import retune

__all__ = ["CorewiseError", "Result", "__version__", "load", "optimize", "retune"]

_LAZY = {
    "Result": "corewise.search.result",
    "load": "corewise.artifact.open",
    "optimize": "corewise.search.optimization",
    "retune": "corewise.search.retuning",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'corewise' has no attribute {name!r}")
    from importlib import import_module

    # Kept, for importing the submodule "optimize" or "retune" has put the module in the function's place.
    globals()[name] = getattr(import_module(_LAZY[name]), name)
    return globals()[name]
