"""report: one story in every format, nothing cut off, nothing that can steer a terminal or break a table."""

import io
import json
import re
import runpy
from dataclasses import replace

import pytest
from builders import said
from builders import text as text_of
from places import GOLDEN
from rich.console import Console

from corewise.records.build import Build, Plan, Receipt
from corewise.records.events import (
    BuildsLeftUntried,
    RaceRound,
    Stage,
    StageStarted,
    TrialEnded,
    TrialStarted,
    TrialStep,
)
from corewise.records.goal import Latency, Throughput
from corewise.records.jsonable import from_json, to_json
from corewise.records.measurement import Rates
from corewise.records.reason import Reason, ReasonKind, Step
from corewise.records.report import Report
from corewise.records.trial import Trial
from corewise.report import figures, html, markdown, numbers, story, terminal, words
from corewise.report.summary import summarize
from corewise.report.terminal import Progress

MAKE = runpy.run_path(str(GOLDEN / "make.py"))
REPORT, shown = MAKE["REPORT"], MAKE["shown"]
WINNER = REPORT.winner
EAGER = REPORT.trials[0]
FAILED = next(trial for trial in REPORT.trials if trial.state == "failed")

LATENCY = replace(REPORT.requirements, goal=Latency())


def altered(**choice):
    return replace(REPORT, choice=replace(REPORT.choice, **choice))


def flat(text):
    return " ".join(text.split())


# --- golden files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["report.json", "report.md", "report.html", "show.txt"])
def test_the_golden_files_are_what_the_report_looks_like(name):
    assert (GOLDEN / name).read_text() == MAKE["files"]()[name], "renew with tests/golden/make.py and read the diff"


def test_the_golden_json_is_read_back_as_the_same_report():
    assert from_json(Report, json.loads((GOLDEN / "report.json").read_text())) == REPORT


# --- summary ------------------------------------------------------------------------------------------------------


def test_the_summary_is_json_with_the_figures_of_the_choice_and_the_winner():
    found = summarize(REPORT)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    expected = {
        "engine": "openvino",
        "precision": "int8",
        "options": {"reduce_range": True},
        "plan": {"threads_per_instance": 2, "instances": 1, "batch": 16},
        "objective": REPORT.requirements.flat(),
        "throughput_per_s": 55.4,
        "baseline_throughput_per_s": 13.07,
        "speedup": 4.24,
        "speedup_low": 4.17,
        "speedup_high": 4.31,
        "metric": "top1",
        "baseline_value": 0.92,
        "value": 275 / 300,
        "drop": WINNER.fidelity.drop,
        "drop_low": -0.01,
        "drop_high": 0.0167,
        "sqnr_db": 22.9,
        "cosine": 0.9976,
        "agreement": 293 / 300,
        "lower_is_better": False,
        "basis": "labels",
        "suggested_metrics": [],
        "shift_drop": 0.0244,
        "holdout": 300,
        "calibration": 200,
        "wall_s": 252.4,
        "peak_memory_bytes": 2_310_811_648,
        "reason": said(REPORT.choice.reason),
        "warnings": [said(warning) for warning in REPORT.choice.warnings],
    }
    assert {name: found[name] for name in expected} == expected
    assert {name: found["worst_group"][name] for name in ("name", "sqnr_db", "floor_db")} == {
        "name": "output_0",
        "sqnr_db": 20.8,
        "floor_db": 5.0,
    }


def test_every_trial_is_in_the_summary_with_why_it_lost_or_won():
    trials = {trial["label"]: trial for trial in summarize(REPORT)["trials"]}
    assert len(trials) == len(REPORT.trials)
    assert [label for label, trial in trials.items() if trial["chosen"]] == [WINNER.build.label]
    assert trials[WINNER.build.label]["reason"] == said(REPORT.choice.reason)
    assert {label: trials[label]["reason"] for label in trials if label != WINNER.build.label} == {
        loser.build.label: said(loser.reason) for loser in REPORT.choice.losers
    }
    assert trials["eager/fp32"]["throughput_per_s"] == 13.1
    failed = trials[FAILED.build.label]
    assert (failed["value"], failed["drop"], failed["throughput_per_s"], failed["p50_ms"]) == (None,) * 4
    assert (failed["shift_drop"], failed["worst_group"]) == (None, None)
    assert trials[WINNER.build.label]["shift_drop"] == 0.0244


