"""The APIs for texts: what goes in is read as they say, and what is no request is told by the field that is wrong."""

import base64
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corewise.pipeline import ClassAnswer, Span
from corewise.serving import openai, rerank, tei, texts
from corewise.serving.protocol import ProtocolError
from corewise.serving.text_routes import task_of
from corewise.serving.texts import FieldError, TextRequest


def body(**fields):
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("given", "items", "ids"),
    [
        ("a", ["a"], []),
        (["a", "[1]"], ["a", "[1]"], []),
        ([1, 2], [], [[1, 2]]),
        ([[1, 2], [3]], [], [[1, 2], [3]]),
    ],
)
def test_openais_input_is_texts_or_token_ids(given, items, ids):
    asked = openai.parse(body(model="m", input=given, user="u", unknown=1))
    assert asked == openai.EmbeddingsRequest(model="m", texts=TextRequest(items=items, ids=ids))


def test_white_space_is_what_json_permits():
    asked = openai.parse(b'{\r\n  "input": [\r\n\t"a"\r\n  ]\r\n}')
    assert asked.texts.items == ["a"]


def test_openais_options():
    sent = body(input="a", encoding_format="base64", dimensions=3, truncate="START", prompt_name="query")
    asked = openai.parse(sent)
    assert (asked.model, asked.encoding, asked.dimensions) == (None, "base64", 3)
    assert (asked.texts.truncate, asked.texts.prompt) == ("left", "query")
    # Proxies send the fields that their users left out.
    assert openai.parse(body(input="a", encoding_format=None, dimensions=None, user=None)).encoding == "float"


@pytest.mark.parametrize(
    ("given", "field", "match"),
    [
        ({}, "input", "missing required field `input`"),
        ({"input": []}, "input", "input is empty"),
        ({"input": 5}, "input", "Expected `array`, got `int`"),
        ({"input": {}}, "input", "Expected `array`, got `object`"),
        ({"input": [None]}, "input", r"input\[0\]: Expected `str`, got `null`"),
        ({"input": ["a", 5]}, "input", r"input\[1\]: Expected `str`, got `int`"),
        ({"input": [1, "a"]}, "input", r"input\[1\]: Expected `int`, got `str`"),
        ({"input": [-1]}, "input", "Expected `int` >= 0"),
        ({"input": [[1], []]}, "input", "row without token ids"),
        ({"input": ["a"] * (texts.MOST_TEXTS + 1)}, "input", f"at most {texts.MOST_TEXTS} are allowed"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "encoding_format: Invalid enum value 'hex'"),
        ({"input": "a", "dimensions": "x"}, "dimensions", "dimensions: Expected `int"),
        ({"input": "a", "truncate": "MIDDLE"}, "truncate", "give true, false, NONE, START or END"),
        ({"input": "a", "model": 5}, "model", "model: Expected `str"),
    ],
)
def test_wrong_fields_are_named(given, field, match):
    with pytest.raises(FieldError, match=match) as caught:
        openai.parse(body(**given))
    assert (caught.value.field, caught.value.status) == (field, 400)


@pytest.mark.parametrize("wrong", [b"", b"{", b'{"input": "\xff"}', b'{"input": "\\ud800"}', b"[" * 100_000, b"\x00"])
def test_what_is_no_json_is_told(wrong):
    for parse in (openai.parse, rerank.parse, tei.embed, tei.rank, tei.tokenize):
        with pytest.raises(ProtocolError, match=r"^the request "):
            parse(wrong)


@given(
    st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3), min_size=1)
)
def test_vectors_go_through_json_and_base64_without_loss(rows):
    vectors = np.array(rows, np.float32)
    for encoding in ("float", "base64"):
        asked = openai.EmbeddingsRequest(model="m", texts=TextRequest(items=["a"]), encoding=encoding)
        answer = json.loads(openai.render(asked, "m", vectors, tokens=7))
        assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
        assert [each["index"] for each in answer["data"]] == list(range(len(rows)))
        found = [each["embedding"] for each in answer["data"]]
        if encoding == "base64":
            found = [np.frombuffer(base64.b64decode(each), "<f4") for each in found]
        np.testing.assert_array_equal(np.array(found, np.float32), vectors)


def test_shorter_vectors_have_length_one():
    vectors = np.array([[3, 4, 12], [0, 0, 1]], np.float32)
    assert texts.shortened(vectors, None) is vectors
    assert texts.shortened(vectors, 3) is vectors
    np.testing.assert_allclose(texts.shortened(vectors, 2), [[0.6, 0.8], [0, 0]], rtol=1e-6)


