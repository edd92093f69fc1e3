"""report.html in a real browser: it fits phones and desks, in light and dark, and can be read."""

import json
import re
import runpy
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from builders import text
from places import GOLDEN

from corewise.records.build import Build
from corewise.report import html

REPORT = runpy.run_path(str(GOLDEN / "make.py"))["REPORT"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")

# A page of the same origin looks at ours in frames of the wanted widths, for Chromium has no window narrower than 500.
FRAME = """<iframe src="NAME.html" style="border:0;width:WIDTHpx;height:900px"></iframe>"""
LOOK = """<!doctype html><body style="margin:0">
FRAMES
<script>
function color(text) { return text.match(/[\\d.]+/g).map(Number) }
function luminance(rgb) {
  const [r, g, b] = rgb.map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  return 0.2126 * r + 0.7152 * g + 0.0722 * b
}
function behind(element, view) {
  for (let e = element; e; e = e.parentElement) {
    const found = color(view.getComputedStyle(e).backgroundColor)
    if (found.length === 3 || found[3] === 1) return found.slice(0, 3)
  }
}
function look(frame) {
  const page = frame.contentDocument, view = frame.contentWindow
  page.querySelectorAll("details").forEach(one => one.open = true)
  const written = [...page.body.querySelectorAll("*")].filter(e =>
    [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length
    && !["title", "desc"].includes(e.tagName))
  const contrasts = written.map(e => {
    const style = view.getComputedStyle(e)
    const pair = [luminance(color(e.tagName === "text" ? style.fill : style.color)), luminance(behind(e, view))]
    return [(Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05), e.outerHTML.slice(0, 80)]
  })
  return {
    width: view.innerWidth,
    scrolled: page.documentElement.scrollWidth,
    outside: [...page.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > view.innerWidth + 1)
      .map(e => e.outerHTML.slice(0, 80)),
    ground: color(view.getComputedStyle(page.body).backgroundColor),
    contrast: contrasts.sort((a, b) => a[0] - b[0])[0],
    written: written.length,
    smallest: Math.min(...[...page.querySelectorAll("text")].map(e =>
      parseFloat(view.getComputedStyle(e).fontSize) * e.getScreenCTM().a)),
  }
}
onload = () => {
  const results = [...document.querySelectorAll("iframe")].map(look)
  document.body.textContent = "FOUND" + JSON.stringify(results) + "END"
}
</script>
"""

LONG = Build(
    engine="openvino",
    precision="int8",
    options=(("quantizer", "corewise"), ("returned", "features.0.0,features.17.conv.3," * 6), ("x" * 90, True)),
)
NAMED_AT_LENGTH = replace(
    REPORT,
    model="a/path/of/many/parts/" + "and_a_name_that_never_ends_" * 6 + ".py:build",
    trials=tuple(replace(one, build=LONG) if one is REPORT.winner else one for one in REPORT.trials),
    finals=tuple(replace(one, build=LONG) if one.build == REPORT.winner.build else one for one in REPORT.finals),
    choice=replace(REPORT.choice, winner=LONG, reason=text(f"{LONG.label} wins"), warnings=(text("w" * 400),)),
    notes=(text("n" * 400),),
)


REPORTS = {"golden": REPORT, "long-names": NAMED_AT_LENGTH}
SEEN = [(name, width) for name in REPORTS for width in (390, 1280)]


@pytest.fixture(scope="module", params=["light", "dark"])
def seen(request, tmp_path_factory):
    """The preferred colours, what Chromium makes of each report at each width in CSS pixels, and what it asked for."""
    folder, asked = tmp_path_factory.mktemp("page"), []
    for name, report in REPORTS.items():
        (folder / f"{name}.html").write_text(html.render(report), encoding="utf-8")
    frames = [FRAME.replace("NAME", name).replace("WIDTH", str(width)) for name, width in SEEN]
    (folder / "look.html").write_text(LOOK.replace("FRAMES", "\n".join(frames)))

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, form, *args):
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        Thread(target=server.serve_forever).start()
        command = [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-proxy-server"),
            f"--user-data-dir={folder / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if request.param == 'dark' else 1}",
            *("--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom"),
            f"http://127.0.0.1:{server.server_address[1]}/look.html",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        server.shutdown()
    found = re.search("FOUND(.*)END", done.stdout)
    assert found, done.stdout + done.stderr
    return request.param, dict(zip(SEEN, json.loads(unescape(found.group(1))), strict=True)), asked


@pytest.mark.parametrize(("name", "width"), SEEN)
def test_it_fits_and_can_be_read(seen, name, width):
    scheme, pages, asked = seen
    found = pages[name, width]
    assert found["width"] == width
    assert found["scrolled"] <= width
    assert found["outside"] == []
    assert (max(found["ground"]) < 60) == (scheme == "dark")
    assert found["written"] > 150
    assert found["contrast"][0] >= 4.5, found["contrast"]
    assert found["smallest"] >= 10
    assert set(asked) - {"/favicon.ico"} == {"/look.html", *(f"/{name}.html" for name in REPORTS)}
