"""nested: values of every container kind go flat and come back."""

import json
import sys
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corewise.common import nested
from corewise.common.errors import InputError
from corewise.common.nested import Record, Structure

Point = namedtuple("Point", "x y")


@dataclass(frozen=True)
class Output:
    logits: Any
    scale: float = 1.0


@dataclass
class OrderedOutput(OrderedDict):  # type: ignore[type-arg]
    """As transformers' ModelOutput: a dataclass that is an OrderedDict of the fields that are not None."""

    logits: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        for name in ("logits", "hidden"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


def array(value: float = 0.0) -> np.ndarray:
    return np.full((2, 3), value, np.float32)


def through_json(structure: Structure) -> Structure:
    return Structure.from_data(json.loads(json.dumps(structure.to_data())))


constants = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
values = st.recursive(
    constants | st.integers(0, 9).map(array),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3).map(OrderedDict)
        | st.tuples(inner, inner).map(Point._make)
        | inner.map(Output)
    ),
    max_leaves=8,
)


@given(values)
def test_what_goes_flat_comes_back_equal_and_of_its_class(value: Any) -> None:
    leaves, structure = nested.flatten(value)
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
    back, again = nested.flatten(nested.unflatten(through_json(structure), leaves))
    assert again == structure
    for others in (back, nested.match(structure, value)):
        assert all(one is other for one, other in zip(leaves, others, strict=True))
    assert len(set(nested.leaf_names(structure))) == len(leaves)


def test_model_output_comes_back_as_its_class_without_its_none_fields() -> None:
    value = OrderedOutput(logits=array(1))
    leaves, structure = nested.flatten(value)
    assert structure.keys == ("logits",)
    back = nested.unflatten(structure, leaves)
    assert type(back) is OrderedOutput
    assert back.logits is value.logits
    assert back["logits"] is value.logits
    assert back.hidden is None


def test_absent_classes_come_back_as_record_and_namedtuple_without_an_import() -> None:
    structure = Structure("object", "wave:Absent", ("logits", "scale"), (Structure("leaf"), Structure("leaf")))
    sys.modules.pop("wave", None)
    record = nested.unflatten(structure, [1, 2])
    assert "wave" not in sys.modules
    assert isinstance(record, Record)
    assert (record.logits, record["scale"], record[0], record[-1]) == (1, 2, 1, 2)
    with pytest.raises(AttributeError, match="no field 'missing'; there are logits, scale"):
        _ = record.missing
    point = nested.unflatten(Structure("tuple", "wave:Pair", ("a", "b"), structure.children), [1, 2])
    assert point == (1, 2)
    assert (point.a, point.b) == (1, 2)


@pytest.mark.parametrize("name", ["subprocess:Popen", "os:system", "builtins:dict", "collections:Counter", ":", "json"])
def test_only_dataclasses_are_ever_called(name: str) -> None:
    structure = Structure("object", name, ("args",), (Structure("constant", value="touch /tmp/never"),))
    assert type(nested.unflatten(structure, [])) is Record


@pytest.mark.parametrize("leaves", [[], [1], [1, 2, 3]])
def test_a_wrong_number_of_leaves_is_refused(leaves: list[int]) -> None:
    _, structure = nested.flatten([array(), array()])
    with pytest.raises(ValueError, match=r"too (few|many)"):
        nested.unflatten(structure, leaves)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"ids": 1, "mask": array()}, 'inputs["ids"] is 1, but a tensor is expected; give a tensor or an array'),
        ({"ids": array()}, 'inputs["mask"] is missing; give ids, mask'),
        ({"ids": array(), "mask": array(), "extra": 1}, 'inputs["extra"] is not expected; give ids, mask'),
        ([array()], "inputs is a list, but a dict is expected"),
        (array(), "inputs is a tensor, but a dict is expected"),
        (None, "inputs is None, but a dict is expected"),
    ],
)
def test_a_value_of_another_structure_is_named_by_its_path(value: Any, message: str) -> None:
    _, structure = nested.flatten({"ids": array(), "mask": array()})
    with pytest.raises(InputError) as caught:
        nested.match(structure, value)
    assert str(caught.value) == message


def test_constants_must_be_equal_in_value_and_type() -> None:
    _, structure = nested.flatten([array(), {"k": 1}])
    assert len(nested.match(structure, [array(), {"k": 1}])) == 1
    for other in (2, True, 1.0, None):
        with pytest.raises(InputError, match=r'inputs\[1\]\["k"\] is .*, but 1 is expected; constants'):
            nested.match(structure, [array(), {"k": other}])


def test_keyword_arguments_match_in_any_order() -> None:
    first, second = array(1), array(2)
    _, structure = nested.flatten(((first,), {"a": first, "b": second}))
    leaves = nested.match_call(structure, [first], {"b": second, "a": first})
    assert [leaf is array for leaf, array in zip(leaves, [first, first, second], strict=True)] == [True] * 3
    with pytest.raises(InputError, match=r'^inputs\["b"\] is missing'):
        nested.match_call(structure, [first], {"a": first})
    with pytest.raises(InputError, match=r"^inputs\[0\] is missing"):
        nested.match_call(structure, [], {"a": first, "b": second})


@pytest.mark.parametrize("value", [object(), {1.5: array()}, {"a": {1, 2}}, [array, b"bytes"]])
def test_what_is_no_container_is_refused(value: Any) -> None:
    with pytest.raises(InputError):
        nested.flatten(value)


def test_the_error_names_the_place_of_a_foreign_object() -> None:
    with pytest.raises(InputError, match=r'^output\["cache"\]\[0\] is an object, which is not a tensor'):
        nested.flatten({"cache": [object()]}, "output")


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {"kind": "leaf"},
        {"kind": "code", "type": "", "keys": [], "children": [], "value": None},
        {"kind": "leaf", "type": 3, "keys": [], "children": [], "value": None},
        {"kind": "list", "type": "", "keys": [0], "children": [], "value": None},
        {"kind": "list", "type": "", "keys": [[]], "children": [Structure("leaf").to_data()], "value": None},
        {"kind": "constant", "type": "", "keys": [], "children": [], "value": []},
    ],
)
def test_damaged_structure_data_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="structure"):
        Structure.from_data(data)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (array(), ("output_0",)),
        ((array(), array()), ("output_0", "output_1")),
        ({"logits": array(), "states": (array(), array())}, ("logits", "states_0", "states_1")),
        (Output(array()), ("logits",)),
        ([{"a": array()}, {"a": array()}], ("a", "a_1")),
        ({"a.b-c": array()}, ("a_b_c",)),
        (None, ()),
    ],
)
def test_leaf_names(value: Any, names: tuple[str, ...]) -> None:
    _, structure = nested.flatten(value)
    assert nested.leaf_names(structure) == names


def test_input_names_use_the_parameters_of_the_call() -> None:
    _, structure = nested.flatten(((array(), [array(), array()], array()), {"mask": array()}))
    assert nested.input_names(structure, ["x", "pair"]) == ("x", "pair_0", "pair_1", "input_3", "mask")
    assert nested.input_names(structure)[0] == "input_0"