def test_openais_errors_and_models():
    assert openai.error("no", 404, "model")["error"] == {
        "message": "no",
        "type": "not_found_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert openai.error("full", 503)["error"]["type"] == "server_error"
    assert openai.error("no such path", 404)["error"]["code"] is None
    assert openai.model_entry("m", "2026-01-02T03:04:05+00:00")["created"] == 1767323045
    assert openai.model_entry("m", "long ago")["created"] == 0


@pytest.mark.parametrize(
    ("truncate", "direction", "side"),
    [
        (None, None, None),
        (False, "Left", None),
        (True, None, "right"),
        (True, "Left", "left"),
        ("NONE", "Left", None),
        ("END", None, "right"),
        ("start", None, "left"),
    ],
)
def test_where_texts_are_cut(truncate, direction, side):
    assert texts.side(truncate, direction) == side
    asked = tei.embed(body(inputs="a", truncate=truncate, truncation_direction=direction))
    assert asked.texts.truncate == side


def test_documents_are_ranked():
    given = body(model="m", query="q", documents=["a", {"text": "b"}, "c"], top_n=2, return_documents=True)
    asked = rerank.parse(given)
    assert asked.texts.items == [("q", "a"), ("q", "b"), ("q", "c")]
    assert asked.texts.truncate == "right"
    # Proxies send the fields that their users left out.
    left_out = dict.fromkeys(("model", "top_n", "return_documents", "truncate"))
    assert rerank.parse(body(query="q", documents=["a"], **left_out)) == rerank.parse(body(query="q", documents=["a"]))
    answer = json.loads(rerank.render(asked, "m", "r1", np.array([0.5, 0.9, 0.5]), tokens=9))
    assert answer["results"] == [
        {"index": 1, "relevance_score": 0.9, "document": {"text": "b"}},
        {"index": 0, "relevance_score": 0.5, "document": {"text": "a"}},
    ]
    assert answer["usage"]["total_tokens"] == 9
    with pytest.raises(FieldError, match="documents is empty"):
        rerank.parse(body(query="q", documents=[]))
    with pytest.raises(FieldError, match="top_n"):
        rerank.parse(body(query="q", documents=["a"], top_n=0))


def test_documents_may_be_objects_with_texts_of_which_some_count():
    whole = {"title": "Dune", "text": "sand", "year": 1965}
    asked = rerank.parse(body(query="q", documents=[whole, "b"], return_documents=True))
    assert asked.texts.items == [("q", "sand"), ("q", "b")]
    answer = json.loads(rerank.render(asked, "m", "r1", np.array([0.9, 0.5]), tokens=9))
    assert [each["document"] for each in answer["results"]] == [whole, {"text": "b"}]
    asked = rerank.parse(body(query="q", documents=[whole, {"title": "Emma"}], rank_fields=["title", "text"]))
    assert asked.texts.items == [("q", "Dune\nsand"), ("q", "Emma")]


@pytest.mark.parametrize(
    ("documents", "fields", "match"),
    [
        (["a", {"image": "b"}], None, r"documents\[1\] has none of the fields text; give texts, or objects"),
        ([{"text": "a"}], ["title"], r"documents\[0\] has none of the fields title"),
        ([{"text": "a", "year": 1}], ["text", "year"], r"documents\[0\] has something that is not a text"),
        ([5], None, r"documents\[0\]: Expected `str \| object`, got `int`"),
    ],
)
def test_documents_without_texts_are_named(documents, fields, match):
    with pytest.raises(FieldError, match=match) as caught:
        rerank.parse(body(query="q", documents=documents, rank_fields=fields))
    assert caught.value.field == "documents"


@pytest.mark.parametrize("inputs", ["a", ["a"], [[1, 2]]])
def test_one_address_takes_texts_to_embed_and_to_compare(inputs):
    assert tei.embed_or_compare(body(inputs=inputs)) == tei.embed(body(inputs=inputs))
    sentences = {"source_sentence": "a", "sentences": ["b"]}
    asked = tei.embed_or_compare(b'{"inputs":  ' + json.dumps(sentences).encode() + b', "parameters": {}}')
    assert (asked.is_similarity, asked.texts.items) == (True, ["a", "b"])
    with pytest.raises(FieldError, match="missing required field `inputs`"):
        tei.embed_or_compare(body(text="a"))


def test_info_has_what_the_apis_description_requires():
    pipeline = SimpleNamespace(task="scores", pairs=True, pooling="", labels=("no", "yes"), max_length=2048, prompts={})
    told = tei.info("m", "s", "int8", pipeline, version="1", batch=8, tokens=1024, requests=512, tokenizers=2)
    required = {
        "model_id",
        "model_dtype",
        "model_type",
        "max_concurrent_requests",
        "max_input_length",
        "max_batch_tokens",
        "max_client_batch_size",
        "auto_truncate",
        "tokenization_workers",
        "version",
    }
    assert required <= set(told)
    assert told["max_batch_tokens"] == 2048
    labels = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    assert told["model_type"] == {"reranker": labels}


def test_each_tokens_vectors_are_a_list_for_each_text():
    found = tei.render_token_vectors([np.ones((2, 2), np.float32), np.zeros((1, 2), np.float32)])
    assert json.loads(found) == [[[1, 1], [1, 1]], [[0, 0]]]


@pytest.mark.parametrize(
    ("inputs", "pairs", "items", "is_batch"),
    [
        ("a", False, ["a"], False),
        (["a", "b"], True, [("a", "b")], False),
        (["a", "b"], False, ["a", "b"], True),
        ([["a"], ["b", "c"]], False, ["a", ("b", "c")], True),
        ([["a", "b"]], True, [("a", "b")], True),
    ],
)
def test_what_is_classified(inputs, pairs, items, is_batch):
    asked = tei.predict(body(inputs=inputs), pairs=lambda model: pairs)
    assert (asked.texts.items, asked.is_batch) == (items, is_batch)


@pytest.mark.parametrize(
    ("more", "activation"),
    [
        ({}, None),
        ({"parameters": {"top_k": 1}}, None),
        ({"parameters": {"function_to_apply": "sigmoid"}}, "sigmoid"),
        ({"parameters": {"function_to_apply": "none", "aggregation_strategy": "simple"}}, "none"),
        ({"raw_scores": True}, "none"),
    ],
)
def test_what_makes_scores_is_what_the_request_says(more, activation):
    assert tei.predict(body(inputs="a", **more), pairs=lambda model: False).activation == activation


@pytest.mark.parametrize("parameters", [{"function_to_apply": "tanh"}, {"aggregation_strategy": "none"}])
def test_parameters_that_would_be_ignored_are_told(parameters):
    with pytest.raises(FieldError, match=f"parameters.{next(iter(parameters))}: Invalid enum value"):
        tei.predict(body(inputs="a", parameters=parameters), pairs=lambda model: False)


def test_items_that_are_neither_texts_nor_pairs_are_told():
    with pytest.raises(FieldError, match="one or two texts each"):
        tei.predict(body(inputs=[["a", "b", "c"]]), pairs=lambda model: False)
    with pytest.raises(FieldError, match="give token ids"):
        tei.decode_ids(body(ids=["a"]))


def test_predictions_are_as_each_client_reads_them():
    answer = ClassAnswer(label="b", probability=0.75, probabilities={"a": 0.25, "b": 0.75})
    classes = [{"score": 0.75, "label": "b"}, {"score": 0.25, "label": "a"}]
    assert predicted(body(inputs="x"), [answer]) == classes
    assert predicted(body(inputs=[["x"], ["y"]]), [answer, answer]) == [classes, classes]
    # huggingface_hub's InferenceClient takes the first of a list of answers.
    assert predicted(body(inputs="x", parameters={"top_k": 1}), [answer]) == [classes[:1]]
    span = Span(label="PER", probability=0.5, start=0, end=3, text="Ada")
    entity = {"entity_group": "PER", "score": 0.5, "word": "Ada", "start": 0, "end": 3}
    assert predicted(body(inputs="x", parameters={}), [[span]]) == [entity]
    assert predicted(body(inputs="x", parameters={"ignore_labels": ["PER"]}), [[span]]) == []
    score = [{"score": 0.5, "label": "LABEL_0"}]
    assert predicted(body(inputs="x"), [0.5]) == score
    assert predicted(body(inputs="x", parameters={}), [0.5]) == [score]


@pytest.mark.parametrize(
    ("task", "pairs", "does"), [("scores", True, "scores"), ("scores", False, "classes"), ("vectors", False, "vectors")]
)
def test_a_score_of_a_single_text_is_a_class_and_no_rank(task, pairs, does):
    assert task_of(SimpleNamespace(pipeline=SimpleNamespace(task=task, pairs=pairs))) == does


def predicted(sent, answers):
    return json.loads(tei.render_predictions(tei.predict(sent, pairs=lambda model: False), answers, ()))


def test_similarities_and_ranks():
    asked = tei.similarity(
        body(inputs={"source_sentence": "a", "sentences": ["b", "c"]}, parameters={"truncate": True})
    )
    assert (asked.texts.items, asked.texts.truncate) == (["a", "b", "c"], "right")
    vectors = np.array([[2, 0], [3, 0], [0, 1]], np.float32)
    assert json.loads(tei.render_similarities(vectors)) == [1.0, 0.0]
    ranked = tei.rank(body(query="q", texts=["a", "b"], return_text=True))
    found = json.loads(tei.render_ranks(ranked, np.array([0.1, 0.2])))
    assert found == [{"index": 1, "score": 0.2, "text": "b"}, {"index": 0, "score": 0.1, "text": "a"}]
