"""An artifact with an elastic plan in service, under load, and in a bulk job's hands."""

import concurrent.futures
import json
from pathlib import Path

import numpy as np
import pytest
from places import GOLDEN
from requests_to_fakes import ROWS, expected, infer, output
from serving_tools import eventually, fake_artifact, serving

import corewise
from corewise import artifact
from corewise.artifact import tuned
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import ElasticPlan, Plan

NARROW = Plan(threads_per_instance=1, instances=2, batch=4)
ELASTIC = ElasticPlan(wide=Plan(threads_per_instance=2, batch=4), narrow=NARROW)
ON_ALL, ON_ONE = ELASTIC.wide.layout_label, NARROW.layout_label

pytestmark = pytest.mark.skipif(
    inspect_cpu().architecture != "x86_64" or inspect_cpu().usable_cores < 2, reason="the plan is for two cores"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("elastic") / "toy.cw"
    return fake_artifact(made, NARROW, call_ms=10.0, elastic=ELASTIC, seconds_per_item=0.02, dies_above=100.0)


def ran(server):
    """The requests of each layout, by the server's metrics."""
    lines = server.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("corewise_layout_requests_total{")]
    return {line.partition('layout="')[2].partition('"')[0]: float(line.split()[-1]) for line in found}


def test_a_server_runs_lone_requests_on_all_cores_and_a_crowd_on_one_each(folder):
    with serving(folder, wait=False) as server:
        assert ELASTIC.label in server.until("ready:")
        for _ in range(5):
            np.testing.assert_allclose(output(infer(server, ROWS[:1])), expected(ROWS[:1]), atol=1e-4)
        assert ran(server) == {ON_ALL: 5.0}
        with concurrent.futures.ThreadPoolExecutor(16) as clients:
            answers = list(clients.map(lambda k: infer(server, ROWS[k % 2 : k % 2 + 1]), range(40)))
        for k, answer in enumerate(answers):
            np.testing.assert_allclose(output(answer), expected(ROWS[k % 2 : k % 2 + 1]), atol=1e-4)
        assert ran(server)[ON_ONE] > 0
        model = server.get("/live.json").json()["models"][0]
        assert (model["plan"], model["wide"]) == (ELASTIC.label, ON_ALL)
        assert eventually(lambda: server.get("/live.json").json()["models"][0]["layouts"].get(ON_ALL, 0) >= 5)

        assert infer(server, np.full_like(ROWS[:1], 200.0)).status_code == 500, "its process ends with it"
        assert eventually(lambda: infer(server, ROWS[:1]).status_code == 200)
        model = server.get("/live.json").json()["models"][0]
        assert model["restarts"] == 1
        # So many that some still wait when the next lines run.
        with concurrent.futures.ThreadPoolExecutor(60) as clients:
            asked = [clients.submit(infer, server, ROWS[:1]) for _ in range(60)]
            assert eventually(lambda: server.get("/live.json").json()["models"][0]["waiting_rows"] > 0)
            assert server.stop() == 0
            assert [one.result().status_code for one in asked] == [200] * 60


def test_a_load_test_uses_both_layouts_and_a_job_the_one_that_does_most(folder, tmp_path):
    test = corewise.loadtest(folder, clients=4, duration_s=0.5)
    assert (test.elastic, test.run.plan, test.run.failed, test.run.refused) == (ELASTIC, NARROW, 0, 0)
    assert test.call_ms == pytest.approx(1.2 * 20.0)
    fixed = corewise.loadtest(folder, clients=1, duration_s=0.1, instances=1, threads_per_instance=2)
    assert fixed.elastic is None
    found, cpu = artifact.read(Path(folder)), inspect_cpu()
    assert tuned.fit(found, cpu).elastic == ELASTIC
    bulk = tuned.for_bulk(found, cpu)
    assert (bulk.plan, bulk.elastic) == (NARROW, None)
    alone = fake_artifact(tmp_path / "alone.cw", ELASTIC.wide, call_ms=1.0, elastic=ELASTIC, seconds_per_item=0.02)
    data = json.loads((alone / "report.json").read_text())
    assert data["requirements"]["goal"] == "throughput"
    assert tuned.for_bulk(artifact.read(alone), cpu).plan == ELASTIC.wide, "it won a race for throughput"
    measured = tuned.measured(found, tuned.fit(found, cpu))
    assert tuned.bulk_plan(ELASTIC.wide, ELASTIC, "latency", measured) == NARROW


def test_an_artifact_of_another_machine_or_an_older_version_has_one_layout(folder):
    found = artifact.read(GOLDEN / "schema-2")
    assert found.manifest.elastic is None
    assert found.report.choice.elasticity is None
