"""Derives which values and sizes a program's inputs may have from the tables that they index.

An engine that gets an index outside of a table may read memory behind it, for example a part of another request. The
ranges are therefore derived from the exported program: the values of each integer tensor are followed through the
graph as intervals, and wherever a tensor is an index (``embedding``, ``gather``, ...) both ends must lie in the table.

A value that depends on a condition (``where``, ``masked_fill``, a product with a mask) is not followed further, because
the condition may make it valid. Such inputs are not checked.

This reads the JSON in a ``.pt2`` file, without torch. The names are those of torch's ``_export/serde/schema.py``.
"""

import ast
import json
import re
import zipfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from corewise.artifact.intervals import Interval, Limits, Linear, Region
from corewise.common.errors import ArtifactError
from corewise.records.ranges import InputRange, ValueRange

MOST_CONSTANTS = 1 << 20
"""The values of integer tensors with more elements are not read."""
MOST_INTERVALS = 32
MULTIPLE = re.compile(r"\(?L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\] % (\d+)\)? == 0")
"""A condition that held when the program was exported: of an input's number, an axis, and what its size divides by."""
EXPORTED_LEAST = 2
"""What torch.export gives as the least of a size that may be anything."""
TO_THE_END = 1 << 62
"""A slice that stops here or later stops with its dimension."""
BOOL = 12
INTEGERS = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", BOOL: "u1"}
"""torch's numbers of the integer dtypes, with numpy's names."""


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
            return _Graph.read(archive).ranges()
    except UNREADABLE as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ArtifactError(
            f"the ranges of the inputs cannot be read from {program} ({why})", "make the artifact again"
        ) from error


class _Values(NamedTuple):
    """The numbers of a tensor: each lies in one of the intervals."""

    intervals: tuple[Interval, ...]
    in_place: bool = False
    """Whether each number is still at the place that it has in the input."""

    @property
    def follows_input(self) -> bool:
        """Whether an input's values are among them."""
        return any(interval.follows_input for interval in self.intervals)


def _between(low: int, high: Linear) -> _Values:
    return _Values((Interval(Linear(low), high),))


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """A program as its file describes it."""

    nodes: Sequence[Mapping[str, Any]]
    tensors: Mapping[str, Any]
    numbers: Mapping[str, Any]
    """Numbers that are computed from sizes."""
    constants: Mapping[str, _Values]
    inputs: Sequence[str]
    size_limits: Mapping[str, Any]
    multiples: Mapping[tuple[str, int], int]
    """By the input's name and its axis."""

    @classmethod
    def read(cls, archive: zipfile.ZipFile) -> "_Graph":
        """The graph in an open ``.pt2`` file."""
        records = {name.partition("/")[2]: name for name in archive.namelist()}
        model = json.loads(archive.read(records["models/model.json"]))
        module = model["graph_module"]
        specs = module["signature"]["input_specs"]
        inputs = [spec["user_input"]["arg"]["as_tensor"]["name"] for spec in specs if "user_input" in spec]
        return cls(
            nodes=module["graph"]["nodes"],
            tensors=module["graph"]["tensor_values"],
            numbers=module["graph"]["sym_int_values"],
            constants=dict(_constants(archive, records, specs)),
            inputs=inputs,
            size_limits=model["range_constraints"],
            multiples=_multiples(model.get("guards_code") or (), inputs),
        )

    def ranges(self) -> tuple[InputRange, ...]:
        """The range of each input."""
        limits = Limits()
        values: dict[str, _Values | None] = dict(self.constants)
        for name in self.inputs:
            if self.tensors[name]["dtype"] in INTEGERS:
                whole = Linear.of(Region(name))
                values[name] = _Values((Interval(whole, whole),), in_place=True)
        for node in self.nodes:
            call = _Call(self, node, values)
            for index, least, size in call.lookups():
                limits.require(index.intervals, least, size.plus(Linear(-1)))
            values.update(call.results())
        return tuple(self._range(name, limits) for name in self.inputs)

    def _range(self, name: str, limits: Limits) -> InputRange:
        sizes = self.shape(name)[1:]
        shortest = [self._shortest(size) for size in sizes]
        multiples = [self.multiples.get((name, axis)) for axis in range(1, len(sizes) + 1)]
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
            longest=(None, *(self._longest(size, limits) for size in sizes)),
            shortest=(None, *shortest) if any(shortest) else (),
            multiples=(None, *multiples) if any(multiples) else (),
        )

    def _longest(self, size: Linear, limits: Limits) -> int | None:
        symbol = _alone(size)
        exported = (self.size_limits.get(str(symbol)) or {}).get("max_val")
        return min((most for most in (exported, limits.highs.get(symbol)) if most is not None), default=None)

    def _shortest(self, size: Linear) -> int | None:
        """Below it the program, of which only one branch was exported, would take that branch all the same."""
        least = (self.size_limits.get(str(_alone(size))) or {}).get("min_val")
        return least if least is not None and least > EXPORTED_LEAST else None

    def shape(self, tensor: str) -> list[Linear]:
        """The sizes of a tensor."""
        return [self.number(size) for size in self.tensors[tensor]["sizes"]]

    def number(self, argument: Mapping[str, Any]) -> Linear:
        """A size, or a number that is computed from sizes. Raises ``ValueError`` if it is not linear."""
        ((kind, value),) = argument.items()
        if kind == "as_sym_int":
            return self.number(value)
        if kind == "as_name":
            return self.number(self.numbers[value])
        if kind == "as_expr":
            return _linear(ast.parse(value["expr_str"], mode="eval").body)
        if kind != "as_int":
            raise ValueError(f"{kind} is not a whole number")
        return Linear(int(value))


