"""README's terminal: `corewise optimize` on the digits, run and recorded, as an SVG.

    python bench/readme_terminal.py

Writes docs/images/optimize.svg. The machine should do nothing else: the picture shows what was measured.
"""

import os
import re
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "optimize.svg"
COMMAND = ("corewise", "optimize", "examples/digits.py:build", "--samples", "examples/digits.py:samples")
OUTPUT = ("-o", "digits.cw")
WIDTH = 100
FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


def record() -> str:
    """What the command prints on a terminal, with its colours; what a live display removes again is not in it."""
    environment = {**os.environ, "FORCE_COLOR": "1", "TTY_INTERACTIVE": "0", "COLUMNS": str(WIDTH)}
    environment["PYTHONPATH"] = str(ROOT / "src")
    with tempfile.TemporaryDirectory(prefix="corewise-") as folder:
        (Path(folder) / "examples").symlink_to(ROOT / "examples")
        command = [sys.executable, "-m", "corewise.cli", *COMMAND[1:], *OUTPUT]
        done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def picture(printed: str) -> str:
    """The terminal after the command."""
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "bold green"), " ".join((*COMMAND, *OUTPUT))))
    console.print(Text.from_ansi(printed.rstrip("\n")))
    # Without the fonts that rich would load from another server.
    return FONTS.sub("", console.export_svg(title="corewise optimize", unique_id="optimize"))


if __name__ == "__main__":
    PICTURE.write_text(picture(record()))
