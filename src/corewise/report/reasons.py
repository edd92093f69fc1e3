"""The sentence of each reason. Pure; one-line strings without a final full stop."""

from collections.abc import Callable
from typing import Any

from corewise.common.phrases import percent
from corewise.records.reason import Reason, ReasonKind
from corewise.report import numbers

Details = dict[str, Any]
K = ReasonKind


def sentence(reason: Reason) -> str:
    """The reason in words. Records of older versions hold the sentence itself."""
    details = reason.details
    if set(details) == {"text"}:
        return str(details["text"])
    return _SENTENCES[reason.kind](details)


def _fixed(text: str) -> Callable[[Details], str]:
    return lambda details: text


def _accuracy(details: Details) -> str:
    d = details
    verdict = "within" if d["passed"] else "above"
    upper = " at its upper end" if d["strict"] else ""
    return (
        f"{d['metric']} {d['value']:.4f} against {d['baseline_value']:.4f}: drop {d['drop']:.4f} "
        f"[{d['drop_low']:.4f}, {d['drop_high']:.4f}] {verdict} {d['max_drop']:g}{upper}"
    )


def _shifted(details: Details) -> str:
    if details.get("alone"):
        return "on texts in calls of their own: "
    return "on samples unlike the calibration samples: " if details.get("shifted") else ""


def _below_floor(details: Details) -> str:
    sqnr = f"{details['channels']} has an SQNR of {details['sqnr_db']:.1f} dB"
    return f"{_shifted(details)}{sqnr}, below its floor of {details['floor_db']:g} dB; {_accuracy(details)}"


def _near_chance(details: Details) -> str:
    scores = f"fp32 itself scores {details['metric']} {details['value']:.4f}, guessing {details['chance']:.4f}"
    return f"{scores}: check the labels and the preprocessing"


def _nothing_in_int8(details: Details) -> str:
    layers = details["layers"]
    if not layers:
        return "it has no layer that runs in int8"
    which = "its only layer" if layers == 1 else f"all {layers} layers"
    return f"{which} silently ran in fp32"


def _too_slow(details: Details) -> str:
    per_s, best_per_s = numbers.rate(details["per_s"]), numbers.rate(details["best_per_s"])
    return f"too slow to measure: {per_s} while verifying; the best so far did {best_per_s}"


def _budget(details: Details) -> str:
    return f"the budget of {details['budget_s']:g} s was spent"


def _budget_so_far(details: Details, rest: str = "plans and the race") -> str:
    """What was spent of the budget, and what the rest is for; records of older versions do not say how much."""
    budget_s = details["budget_s"]
    elapsed_s = details.get("elapsed_s", budget_s)
    if elapsed_s >= budget_s:
        return _budget(details)
    return f"{elapsed_s:.0f} s of the budget of {budget_s:g} s were spent, and the rest is kept for {rest}"


def _budget_too_short(details: Details) -> str:
    left, needed = numbers.duration(details["left_s"]), numbers.duration(details["needed_s"])
    what = "calibrating it again without those samples" if details.get("twin") else "the trial"
    return f"{left} of the budget of {details['budget_s']:g} s were left, and {what} needs about {needed}"


def _left_untried(details: Details) -> str:
    names = ", ".join(details["builds"])
    more = details["count"] - len(details["builds"])
    untried = f"{names} and {more} more" if more else names
    return f"{_budget_so_far(details)}; left untried: {untried}"


def _earlier_trials_unused(details: Details) -> str:
    """Runs of older versions did not keep what they were of."""
    *others, last = details["differing"] or ["the model, the samples, the options or the versions"]
    what = f"{', '.join(others)} and {last}" if others else last
    trials = "1 finished trial" if details["count"] == 1 else f"{details['count']} finished trials"
    return f"the search starts again: {what} changed since the earlier run, so its {trials} cannot be used"