class _Call:
    """One node of the graph, with the known values of its arguments."""

    def __init__(self, graph: _Graph, node: Mapping[str, Any], values: Mapping[str, _Values | None]) -> None:
        self._graph, self._values, self._outputs = graph, values, node["outputs"]
        self._arguments: dict[str, Any] = {argument["name"]: argument["arg"] for argument in node["inputs"]}
        self._operator = node["target"].removeprefix("torch.ops.aten.").partition(".")[0]

    def lookups(self) -> Iterator[tuple[_Values, Linear, Linear]]:
        """The lookups of this call: the index, the lowest allowed index, and the size of the table."""
        operator, name = self._operator, LOOKUPS.get(self._operator)
        if operator in ("index", "index_put", "index_put_"):
            yield from self._indexed()
        elif name is not None and (index := self._tensor(name)) is not None:
            if operator == "one_hot":
                yield index, Linear(0), Linear(self._int("num_classes", -1))
            elif (table := self._shape("weight" if "embedding" in operator else "self")) is not None:
                axis = 0 if "embedding" in operator else self._int("dim", 0)
                yield index, Linear(0), table[axis]

    def _indexed(self) -> Iterator[tuple[_Values, Linear, Linear]]:
        """``table[i, j]``, which also takes negative numbers: they count from the end."""
        table = self._shape("self")
        (indices,) = self._arguments["indices"].values()
        names = [index["name"] if "name" in index else _tensor_name(index) for index in indices]
        if table is None or any(name and self._graph.tensors[name]["dtype"] == BOOL for name in names):
            return
        for name, size in zip(names, table, strict=False):
            if name is not None and (index := self._values.get(name)) is not None:
                yield index, size.times(-1), size

    def results(self) -> Iterator[tuple[str, _Values | None]]:
        """The known values of the tensors that the call returns."""
        rule = RULES.get(self._operator)
        try:
            values = None if rule is None else rule(self)
        except (ValueError, KeyError):  # an argument is of a kind that the rule does not know
            values = None
        if values is not None and len(values.intervals) > MOST_INTERVALS:
            values = None
        for output in self._outputs:
            if (name := _tensor_name(output)) is not None:
                is_flag = self._graph.tensors[name]["dtype"] == BOOL
                yield name, _between(0, Linear(1)) if is_flag else values

    # --- arguments --------------------------------------------------------------------------------------------

    def _given(self, name: str) -> Any:
        argument = self._arguments.get(name, {"as_none": True})
        return None if "as_none" in argument else argument

    def _tensor(self, name: str) -> _Values | None:
        tensor = _tensor_name(self._given(name))
        return None if tensor is None else self._values.get(tensor)

    def _tensors(self, name: str) -> list[_Values | None]:
        return [self._values.get(tensor["name"]) for tensor in self._arguments[name]["as_tensors"]]

    def _shape(self, name: str) -> list[Linear] | None:
        tensor = _tensor_name(self._given(name))
        try:
            return None if tensor is None else self._graph.shape(tensor)
        except ValueError:
            return None

    def _number(self, name: str, default: int) -> Linear:
        argument = self._given(name)
        return Linear(default) if argument is None else self._graph.number(argument)

    def _int(self, name: str, default: int) -> int:
        number = self._number(name, default)
        if number.terms:
            raise ValueError(f"{name} depends on sizes")
        return number.constant

    # --- rules ------------------------------------------------------------------------------------------------

    def same(self) -> _Values | None:
        """The same numbers at the same places."""
        return self._tensor("self")

    def moved(self) -> _Values | None:
        """The same numbers elsewhere."""
        values = self._tensor("self")
        return None if values is None else values._replace(in_place=False)

    def sliced(self) -> _Values | None:
        """Some of the numbers: ``slice``, ``select``, ``narrow``."""
        values = self._tensor("self")
        if values is None or not values.follows_input:
            return values
        axis, start = self._int("dim", 0), self._int("index" if self._operator == "select" else "start", 0)
        if self._operator == "slice":
            stop = self._int("end", TO_THE_END)
            if self._int("step", 1) != 1:
                return None
        else:
            stop = start + (1 if self._operator == "select" else self._int("length", 0))
            stop = TO_THE_END if stop == 0 else stop  # the last one, counted from the end
        is_all = start == 0 and stop >= TO_THE_END
        if is_all and self._operator == "slice":
            return values
        regions = {symbol for interval in values.intervals for end in interval if end for symbol, _ in end.terms}
        whole = next(iter(regions))
        if not values.in_place or axis < 1 or len(regions) != 1 or not isinstance(whole, Region) or whole.axis:
            return None
        part = Linear.of(Region(whole.input, axis, start, None if stop >= TO_THE_END else stop))
        return _Values((Interval(part, part),))

    def joined(self) -> _Values | None:
        """All numbers of several tensors: ``cat``, ``stack``."""
        parts = self._tensors("tensors")
        if any(part is None for part in parts):
            return None
        return _Values(tuple(interval for part in parts if part is not None for interval in part.intervals))

    def looked_up(self) -> _Values | None:
        """Any numbers of a table."""
        table = self._tensor("weight" if self._operator == "embedding" else "self")
        return None if table is None or table.follows_input else table

    def added(self) -> _Values | None:
        """``add``, ``sub`` and ``rsub``, with a number or a tensor, times ``alpha``."""
        left, right = self._tensor("self"), self._tensor("other")
        if left is not None and right is None and "as_tensor" not in self._arguments["other"]:
            other = self._number("other", 0)
            right = _Values((Interval(other, other),))
        if left is None or right is None:
            return None
        factor = self._int("alpha", 1) * (-1 if self._operator in ("sub", "rsub") else 1)
        if self._operator == "rsub":
            left, right = right, left
        sums = (a.plus(b.times(factor)) for a in left.intervals for b in right.intervals)
        return _Values(tuple(sums))

    def multiplied(self) -> _Values | None:
        """``mul`` with a number, or of two tensors that do not follow an input."""
        left, right = self._tensor("self"), self._tensor("other")
        if left is None:
            return None
        if right is None:
            if "as_tensor" in self._arguments["other"]:
                return None
            factor = self._int("other", 1)
            return _Values(tuple(interval.times(factor) for interval in left.intervals))
        if len(left.intervals) != 1 or len(right.intervals) != 1 or left.follows_input or right.follows_input:
            return None
        (ours,), (theirs,) = left.intervals, right.intervals
        if ours.high is None or theirs.high is None or not (ours.is_natural and theirs.is_natural):
            return None
        if ours.high.terms and theirs.high.terms:
            return None
        number, high = (ours.high, theirs.high) if not ours.high.terms else (theirs.high, ours.high)
        return _between(0, high.times(number.constant))

    def negated(self) -> _Values | None:
        """``neg``."""
        values = self._tensor("self")
        return None if values is None else _Values(tuple(interval.times(-1) for interval in values.intervals))

    def clamped(self) -> _Values | None:
        """``clamp`` to numbers."""
        values = self._tensor("self")
        low, high = (self._number(name, 0) if self._given(name) is not None else None for name in ("min", "max"))
        if low is not None and high is not None:
            return _Values((Interval(low, high),))
        if values is None:
            return _Values((Interval(low, high),))
        return _Values(
            tuple(
                Interval(interval.low if low is None else low, interval.high if high is None else high)
                for interval in values.intervals
            )
        )

    def cumulated(self) -> _Values | None:
        """``cumsum`` of numbers that are 0 or more."""
        values, shape = self._tensor("self"), self._shape("self")
        if values is None or shape is None or not all(interval.is_natural for interval in values.intervals):
            return None
        highs = [interval.high for interval in values.intervals]
        if any(high is None or high.terms for high in highs):
            return None
        most = max(high.constant for high in highs if high is not None)
        return _between(0, shape[self._int("dim", 0)].times(most))

    def counted(self) -> _Values | None:
        """``arange``."""
        if self._int("step", 1) < 1:
            return None
        start = self._number("start", 0)
        return _Values((Interval(start, self._number("end", 0).plus(Linear(-1))),))

    def filled(self) -> _Values | None:
        """``full``, ``zeros``, ``ones`` and similar."""
        kind = self._operator.removeprefix("new_").removesuffix("_like")
        value = {"zeros": Linear(0), "ones": Linear(1)}.get(kind)
        if value is None:
            value = self._number("s" if kind == "scalar_tensor" else "fill_value", 0)
        return _Values((Interval(value, value),))

    def chosen(self) -> _Values | None:
        """``where`` and ``masked_fill`` of values that do not follow an input."""
        if self._operator == "where":
            parts = [self._tensor("self"), self._tensor("other")]
        else:
            fill = self._number("value", 0)
            parts = [self._tensor("self"), _Values((Interval(fill, fill),))]
        if any(part is None or part.follows_input for part in parts):
            return None
        return _Values(tuple(interval for part in parts if part is not None for interval in part.intervals))

    def remainder(self) -> _Values | None:
        """``remainder`` of a division by a number above 0."""
        divisor = self._int("other", 0)
        return _between(0, Linear(divisor - 1)) if divisor > 0 else None


