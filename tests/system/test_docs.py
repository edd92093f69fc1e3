"""The documentation: every command and Python block of README and docs/ is run, and links lead somewhere."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from docs_pages import NOT_RUN, Driver, Reader, blocks, commands
from docs_samples import write_photos, write_texts
from places import ROOT

from corewise.machine.inspect import inspect_cpu

PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md")))
SHOWN = {name: list(blocks((ROOT / name).read_text())) for name in PAGES}
RUN = [name for name in PAGES if any(block.language in ("bash", "python") for block in SHOWN[name])]
MAKES_DIGITS = next(
    command
    for block in SHOWN["docs/first-steps.md"]
    for command in commands(block.text)
    if command.endswith("-o digits.cw")
)
"""Run once for all pages."""
GIVEN: dict[str, Callable[[Path], None]] = {"docs/guides/photos.md": write_photos, "docs/guides/text.md": write_texts}
"""What a page says that its reader has."""
SMALL = ("CHANNELS = ((1, 16, 2), (16, 32, 2), (32, 64, 2))", "EPOCHS, BATCH, PEAK_RATE = 4, 50, 0.01")
"""The digits' network, small: searching it takes seconds."""
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)

pytestmark = pytest.mark.skipif(inspect_cpu().architecture != "x86_64", reason="the pages' artifacts are for x86-64")


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    with Driver() as driver:
        yield driver


@pytest.fixture(scope="module")
def digits(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reader who has done the first steps: ``examples`` and ``digits.cw``."""
    folder = tmp_path_factory.mktemp("digits")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns(".*", "__pycache__"))
    source = folder / "examples" / "digits.py"
    text = source.read_text()
    for line in SMALL:
        text, count = re.subn(rf"^{re.escape(line.partition(' =')[0])} = .*$", line, text, flags=re.MULTILINE)
        assert count == 1, line
    source.write_text(text)
    with Reader(driver, folder, set(), thorough=True) as reader:
        reader.command(MAKES_DIGITS)
    return folder


@pytest.fixture(scope="module")
def done() -> set[str]:
    """Commands that need not be run again."""
    return {MAKES_DIGITS}


@pytest.mark.parametrize("page", RUN)
def test_what_a_page_shows_works(page: str, driver: Driver, digits: Path, done: set[str], tmp_path: Path) -> None:
    folder = tmp_path / "page"
    shutil.copytree(digits, folder)
    GIVEN.get(page, lambda folder: None)(folder)
    with Reader(driver, folder, done) as reader:
        for block in SHOWN[page]:
            reader.follow(block, page)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_says_why(page: str) -> None:
    for block in SHOWN[page]:
        if block.language == "console" and not block.text.startswith("$ "):
            assert block.text.startswith(NOT_RUN), f"{page}:{block.line}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    here = (ROOT / page).parent
    for target in LINK.findall((ROOT / page).read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (here / name).resolve() if name else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(path), f"{page} links to {target}"


def anchors(path: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    headings = HEADING.findall(path.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_linked() -> None:
    linked = {"README.md"}
    for page in PAGES:
        for target in LINK.findall((ROOT / page).read_text()):
            path = (ROOT / page).parent / target.partition("#")[0]
            if path.suffix == ".md" and path.exists():
                linked.add(str(path.resolve().relative_to(ROOT)))
    assert set(PAGES) <= linked


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 150
    assert max(map(len, lines)) <= 120
    assert not [line for line in lines if line.startswith("|") and "[" in re.sub(LINK, "", line)]