def _over_budget(details: Details) -> str:
    """Where the time went of a search that took longer than its budget."""
    trials, whole = numbers.duration(details["trials_s"]), numbers.duration(details["elapsed_s"])
    race = numbers.duration(details["race_s"] - details["trials_s"])
    rest = numbers.duration(details["elapsed_s"] - details["race_s"])
    return (
        f"it took {whole} with a budget of {details['budget_s']:g} s: trials and plans ended after {trials}, the race "
        f"took {race}, and the last steps for the winner took {rest}"
    )


def _while(details: Details) -> str:
    return f"{details['step']} with {details['plan']}" if "plan" in details else str(details["step"])


def _last_words(details: Details) -> str:
    return f": {details['last_words']}" if details.get("last_words") else ""


def _hung(details: Details) -> str:
    return f"hung while {_while(details)}: no answer in {details['timeout_s']:.0f} s, so it was killed"


def _killed(details: Details) -> str:
    killer = "killed (SIGKILL, most likely by the kernel because memory ran out)"
    return f"{killer} while {_while(details)}{_last_words(details)}"


def _over_memory(details: Details) -> str:
    needs, limit = numbers.megabytes(details["needs_bytes"]), numbers.megabytes(details["limit_bytes"])
    return f"{details['plan']} needs {needs} of memory, more than {limit}"


def _not_tuned(details: Details) -> str:
    per_s, best_per_s = numbers.rate(details["per_s"]), numbers.rate(details["best_per_s"])
    return f"its plans were not searched: {per_s} under {details['plan']} against {best_per_s}"


def _ratio(details: Details, prefix: str = "") -> str:
    ratio, low, high = (details[f"{prefix}{name}"] for name in ("ratio", "low", "high"))
    return f"{numbers.times(ratio)} {numbers.interval(low, high)}"


def _won(details: Details) -> str:
    """The winner's label, after what its win says about the other precisions."""
    inaccurate = details["inaccurate"]
    start = f"no {' or '.join(inaccurate)} build was accurate enough; " if inaccurate else ""
    return f"{start}{details['winner']} wins"


def _figure(details: Details) -> str:
    return numbers.figure(details["figure"], details["unit"])


def _tie(details: Details) -> str:
    if "tied_with" not in details:
        return ""
    return f"; as fast as {details['tied_with']} ({_ratio(details, 'tied_')} of it) and more accurate"


def _faster(details: Details) -> str:
    against = f"{_ratio(details)} the baseline {details['baseline']} in {details['rounds']} alternating rounds"
    return f"{_won(details)}: {_figure(details)}, {against}{_tie(details)}"


def _rate_under_slo(details: Details, prefix: str = "") -> str:
    rate_per_s, slo_ms = details[f"{prefix}rate_per_s"], details[f"{prefix}slo_ms"]
    within = f"with p99 <= {slo_ms:g} ms"
    if rate_per_s is None:
        if details[f"{prefix}loaded"]:
            return f"meets no rate {within}"
        return f"was not put under load, so no rate {within} is known"
    p99_ms, duration_s = details[f"{prefix}p99_ms"], details[f"{prefix}duration_s"]
    seen = f"(p99 {numbers.milliseconds(p99_ms)} over {duration_s:.0f} s)"
    return f"meets {numbers.rate(rate_per_s, 'requests')} {within} {seen}"


def _highest_rate(details: Details) -> str:
    text = f"{_won(details)}: it {_rate_under_slo(details)}"
    if "baseline_slo_ms" in details:
        return f"{text}; the baseline {_rate_under_slo(details, 'baseline_')}"
    return f"{text}, and no finalist did better"


def _slo_uncertain(details: Details) -> str:
    nothing = f"nothing is certain to meet p99 <= {details['slo_ms']:g} ms: {details['winner']}"
    if "call_p99_ms" in details:
        return f"{nothing} is the closest; a single call takes p99 {numbers.milliseconds(details['call_p99_ms'])}"
    if "met_per_s" in details:
        rate = numbers.rate(details["met_per_s"], "requests")
        return f"{nothing} met {rate} once, but no slightly lower rate afterwards"
    rate = numbers.rate(details["lowest_per_s"], "requests")
    return f"{nothing} answered {percent(details['in_time'])} of {rate} in time"