def test_where_no_metric_was_named_every_format_says_what_was_judged_and_how_to_name_one():
    fidelity = replace(
        WINNER.fidelity, metric="concordance", basis="outputs", suggested_metrics=("detections", "map"), shift=None
    )
    trials = tuple(replace(trial, fidelity=fidelity) if trial is WINNER else trial for trial in REPORT.trials)
    report = replace(REPORT, trials=trials)
    assert summarize(report)["suggested_metrics"] == ["detections", "map"]
    found = Console(file=io.StringIO(), width=200)
    found.print(terminal.conclusion(report, saved="a.cw", next_command="next"))
    for text in (shown(report, 200), found.file.getvalue(), markdown.render(report), html.render(report)):
        assert "output_0, 20.8 dB of at least 5" in text
        assert "because no metric was named; detections, map fit such outputs" in text
        assert "(--metric)" in text


def test_a_winner_without_fidelity_has_no_accuracy_in_any_format():
    trials = tuple(replace(trial, fidelity=None) for trial in REPORT.trials)
    report = replace(REPORT, trials=trials)
    assert summarize(report)["metric"] is None
    assert summarize(report)["drop"] is None
    for text in (shown(report, 80), markdown.render(report)):
        assert "top1 0." not in text.split("others lost")[0]


# --- terminal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_everything_is_shown_in_full_at_every_width(width):
    text = shown(REPORT, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for word in re.split(
        r"\s+", " ".join(map(said, (REPORT.choice.reason, *(loser.reason for loser in REPORT.choice.losers))))
    ):
        assert word in text
    for trial in REPORT.trials:
        assert trial.build.label in text
    assert "! failed" in text
    assert "✗ rejected" in text
    assert "✓ chosen" in text


def test_the_headline_says_how_much_faster_and_at_what_accuracy():
    assert words.headline(REPORT) == "4.24x [4.17, 4.31] as fast as eager PyTorch, top1 0.9167 against 0.9200"


def test_a_winning_baseline_is_called_what_it_is():
    report = altered(winner=EAGER.build, throughput_per_s=13.07, speedup=1.0)
    for text in (shown(report, 80), markdown.render(report)):
        assert "nothing beat the baseline, eager PyTorch in fp32 at 13.1 items/s" in text
        assert "faster than" not in text
        assert "against 13.1" not in text


def test_a_baseline_that_stood_alone_beat_nothing():
    report = replace(altered(winner=EAGER.build, throughput_per_s=13.07, speedup=1.0, losers=()), trials=(EAGER,))
    assert words.headline(report) == "nothing but the baseline was tried: eager PyTorch in fp32 at 13.1 items/s"


def test_the_latency_goal_is_told_in_milliseconds():
    report = replace(altered(throughput_per_s=50.0, baseline_throughput_per_s=11.2), requirements=LATENCY)
    for text in (shown(report, 80), markdown.render(report)):
        assert "20.0 ms against 89.3 ms" in text
        assert "p50/p99 ms" in text
        assert "19.9/21.1" in text
        assert "items/s" not in text
    assert words.speedup(WINNER, EAGER, Latency()) == pytest.approx(50.3 / 11.2, rel=1e-3)
    assert "…" not in shown(report, 80)


def test_what_ran_in_int8_is_told_for_the_winner_and_the_losers():
    told = "int8: 53 of 54 convolutions and linears, 0 fell back"
    assert ("receipt", told) in list(story.facts(REPORT))
    for text in (shown(REPORT, 120), markdown.render(REPORT)):
        assert told in text
        assert "int8: 53 of 54 convolutions and linears, 1 fell back (node_linear)" in flat(text.replace("\\", ""))
    found = summarize(REPORT)
    assert found["receipt"]["int8"] == 53
    assert found["trials"][0]["receipt"] is None


def test_what_a_repair_cost_is_told_beside_the_build_that_was_rejected():
    assert "repair" not in dict(story.facts(REPORT))
    options = replace(WINNER.build.quantization, quantizer="corewise")
    broken, repaired = (WINNER.build.with_quantization(replace(options, reverted_layers=count)) for count in (0, 4))
    trials = (
        EAGER,
        replace(WINNER, build=broken, state="rejected", verified_per_s=60.0),
        replace(WINNER, build=repaired, verified_per_s=52.5),
    )
    report = replace(altered(winner=repaired), trials=trials)
    told = dict(story.facts(report))["repair"]
    assert told.startswith(
        "4 layers are back in floating point, because the build with all layers in int8 was rejected"
    )
    assert told.endswith("52.5 items/s against 60.0 items/s of that build")
    assert told in flat(shown(report, 300))


def test_of_many_layers_that_fell_back_the_first_are_named():
    many = Receipt.tally([("Conv", False)] * 5, ["a\x1b[2J", "b", "c", "d", "e"])
    assert words.receipt(many) == ("int8: 0 of 5 convolutions and linears, 5 fell back (a [2J, b, c and 2 more)")


def test_text_of_others_is_neither_markup_nor_control_codes():
    text = shown(replace(REPORT, notes=(text_of("install corewise[openvino]\x1b[2J\x07\nnow \u202eback"),)), 120)
    assert "- install corewise[openvino] [2J now back" in text
    assert "\x1b" not in text


def test_an_older_or_foreign_trial_list_without_a_baseline_has_no_speedups():
    report = replace(REPORT, trials=REPORT.trials[2:])
    assert words.baseline(report.trials) is None
    assert "1.51x" not in shown(report, 80)
    assert "19.8" in shown(report, 80)


def test_losers_are_told_the_fastest_first():
    listed = shown(REPORT, 120).partition("why the others lost, the fastest first")[2]
    labels = [
        "torch-int8/int8/backend=onednn",
        "openvino/fp32",
        "eager/fp32",
        "eager/bf16",
        "torch-int8/int8/backend=x86",
    ]
    places = [listed.index(f" {label}") for label in labels]
    assert places == sorted(places)


# --- the end of a search ------------------------------------------------------------------------------------------


def ended(report=REPORT, width=80, cut=True):
    screen = console(width=width)
    screen.print(terminal.overview(report, cut=cut), crop=False)
    screen.print(terminal.conclusion(report, saved="my net.cw", next_command="corewise serve 'my net.cw'"))
    return [line.rstrip() for line in screen.file.getvalue().splitlines()]


def test_a_search_ends_with_the_winner_its_speed_its_accuracy_and_the_next_command():
    assert ended()[-8:] == [
        "",
        "winner    openvino/int8/reduce_range=True, 2 threads x 1, batch 16",
        "speed     4.24x [4.17, 4.31] as fast as eager PyTorch: 55.4/s against 13.1/s",
        "layouts   one, because an elastic plan is not better",
        "accuracy  top1 0.9167 against 0.9200: drop 0.0033 [-0.0100, 0.0167] on 300",
        "          held-out samples, 0.0244 [-0.0302, 0.0901] under shift (41 samples)",
        "saved     my net.cw",
        "next      corewise serve 'my net.cw'",
    ]


def test_a_search_that_packs_texts_ends_with_what_that_is_worth():
    facts = {"ratio": 1.17, "tokens": 64, "metric": "cosine", "value": 0.9981}
    packs = Reason.of(ReasonKind.PACKS_TEXTS, size_bytes=30_000_000, **facts)
    line = next(line for line in ended(replace(REPORT, notes=(packs,)), width=200) if line.startswith("packing"))
    assert line == f"packing   {said(packs)}"
    assert "1.17 times as many texts" in line
    slower = Reason.of(ReasonKind.PACKING_SLOWER, **facts)
    assert not [line for line in ended(replace(REPORT, notes=(slower,))) if line.startswith("packing")]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_above_it_each_loser_has_one_line_the_fastest_first_and_no_note_is_shown(width):
    lines = ended(width=width)
    assert max(map(len, lines)) <= width
    first = lines.index("the other builds, the fastest first") + 1
    losers = lines[first : lines.index("", first)]
    assert len(losers) == len(REPORT.choice.losers)
    assert [line.split()[1] for line in losers[:3]] == ["41.9/s", "19.8/s", "13.1/s"]
    assert any(line.endswith("…") for line in losers)
    assert "warnings" in lines[first + len(losers) + 1]
    assert "notes" not in lines
    assert len(lines) < 25


def test_in_a_file_the_lines_of_losers_are_whole():
    text = "\n".join(ended(cut=False))
    assert "…" not in text
    for loser in REPORT.choice.losers:
        assert loser.build.label in text
        assert said(loser.reason) in text


def test_the_end_of_a_search_for_latency_or_without_a_winner():
    latency = replace(altered(throughput_per_s=50.0, baseline_throughput_per_s=11.2), requirements=LATENCY)
    assert "as fast as eager PyTorch: 20.0 ms against 89.3 ms" in "\n".join(ended(latency))
    assert [line.split()[1] for line in ended(latency)[2:5]] == ["25.8", "52.4", "89.3"]
    lost = "\n".join(ended(altered(winner=EAGER.build, throughput_per_s=13.07, speedup=1.0)))
    assert "speed     nothing beat the baseline, eager PyTorch in fp32 at 13.1" in lost
    assert "as fast as" not in lost


def test_latency_over_load_is_told_for_the_elastic_plan_and_both_layouts_alone():
    found = REPORT.choice.elasticity
    elastic = replace(REPORT, choice=replace(REPORT.choice, elasticity=replace(found, pays=True)))
    facts = dict(story.facts(elastic))["layouts"]
    assert facts.startswith(
        f"{found.plan.label}, depending on the load: "
        "simulated p50 at 5 % of the saturated rate 20.1 ms instead of 19.9 ms"
    )
    assert facts.endswith("; at most 734 MB")
    for text in (markdown.render(elastic), shown(elastic, 80)):
        assert [line.split() for line in text.replace("|", "").splitlines() if line.strip("| ").startswith("67 %")] == [
            ["67", "%", "41.0", "/", "97.2", "39.4", "/", "102", "48.8", "/", "112"]
        ]
    drawn = next(figure for figure in figures.won(figures.Builds(elastic)) if figure.title == "Latency over load")
    assert [len(cells) for _, cells in drawn.rows] == [4, 4, 4]
    assert drawn.svg.count("polyline") == 3
    limited = replace(REPORT, requirements=replace(REPORT.requirements, memory_limit_bytes=700 * 10**6))
    one = "one, because both together may need 734 MB, more than the memory limit"
    assert dict(story.facts(limited))["layouts"] == one
    nothing = replace(REPORT, choice=replace(REPORT.choice, elasticity=None))
    assert "over load" not in markdown.render(nothing) + shown(nothing, 80)


# --- Markdown -----------------------------------------------------------------------------------------------------


def test_markdown_rows_keep_their_columns_whatever_an_option_holds():
    build = replace(WINNER.build, options=(("skip", "a|b`c*\nd"),))
    trials = tuple(replace(trial, build=build) if trial is WINNER else trial for trial in REPORT.trials)
    text = markdown.render(replace(altered(winner=build, elasticity=None), trials=trials))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == len(REPORT.trials) + 2
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {8}
    assert r"openvino (skip=a\|b\`c\* d)" in text


def test_markdown_shows_names_as_they_are():
    report = replace(REPORT, model="my_net.py:__init__", notes=(text_of("# <b>5*5</b> [x](y) avx512_vnni"),))
    text = markdown.render(report)
    assert text.startswith("# my_net.py:\\_\\_init\\_\\_\n")
    assert text.endswith("\n- \\# \\<b\\>5\\*5\\</b\\> \\[x](y) avx512_vnni\n" + _notes_of_trials())


def _notes_of_trials():
    return "".join(f"- {note}\n" for note in words.notes(replace(REPORT, notes=())))


# --- figures ------------------------------------------------------------------------------------------------------


def test_figures_are_short_and_never_misleading():
    assert [numbers.duration(s) for s in (0, 8.44, 31.2, 59.7, 252.4, 3840)] == [
        "0 s",
        "8.4 s",
        "31 s",
        "1 min 0 s",
        "4 min 12 s",
        "1 h 4 min",
    ]
    assert [numbers.size(b) for b in (0, 2048, 25_000_000, 2_400_000_000)] == [
        "0.0 KiB",
        "2.0 KiB",
        "23.8 MiB",
        "2.2 GiB",
    ]
    assert [numbers.times(x) for x in (1.041, 9.996, 42.26, 1204.4)] == ["1.04x", "10.0x", "42.3x", "1,204x"]
    assert [words.score(x) for x in (-0.00001, 0.91666, -345.25, 1234567.0)] == [
        "0.0000",
        "0.9167",
        "-345.2500",
        "1.23457e+06",
    ]


def test_numbers_are_written_the_same_everywhere():
    assert [numbers.three_digits(value) for value in (0, 0.456, 9.994, 9.996, 87.34, 99.96, 1204.4, 13314.2)] == [
        *("0.00", "0.46", "9.99", "10.0", "87.3", "100", "1,204", "13,314")
    ]
    assert numbers.rate(13310.4) == "13,310/s"
    assert numbers.milliseconds(0.4167) == "0.42 ms"


# --- progress -----------------------------------------------------------------------------------------------------


class Clock:
    """A clock that stands still until it is set."""

    now_s = 0.0

    def __call__(self):
        return self.now_s


def events():
    yield StageStarted(Stage.EXPORTING)
    yield TrialEnded(EAGER, resumed=True)
    for number, trial in enumerate(REPORT.trials[1:], 2):
        yield TrialStarted(trial.build, number, 8)
        yield TrialStep(trial.build, Step.BUILDING)
        yield TrialEnded(trial)
    yield RaceRound(1, 2, tuple(replace(rates, per_s=rates.per_s[:1]) for rates in REPORT.finals))
    yield RaceRound(2, 2, tuple(replace(rates, per_s=rates.per_s[:2]) for rates in REPORT.finals))


def console(width=80, height=50, terminal=True):
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=terminal, color_system=None)


