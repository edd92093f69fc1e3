"""What builds that were not tried yet are expected to win and to cost, from what was seen so far. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import inf
from statistics import median

from corewise.engines.qdq import uses_corewise_quantizer
from corewise.records.build import Build, Plan, Precision, QuantizationOptions
from corewise.records.cpu import Cpu
from corewise.records.goal import Goal
from corewise.records.trial import State, Trial
from corewise.search.candidates import rung_height

VNNI_SPEEDS: dict[Precision, float] = {"int8": 5.5, "int8-dynamic": 4.0, "bf16": 3.0, "fp32": 1.5}
"""Speeds over eager PyTorch in fp32 where the CPU multiplies int8: about the middle of what was seen on six models
(Zen 4). What a search has seen itself replaces them."""
OTHER_SPEEDS: dict[Precision, float] = {"int8": 2.5, "int8-dynamic": 1.8, "bf16": 3.0, "fp32": 1.5}
"""Without such instructions, of networks that convolve (Zen 3)."""
OTHER_SPEEDS_OF_LINEARS: dict[Precision, float] = {"int8": 1.1, "int8-dynamic": 1.7, "bf16": 2.0, "fp32": 1.15}
"""Without such instructions, of transformers: int8 with ranges wins them little (MiniLM, Zen 3)."""
ENGINE_FACTORS = {"onnxruntime": 0.8, "torch-int8": 0.85, "inductor": 0.85, "eager": 0.6}
"""An engine's speed over OpenVINO's in the same precision (the same models)."""
BF16_REST = 1.05
PASSES: dict[Precision, float] = {"int8": 0.8, "int8-dynamic": 0.8, "bf16": 0.95, "fp32": 0.98}
"""How often a build can be made and passes the gate."""
PASSES_UNCORRECTED = 0.6
"""On the first rung of corewise's quantizer, which corrects nothing."""
PASSES_LIKE_ONE = 0.95
"""After the same precision of another engine passed, or the same layers in int8 did."""
PASSES_UNLIKE_ONE = 0.4
"""After the gate rejected int8 of an engine's own quantizer: others', and corewise's next rung."""
PASSES_AS_REJECTED = 0.1
"""After the gate rejected the same layers in int8."""
PROMISING = 0.7
"""A build slower than this share of the fastest under the first plan will hardly win: other threads and batches change
the order of builds, but seldom by more (MobileNetV2 as two instances of one thread ran 25 to 35 % faster)."""
TOGETHER = 3
"""Trials that are looked ahead."""
START_S = 6.0
"""Seconds to start a process, import an engine, and convert and open a program (two cores: 4 on a Zen 4, 9 on a Zen
3)."""
MEASURE_S = 3.0
"""Seconds to count int8 layers and to measure the first plan."""
EXTRA_ROWS = 40
"""Rows that a trial runs beside the holdout."""
OWN_QUANTIZER_S = 10.0
"""Seconds that an engine's own quantizer takes beside running the calibration samples (8 to 20 on six models)."""
LOWERING_S = 8.0
"""Seconds to make corewise's graph an ONNX model (ResNet-50)."""
FIRST_RUNG_ROWS = 60
"""Calls of one row, in eager PyTorch's time, that the first rung of corewise's quantizer takes."""
BACKEND_ROWS = 100
"""The same for trying PyTorch's quantized backends."""
SHIFT_TWIN = 1.3
"""A twin that is judged under shift (``search.shifting``) takes about this many times as long as its build: it also
answers the holdout, and its cache begins empty."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Expectations about builds that were not tried. Speeds are multiples of the baseline's."""

    cpu: Cpu
    calibration: int
    holdout: int
    convolves: bool = True
    """Whether most of the work is convolutions, and not linear layers."""
    trials: Sequence[Trial] = ()
    judged_under_shift: bool = False
    """Whether int8 with ranges counts only with a twin, whose time is then part of its trial."""

    def worth(self, build: Build, price_per_s: float) -> float:
        """The speed that a build must not have been beaten by to be worth its time: what comes next has the highest.

        If trying build i takes the seconds c_i and gives the speed s_i with probability p_i, the best order of trials,
        of which the fastest counts, is by the z_i that solves p_i (s_i - z_i) = price * c_i (Weitzman, Optimal Search
        for the Best Alternative, Econometrica 47, 1979). A build that wins much comes before cheap ones that win
        little, unless it takes most of the time that is left.
        """
        return self.speed(build) - price_per_s * self.seconds(build) / self.passes(build)

    @property
    def best(self) -> float:
        """The highest speed of a build that passed; 1 for the baseline's."""
        return max((self._ratio(trial) for trial in self._verified if trial.state == State.OK), default=1.0)

    def speed(self, build: Build) -> float:
        """The expected speed: that of a twin; the usual one, corrected by others of its precision; or the usual one."""
        for trial in reversed(self._verified):
            if are_twins(trial.build, build):
                return self._ratio(trial)
        seen = [
            self._ratio(trial) / self._usual_speed(trial.build)
            for trial in self._verified
            if trial.build.precision == build.precision
        ]
        return self._usual_speed(build) * (median(seen) if seen else 1.0)

    def passes(self, build: Build) -> float:
        """How likely it can be made and passes the gate."""
        if not is_int8(build):
            return PASSES[build.precision]
        same = [trial for trial in self._verified if same_int8_layers(trial.build, build)]
        if same:
            return PASSES_AS_REJECTED if same[-1].inaccurate else PASSES_LIKE_ONE
        others = [trial for trial in self._verified if trial.build.precision == build.precision]
        ours = uses_corewise_quantizer(build)
        rejected = [trial for trial in others if trial.inaccurate and uses_corewise_quantizer(trial.build) >= ours]
        if rejected:
            as_corrected = ours and any(rung_height(trial.build) >= rung_height(build) for trial in rejected)
            return PASSES_AS_REJECTED if as_corrected else PASSES_UNLIKE_ONE
        if any(trial.state == State.OK for trial in others):
            return PASSES_LIKE_ONE
        return PASSES_UNCORRECTED if build.quantization.rung == 0 else PASSES[build.precision]

    def seconds(self, build: Build) -> float:
        """How long its trial takes."""
        run_s = (self.holdout + EXTRA_ROWS) * self._row_s / self.speed(build)
        making_s = START_S + self._making_s(build)
        twin_s = SHIFT_TWIN * making_s if self.judged_under_shift and build.precision == "int8" else 0.0
        return making_s + run_s + MEASURE_S + twin_s

    @property
    def _verified(self) -> list[Trial]:
        return [trial for trial in self.trials[1:] if trial.verified_per_s > 0] if self._row_s else []

    @property
    def _row_s(self) -> float:
        """Seconds of one row in eager PyTorch, as the baseline was seen to run; 0 before."""
        return 1 / self.trials[0].verified_per_s if self.trials and self.trials[0].verified_per_s > 0 else 0.0

    def _ratio(self, trial: Trial) -> float:
        return trial.verified_per_s * self._row_s

    def _usual_speed(self, build: Build) -> float:
        others = OTHER_SPEEDS if self.convolves else OTHER_SPEEDS_OF_LINEARS
        speeds = VNNI_SPEEDS if self.cpu.int8_dot else others
        rest = BF16_REST if build.quantization.rest == "bf16" else 1.0
        return speeds[build.precision] * ENGINE_FACTORS.get(build.engine, 1.0) * rest

    def _making_s(self, build: Build) -> float:
        """Seconds to make it, beyond converting the program."""
        if build.precision != "int8":
            return 0.0
        made = [trial for trial in self.trials if trial.build_s > 0 and _same_quantizer(trial.build, build)]
        ours, rung = uses_corewise_quantizer(build), build.quantization.rung
        if any(trial.build.quantization.rung == rung if ours else are_twins(trial.build, build) for trial in made):
            return 0.0  # what was calibrated is kept
        if ours:
            rows = FIRST_RUNG_ROWS if rung == 0 else self.calibration * (2 if rung is None else 1)
            return LOWERING_S + rows * self._row_s
        rows = self.calibration + (BACKEND_ROWS if build.engine == "torch-int8" else 0)
        return OWN_QUANTIZER_S + rows * self._row_s


