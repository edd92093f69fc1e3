"""Derives which values and sizes a program's inputs may have from the tables that they index.

An engine that gets an index outside of a table may read memory behind it, for example a part of another request. The
ranges are therefore derived from the exported program: the values of each integer tensor are followed through the
graph as intervals, and wherever a tensor is an index (``embedding``, ``gather``, ...) both ends must lie in the table.

An input whose values depend on a condition is not checked (``index_rules``).
"""

import zipfile
from collections.abc import Hashable
from pathlib import Path

from corewise.artifact.graph_file import INTEGERS, Graph
from corewise.artifact.index_rules import Call
from corewise.artifact.intervals import Interval, Limits, Linear, Region, Values
from corewise.common.errors import ArtifactError
from corewise.records.ranges import InputRange, ValueRange

EXPORTED_LEAST = 2
"""What torch.export gives as the least of a size that may be anything."""

UNREADABLE = (
    OSError,
    zipfile.BadZipFile,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    SyntaxError,
    RecursionError,
    MemoryError,
)
"""Errors raised for files that are damaged or were written by another version of torch."""


def derive(program: Path) -> tuple[InputRange, ...]:
    """The range of each input of the program in a ``.pt2`` file.

    Raises ``ArtifactError`` if this corewise cannot read the file.
    """
    try:
        with zipfile.ZipFile(program) as archive:
            return _ranges(Graph.read(archive))
    except UNREADABLE as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ArtifactError(
            f"the ranges of the inputs cannot be read from {program} ({why})", "make the artifact again"
        ) from error


def _ranges(graph: Graph) -> tuple[InputRange, ...]:
    """The range of each input."""
    limits = Limits()
    values: dict[str, Values | None] = dict(graph.constants)
    for name in graph.inputs:
        if graph.tensors[name]["dtype"] in INTEGERS:
            whole = Linear.of(Region(name))
            values[name] = Values((Interval(whole, whole),), in_place=True)
    for node in graph.nodes:
        call = Call(graph, node, values)
        for index, least, size in call.lookups():
            limits.require(index.intervals, least, size.plus(Linear(-1)))
        values.update(call.results())
    return tuple(_range(graph, name, limits) for name in graph.inputs)


def _range(graph: Graph, name: str, limits: Limits) -> InputRange:
    sizes = graph.shape(name)[1:]
    shortest = [_shortest(graph, size) for size in sizes]
    multiples = [graph.multiples.get((name, axis)) for axis in range(1, len(sizes) + 1)]
    symbols = {**limits.lows, **limits.highs}
    regions = [symbol for symbol in symbols if isinstance(symbol, Region) and symbol.input == name]
    return InputRange(
        values=tuple(
            ValueRange(
                low=limits.lows.get(region),
                high=limits.highs.get(region),
                axis=region.axis,
                start=region.start,
                stop=region.stop,
            )
            for region in sorted(regions, key=lambda region: (region.axis or 0, region.start, region.stop or 0))
        ),
        # Dimension 0 is the batch, which is cut into calls of any size.
        longest=(None, *(_longest(graph, size, limits) for size in sizes)),
        shortest=(None, *shortest) if any(shortest) else (),
        multiples=(None, *multiples) if any(multiples) else (),
    )


def _longest(graph: Graph, size: Linear, limits: Limits) -> int | None:
    symbol = _alone(size)
    exported = (graph.size_limits.get(str(symbol)) or {}).get("max_val")
    return min((most for most in (exported, limits.highs.get(symbol)) if most is not None), default=None)


def _shortest(graph: Graph, size: Linear) -> int | None:
    """Below it the program, of which only one branch was exported, would take that branch all the same."""
    least = (graph.size_limits.get(str(_alone(size))) or {}).get("min_val")
    return least if least is not None and least > EXPORTED_LEAST else None


def _alone(size: Linear) -> Hashable | None:
    """The symbol, if a size is nothing but one."""
    if size.constant or len(size.terms) != 1:
        return None
    ((symbol, factor),) = size.terms
    return symbol if factor == 1 else None