def test_plain_progress_is_one_whole_line_per_stage_and_ended_trial():
    screen = console(width=20, terminal=False)
    with Progress(screen, "plain") as progress:
        for event in events():
            progress(event)
    lines = screen.file.getvalue().splitlines()
    assert lines[:3] == [
        "exporting the model",
        "eager/fp32: ok, top1 0.9200 (drop 0.0000), 13.1 items/s (1.00x eager) (resumed)",
        "2/8 eager/bf16: pruned: this CPU has no bf16 instructions: it would be slower than fp32",
    ]
    assert lines[3] == "3/8 openvino/fp32: ok, top1 0.9200 (drop 0.0000), 19.8 items/s (1.51x eager)"
    assert lines[-1].startswith(
        "race of 2 rounds: 56.0/s openvino/int8/reduce_range=True, 2 threads x 1, batch 16; 42.1/s"
    )
    assert len(lines) == 1 + len(REPORT.trials) + 1
    assert "\x1b" not in screen.file.getvalue()


def test_what_the_budget_leaves_untried_is_told_once_and_at_once():
    screen, builds = console(terminal=False), [f"engine/{n}" for n in range(3)]
    details = {"budget_s": 60.0, "elapsed_s": 36.4}
    with Progress(screen, "plain") as progress:
        for n in range(4):
            reason = Reason.of(ReasonKind.BUDGET_SPENT_BEFORE, **details)
            build = Build(engine="openvino", precision="int8", options=(("n", n),))
            progress(TrialEnded(Trial(build=build, state="pruned", reason=reason)))
        progress(BuildsLeftUntried(Reason.of(ReasonKind.LEFT_UNTRIED, builds=builds, count=4, **details)))
    assert screen.file.getvalue() == (
        "36 s of the budget of 60 s were spent, and the rest is kept for plans and the race; "
        "left untried: engine/0, engine/1, engine/2 and 1 more\n"
    )


