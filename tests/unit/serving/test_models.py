"""Models that are replaced, taken out of service, and counted."""

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
from places import GOLDEN

from corewise import artifact
from corewise.records.ranges import InputRange, ValueRange
from corewise.serving import admin
from corewise.serving.admin import Repository
from corewise.serving.models import Models
from corewise.serving.protocol import Limits, ProtocolError
from corewise.serving.rpc_extensions import list_methods
from corewise.serving.served import Served, Source
from corewise.serving.values import Values


class Model:
    """A model of which requests are counted."""

    name, version, ready = "m", "1", True

    def __init__(self, form=1):
        self.form, self.asked = form, 0

    def takes_as(self, other):
        return self.form == other.form

    def submit(self, inputs, *, timeout_s, priority):
        self.asked += 1
        return Future()

    def close(self, drain_s):
        return True


def models_of(*made):
    left = iter(made)
    models = Models([Source(name="m", version="1", folder=Path("x"))], lambda source: next(left))
    models.open()
    return models


@pytest.mark.parametrize("form", [1, 2])
def test_a_request_that_was_read_for_a_model_is_not_run_by_another_that_takes_others(form):
    old, new = Model(), Model(form)
    models = models_of(old, new)
    meant = models.find("m")
    models.reload("m")
    if form == 1:
        assert models.submit("m", "1", [], timeout_s=1.0, priority=0, meant=meant)[0] is new
        return
    with pytest.raises(ProtocolError, match="was replaced meanwhile") as caught:
        models.submit("m", "1", [], timeout_s=1.0, priority=0, meant=meant)
    assert caught.value.status == 503
    assert not old.asked
    assert not new.asked


def test_models_take_the_same_requests_if_these_are_read_and_checked_alike():
    found = artifact.read(GOLDEN / "schema-1")
    ranges = tuple(InputRange(values=(ValueRange(low=0, high=9),)) for _ in found.manifest.inputs)
    others = {
        "created": "2001-01-01T00:00:00",
        "inputs": tuple(replace(spec, dtype="float64") for spec in found.manifest.inputs),
        "outputs": tuple(replace(spec, name="other") for spec in found.manifest.outputs),
        "input_ranges": ranges,
    }

    def form(**changed):
        manifest = replace(found.manifest, **changed)
        values = Values(replace(found, manifest=manifest))
        return Served._form.fget(SimpleNamespace(manifest=manifest, values=values, text=None))

    alike = {name: form(**{name: value}) == form() for name, value in others.items()}
    assert alike == {"created": True, "inputs": False, "outputs": False, "input_ranges": False}


def test_memory_counts_that_of_fp32_in_the_shadow_too():
    def pids(engine, shadow):
        return Served.pids.fget(SimpleNamespace(remote=SimpleNamespace(pid=engine), shadow=shadow))

    assert pids(5, None) == [5]
    assert pids(5, SimpleNamespace(pid=6)) == [5, 6]
    assert pids(None, SimpleNamespace(pid=None)) == []


# --- the admin ports ----------------------------------------------------------------------------------------------


def test_models_that_are_loaded_take_one_thread_of_those_that_others_need():
    entered, opened = Event(), Event()

    class Slow(Models):
        def reload(self, name, version=None):
            entered.set()
            assert opened.wait(60)

    async def main():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        repository = Repository(Slow([Source(name="m", version="1", folder=Path("x"))], lambda source: Model()))
        loading = [asyncio.ensure_future(repository.load("m")) for _ in range(2)]
        while not entered.is_set():
            await asyncio.sleep(0)
        try:
            async with asyncio.timeout(30):
                await asyncio.to_thread(opened.set)
        finally:
            opened.set()
        assert await asyncio.gather(*loading) == ["", ""]

    asyncio.run(main())


def test_a_model_is_unloaded_in_all_versions_though_some_are_already():
    async def main():
        sources = [Source(name="m", version=version, folder=Path("x")) for version in ("1", "2")]
        models = Models(sources, lambda source: Model())
        models.open()
        repository = Repository(models)
        await repository.unload("m", "1")
        await repository.unload("m")
        assert [each["state"] for each in repository.index()] == ["UNAVAILABLE"] * 2
        with pytest.raises(ProtocolError, match="was unloaded"):
            await repository.unload("m")

    asyncio.run(main())


def test_an_admin_that_goes_while_it_asks_is_no_error():
    sent = []

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v2/repository/index",
        "headers": [],
        "query_string": b"",
        "http_version": "1.1",
    }
    asyncio.run(admin.web(Repository(models_of(Model())))(scope, receive, send))
    assert sent[0]["status"] == 499


def test_a_configuration_of_a_model_that_there_is_not_is_counted():
    counted = []
    metrics = SimpleNamespace(turned_away=lambda protocol, reason: counted.append((protocol, reason)))
    methods = list_methods(models_of(Model()), metrics, None, None, Limits())
    (config,) = (method for method in methods if method.path.endswith("/ModelConfig"))
    with pytest.raises(ProtocolError, match="there is no model"):
        asyncio.run(config.unary(SimpleNamespace(name="other", version=""), None))
    assert counted == [("grpc", "unknown model")]