def following(left: Sequence[Build], forecast: Forecast, left_s: float = inf, sure_s: float | None = None) -> Build:
    """The next of the builds that are ``left`` with ``left_s`` seconds.

    Of those that together promise most in that time (``_best_together``), the one with the most expected gain for its
    time (``Forecast.worth``), where a second is worth what the fastest build could win, divided among the seconds that
    are left. If none fits, the quickest. While nothing but the baseline has passed, time for the quickest build in
    floating point is kept until ``sure_s`` seconds have passed.
    """
    fastest = max(forecast.speed(build) for build in left)
    price_per_s = max(0.0, fastest - 1) / max(left_s, 1e-9)
    quickest = min((build for build in left if is_sure(build)), key=forecast.seconds, default=None)
    kept_s = forecast.seconds(quickest) if quickest else 0.0

    def fits(build: Build) -> bool:
        needed_s = forecast.seconds(build)
        return needed_s <= left_s and (sure_s is None or is_sure(build) or needed_s + kept_s <= sure_s)

    fitting = [build for build in left if fits(build)]
    if not fitting:
        return min(left, key=forecast.seconds)
    together = _best_together(fitting, forecast, left_s)
    return max(together, key=lambda build: forecast.worth(build, price_per_s))


def _best_together(builds: Sequence[Build], forecast: Forecast, left_s: float) -> Sequence[Build]:
    """The few of the builds whose trials fit into the time and whose fastest that passes is expected to be fastest.

    An index for each build alone does not see that two quick trials of slow builds leave no time for the one of a fast
    build. Of builds with the same layers in int8 one is taken, because they pass or fail together.
    """
    seconds = {build: forecast.seconds(build) for build in builds}
    chances = {build: (forecast.speed(build), forecast.passes(build)) for build in builds}

    def expected(chosen: Sequence[Build]) -> float:
        """The expected highest speed of those that pass, or that of what passed before."""
        whole, missed = 0.0, 1.0
        for speed, passes in sorted((chances[build] for build in chosen), reverse=True):
            if speed <= forecast.best:
                break
            whole += missed * passes * speed
            missed *= 1 - passes
        return whole + missed * forecast.best

    groups = (group for count in range(1, TOGETHER + 1) for group in combinations(builds, count))
    fitting = [
        group
        for group in groups
        if sum(seconds[build] for build in group) <= left_s
        and not any(is_int8(first) and same_int8_layers(first, second) for first, second in combinations(group, 2))
    ]
    return max(fitting, key=lambda group: (expected(group), -sum(seconds[build] for build in group)))


