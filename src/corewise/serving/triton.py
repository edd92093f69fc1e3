"""Triton's extensions of the protocol for a model: its configuration, and outputs as classes.

https://github.com/triton-inference-server/server/tree/main/docs/protocol (model configuration, classification)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from corewise.records.build import TensorSpec
from corewise.serving import protocol
from corewise.serving.protocol import ProtocolError
from corewise.serving.served import Served


def config(served: Served) -> dict[str, Any]:
    """A model's configuration, with the names of Triton's ``ModelConfig``; its dimensions leave out the batch."""
    build, plan = served.manifest.build, served.plan
    return {
        "name": served.name,
        "platform": f"corewise_{build.engine}",
        "backend": "corewise",
        "max_batch_size": plan.batch,
        "input": [_tensor(spec) for spec in served.inputs],
        "output": [_tensor(spec) for spec in served.outputs],
        "instance_group": [{"name": served.name, "kind": "KIND_CPU", "count": plan.instances}],
        "dynamic_batching": {
            "preferred_batch_size": [plan.batch],
            "priority_levels": protocol.PRIORITY_LEVELS,
            "default_priority_level": protocol.DEFAULT_LEVEL,
        },
        "parameters": {
            "precision": {"string_value": build.precision},
            "threads_per_instance": {"string_value": str(plan.threads_per_instance)},
        },
        "model_transaction_policy": {"decoupled": False},
    }


def classified(
    counts: Mapping[str, int], outputs: Mapping[str, np.ndarray], labels: Sequence[str] | None
) -> dict[str, np.ndarray]:
    """The outputs, with each one that ``counts`` names replaced by its highest values, as that many classes.

    A class is ``score:index``, or ``score:index:label`` if the model has a label for it. Raises ``ProtocolError`` for
    outputs that are no numbers.
    """
    classes = {name: _classes(name, count, outputs[name], labels or ()) for name, count in counts.items() if count}
    return {**outputs, **classes}


def class_bytes(counts: Mapping[str, int], outputs: Mapping[str, np.ndarray]) -> int:
    """About as many bytes of JSON take as long as ``classified``, which sorts all values of these outputs."""
    return sum(protocol.VALUE_BYTES * outputs[name].size for name in counts)


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    datatype = protocol.DATATYPES[spec.dtype]
    dims = [-1 if size is None else size for size in spec.shape[1:]]
    return {"name": spec.name, "data_type": f"TYPE_{'STRING' if datatype == 'BYTES' else datatype}", "dims": dims}


def _classes(name: str, count: int, scores: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    if scores.dtype.kind not in "fiu":
        raise ProtocolError(f"the output {name} does not hold numbers, so it has no classes")
    rows = scores.reshape(len(scores), -1)
    best = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :count]
    words = [
        _class(rows[row, index].item(), index, labels) for row, indices in enumerate(best.tolist()) for index in indices
    ]
    return protocol.objects([word.encode() for word in words], best.shape)


def _class(score: float | int, index: int, labels: Sequence[str]) -> str:
    number = f"{score:f}" if isinstance(score, float) else str(score)
    return f"{number}:{index}:{labels[index]}" if index < len(labels) else f"{number}:{index}"
