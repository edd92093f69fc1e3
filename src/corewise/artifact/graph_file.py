"""The graph of an exported program as its ``.pt2`` file describes it, read without torch.

The names are those of torch's ``_export/serde/schema.py``.
"""

import ast
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import numpy as np

from corewise.artifact.intervals import Linear, Values

MOST_CONSTANTS = 1 << 20
"""The values of integer tensors with more elements are not read."""
MULTIPLE = re.compile(r"\(?L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\] % (\d+)\)? == 0")
"""A condition that held when the program was exported: of an input's number, an axis, and what its size divides by."""
BOOL = 12
INTEGERS = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", BOOL: "u1"}
"""torch's numbers of the integer dtypes, with numpy's names."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A program as its file describes it."""

    nodes: Sequence[Mapping[str, Any]]
    tensors: Mapping[str, Any]
    numbers: Mapping[str, Any]
    """Numbers that are computed from sizes."""
    constants: Mapping[str, Values]
    inputs: Sequence[str]
    size_limits: Mapping[str, Any]
    multiples: Mapping[tuple[str, int], int]
    """What a size must be a multiple of, by the input's name and the axis."""

    @classmethod
    def read(cls, archive: zipfile.ZipFile) -> "Graph":
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


def _multiples(conditions: Sequence[str], inputs: Sequence[str]) -> dict[tuple[str, int], int]:
    """What sizes of inputs must be multiples of, so that the conditions hold under which a program was exported."""
    found: dict[tuple[str, int], int] = {}
    for condition in conditions:
        if match := MULTIPLE.fullmatch(condition):
            number, axis, divisor = map(int, match.groups())
            found[inputs[number], axis] = lcm(divisor, found.get((inputs[number], axis), 1))
    return found


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
) -> Iterator[tuple[str, Values]]:
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
            yield about["arg"]["name"], Values.between(int(numbers.min()), Linear(int(numbers.max())))