Rule = Callable[[_Call], _Values | None]
LOOKUPS = {
    **dict.fromkeys(("embedding", "embedding_bag", "_embedding_bag"), "indices"),
    **dict.fromkeys(("index_select", "index_add", "index_copy", "index_fill", "gather"), "index"),
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), "index"),
    "one_hot": "self",
}
"""The operators that look up values in a table, and their index argument."""
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        ("to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach", "lift_fresh_copy"), _Call.same
    ),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "unflatten"), _Call.moved),
    **dict.fromkeys(("expand", "expand_as", "repeat", "permute", "transpose", "t", "flip", "roll"), _Call.moved),
    **dict.fromkeys(("slice", "select", "narrow"), _Call.sliced),
    **dict.fromkeys(("cat", "stack"), _Call.joined),
    **dict.fromkeys(("gather", "index_select", "index", "embedding"), _Call.looked_up),
    **dict.fromkeys(("add", "sub", "rsub"), _Call.added),
    "mul": _Call.multiplied,
    "neg": _Call.negated,
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), _Call.clamped),
    "cumsum": _Call.cumulated,
    "arange": _Call.counted,
    **dict.fromkeys(("full", "full_like", "new_full", "scalar_tensor"), _Call.filled),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones"), _Call.filled),
    **dict.fromkeys(("where", "masked_fill"), _Call.chosen),
    "remainder": _Call.remainder,
}
"""How the values of an operator's result follow from its arguments; the results of other operators are unknown."""


