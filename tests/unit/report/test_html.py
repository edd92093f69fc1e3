"""report.html: well-formed, self-contained, complete, and nothing in it but what we wrote is markup."""

import json
import math
import re
import runpy
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from builders import text as text_of
from hypothesis import given
from hypothesis import strategies as st
from places import GOLDEN

from corewise.records.build import Build, Plan
from corewise.records.goal import Latency, Throughput
from corewise.records.jsonable import from_json
from corewise.records.measurement import Measurement, Rates
from corewise.records.report import LosingTrial, Report, SampleFacts
from corewise.records.schema_1 import upgrade_report
from corewise.report import charts, figures, html, story, words
from corewise.report.charts import Axis, Bar, Line, Mark
from corewise.report.figures import Builds

REPORT = runpy.run_path(str(GOLDEN / "make.py"))["REPORT"]
WINNER, EAGER = REPORT.winner, REPORT.trials[0]
HOSTILE = """<script>alert(1)</script><img src="http://evil/x" onerror='x'>&amp;</title></style>"""
VOID = {"meta", "wbr", "circle", "rect", "line", "path", "polyline"}


class Page(HTMLParser):
    """The elements of a page; fails where a tag is closed that is not the last one opened."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert len({name for name, _ in attributes}) == len(attributes)
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())

    def all(self, tag, **attributes):
        return [found for name, found in self.elements if name == tag and attributes.items() <= found.items()]


def plans(per_s, threads=(1, 2, 4), batches=(1, 8), instances=(1, 2)):
    """Measurements under every such plan, as of a build that scales with them."""
    found = []
    for count in instances:
        for each in threads:
            for batch in batches:
                rate = per_s * (count * each) ** 0.8 * batch / (batch + 0.5)
                call_ms = 1000 * batch * count / rate
                plan = Plan(threads_per_instance=each, instances=count, batch=batch)
                found.append(
                    Measurement(
                        plan=plan,
                        latencies_ms=(call_ms,),
                        throughput_per_s=rate,
                        p50_ms=call_ms,
                        p99_ms=1.2 * call_ms,
                        spread=0.02,
                        throttled=count - 1,
                    )
                )
    return tuple(found)


def searched():
    """The golden report as a search over threads and instances would leave it."""
    trials = tuple(
        replace(trial, measurements=plans(trial.measurements[0].throughput_per_s)) if trial.measurements else trial
        for trial in REPORT.trials
    )
    best = Throughput().best(next(trial for trial in trials if trial.build == WINNER.build))
    return replace(REPORT, trials=trials, choice=replace(REPORT.choice, plan=best.plan))


# --- the page -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("report", [REPORT, searched()], ids=["golden", "searched"])
def test_it_is_well_formed_and_tells_the_story_from_the_top_down(report):
    page = Page(html.render(report))
    headings = ["Warnings", "What was won", "What it cost", "Why the others lost", "How it was measured", "Notes"]
    assert [page.text.find(heading) for heading in headings] == sorted(page.text.index(h) for h in headings)
    assert page.text.index(words.headline(report)) < page.text.index("Warnings")
    assert len(page.all("h1")) == len(page.all("main")) == 1
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_every_fact_loser_warning_and_note_is_there_in_the_words_of_the_other_formats():
    text = Page(html.render(REPORT)).text
    for heading, sentence in story.facts(REPORT):
        assert sentence in text, heading
    for label, _, reason in words.losers(REPORT):
        assert label in text
        assert reason in text
    for sentence in (*words.warnings(REPORT), *words.notes(REPORT), words.SPEED_NOTE):
        assert sentence in text


def test_every_state_has_its_mark_and_word():
    text = Page(html.render(REPORT)).text
    for state in ("✓ chosen", "· ok", "✗ rejected", "! failed", "- pruned"):
        assert state in text


def test_nothing_outside_is_asked_for_and_nothing_can_run():
    text = html.render(replace(searched(), model=HOSTILE))
    page = Page(text)
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "base", "form")
        assert not {"src", "href", "xlink:href", "style", "action"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"url\(|@import|@font-face|https?:|expression", style)


def test_whatever_others_wrote_is_text():
    build = Build(engine=HOSTILE, precision="int8", options=((HOSTILE, HOSTILE),))
    fidelity = replace(WINNER.fidelity, metric=HOSTILE)
    trial = replace(WINNER, build=build, reason=text_of(HOSTILE), notes=(HOSTILE,), fidelity=fidelity)
    other = replace(REPORT.trials[5], build=replace(build, precision="fp32"), reason=text_of(HOSTILE), state="failed")
    report = replace(
        REPORT,
        model=HOSTILE,
        created=HOSTILE,
        versions={HOSTILE: HOSTILE},
        cpu=replace(REPORT.cpu, model=HOSTILE),
        samples=replace(REPORT.samples, source=HOSTILE),
        trials=(EAGER, trial, other),
        finals=(Rates(build=build, plan=REPORT.choice.plan, per_s=(1.0, 2.0)),),
        choice=replace(
            REPORT.choice,
            winner=build,
            reason=text_of(HOSTILE),
            losers=(LosingTrial(build=other.build, state="failed", reason=text_of(HOSTILE)),),
            warnings=(text_of(HOSTILE),),
        ),
        notes=(text_of(HOSTILE),),
    )
    page = Page(html.render(report))
    assert page.text.count("<script>alert(1)</script>") >= 10
    ours = {tag for tag, _ in Page(html.render(REPORT)).elements}
    assert {tag for tag, _ in page.elements} <= ours


def test_the_chosen_build_is_marked_the_same_way_everywhere():
    page = Page(html.render(searched()))
    keys = page.all("b", **{"class": "key chosen"})
    names = page.all("span", **{"class": "build chosen"})
    # Once at the top, and in each chart's legend and table: 6 charts, and the table of all trials.
    assert len(keys) == len(names) + 1
    assert len(page.all("svg")) == 6
    assert len(page.all("em")) >= 2 * 6


def test_each_chart_has_a_title_a_description_and_its_figures_in_a_table():
    page = Page(html.render(searched()))
    charts_found, ids = page.all("svg"), {attributes.get("id") for _, attributes in page.elements}
    for chart in charts_found:
        assert chart["role"] == "img"
        title, description = chart["aria-labelledby"].split()
        assert {title, description} <= ids
    assert len(page.all("details")) == len(page.all("figcaption")) == len(charts_found)
    assert len(page.all("table")) == len(charts_found) + 1
    assert len(page.all("th", scope="row")) == len(page.all("th", role="rowheader"))


def test_the_golden_artifact_and_the_golden_report_have_a_page():
    for path in (GOLDEN / "report.json", GOLDEN / "schema-1" / "report.json"):
        data = json.loads(path.read_text())
        report = from_json(Report, upgrade_report(data) if "objective" in data else data)
        assert words.headline(report) in Page(html.render(report)).text


def test_a_baseline_that_nothing_beat_has_a_page():
    choice = replace(REPORT.choice, winner=EAGER.build, losers=REPORT.choice.losers[1:], speedup=1.0)
    report = replace(REPORT, choice=choice, requirements=replace(REPORT.requirements, goal=Latency()))
    page = Page(html.render(report))
    assert "nothing beat the baseline" in page.text
    assert page.all("span", **{"class": "build chosen"})
    assert not page.all("span", **{"class": "build baseline"})


def test_a_report_without_measurements_race_or_accuracy_has_a_page_without_charts():
    trials = tuple(replace(trial, measurements=(), fidelity=None) for trial in REPORT.trials)
    choice = replace(REPORT.choice, elasticity=None)
    page = Page(html.render(replace(REPORT, trials=trials, finals=(), notes=(), choice=choice)))
    assert not page.all("svg")
    assert "Why the others lost" in page.text


# --- pictures -----------------------------------------------------------------------------------------------------


def titles(report):
    builds = Builds(report)
    return [figure.title for figure in (*figures.won(builds), *figures.cost(builds))]


def figure(report, title):
    builds = Builds(report)
    (found,) = [one for one in (*figures.won(builds), *figures.cost(builds)) if one.title == title]
    return found


def test_threads_are_drawn_only_where_more_than_one_number_was_measured():
    assert titles(REPORT) == [
        "The alternating run",
        "Throughput over latency",
        "Latency over batch",
        "Latency over load",
        "Accuracy over speed",
    ]
    assert titles(searched())[3] == "Throughput over threads"
    found = figure(searched(), "Throughput over threads")
    # 1, 2 and 4 threads in 1 and 2 instances.
    assert found.columns == ("items/s", "1 threads", "2 threads", "4 threads", "8 threads")


def test_one_batch_is_no_curve():
    trials = tuple(replace(trial, measurements=trial.measurements[:1]) for trial in REPORT.trials)
    assert "Latency over batch" not in titles(replace(REPORT, trials=trials))


def test_the_frontier_is_what_none_beats_in_both():
    report = searched()
    runs = [(trial.build.label, one) for trial in report.trials for one in trial.measurements if trial.state == "ok"]
    best = {
        f"{label}, {one.plan.label}:"
        for label, one in runs
        if not any(
            other.p50_ms <= one.p50_ms and other.throughput_per_s >= one.throughput_per_s and other is not one
            for _, other in runs
        )
    }
    described = re.search(r"<desc[^>]*>None beats (.*?)</desc>", figure(report, "Throughput over latency").svg).group(1)
    assert len(best) > 1
    assert {f"{line.partition(':')[0]}:" for line in described.split("; ")} == best


def test_tables_hold_every_measurement_and_the_best_of_each_group():
    report = searched()
    table = figure(report, "Throughput over latency")
    assert len(table.rows) == sum(len(trial.measurements) for trial in report.trials)
    assert [cells[0] for _, cells in table.rows if "chosen" in cells[0]] == [f"{report.choice.plan.label} (chosen)"]
    assert table.columns[-1] == "throttled"
    fastest = min(one.p50_ms for one in report.winner.measurements if one.plan.batch == 8)
    cells = dict(figure(report, "Latency over batch").rows)[WINNER.build]
    assert cells[1] == f"{words.three_digits(fastest)} / {words.three_digits(1.2 * fastest)}"


def test_a_rejected_build_stands_below_the_gate_at_its_speed_while_verifying():
    rejected = next(trial for trial in REPORT.trials if trial.state == "rejected")
    found = figure(REPORT, "Accuracy over speed")
    assert dict(found.rows)[rejected.build] == (words.times(36.4 / 12.6), "0.8900 [0.8700, 0.9100]", "0.0300", "")
    assert 'class="floor"' in found.svg
    assert "lowest top1 allowed is 0.9100" in found.svg


def test_the_drop_under_shift_stands_beside_the_drop():
    found = figure(REPORT, "Accuracy over speed")
    assert found.columns[-2:] == ("drop", "drop under shift")
    assert dict(found.rows)[WINNER.build][-2:] == ("0.0033", "0.0244")
    without = replace(WINNER, fidelity=replace(WINNER.fidelity, shift=None))
    report = replace(REPORT, trials=tuple(without if trial is WINNER else trial for trial in REPORT.trials))
    assert figure(report, "Accuracy over speed").columns[-1] == "drop"


def test_where_the_metric_is_an_error_what_is_above_the_limit_is_shaded():
    trials = tuple(
        replace(trial, fidelity=trial.fidelity and replace(trial.fidelity, metric="mae", lower_is_better=True))
        for trial in REPORT.trials
    )
    found = figure(replace(REPORT, trials=trials), "Error over speed")
    assert "highest mae allowed is 0.9300" in found.svg
    # The drop's interval [-0.01, 0.0167] hangs from 0.92 upwards.
    assert dict(found.rows)[WINNER.build][1] == "0.9167 [0.9100, 0.9367]"
    shade = re.search(r'class="shade" x="[^"]*" y="([^"]*)" width="[^"]*" height="([^"]*)"', found.svg)
    line = re.search(r'class="floor" x1="[^"]*" y1="([^"]*)"', found.svg)
    assert float(shade[1]) + float(shade[2]) == pytest.approx(float(line[1]), abs=0.11)


def test_for_latency_the_race_is_in_milliseconds_and_the_shortest_comes_first():
    found = figure(replace(REPORT, requirements=replace(REPORT.requirements, goal=Latency())), "The alternating run")
    assert found.columns[2] == "median, ms"
    assert found.rows[0][0] == WINNER.build
    medians = [float(cells[1]) for _, cells in found.rows]
    assert medians == sorted(medians)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_values_that_cannot_be_drawn_are_left_out(value):
    odd = replace(WINNER.measurements[0], p50_ms=value, throughput_per_s=value)
    fidelity = replace(WINNER.fidelity, value=value, drop_low=value)
    trials = tuple(
        replace(trial, measurements=(odd, trial.measurements[1]), fidelity=fidelity) if trial is WINNER else trial
        for trial in REPORT.trials
    )
    page = Page(html.render(replace(REPORT, trials=trials)))
    for tag, attributes in page.elements:
        if tag in VOID:
            assert not re.search(r"nan|inf", " ".join(map(str, attributes.values()))), (tag, attributes)


# --- axes ---------------------------------------------------------------------------------------------------------

positive = st.floats(min_value=1e-6, max_value=1e9)


@given(st.lists(positive, min_size=1, max_size=6))
def test_axes_hold_their_values_and_have_few_ascending_ticks(values):
    for axis in (Axis.linear(values), Axis.logarithmic(values)):
        assert axis.low < axis.high
        assert axis.low <= min(values) * (1 + 1e-6)
        assert axis.high >= max(values) * (1 - 1e-6)
        assert 1 <= len(axis.ticks) <= 9
        assert list(axis.ticks) == sorted(set(axis.ticks))
        places = [axis.part(value) for value in sorted(values)]
        assert places == sorted(places)
        assert places[0] >= 0
        assert places[-1] <= 1


def test_ticks_are_round():
    assert Axis.linear((0.867, 0.93)).ticks == (0.86, 0.88, 0.9, 0.92, 0.94)
    assert Axis.logarithmic((1, 4.4)).ticks == (1, 1.5, 2, 3, 4)
    assert Axis.logarithmic((20, 900)).ticks == (20, 50, 100, 200, 500, 1000)
    assert Axis.counts((1, 16, 32)).ticks == (1, 16, 32)
    assert len(Axis.counts(range(1, 65)).ticks) <= 7


def test_marks_are_told_apart_by_shape_too_and_the_chosen_one_is_on_top():
    marks = [
        Mark(x=1, y=1, role=role, key=str(k), tip="<tip>", ringed=role == "chosen")
        for k, role in enumerate(("chosen", "baseline", "other", "rejected"))
    ]
    text = charts.plot(
        "n",
        "a < b",
        "d",
        x=Axis.linear((0, 1)),
        y=Axis.linear((0, 1)),
        marks=marks,
        lines=[Line(points=((0, 0), (1, 1)), style="chosen")],
    )
    groups = re.findall(r'<g class="(\w+)"><title>&lt;tip&gt;</title><(\w+) class="mark"[^>]*r?="?', text)
    assert [role for role, _ in groups][-1] == "chosen"
    assert dict(groups) == {"baseline": "rect", "other": "circle", "rejected": "path", "chosen": "circle"}
    assert text.count('class="ring"') == 1
    assert "a &lt; b" in text


def test_keys_beside_marks_do_not_cover_each_other():
    marks = [Mark(x=x, y=5, role="other", key=str(k), tip="") for k, x in enumerate((5, 5.1, 5.2, 5.3))]
    text = charts.plot("n", "t", "d", x=Axis.linear((0, 10)), y=Axis.linear((0, 10)), marks=marks)
    places = re.findall(r'class="tag" x="([\d.]+)" y="([\d.]+)"', text)
    assert len(set(places)) == len(marks)


def test_no_key_stands_on_an_interval():
    near = (("A", 3.0, "other"), ("B", 2.9, "chosen"), ("C", 3.3, "other"))
    marks = [Mark(x=5, y=y, role=role, key=key, tip="", interval=(y, 9)) for key, y, role in near]
    text = charts.plot("n", "t", "d", x=Axis.linear((0, 10)), y=Axis.linear((0, 10)), marks=marks)
    start, foot, top = map(float, re.findall(r'class="interval" d="M([\d.]+) ([\d.]+)h8m-4 0V([\d.]+)', text)[0])
    keys = [(float(x), float(y)) for x, y in re.findall(r'class="tag" x="([\d.]+)" y="([\d.]+)"', text)]
    assert len(keys) == 3
    assert not [key for key in keys if key[0] < start + 4 < key[0] + 7.8 and top < key[1] - 2 < foot]


def test_a_bar_is_as_long_as_its_value_and_its_text_fits():
    rows = [
        Bar(value=value, values=(value, value * 1.1), role="other", key="1", text="100 items/s") for value in (50, 100)
    ]
    text = charts.bars("n", "t", "d", rows)
    widths = [float(width) for width in re.findall(r'class="bar"[^>]*width="([\d.]+)"', text)]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    ends = [float(x) for x in re.findall(r'class="value" x="([\d.]+)"[^>]*text-anchor="start"', text)]
    assert max(ends) + 7 * len("100 items/s") <= 360 + 8


def test_samples_without_labels_are_told():
    report = replace(REPORT, samples=SampleFacts(**{**vars(REPORT.samples), "labelled": False}))
    assert "without labels" in Page(html.render(report)).text
