"""What each operator of a program looks up in tables, and how the numbers of its result follow from its arguments.

A value that depends on a condition (``where``, ``masked_fill``, a product with a mask) is not followed further, because
the condition may make it valid.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from corewise.artifact.graph_file import BOOL, Graph
from corewise.artifact.intervals import Interval, Linear, Region, Values

MOST_INTERVALS = 32
"""The numbers of a tensor with more intervals count as unknown."""
TO_THE_END = 1 << 62
"""A slice that stops here or later stops with its dimension."""


class Call:
    """One node of the graph, with the known values of its arguments."""

    def __init__(self, graph: Graph, node: Mapping[str, Any], values: Mapping[str, Values | None]) -> None:
        self._graph, self._values, self._outputs = graph, values, node["outputs"]
        self._arguments: dict[str, Any] = {argument["name"]: argument["arg"] for argument in node["inputs"]}
        self._operator = node["target"].removeprefix("torch.ops.aten.").partition(".")[0]

    def lookups(self) -> Iterator[tuple[Values, Linear, Linear]]:
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

    def _indexed(self) -> Iterator[tuple[Values, Linear, Linear]]:
        """``table[i, j]``, which also takes negative numbers: they count from the end."""
        table = self._shape("self")
        (indices,) = self._arguments["indices"].values()
        names = [index["name"] if "name" in index else _tensor_name(index) for index in indices]
        if table is None or any(name and self._graph.tensors[name]["dtype"] == BOOL for name in names):
            return
        for name, size in zip(names, table, strict=False):
            if name is not None and (index := self._values.get(name)) is not None:
                yield index, size.times(-1), size

    def results(self) -> Iterator[tuple[str, Values | None]]:
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
                yield name, Values.between(0, Linear(1)) if is_flag else values

    # --- arguments --------------------------------------------------------------------------------------------

    def _given(self, name: str) -> Any:
        argument = self._arguments.get(name, {"as_none": True})
        return None if "as_none" in argument else argument

    def _tensor(self, name: str) -> Values | None:
        tensor = _tensor_name(self._given(name))
        return None if tensor is None else self._values.get(tensor)

    def _tensors(self, name: str) -> list[Values | None]:
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

    def same(self) -> Values | None:
        """The same numbers at the same places."""
        return self._tensor("self")

    def moved(self) -> Values | None:
        """The same numbers elsewhere."""
        values = self._tensor("self")
        return None if values is None else values._replace(in_place=False)

    def sliced(self) -> Values | None:
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
        return Values((Interval(part, part),))

    def joined(self) -> Values | None:
        """All numbers of several tensors: ``cat``, ``stack``."""
        parts = self._tensors("tensors")
        if any(part is None for part in parts):
            return None
        return Values(tuple(interval for part in parts if part is not None for interval in part.intervals))

    def looked_up(self) -> Values | None:
        """Any numbers of a table."""
        table = self._tensor("weight" if self._operator == "embedding" else "self")
        return None if table is None or table.follows_input else table

    def added(self) -> Values | None:
        """``add``, ``sub`` and ``rsub``, with a number or a tensor, times ``alpha``."""
        left, right = self._tensor("self"), self._tensor("other")
        if left is not None and right is None and "as_tensor" not in self._arguments["other"]:
            other = self._number("other", 0)
            right = Values((Interval(other, other),))
        if left is None or right is None:
            return None
        factor = self._int("alpha", 1) * (-1 if self._operator in ("sub", "rsub") else 1)
        if self._operator == "rsub":
            left, right = right, left
        sums = (a.plus(b.times(factor)) for a in left.intervals for b in right.intervals)
        return Values(tuple(sums))

    def multiplied(self) -> Values | None:
        """``mul`` with a number, or of two tensors that do not follow an input."""
        left, right = self._tensor("self"), self._tensor("other")
        if left is None:
            return None
        if right is None:
            if "as_tensor" in self._arguments["other"]:
                return None
            factor = self._int("other", 1)
            return Values(tuple(interval.times(factor) for interval in left.intervals))
        if len(left.intervals) != 1 or len(right.intervals) != 1 or left.follows_input or right.follows_input:
            return None
        (ours,), (theirs,) = left.intervals, right.intervals
        if ours.high is None or theirs.high is None or not (ours.is_natural and theirs.is_natural):
            return None
        if ours.high.terms and theirs.high.terms:
            return None
        number, high = (ours.high, theirs.high) if not ours.high.terms else (theirs.high, ours.high)
        return Values.between(0, high.times(number.constant))

    def negated(self) -> Values | None:
        """``neg``."""
        values = self._tensor("self")
        return None if values is None else Values(tuple(interval.times(-1) for interval in values.intervals))

    def clamped(self) -> Values | None:
        """``clamp`` to numbers."""
        values = self._tensor("self")
        low, high = (self._number(name, 0) if self._given(name) is not None else None for name in ("min", "max"))
        if low is not None and high is not None:
            return Values((Interval(low, high),))
        if values is None:
            return Values((Interval(low, high),))
        return Values(
            tuple(
                Interval(interval.low if low is None else low, interval.high if high is None else high)
                for interval in values.intervals
            )
        )

    def cumulated(self) -> Values | None:
        """``cumsum`` of numbers that are 0 or more."""
        values, shape = self._tensor("self"), self._shape("self")
        if values is None or shape is None or not all(interval.is_natural for interval in values.intervals):
            return None
        highs = [interval.high for interval in values.intervals]
        if any(high is None or high.terms for high in highs):
            return None
        most = max(high.constant for high in highs if high is not None)
        return Values.between(0, shape[self._int("dim", 0)].times(most))

    def counted(self) -> Values | None:
        """``arange``."""
        if self._int("step", 1) < 1:
            return None
        start = self._number("start", 0)
        return Values((Interval(start, self._number("end", 0).plus(Linear(-1))),))

    def filled(self) -> Values | None:
        """``full``, ``zeros``, ``ones`` and similar."""
        kind = self._operator.removeprefix("new_").removesuffix("_like")
        value = {"zeros": Linear(0), "ones": Linear(1)}.get(kind)
        if value is None:
            value = self._number("s" if kind == "scalar_tensor" else "fill_value", 0)
        return Values((Interval(value, value),))

    def chosen(self) -> Values | None:
        """``where`` and ``masked_fill`` of values that do not follow an input."""
        if self._operator == "where":
            parts = [self._tensor("self"), self._tensor("other")]
        else:
            fill = self._number("value", 0)
            parts = [self._tensor("self"), Values((Interval(fill, fill),))]
        if any(part is None or part.follows_input for part in parts):
            return None
        return Values(tuple(interval for part in parts if part is not None for interval in part.intervals))

    def remainder(self) -> Values | None:
        """``remainder`` of a division by a number above 0."""
        divisor = self._int("other", 0)
        return Values.between(0, Linear(divisor - 1)) if divisor > 0 else None


Rule = Callable[[Call], Values | None]
LOOKUPS = {
    **dict.fromkeys(("embedding", "embedding_bag", "_embedding_bag"), "indices"),
    **dict.fromkeys(("index_select", "index_add", "index_copy", "index_fill", "gather"), "index"),
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), "index"),
    "one_hot": "self",
}
"""The operators that look up values in a table, and their index argument."""
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        ("to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach", "lift_fresh_copy"), Call.same
    ),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "unflatten"), Call.moved),
    **dict.fromkeys(("expand", "expand_as", "repeat", "permute", "transpose", "t", "flip", "roll"), Call.moved),
    **dict.fromkeys(("slice", "select", "narrow"), Call.sliced),
    **dict.fromkeys(("cat", "stack"), Call.joined),
    **dict.fromkeys(("gather", "index_select", "index", "embedding"), Call.looked_up),
    **dict.fromkeys(("add", "sub", "rsub"), Call.added),
    "mul": Call.multiplied,
    "neg": Call.negated,
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), Call.clamped),
    "cumsum": Call.cumulated,
    "arange": Call.counted,
    **dict.fromkeys(("full", "full_like", "new_full", "scalar_tensor"), Call.filled),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones"), Call.filled),
    **dict.fromkeys(("where", "masked_fill"), Call.chosen),
    "remainder": Call.remainder,
}
"""How the values of an operator's result follow from its arguments; the results of other operators are unknown."""


def _tensor_name(argument: Any) -> str | None:
    """The tensor that an argument or an output names, if it is one."""
    holder = argument.get("as_tensor") if isinstance(argument, dict) else None
    return None if holder is None else str(holder["name"])
