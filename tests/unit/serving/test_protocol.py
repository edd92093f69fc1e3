"""The Open Inference Protocol in JSON and bytes: what goes in comes out, and what is no request is told as such."""

import json
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from corewise.records.build import TensorSpec
from corewise.serving import files, logs, protocol
from corewise.serving.json_body import parse, render
from corewise.serving.protocol import DATATYPES, MOST_STRINGS, Asked, ProtocolError

IMAGE = TensorSpec(name="x", dtype="float32", shape=(None, 3))
IDS = TensorSpec(name="ids", dtype="int64", shape=(None, None))
MASK = TensorSpec(name="mask", dtype="bool", shape=(None, None))
SCORES = TensorSpec(name="scores", dtype="float32", shape=(None, 2))
OTHERS = TensorSpec(name="others", dtype="int64", shape=(None,))
NUMBERS = [name for name in DATATYPES if name != "object"]


def request(*inputs, **more):
    return json.dumps({"inputs": list(inputs), **more}).encode()


def tensor(name="x", shape=(1, 3), datatype="FP32", **more):
    return {"name": name, "shape": list(shape), "datatype": datatype, **more}


def assert_told(body, length=None, inputs=(IMAGE,), outputs=(SCORES, OTHERS), match=""):
    with pytest.raises(ProtocolError, match=match) as caught:
        parse(body, length, inputs, outputs)
    return caught.value


def finite(name):
    elements = arrays.from_dtype(np.dtype(name), allow_nan=False, allow_infinity=False)
    return arrays.arrays(name, arrays.array_shapes(min_dims=1, max_dims=3), elements=elements)


@given(st.sampled_from(NUMBERS).flatmap(finite))
def test_a_tensor_goes_through_bytes_and_json(value):
    spec = TensorSpec(name="x", dtype=value.dtype.name, shape=(None,) * value.ndim)
    described = tensor(shape=value.shape, datatype=DATATYPES[value.dtype.name])
    data = protocol.to_bytes(value)
    head = request({**described, "parameters": {"binary_data_size": len(data)}})
    (found,) = parse(head + data, len(head), [spec], [SCORES]).inputs
    np.testing.assert_array_equal(found, value)
    assert found.dtype == value.dtype
    for listed in (value.tolist(), value.reshape(-1).tolist()):
        (found,) = parse(request({**described, "data": listed}), None, [spec], [SCORES]).inputs
        np.testing.assert_array_equal(found, value)
        assert found.dtype == value.dtype


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=5))
def test_strings_go_through_bytes(items):
    spec = TensorSpec(name="x", dtype="object", shape=(None,))
    data = protocol.to_bytes(protocol.objects(items, [len(items)]))
    head = request(tensor(shape=[len(items)], datatype="BYTES", parameters={"binary_data_size": len(data)}))
    (found,) = parse(head + data, len(head), [spec], [SCORES]).inputs
    assert found.tolist() == items


def test_strings_come_as_json():
    spec = TensorSpec(name="x", dtype="object", shape=(None,))
    (found,) = parse(request(tensor(shape=[2], datatype="BYTES", data=["a", "ü"])), None, [spec], [SCORES]).inputs
    assert found.tolist() == [b"a", "ü".encode()]
    assert_told(request(tensor(shape=[1], datatype="BYTES", data=[1])), inputs=[spec], match="are not BYTES")


def test_texts_in_place_of_inputs_are_told_by_their_names():
    text, pair = (TensorSpec(name=name, dtype="object", shape=(None,)) for name in ("text", "text_pair"))

    def told(instead, *names, data="a"):
        body = request(*(tensor(name, [1], "BYTES", data=[data]) for name in names))
        with pytest.raises(ProtocolError) as caught:
            parse(body, None, [IDS], [SCORES], [instead])
        return str(caught.value)

    assert told([text], "text", "text_pair") == "there is no input 'text_pair'; the model has text"
    assert told([text, pair], "text_pair") == "the input text is missing"
    assert told([text], "ids", "text") == "there is no input 'ids'; the model has text"
    # json.dumps writes it as a client of Python does that read a broken file.
    assert told([text], "text", data="a \ud800 b") == "the request cannot be read: it has half of a surrogate pair"