def test_a_speedup_that_the_trials_deny_is_told_in_the_headline():
    ratios = {"ratio": 50.0, "low": 48.0, "high": 52.0, "alone_ratio": 3.62, "alone_low": 3.5, "alone_high": 3.7}
    doubt = Reason(kind=ReasonKind.RACE_CONTRADICTS, details=ratios)
    told = "4.24x [4.17, 4.31] as fast as eager PyTorch in the race but 3.62x in trials, top1"
    assert told in words.headline(altered(warnings=(doubt,)))


def test_a_model_near_chance_or_that_mixes_its_batch_is_told_in_the_headline():
    near = Reason.of(ReasonKind.NEAR_CHANCE, metric="top1", value=0.1, chance=0.1)
    mixes = Reason.of(ReasonKind.MIXES_BATCH, decibels=12.0, operation="aten.mean", where="m.py:3")
    report = replace(altered(warnings=(near,)), notes=(mixes,))
    for text in (words.headline(report), flat(markdown.render(report)), html.render(report)):
        assert "; fp32 itself is near chance: check the labels and the preprocessing; the model mixes the rows" in text


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        (
            Reason.of(ReasonKind.FIXED_BATCH, rows=1, why="batch became the constant 2"),
            "calls have exactly 1 row: batch",
        ),
        (
            Reason.of(ReasonKind.ONLY_EAGER, why="a branch on data"),
            "only eager was tried: the model cannot be exported",
        ),
    ],
)
def test_what_is_unusual_about_the_model_is_told_at_the_end_of_a_search(reason, told):
    assert f"model     {told}" in "\n".join(ended(replace(REPORT, notes=(reason,)), width=200))