def is_better_left(build: Build, left: Sequence[Build], forecast: Forecast, left_s: float) -> bool:
    """Whether it is expected to be much slower than what passed, and there is no time for all that are ``left``."""
    scarce = sum(map(forecast.seconds, left)) > left_s
    return scarce and forecast.speed(build) < PROMISING * forecast.best


def learned_plan(build: Build, trials: Sequence[Trial], goal: Goal) -> Plan | None:
    """The best plan of the fastest twin whose plans were searched; ``None`` if there is none."""
    searched = [
        trial
        for trial in trials
        if trial.build != build and are_twins(trial.build, build) and trial.tuned and not trial.skipped_tuning
    ]
    able = [trial for trial in searched if trial.state == State.OK and goal.best(trial) is not None]
    best = goal.best(min(able, key=goal.cost)) if able else None
    return best.plan if best else None


def is_int8(build: Build) -> bool:
    """Whether it has layers in int8, with ranges or dynamic."""
    return build.precision.startswith("int8")


def is_sure(build: Build) -> bool:
    """Whether it is nearly certain to pass the gate."""
    return build.precision in ("fp32", "bf16")


def are_twins(first: Build, second: Build) -> bool:
    """Whether two builds differ in how they are quantized at most, so that their speeds and best plans are similar."""
    return _unquantized(first) == _unquantized(second)


def same_int8_layers(first: Build, second: Build) -> bool:
    """Whether the same graph runs in int8, whatever the precision of the rest."""
    return _with_fp32_rest(first) == _with_fp32_rest(second)


def _unquantized(build: Build) -> Build:
    return build.with_quantization(QuantizationOptions(reduce_range=build.quantization.reduce_range))


def _with_fp32_rest(build: Build) -> Build:
    return build.with_quantization(replace(build.quantization, rest="fp32"))


def _same_quantizer(first: Build, second: Build) -> bool:
    """Whether two builds are quantized by the same package."""
    ours = uses_corewise_quantizer(first)
    return ours == uses_corewise_quantizer(second) and (ours or first.engine == second.engine)
