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

# A page of the same origin looks at ours in a frame of the wanted width, for Chromium has no window narrower than 500.
LOOK = """<!doctype html><body style="margin:0">
<iframe src="report.html" style="border:0;width:WIDTHpx;height:900px"></iframe>
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
onload = () => {
  const frame = document.querySelector("iframe"), page = frame.contentDocument, view = frame.contentWindow
  page.querySelectorAll("details").forEach(one => one.open = true)
  const written = [...page.body.querySelectorAll("*")].filter(e =>
    [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length
    && !["title", "desc"].includes(e.tagName))
  const contrasts = written.map(e => {
    const style = view.getComputedStyle(e)
    const pair = [luminance(color(e.tagName === "text" ? style.fill : style.color)), luminance(behind(e, view))]
    return [(Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05), e.outerHTML.slice(0, 80)]
  })
  const result = {
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
  document.body.textContent = "FOUND" + JSON.stringify(result) + "END"
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


@pytest.fixture
def site(tmp_path):
    """A folder, the address at which it is served, and what was asked for there."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, form, *args):
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path)) as server:
        Thread(target=server.serve_forever).start()
        yield tmp_path, f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def look(folder, address, width, scheme):
    """What a Chromium that prefers ``scheme`` makes of the page in ``folder`` at a width in CSS pixels."""
    (folder / "look.html").write_text(LOOK.replace("WIDTH", str(width)))
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-proxy-server"),
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
        *("--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom", f"{address}/look.html"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search("FOUND(.*)END", done.stdout)
    assert found, done.stdout + done.stderr
    return json.loads(unescape(found.group(1)))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("report", [REPORT, NAMED_AT_LENGTH], ids=["golden", "long names"])
def test_it_fits_and_can_be_read(site, report, width, scheme):
    folder, address, asked = site
    (folder / "report.html").write_text(html.render(report), encoding="utf-8")
    found = look(folder, address, width, scheme)
    assert found["width"] == width
    assert found["scrolled"] <= width
    assert found["outside"] == []
    assert (max(found["ground"]) < 60) == (scheme == "dark")
    assert found["written"] > 150
    assert found["contrast"][0] >= 4.5, found["contrast"]
    assert found["smallest"] >= 10
    assert set(asked) - {"/favicon.ico"} == {"/look.html", "/report.html"}