def _nothing_fits(details: Details) -> str:
    limit, needs = numbers.megabytes(details["limit_bytes"]), numbers.megabytes(details["needs_bytes"])
    return f"no build fits in {limit} of memory; {details['winner']} needs at least {needs}"


def _race_contradicts(details: Details) -> str:
    """Records of older versions always had a second race."""
    again = "in a second race too" if details.get("races", 2) > 1 else "and the budget left no time for a second race"
    return (
        f"the race and the trials contradict each other, {again}: {_ratio(details)} the baseline in the race, "
        f"{_ratio(details, 'alone_')} in trials; other programs may have disturbed them, so run it again"
    )


def _drop_uncertain(details: Details) -> str:
    needed = details["needed"]
    too_close = "the drop is too close to the limit for any number of samples"
    advice = f"about {needed} samples would show it" if needed else too_close
    limit = f"whether the drop is within {details['max_drop']:g}"
    return f"a holdout of {details['samples']} is too small to show {limit}; {advice}"


def _mixes_batch(details: Details) -> str:
    place = f" in {details['operation']}" if details["operation"] else ""
    place += f" ({details['where']})" if details["where"] else ""
    agreement = f"a row's answer alone agrees with its answer in a batch to only {details['decibels']:.0f} dB"
    return f"the model mixes the rows of a batch{place}: {agreement}; each row runs in a call of its own"


def _decoding(details: Details, so: str) -> str:
    """What decoding large JPEGs at a smaller scale does to the winner's answers."""
    score = f"{details['metric']} {details['value']:.4g}, {details['drop']:.4g} below fp32's on photos decoded in full"
    told = f"with {details['photos']} photos decoded at a smaller scale, the answers have {score}"
    if "moved_db" not in details:  # a record of an older version
        return f"{told}, {so}"
    moved = f"decoding alone adds errors {details['moved_db']:.1f} dB below the answers"
    return f"{told}, and {moved} (at least {details['needed_db']:.1f} dB are needed), {so}"


def _pixels(details: Details) -> str:
    """What it is worth that the engine normalizes photos itself."""
    apart = f"if the engine normalizes photos itself, its answers agree to {details['decibels']:.0f} dB"
    if details["decibels"] < details["least_db"]:
        return f"{apart}, and at least {details['least_db']:.0f} dB are needed"
    return f"{apart}, and it answers {details['ratio']:.2f} times as many photos"


def _packing(details: Details) -> str:
    """What it is worth that several texts share a row."""
    return (
        f"with several texts in each row of {details['tokens']} tokens the engine answers {details['ratio']:.2f} times "
        f"as many texts, at {details['metric']} {details['value']:.4f}"
    )


def _from_files(details: Details) -> str:
    """How photos are answered from their files, and what share decoding has."""
    decoders, ratio = details["decoders"], details["per_s"] / details["own_per_s"]
    threads = "1 thread decodes" if decoders == 1 else f"{decoders} threads decode"
    gain = f", {ratio:.2f} times as many as under the winner's plan for tensors" if ratio > 1 else ""
    return (
        f"from files it answers {numbers.rate(details['per_s'], 'photos')} if {threads} beside {details['plan']}"
        f"{gain}; decoding takes {percent(details['decoding'])} of the processor time"
    )


def _keeps_state(details: Details) -> str:
    where = f" ({details['where']})" if details["where"] else ""
    so = "answers do not depend on it"
    if details.get("is_read"):
        so = "no answer was seen to change, but answers are computed from it, and builds keep its present value"
    return f"each call changes {details['name'] or 'a value'} in the model{where}; {so}"


