"""What operators see of a server: statistics by the second, refusals in the log, classes, names of metrics."""

import asyncio
import json
import logging
import re
from dataclasses import replace
from time import monotonic
from types import SimpleNamespace

import numpy as np
import pytest
from places import GOLDEN
from waiting import eventually

from corewise import artifact
from corewise.batching import Answer, NotServed
from corewise.common.errors import InputError
from corewise.records.build import TensorSpec
from corewise.serving import addresses
from corewise.serving.addresses import remove_stale
from corewise.serving.host import Options
from corewise.serving.infer import broken
from corewise.serving.logs import RefusalLog, _is_ours
from corewise.serving.metrics import Metrics
from corewise.serving.models import Models
from corewise.serving.protocol import NoRoom, ProtocolError
from corewise.serving.server import _Server
from corewise.serving.statistics import COLUMNS, HISTORY_S, Statistics
from corewise.serving.traces import Traces
from corewise.serving.triton import classified
from corewise.serving.values import Values

ARTIFACT = GOLDEN / "schema-1"
WITHIN = 0.03
"""What the buckets of latencies leave open."""


def answer(rows=1, waited_s=0.1, ran_s=0.2, batch=4):
    return Answer(outputs=[np.ones((rows, 2))], waited_s=waited_s, ran_s=ran_s, batch_rows=batch)


def busy(seconds, start=1000.0):
    """Statistics of one request a second, the last one slow, with a refusal beside each; and the clock."""
    now = [start]
    kept = Statistics(clock=lambda: now[0])
    for k in range(seconds):
        now[0] = start + k
        kept.answered(answer(), rows=2, took_s=0.110 if k == seconds - 1 else 0.010)
        kept.not_served()
    now[0] += 1.5
    return kept, now


def test_statistics_are_of_all_time_and_of_the_last_minute():
    kept, now = busy(100)
    kept.failed(0.5)
    recent = kept.recent()
    assert (recent.rate_per_s, recent.rows_per_s, recent.refused_per_s) == (1.0, 2.0, 1.0)
    assert (recent.p50_ms, recent.p99_ms) == (pytest.approx(10, rel=WITHIN), pytest.approx(110, rel=WITHIN))
    assert recent.queue_ms == pytest.approx(100)
    assert recent.batch_rows == {4: 60}
    assert recent.failed_per_s == 0  # the second that runs is told when it is over
    assert (kept.success.times, kept.rows, kept.calls) == (100, 200, 50.0)
    assert kept.queue.seconds == pytest.approx(10.0)
    now[0] += 1
    assert kept.recent().failed_per_s == pytest.approx(1 / 60)
    now[0] += 120
    assert (kept.recent().rate_per_s, kept.recent().p99_ms) == (0.0, 0.0)


def test_now_is_the_last_seconds_and_a_young_server_divides_by_its_age():
    kept, now = busy(10)
    assert kept.recent(5).rate_per_s == 1.0
    assert kept.recent().rate_per_s == 1.0
    now[0] += 2
    assert kept.recent(5).rate_per_s == pytest.approx(3 / 5)
    assert kept.recent().rate_per_s == pytest.approx(10 / 12)


def test_history_is_by_the_second_and_ends_with_the_last_whole_one():
    kept, now = busy(30)
    history = kept.history()
    assert tuple(history) == COLUMNS
    assert history["at"] == list(range(1000, 1030))
    assert history["answered"] == history["refused"] == [1] * 30
    assert history["p99_ms"][0] == pytest.approx(10, rel=WITHIN)
    assert history["p99_ms"][-1] == pytest.approx(110, rel=WITHIN)
    assert kept.history(since=1027)["at"] == [1028, 1029]
    kept.failed(0.1)
    assert kept.history()["at"][-1] == 1029
    now[0] += 1
    assert (kept.history()["at"][-1], kept.history()["failed"][-1]) == (1030, 1)


def test_history_has_an_end():
    kept, _ = busy(3 * HISTORY_S)
    assert len(kept.history()["at"]) == HISTORY_S
    assert len(kept._seconds) <= HISTORY_S + 1


