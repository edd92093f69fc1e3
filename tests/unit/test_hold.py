"""The rate under an SLO: closed in on with loads, from whatever the simulation said."""

import pytest

from corewise.hold import ATTEMPTS, PROMISED, UP, _search
from corewise.trial import Budget, Setting
from corewise.values import LoadRun, Measurement, Plan, to_json

PLAN = Plan(threads_per_instance=2, batch=8)
TABLE = [
    Measurement(plan=PLAN, latencies_ms=(10.0,), throughput_per_s=800.0, p50_ms=10.0, p99_ms=12.0, spread=0.0),
]


class Machine:
    """Holds any rate up to what it can do; above, it answers that much in time."""

    def __init__(self, most_per_s):
        self.most_per_s = most_per_s
        self.peak_memory_bytes = 0

    def call(self, op, doing, *, rate_per_s, duration_s, slo_ms, **arguments):
        offered = max(1, round(rate_per_s * duration_s))
        answered = min(offered, int(self.most_per_s * duration_s))
        run = LoadRun(
            plan=PLAN,
            rate_per_s=rate_per_s,
            clients=None,
            duration_s=duration_s,
            offered=offered,
            answered=answered,
            refused=offered - answered,
            failed=0,
            in_time=answered,
            p50_ms=10.0,
            p99_ms=slo_ms / 2,
            refusal_p99_ms=0.1,
            slo_ms=slo_ms,
        )
        return {"load": to_json(run)}


def loads(tmp_path, most_per_s, simulated_per_s):
    setting = Setting(
        folder=tmp_path, plan=PLAN, cpu=None, timeout_s=1.0, verify=None, tell=lambda event: None, budget=Budget()
    )
    return list(_search(Machine(most_per_s), simulated_per_s, TABLE, setting, 100.0))


@pytest.mark.parametrize("simulated_per_s", [70.0, 90.0, 100.0, 130.0, 300.0, 3000.0])
def test_the_promise_is_near_the_most_that_is_held(tmp_path, simulated_per_s):
    runs = loads(tmp_path, 100.0, simulated_per_s)
    assert len(runs) <= ATTEMPTS + 1
    assert runs[-1].held
    assert PROMISED / UP * 98.0 <= runs[-1].rate_per_s <= PROMISED * 102.0
    assert runs[-1].duration_s >= runs[0].duration_s


def test_what_holds_nothing_promises_nothing(tmp_path):
    runs = loads(tmp_path, 0.0, 1000.0)
    assert len(runs) == ATTEMPTS
    assert not any(run.held for run in runs)
    rates = [run.rate_per_s for run in runs]
    assert rates == sorted(rates, reverse=True)