@pytest.mark.parametrize("is_binary", [True, False])
def test_more_strings_than_are_read_at_once_are_refused(is_binary):
    spec = TensorSpec(name="x", dtype="object", shape=(None,))
    for count in (MOST_STRINGS, MOST_STRINGS + 1):
        data = bytes(4 * count) if is_binary else b""
        more = {"parameters": {"binary_data_size": len(data)}} if is_binary else {"data": [""] * count}
        head = request(tensor(shape=[count], datatype="BYTES", **more))
        length = len(head) if is_binary else None
        if count == MOST_STRINGS:
            assert len(parse(head + data, length, [spec], [SCORES]).inputs[0]) == count
        else:
            told = assert_told(head + data, length, inputs=[spec], match="has 8193 strings; send at most 8192")
            assert told.status == 413


def test_what_is_no_form_is_told_and_not_logged(caplog, monkeypatch):
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)  # it would take the place of caplog's
    logs.to_stderr("info")
    for boundary in ("b" * 300, "b"):
        with pytest.raises(ProtocolError, match="the form cannot be read"):
            files.content(b"--x", f"multipart/form-data; boundary={boundary}", "image")
    assert not caplog.records


HALF = "the request cannot be read: it has half of a surrogate pair"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (rb'{"id": "\ud83d"}', HALF),
        (rb'{"id": "\ude00"}', HALF),
        (rb'{"id": "\\\ud83d"}', HALF),
        (rb'{"id": "\ud83d and more"}', HALF),
        (rb'{"inputs": 5, "id":"\\ud83d x"}', "the request cannot be read: Expected `array`, got `int`"),
        (rb'{"id":"\\ud83d"', "the request cannot be read: Input data was truncated"),
    ],
)
def test_half_of_a_surrogate_pair_is_told_where_it_is_one(body, told):
    assert_told(body, match=told)


def test_half_of_a_surrogate_pair_is_told_beside_a_file_too():
    with pytest.raises(ProtocolError, match="half of a surrogate pair"):
        files.content(rb'{"audio":"\ud83d"}', "application/json", "audio")


def test_numbers_beyond_the_datatype_are_told():
    (found,) = parse(request(tensor(data=[3.4e38, -1, 0])), None, [IMAGE], [SCORES]).inputs
    assert np.isfinite(found).all()
    assert_told(request(tensor(data=[0, -1e39, 1])), match=r"the input x are not FP32: -1e\+39 is out of its range")
    half = TensorSpec(name="x", dtype="float16", shape=(None,))
    many = tensor(shape=[50_000], datatype="FP16", data=[1.0] * 49_999 + [70_000])
    assert_told(request(many), inputs=[half], match="the input x are not FP16: 70000.0 is out of its range")


def test_inputs_come_in_the_models_order():
    body = request(tensor("mask", (1, 2), "BOOL", data=[True, False]), tensor("ids", (1, 2), "INT64", data=[[5, 6]]))
    ids, mask = parse(body, None, [IDS, MASK], [SCORES]).inputs
    assert (ids.tolist(), mask.tolist()) == ([[5, 6]], [[True, False]])


def test_what_a_request_may_ask():
    body = request(
        tensor(data=[1, 2, 3]),
        id="a",
        parameters={"timeout": 5e4, "priority": 3, "binary_data_output": True},
        outputs=[{"name": "others", "parameters": {"binary_data": False}}, {"name": "scores"}],
    )
    found = parse(body, None, [IMAGE], [SCORES, OTHERS])
    assert (found.id, found.timeout_s, found.priority) == ("a", 0.05, 47)
    assert found.outputs == (Asked(name="others"), Asked(name="scores", binary=True))
    plain = parse(request(tensor(data=[1, 2, 3])), None, [IMAGE], [SCORES, OTHERS])
    assert plain.outputs == (Asked(name="scores"), Asked(name="others"))
    assert (plain.id, plain.timeout_s, plain.priority) == (None, None, 0)


def test_a_raw_body_is_the_one_input():
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = parse(value.tobytes(), 0, [IMAGE], [SCORES])
    np.testing.assert_array_equal(found.inputs[0], value)
    assert found.outputs == (Asked(name="scores", binary=True),)
    assert_told(value.tobytes()[:-1], 0, match="has 23 bytes, but its shape needs 12")
    assert_told(b"", 0, match="has 0 bytes")
    assert_told(value.tobytes(), 0, inputs=[IDS], match="without JSON needs a model of one input of known shape")