def test_tritons_statistics_have_all_that_its_clients_look_for():
    kept, _ = busy(3)
    kept.answered(answer(batch=1), rows=1, took_s=0.3)
    described = kept.described()
    assert set(described["inference_stats"]) == {
        "success",
        "fail",
        "queue",
        "compute_input",
        "compute_infer",
        "compute_output",
        "cache_hit",
        "cache_miss",
    }
    assert described["inference_count"] == 7
    assert described["inference_stats"]["queue"] == {"count": 4, "ns": 400_000_000}
    assert [(each["batch_size"], each["compute_infer"]["count"]) for each in described["batch_stats"]] == [
        (1, 1),
        (4, 2),  # three requests took half of a call each
    ]


def test_a_call_of_several_requests_is_one_call_of_its_size():
    kept = Statistics()
    for _ in range(4):
        kept.answered(answer(ran_s=0.2, batch=4), rows=1, took_s=0.3)
    (found,) = kept.described()["batch_stats"]
    assert found["batch_size"] == 4
    assert found["compute_infer"] == {"count": 1, "ns": 200_000_000}
    assert kept.described()["execution_count"] == 1


# --- the log ------------------------------------------------------------------------------------------------------


def test_a_flood_of_refusals_is_one_line_with_their_numbers(caplog):
    caplog.set_level(logging.INFO, "corewise.serve")
    refusals = RefusalLog(period_s=3600.0)
    for k in range(5000):
        refusals.add("unauthenticated" if k % 5 else "overloaded", f"r{k}")
    assert not caplog.messages
    refusals.close()
    (line,) = map(json.loads, caplog.messages)
    assert line == {
        "message": "refused 5000",
        "refused": 5000,
        "reasons": {"unauthenticated": 4000, "overloaded": 1000},
        "last_id": "r4999",
    }


def test_a_single_refusal_is_told_without_another(caplog):
    caplog.set_level(logging.INFO, "corewise.serve")
    refusals = RefusalLog(period_s=0.01)
    refusals.add("queue full")
    assert eventually(lambda: caplog.messages)
    assert json.loads(caplog.messages[0])["reasons"] == {"queue full": 1}
    refusals.close()
    assert len(caplog.messages) == 1


def test_refusals_cost_nothing_where_nobody_reads_them(caplog):
    caplog.set_level(logging.WARNING, "corewise.serve")
    refusals = RefusalLog()
    refusals.add("queue full")
    assert refusals._timer is None


# --- metrics ------------------------------------------------------------------------------------------------------


def test_grpcs_library_tells_of_no_call_that_broke_a_limit():
    told = "ExecuteBatchError raised in core by servicer method [/%s]", "Unexpected [%s] raised by servicer method"
    records = [logging.LogRecord("grpc", logging.ERROR, "", 0, text, ("x",), None) for text in told]
    assert [_is_ours(record) for record in records] == [False, True]


def test_metrics_keep_to_the_conventions_of_prometheus():
    metrics = Metrics(Models([], lambda source: pytest.fail("nothing is opened")), Traces())
    for reason in ("unauthenticated", "unknown path", "unknown method", "unknown model"):
        metrics.turned_away("http", reason)
    metrics.turned_away("grpc", "unknown method")
    metrics.connection_refused("http")
    metrics.watch_connections("grpc", 4096, lambda: 7)
    model = SimpleNamespace(name="m", version="1")
    with metrics.tokenizer_request(model):
        pass
    with pytest.raises(NotServed), metrics.tokenizer_request(model):
        raise NotServed("queue full")
    unloaded = ProtocolError("it was unloaded", status=404)
    for error in (NotServed("queue full"), ProtocolError("no JSON"), NoRoom("no room for it"), unloaded):
        with pytest.raises(type(error)), metrics.unnamed_request("http"):
            raise error
    with pytest.raises(ProtocolError), metrics.request(model, "http", {}):
        raise unloaded
    metrics.close()
    text = metrics.text().decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    assert all(name.endswith("_total") == (kind == "counter") for name, kind in kinds.items())
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in kinds)
    assert not re.search(r'="[^"]*\s[^"]*"', text)
    assert 'corewise_turned_away_requests_total{protocol="http",reason="unknown_path"} 1.0' in text
    assert 'corewise_turned_away_requests_total{protocol="grpc",reason="unknown_method"} 1.0' in text
    assert 'corewise_refused_connections_total{protocol="http"} 1.0' in text
    assert 'corewise_open_connections{protocol="grpc"} 7.0' in text
    assert 'corewise_connections_limit{protocol="grpc"} 4096.0' in text
    assert 'corewise_tokenizer_requests_total{model="m",outcome="ok",version="1"} 1.0' in text
    assert 'corewise_tokenizer_requests_total{model="m",outcome="queue_full",version="1"} 1.0' in text
    assert 'corewise_turned_away_requests_total{protocol="http",reason="queue_full"} 1.0' in text
    assert 'corewise_turned_away_requests_total{protocol="http",reason="invalid"} 1.0' in text
    assert 'corewise_turned_away_requests_total{protocol="http",reason="no_room"} 1.0' in text
    assert 'corewise_turned_away_requests_total{protocol="http",reason="unknown_model"} 1.0' in text
    assert "corewise_requests_total{" not in text  # counted above already
    assert re.search(r'^corewise_build_info\{python="3[.\d]+",version="[\d.]+"\} 1.0$', text, re.MULTILINE)
    assert {"process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"} <= set(kinds)
    assert kinds["corewise_queue_seconds"] == kinds["corewise_request_seconds"] == "histogram"
    assert kinds["corewise_engine_restarts_total"] == "counter"


