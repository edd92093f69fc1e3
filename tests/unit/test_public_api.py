"""The public API: what ``__all__`` lists is there, has the docstring that users read, and its examples run."""

import doctest
import inspect
import shutil

import pytest
from places import GOLDEN
from system.serving_tools import token_artifact

import corewise
from corewise.common import stats
from corewise.engines import engine
from corewise.runtime import race
from corewise.runtime.client import InProcess
from corewise.search import elastic, finals, retuning, search, trial, tuning
from corewise.search.trial import SearchContext

ARTIFACT = GOLDEN / "schema-2"
FUNCTIONS = sorted(name for name in corewise.__all__ if inspect.isfunction(getattr(corewise, name)))


@pytest.fixture
def quick(monkeypatch):
    """Measure for moments only, and search and race in this process."""
    monkeypatch.setattr(SearchContext, "client", lambda context, build, share=1.0: InProcess(engine(build.engine)))
    # What bench starts has a log that is named after its engine.
    monkeypatch.setattr("corewise.artifact.open.Worker", lambda *, log, **options: InProcess(engine(log.stem)))
    for module in (tuning, search, retuning):
        monkeypatch.setattr(module, "BATCHES", (1, 16))
    monkeypatch.setattr(finals, "ROUNDS", stats.MIN_ROUNDS)
    for name, value in (("REQUESTS", 100), ("ROUNDS", 1), ("DUEL_S", 0.05), ("SHORTEST_DUEL_S", 0.05)):
        monkeypatch.setattr(elastic, name, value)
    monkeypatch.setattr(trial, "MEASURE_S", 0.05)
    monkeypatch.setattr(retuning, "MEASURE_S", 0.05)
    monkeypatch.setattr(race, "WARM_S", 0.05)
    monkeypatch.setitem(race.run_race.__kwdefaults__, "round_s", 0.02)


def test_every_exported_name_is_there_and_no_other():
    assert corewise.__all__ == sorted(corewise.__all__)
    assert set(dir(corewise)) == set(corewise.__all__)
    for name in corewise.__all__:
        assert getattr(corewise, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        _ = corewise.optimise


def test_the_functions_are_those_of_the_command_line():
    assert FUNCTIONS == ["bench", "explain", "load", "loadtest", "optimize", "predict", "retune", "verify"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_documented(name):
    function = getattr(corewise, name)
    text = inspect.getdoc(function)
    for section in ("Args:", "Returns:", "Raises:", "Example:"):
        assert section in text
    arguments = text.partition("Args:")[2].partition("Returns:")[0]
    for parameter in inspect.signature(function).parameters:
        assert f"    {parameter}: " in arguments


# The artifact was made on another machine.
@pytest.mark.filterwarnings("ignore:model.cw was tuned on")
@pytest.mark.parametrize("name", [*FUNCTIONS, "Latency", "Slo", "Throughput"])
def test_examples_run(name, quick, tmp_path, monkeypatch):
    shutil.copytree(ARTIFACT, tmp_path / "model.cw")
    if name == "predict":
        token_artifact(tmp_path / "texts.cw")
        (tmp_path / "texts.txt").write_text("w1\nw2 w3\nw4\n")
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestFinder(recurse=False).find(getattr(corewise, name), name)[0]
    assert example.examples
    failed, _ = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example)
    assert failed == 0