def test_an_answer_is_json_or_json_and_bytes():
    outputs = {"scores": np.array([[0.5, np.nan]], np.float32), "others": np.array([7], np.int64)}
    asked = parse(request(tensor(data=[1, 2, 3]), id="b"), None, [IMAGE], [SCORES, OTHERS])
    parts, length = render("m", "1", asked, outputs)
    found = json.loads(b"".join(parts))
    assert length is None
    assert (found["model_name"], found["model_version"], found["id"]) == ("m", "1", "b")
    assert found["outputs"][1] == {"name": "others", "datatype": "INT64", "shape": [1], "data": [7]}
    assert found["outputs"][0]["data"] == [0.5, None]
    body = request(tensor(data=[1, 2, 3]), outputs=[{"name": "scores", "parameters": {"binary_data": True}}])
    parts, length = render("m", None, parse(body, None, [IMAGE], [SCORES, OTHERS]), outputs)
    text, data = b"".join(parts)[:length], b"".join(parts)[length:]
    head = json.loads(text)
    assert "model_version" not in head
    assert "id" not in head
    assert head["outputs"][0]["parameters"] == {"binary_data_size": 8}
    np.testing.assert_array_equal(np.frombuffer(data, np.float32), outputs["scores"][0])


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"", "cannot be read"),
        (b"[]", "cannot be read: Expected `object`"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"inputs": 1}', "cannot be read: Expected"),
        (b'{"inputs": [1]}', "cannot be read: Expected"),
        (request(), "the input x is missing"),
        (request(tensor("y")), "there is no input 'y'; the model has x"),
        (request({"shape": [1, 3]}), "missing required field `name`"),
        (request(tensor(data=[1, 2, 3]), tensor(data=[1, 2, 3])), "is given twice"),
        (request(tensor(shape=[3], data=[1, 2, 3])), r"has the shape \[3\], the model takes \[-1, 3\]"),
        (request(tensor(shape=[0, 3], data=[])), "has the shape"),
        (request(tensor(shape=[-1, 3], data=[1, 2, 3])), "has the shape"),
        (request(tensor(shape=[1, True], data=[1])), "Expected `int`, got `bool`"),
        (request(tensor(shape=[1, 3.0], data=[1])), "Expected `int`, got `float`"),
        (request(tensor(shape=[2**39, 3], data=[1])), "do not have the shape"),
        (request(tensor(shape=[2**62, 3], data=[1])), "has another shape, the model takes"),
        (
            b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [9e4000, 3], "data": [1]}]}',
            "Number out of range",
        ),
        (request(tensor(shape=[10**4000, 3], data=[1])), "has another shape, the model takes"),
        (request(tensor("\ud800")), "cannot be read"),
        (request(tensor(datatype="\ud800", data=[1, 2, 3])), "cannot be read"),
        (b'"' + b'\\"' * 2_000_000, "a string of the request does not end"),
        (request(tensor(datatype="FP64", data=[1, 2, 3])), "is FP64, the model takes FP32"),
        (request(tensor(datatype=None, data=[1, 2, 3])), "Expected `str`, got `null`"),
        (request(tensor(data=["1", "2", "3"])), "are not FP32"),
        (request(tensor(data=["9" * 10**6, "2", "3"])), "are not FP32|is too long"),
        (request(tensor(data=[[1, 2], [3]])), "do not have the shape"),
        (request(tensor(data=[None, 2, 3])), "are not FP32"),
        (request(tensor(data=[10**400, 2, 3])), "are not FP32"),
        (request(tensor()), "has no data"),
        (request(tensor(data=[1, 2])), "do not have the shape"),
        (request(tensor(parameters=3)), "Expected `object`, got `int`"),
        (request(tensor(parameters={"binary_data_size": 12})), "claims more bytes than there are"),
        (request(tensor(parameters={"binary_data_size": -1})), "claims more bytes"),
        (request(tensor(data=[1, 2, 3], parameters={"binary_data_size": 0})), "has both"),
        (request(tensor(data=[1, 2, 3]), id=5), "Expected `str | null`, got `int`"),
        (request(tensor(data=[1, 2, 3]), id="x" * 300), "length <= 256"),
        (request(tensor(data=[1, 2, 3]), parameters=[]), "Expected `object`, got `array`"),
        (request(tensor(data=[1, 2, 3]), parameters={"timeout": 0}), "timeout is not a number"),
        (request(tensor(data=[1, 2, 3]), parameters={"timeout": float("inf")}), "cannot be read"),
        (request(tensor(data=[1, 2, 3]), parameters={"timeout": 10**400}), "timeout is not a number"),
        (request(tensor(data=[1, 2, 3]), parameters={"priority": 1.5}), "priority is not a whole number"),
        (request(tensor(data=[1, 2, 3]), parameters={"priority": 10**30}), "priority is not a whole number"),
        (request(tensor(data=[1, 2, 3]), parameters={"priority": -1}), "from 0 to 100; give 1 for the most urgent"),
        (request(tensor(data=[1, 2, 3]), parameters={"binary_data_output": 1}), "binary_data_output is not a bool"),
        (request(tensor(data=[1, 2, 3]), outputs=[{"name": "z"}]), "there is no output 'z'; the model has scores"),
        (request(tensor(data=[1, 2, 3]), outputs=[{"name": "scores"}] * 2), "is asked for twice"),
        (request(tensor(data=[1, 2, 3]), outputs=[{}]), "missing required field `name`"),
        (request(*[tensor(data=[1, 2, 3])] * 65), "length <= 64"),
        (b'{"inputs": ' + b"[" * 100_000, "Expected `object`, got `array`"),
        (b'{"a":' * 10_000, "nests too deeply"),
    ],
)
def test_what_is_no_request_is_told(body, match):
    assert assert_told(body, match=match).status == 400