def test_the_time_of_a_request_counts_from_its_arrival():
    metrics = Metrics(Models([], lambda source: pytest.fail("nothing is opened")), Traces())
    with metrics.request(SimpleNamespace(name="m", version="1"), "http", {}, arrived_s=monotonic() - 25) as note:
        note(answer())
    text = metrics.text().decode()
    for bound, count in (("20.0", "0.0"), ("+Inf", "1.0")):
        assert f'corewise_request_seconds_bucket{{le="{bound}",model="m",version="1"}} {count}' in text


# --- classes ------------------------------------------------------------------------------------------------------


SCORES = np.array([[0.1, 0.7, 0.2], [0.5, np.nan, 0.25]], np.float32)


def test_the_highest_values_become_classes_with_their_labels():
    found = classified({"scores": 2}, {"scores": SCORES, "others": SCORES}, ("cat", "dog"))
    assert found["scores"].tolist() == [
        [b"0.700000:1:dog", b"0.200000:2"],
        [b"0.500000:0:cat", b"0.250000:2"],
    ]
    assert found["others"] is SCORES
    assert classified({}, {"scores": SCORES}, None)["scores"] is SCORES
    assert classified({"n": 9}, {"n": np.array([[3, 8]])}, None)["n"].tolist() == [[b"8:1", b"3:0"]]
    with pytest.raises(ProtocolError, match="does not hold numbers"):
        classified({"flags": 1}, {"flags": np.array([[True]])}, None)


def test_what_is_not_known_is_not_checked_and_told():
    found = artifact.read(ARTIFACT)
    assert Values(found).notes == ()
    tokens = TensorSpec(name="tokens", dtype="int64", shape=(None, None))
    files = {name: facts for name, facts in found.manifest.files.items() if name != artifact.REFERENCE}
    older = replace(found, manifest=replace(found.manifest, inputs=(tokens,), files=files))
    (note,) = Values(older).notes
    assert "the ranges of the integer inputs tokens are not known" in note
    Values(older).check([np.array([[-1, 10_000_000]])])
    assert Values(older).described() == [{"name": "tokens", "datatype": "INT64", "shape": [-1, -1]}]


def test_a_path_that_no_socket_can_have_is_one_line(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError, match="not a socket"):
        remove_stale(file)
    with pytest.raises(InputError, match="cannot be used"):
        remove_stale(file / "below")


def test_a_server_that_ends_leaves_the_socket_to_the_next_one_that_listens_there(tmp_path):
    path = tmp_path / "http.sock"

    async def main():
        server = _Server([], Options(http=path), lambda what, value: None)
        listening, web = addresses.bound(path), SimpleNamespace(should_exit=False)

        async def serve():
            while not web.should_exit:
                await asyncio.sleep(0)
            listening.close()
            return addresses.bound(path)

        serving = asyncio.ensure_future(serve())
        await server._end([web], [serving], [])
        with serving.result():
            assert path.exists()

    asyncio.run(main())


def test_the_log_has_the_traceback_of_what_was_not_foreseen(caplog):
    try:
        {}["missing"]
    except KeyError as error:
        status, _, body = broken(error, {"request_id": "r1"})
    assert status == 500
    assert b"r1" in body
    assert b"missing" not in body
    assert "test_serving_operations" in caplog.text