def test_plain_lines_of_the_latency_goal_are_in_milliseconds():
    screen = console(terminal=False)
    with Progress(screen, "plain", goal=Latency()) as progress:
        progress(TrialEnded(EAGER))
    assert screen.file.getvalue() == "eager/fp32: ok, top1 0.9200 (drop 0.0000), p50/p99 89.3/94.6 ms (1.00x eager)\n"


@pytest.mark.parametrize("raises", [False, True])
def test_quiet_progress_prints_nothing(raises):
    screen = console()
    try:
        with Progress(screen, "quiet") as progress:
            for event in events():
                progress(event)
            if raises:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert raises
    assert screen.file.getvalue() == ""


def test_live_progress_shows_the_running_step_and_its_seconds_and_the_same_rows_as_the_report():
    clock, screen = Clock(), console()
    with Progress(screen, "live", clock=clock) as progress:
        progress(TrialEnded(EAGER))
        progress(TrialStarted(WINNER.build, 2, 8))
        clock.now_s = 12.4
        progress(TrialStep(WINNER.build, Step.VERIFYING))
        drawn = screen.file.getvalue()
        assert "▸ 12 s 2/8 openvino/int8/reduce_range=True: verifying" in flat(drawn)
        progress(TrialEnded(FAILED))
    header, eager = shown(REPORT, 80).split("\nengine ")[1].splitlines()[:2]
    for row in (header, eager):
        assert flat(row) in flat(drawn)