def test_binary_requests_are_compared_with_their_claims():
    head = request(tensor(parameters={"binary_data_size": 12}))
    data = np.arange(3, dtype=np.float32).tobytes()
    assert_told(head + data, len(head) + 20, match="Inference-Header-Content-Length is")
    assert_told(head + data + b"1", len(head), match="1 bytes belong to no input")
    short = request(tensor(shape=(2, 3), parameters={"binary_data_size": 12}))
    assert_told(short + data, len(short), match="has 12 bytes, but its shape needs 24")
    huge = request(tensor(shape=(2**39, 3), parameters={"binary_data_size": 12}))
    assert_told(huge + data, len(huge), match="but its shape needs")
    spec = TensorSpec(name="x", dtype="object", shape=(None,))
    for broken in (b"\xff\xff\xff\xff", b"\x01\x00", b"\x02\x00\x00\x00a"):
        head = request(tensor(shape=[1], datatype="BYTES", parameters={"binary_data_size": len(broken)}))
        assert_told(head + broken, len(head), inputs=[spec], match="ends after its data")


def test_integers_must_fit():
    small = TensorSpec(name="x", dtype="uint8", shape=(None,))
    assert_told(request(tensor(shape=[1], datatype="UINT8", data=[256])), inputs=[small], match="from 0 to 255")
    assert_told(request(tensor(shape=[1], datatype="UINT8", data=[-1])), inputs=[small], match="are not UINT8")
    assert_told(request(tensor(shape=[1], datatype="UINT8", data=[1.5])), inputs=[small], match="are not UINT8")
    assert_told(request(tensor("mask", (1, 1), "BOOL", data=[1])), inputs=[MASK], match="Expected `bool`")


def test_any_byte_but_zero_is_true():
    head = request(tensor("mask", (1, 3), "BOOL", parameters={"binary_data_size": 3}))
    (found,) = parse(head + b"\x00\x01\x07", len(head), [MASK], [SCORES]).inputs
    assert found.tolist() == [[False, True, True]]
    assert found.view(np.uint8).max() == 1


def test_rows_must_be_as_many():
    body = request(tensor("ids", (2, 1), "INT64", data=[1, 2]), tensor("mask", (1, 1), "BOOL", data=[True]))
    assert_told(body, inputs=[IDS, MASK], match="the inputs have 2, 1 rows")


def status_of(body, length=None):
    """200, or the status of the error."""
    try:
        parse(body, length, [IMAGE], [SCORES])
    except ProtocolError as error:
        return error.status
    return 200


@given(st.binary(max_size=300), st.one_of(st.none(), st.integers(-5, 400)))
def test_no_bytes_break_it(body, length):
    assert status_of(body, length) in (200, 400)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(("inputs", "name", "shape", "datatype", "data", "parameters", "outputs", "id", "x")), inner
        )
    ),
)


@given(JSON)
def test_no_json_breaks_it(data):
    described = {"name": "x", "datatype": "FP32", "shape": data, "data": data}
    assert status_of(json.dumps({"inputs": [described]}).encode()) in (200, 400)
    assert status_of(json.dumps(data).encode()) in (200, 400, 501)