_SENTENCES: dict[ReasonKind, Callable[[Details], str]] = {
    K.BASELINE: _fixed("the baseline"),
    K.ACCURATE: _accuracy,
    K.INACCURATE: lambda details: f"{_shifted(details)}{_accuracy(details)}",
    K.BELOW_FLOOR: _below_floor,
    K.NOT_JUDGED_UNDER_SHIFT: lambda details: (
        f"{details.get('build', 'it')} could not be judged on samples unlike the calibration samples: {details['why']}"
    ),
    K.NOTHING_IN_INT8: _nothing_in_int8,
    K.TOO_SLOW: _too_slow,
    K.DEPENDS_ON_NEIGHBOURS: lambda details: (
        f"a row's answer depends on the other rows of its call: alone it agrees to {details['decibels']:.1f} dB, and "
        f"at least {details['floor_db']:g} dB are needed"
    ),
    K.BUDGET_SPENT: lambda details: _budget_so_far(details, "the race"),
    K.BUDGET_SPENT_BEFORE: lambda details: f"not tried: {_budget_so_far(details)}",
    K.BUDGET_SPENT_DURING: lambda details: f"ended while it was tried: {_budget_so_far(details)}",
    K.BUDGET_TOO_SHORT: _budget_too_short,
    K.BUDGET_BETTER_SPENT: lambda details: (
        f"not tried: it is expected to reach about {numbers.times(details['expected'])} eager's speed, but "
        f"{numbers.times(details['best'])} was measured already, so the time goes to faster builds"
    ),
    K.STEP_FAILED: lambda details: f"{_while(details)}: {details['text']}",
    K.HUNG: _hung,
    K.KILLED: _killed,
    K.CRASHED: lambda details: f"crashed with {details['signal']} while {_while(details)}{_last_words(details)}",
    K.EXITED: lambda details: f"exited with code {details['code']} while {_while(details)}{_last_words(details)}",
    K.UNRESPONSIVE: lambda details: f"closed its channel and did not end while {_while(details)}",
    K.FIRST_LOOK: _fixed("the first look"),
    K.OTHER_LAYOUT: _fixed("other threads and instances"),
    K.OTHER_THREADS: _fixed("other numbers of threads"),
    K.SMALLER_BATCH: _fixed("a smaller batch may be faster"),
    K.LARGER_BATCH: _fixed("a larger batch may be faster"),
    K.SIMILAR_SPEED: _fixed("by their first calls, these threads and instances may be about as fast"),
    K.TWINS_BEST: _fixed("the best plan of a build that differs only in how it is quantized"),
    K.MEASURED_AGAIN: _fixed("it is among the fastest, so it was measured again"),
    K.LATENCY_TABLE: _fixed("the latency table"),
    K.SLO_TABLE: _fixed("the latency table for the SLO"),
    K.ELASTIC_TABLE: _fixed("the latency tables of an elastic plan"),
    K.ELASTIC_NOT_MEASURED: lambda details: (
        f"one layout stays open: an elastic plan was not measured, because {details['why']}"
    ),
    K.OVER_MEMORY: _over_memory,
    K.MEMORY_UNKNOWN: lambda details: f"its memory is not known: {_not_tuned(details)}",
    K.FASTEST_PLAN: lambda details: f"{details['plan']} is the fastest plan tried: {numbers.rate(details['per_s'])}",
    K.FASTEST_CALL: lambda details: (
        f"{details['plan']} is the fastest plan tried: {numbers.milliseconds(details['p50_ms'])}"
    ),
    K.MOST_WITHIN_SLO: lambda details: (
        f"{details['plan']} has the highest rate with calls within {details['slo_ms']:g} ms: "
        f"{numbers.rate(details['per_s'])}"
    ),
    K.NONE_WITHIN_SLO: lambda details: f"no allowed plan has a call within {details['slo_ms']:g} ms",
    K.NO_PLAN_ALLOWED: _fixed("no plan that was tried may be chosen"),
    K.MUCH_SLOWER: _not_tuned,
    K.OTHERS_FASTER: lambda details: f"{_not_tuned(details)}, and {details['count']} others were faster",
    K.BASELINE_SHARE_SPENT: lambda details: (
        f"the baseline's share of the budget, {percent(details['share'])} of {details['budget_s']:g} s, was spent"
    ),
    K.FASTER_THAN_BASELINE: _faster,
    K.NO_FINALIST_FASTER: lambda details: f"{_won(details)}: {_figure(details)}, and no finalist was faster",
    K.ONLY_FINALIST: lambda details: f"{_won(details)}: {_figure(details)}, the only finalist",
    K.STAYS_BASELINE: lambda details: f"{_won(details)}: {_figure(details)}, the baseline{_tie(details)}",
    K.HIGHEST_RATE: _highest_rate,
    K.SLOWER_THAN_WINNER: lambda details: f"{_ratio(details)} of the winner in the race",
    K.LESS_ACCURATE: lambda details: f"{_ratio(details)} of the winner in the race: as fast, but less accurate",
    K.LOWER_RATE: _rate_under_slo,
    K.NOT_A_FINALIST: lambda details: (
        f"not a finalist: {_figure(details)} in its trial against {numbers.figure(details['against'], details['unit'])}"
    ),
    K.NOT_MEASURED: _fixed("not a finalist: its speed was not measured"),
    K.SLO_UNCERTAIN: _slo_uncertain,
    K.NOTHING_FITS_MEMORY: _nothing_fits,
    K.RACE_CONTRADICTS: _race_contradicts,
    K.FEW_ROUNDS: lambda details: (
        f"only {details['rounds']} alternating rounds: a 95 % interval of the speed-up needs {details['needed']}"
    ),
    K.SPEEDUP_UNCERTAIN: _fixed(
        "the interval of the speed-up contains 1: the winner may be no faster than the baseline"
    ),
    K.DROP_UNCERTAIN: _drop_uncertain,
    K.LOSES_UNDER_SHIFT: lambda details: f"{details['why']}; --robust keeps such builds out",
    K.NEAR_CHANCE: _near_chance,
    K.NOISY: lambda details: f"{details['build']}: {details['text']}",
    K.ENGINE_UNAVAILABLE: lambda details: f"engine {details['engine']} was not tried: {details['why']}",
    K.ONLY_EAGER: lambda details: f"only eager was tried: the model cannot be exported ({details['why']})",
    K.FEWER_SAMPLES: lambda details: (
        f"{details['used']} of {details['of']} {details['role']} samples were used: the budget has no time for more"
    ),
    K.EARLIER_TRIALS_UNUSED: _earlier_trials_unused,
    K.LEFT_UNTRIED: _left_untried,
    K.OVER_BUDGET: _over_budget,
    K.MIXES_BATCH: _mixes_batch,
    K.FIXED_BATCH: lambda details: f"calls have exactly {numbers.counted(details['rows'], 'row')}: {details['why']}",
    K.KEEPS_STATE: _keeps_state,
    K.BASELINE_DIFFERS: lambda details: (
        f"for {numbers.counted(details['samples'], 'sample')} the baseline's answers agree with the model's own only "
        f"to {details['decibels']:.0f} dB: either rounding decides, as among scores that are nearly equal, or the "
        "exported program is wrong; compare the artifact's answers with the model's"
    ),
    K.SCALED_DECODING: lambda details: _decoding(details, "so the artifact decodes photos this way"),
    K.FULL_DECODING: lambda details: _decoding(details, "so the artifact decodes photos in full"),
    K.DECODING_NOT_JUDGED: lambda details: (
        f"the artifact decodes photos in full, because the budget had no time to judge photos decoded at "
        f"{details['sharpness']:.3g} times the size needed; give more time"
    ),
    K.TAKES_PIXELS: lambda details: f"{_pixels(details)}: it takes pixels",
    K.TAKES_FLOATS: lambda details: f"{_pixels(details)}: photos are normalized before they reach the engine",
    K.PACKS_TEXTS: lambda details: (
        f"{_packing(details)}: short texts share rows, with a second program of {numbers.size(details['size_bytes'])}"
    ),
    K.PACKING_SLOWER: lambda details: (
        f"{_packing(details)}, too few to keep a second program: each text has a row of its own"
    ),
    K.TEXTS_NOT_PACKED: lambda details: f"each text has a row of its own: {details['why']}",
    K.FROM_FILES: _from_files,
    K.NOT_SPLIT: _fixed("samples are too few or too alike to judge int8 on samples unlike those that calibrated it"),
    K.COREWISE_INT8_ONLY: lambda details: f"only corewise's quantizer makes int8 builds: without {details['layers']}",
}