def _multiples(conditions: Sequence[str], inputs: Sequence[str]) -> dict[tuple[str, int], int]:
    """What sizes of inputs must be multiples of, so that the conditions hold under which a program was exported."""
    found: dict[tuple[str, int], int] = {}
    for condition in conditions:
        if match := MULTIPLE.fullmatch(condition):
            number, axis, divisor = map(int, match.groups())
            found[inputs[number], axis] = lcm(divisor, found.get((inputs[number], axis), 1))
    return found


def _tensor_name(argument: Any) -> str | None:
    """The tensor that an argument or an output names, if it is one."""
    holder = argument.get("as_tensor") if isinstance(argument, dict) else None
    return None if holder is None else str(holder["name"])


def _alone(size: Linear) -> Hashable | None:
    """The symbol, if a size is nothing but one."""
    if size.constant or len(size.terms) != 1:
        return None
    ((symbol, factor),) = size.terms
    return symbol if factor == 1 else None


def _linear(expression: ast.expr) -> Linear:
    """A size as sympy's ``srepr`` writes it. Raises ``ValueError`` if it is not linear."""
    match expression:
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))]):
            return Linear.of(name)
        case ast.Call(func=ast.Name(id="Integer"), args=[number]):
            return Linear(int(ast.literal_eval(number)))
        case ast.Call(func=ast.Name(id="Add"), args=terms):
            total = Linear(0)
            for term in terms:
                total = total.plus(_linear(term))
            return total
        case ast.Call(func=ast.Name(id="Mul"), args=[left, right]):
            first, second = _linear(left), _linear(right)
            if not first.terms:
                return second.times(first.constant)
            if not second.terms:
                return first.times(second.constant)
    raise ValueError(f"the size {ast.unparse(expression)[:80]} is not linear")


def _constants(
    archive: zipfile.ZipFile, records: Mapping[str, str], specs: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, _Values]]:
    """The least and the greatest number of each tensor of integers that the program holds."""
    facts: dict[str, tuple[str, Any]] = {}
    for folder, config in (("constants", "model_constants_config"), ("weights", "model_weights_config")):
        listed = json.loads(archive.read(records[f"data/{folder}/{config}.json"]))["config"]
        facts.update((name, (folder, fact)) for name, fact in listed.items())
    for spec in specs:
        (about,) = spec.values()
        name = about.get("buffer_name") or about.get("tensor_constant_name")
        if name not in facts or facts[name][1]["use_pickle"]:
            continue
        folder, fact = facts[name]
        dtype = INTEGERS.get(fact["tensor_meta"]["dtype"])
        record = archive.getinfo(records[f"data/{folder}/{fact['path_name']}"])
        if dtype is not None and 0 < record.file_size <= MOST_CONSTANTS * np.dtype(dtype).itemsize:
            numbers = np.frombuffer(archive.read(record), dtype)
            yield about["arg"]["name"], _between(int(numbers.min()), Linear(int(numbers.max())))
