"""The rate that a build holds under an SLO: simulated for each of its latency tables, then tried with real load."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf, sqrt

from corewise.batching import Curve
from corewise.batching.simulate import most_rate, service_of
from corewise.candidates import BASELINE
from corewise.errors import CorewiseError, InputError
from corewise.events import Explored, StageStarted, TrialStep
from corewise.explore import tables
from corewise.journal import Journal
from corewise.trial import AnyWorker, Setting
from corewise.values import LoadRun, Measurement, Objective, Trial, from_json, to_json
from corewise.worker import MAX_WAITING

TRIED = 2
"""The builds of the highest simulated rates that are put under load, beside the baseline."""
FIRST = 0.9
"""Of the simulated rate, the first that is tried."""
UP, DOWN = 1.1, 0.85
"""Of the last rate, the next, until one was held and one missed; then one between, until they are as near as ``UP``."""
LEAP = 2.0
"""The next rate is at most so many times the one that was held, however far away the one is that was missed; and that
much where the p99 was not half of the SLO."""
DONE = 0.95
"""Of what was answered in time at a rate that was too high, the most that is tried next."""
ATTEMPTS = 6
PROMISED = 0.9
"""Of the highest rate that was held, what is promised: a machine is never as quiet for hours as for seconds."""
LOAD_S, CONFIRM_S = 5.0, 15.0
REQUESTS = 200
"""A load lasts at least until so many requests were sent: a p99 of fewer is chance."""
LONGEST_S = 60.0
SHARE = 0.95
"""Of the budget: when no further load is begun."""


def hold(trials: Sequence[Trial], setting: Setting, journal: Journal, objective: Objective) -> tuple[Trial, ...]:
    """The trials, with the loads that were put on the most promising ones and on the baseline.

    A trial's last load is at the rate that is promised; its ``promise`` is that load, if it was held.
    """
    assert objective.slo_ms is not None
    simulated = {
        trial.build: _simulated(trial, objective.slo_ms) for trial in trials if trial.state == "ok" and not trial.loads
    }
    others = sorted((build for build in simulated if build != BASELINE), key=lambda build: -simulated[build][0])
    found = {trial.build: trial for trial in trials}
    for build in (*others[:TRIED], BASELINE):  # the baseline last: its few requests take the longest
        rate_per_s, table = simulated.get(build, (0.0, []))
        if rate_per_s > 0 and not setting.budget.ended(SHARE):
            setting.tell(StageStarted(f"putting {build.label} under load"))
            found[build] = _loaded(found[build], rate_per_s, table, setting, objective.slo_ms)
            journal.add(found[build])
            setting.tell(Explored(found[build]))
    return tuple(found.values())


def _simulated(trial: Trial, slo_ms: float) -> tuple[float, list[Measurement]]:
    """The highest rate that one of the trial's tables holds in simulation, and that table."""
    best: tuple[float, list[Measurement]] = 0.0, []
    for table in tables([one for one in trial.measurements if not one.rejected]).values():
        within = [one for one in table if one.p99_ms <= slo_ms]
        if within:
            plan = within[-1].plan
            rate_per_s = most_rate(
                Curve.of(within),
                service=service_of(within),
                instances=plan.instances,
                slo_ms=slo_ms,
                max_batch=plan.batch,
                max_waiting=max(MAX_WAITING, plan.batch),
            )
            best = max(best, (rate_per_s, within), key=lambda one: one[0])
    return best


def _loaded(trial: Trial, rate_per_s: float, table: list[Measurement], setting: Setting, slo_ms: float) -> Trial:
    """The trial with loads at rates near the simulated one, until one is held and a higher one is not."""
    loads: list[LoadRun] = []
    ended = trial.explored
    try:
        with setting.worker(trial.build) as worker:
            worker.call(
                "open",
                "opening for load",
                folder=str(setting.payload(trial.build)),
                build=to_json(trial.build),
                plan=to_json(table[-1].plan),
            )
            for load in _search(worker, rate_per_s, table, setting, slo_ms):
                setting.tell(TrialStep(trial.build, f"{load.rate_per_s:.4g}/s {'held' if load.held else 'missed'}"))
                loads.append(load)
    except InputError:
        raise
    except CorewiseError as error:
        ended = f"{ended}; under load it ended early: {error}"
    return replace(trial, loads=(*trial.loads, *loads), explored=ended)


def _search(
    worker: AnyWorker, simulated_per_s: float, table: list[Measurement], setting: Setting, slo_ms: float
) -> Iterator[LoadRun]:
    """Loads that close in on the highest rate, and at last one at the rate to promise."""

    def load(rate_per_s: float, least_s: float) -> LoadRun:
        answer = worker.call(
            "load",
            "under load",
            samples=setting.holdout,
            plan=to_json(table[-1].plan),
            curve=to_json(Curve.of(table)),
            rate_per_s=rate_per_s,
            # Half of what is left: the child is ended with the budget, and what it was sent has to be answered first.
            duration_s=min(LONGEST_S, max(least_s, REQUESTS / rate_per_s), max(1.0, setting.budget.left_s() / 2)),
            slo_ms=slo_ms,
        )
        return from_json(LoadRun, answer["load"])

    rate_per_s, held_per_s, missed_per_s = FIRST * simulated_per_s, 0.0, inf
    for _ in range(ATTEMPTS):
        run = load(rate_per_s, LOAD_S)
        yield run
        if run.held:
            held_per_s = rate_per_s
        else:
            missed_per_s = rate_per_s
        if missed_per_s <= UP * held_per_s or setting.budget.ended(SHARE):
            break
        if not held_per_s:
            rate_per_s = min(DOWN * rate_per_s, DONE * run.goodput_per_s) or rate_per_s / 2
        else:
            easy = run.held and run.p99_ms < slo_ms / 2
            step = (LEAP if easy else UP) if missed_per_s == inf else min(LEAP, sqrt(missed_per_s / held_per_s))
            rate_per_s = held_per_s * step
    rate_per_s = PROMISED * held_per_s
    while rate_per_s > PROMISED**4 * held_per_s and not setting.budget.ended():
        run = load(rate_per_s, CONFIRM_S)
        yield run
        if run.held:
            break
        rate_per_s *= PROMISED