def test_the_race_is_shown_a_line_for_each_contender_with_its_plan():
    plans = [Plan(threads_per_instance=2, batch=16), Plan(threads_per_instance=1, instances=2, batch=8)]
    speeds = [(13_200.0, 13_310.4, 13_400.0), (14_000.0, 14_276.4, 14_300.0)]
    rates = tuple(Rates(build=WINNER.build, plan=plan, per_s=per_s) for plan, per_s in zip(plans, speeds, strict=True))
    screen = console()
    with Progress(screen, "live") as progress:
        progress(StageStarted(Stage.RACING, count=2))
        progress(RaceRound(3, 10, rates))
        frame = screen.file.getvalue().split("\x1b[2K")[-1]
    assert [flat(line) for line in frame.splitlines()] == [
        "▸ 0 s race, round 3 of 10",
        "14,276/s openvino/int8/reduce_range=True, 1 thread x 2, batch 8",
        "13,310/s openvino/int8/reduce_range=True, 2 threads x 1, batch 16",
    ]


def test_live_progress_leaves_the_screen_when_it_ends_well():
    screen = console()
    with Progress(screen, "live") as progress:
        progress(TrialEnded(EAGER))
    erased = re.search(r"(\x1b\[1A\x1b\[2K)+$", screen.file.getvalue())
    assert erased
    assert "\x1b[?25h" in screen.file.getvalue()


def test_live_progress_restores_the_terminal_and_keeps_the_table_when_it_is_interrupted():
    screen = console()
    progress = Progress(screen, "live")

    def interrupted():
        with progress:
            progress(TrialEnded(FAILED))
            progress(TrialStarted(WINNER.build, 2, 8))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    last_frame = screen.file.getvalue().split("\x1b[2K")[-1]
    assert "! failed" in last_frame
    assert "▸" not in last_frame
    assert "\x1b[?25h" in last_frame


def test_live_progress_on_a_low_terminal_keeps_the_heading_the_last_trials_and_what_runs_now():
    screen = console(height=8)
    with Progress(screen, "live") as progress:
        for trial in REPORT.trials:
            progress(TrialEnded(trial))
        progress(TrialStarted(WINNER.build, 9, 9))
        frame = screen.file.getvalue().split("\x1b[2K")[-1].splitlines()
    assert len(frame) <= 8
    assert frame[0].strip().startswith("engine")
    assert "int8-dynamic" in frame[-2]
    assert "▸ 0 s  9/9" in frame[-1]


def test_what_was_made_for_display_changes_no_value():
    before = to_json(REPORT)
    shown(REPORT, 80)
    markdown.render(REPORT)
    summarize(REPORT)["options"]["reduce_range"] = False
    assert to_json(REPORT) == before
    assert terminal.trial_row(WINNER, EAGER, goal=Throughput(), chosen=True)[-1].plain == "✓ chosen"
