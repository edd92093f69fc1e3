"""The fenced blocks of a Markdown page, and a runner for those that a reader runs.

- ``bash``: commands. ``corewise serve`` goes on in the background until the page ends, as in a second terminal.
- ``python``: runs; the blocks of a page share their names. With ``title="file.py"`` it is a file instead.
- ``console``: commands that no test runs; the first line is a comment that says why.
- anything else is data or output; with a ``title`` it is a file too.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from waiting import free_port

DRIVER = Path(__file__).with_name("docs_driver.py")
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
PORT = re.compile(r"\b800[012]\b")
LOOKING = ("bench", "doctor", "loadtest", "show", "verify")
"""Commands that change nothing: on the artifact that all pages share they are run once."""
NOT_RUN = "# Not run by the tests: "
LONGEST_S = 240
CURLRC = "silent\nfail-with-body\nmax-time = 120\n"


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block; ``line`` is where its text begins in the page."""

    language: str
    title: str
    text: str
    line: int


def blocks(page: str) -> Iterator[Block]:
    """The page's blocks, in order."""
    for match in FENCE.finditer(page):
        yield Block(
            language=match[1], title=match[2] or "", text=match[3], line=page.count("\n", 0, match.start(3)) + 1
        )


def commands(text: str) -> list[str]:
    """The commands of a ``bash`` block: continued lines joined; comments, empty lines and spare spaces left out."""
    lines = re.sub(r" *\\\n *", " ", text).splitlines()
    bare = (re.sub(r"\s+#.*$", "", line).strip() for line in lines)
    return [line for line in bare if line and not line.startswith("#")]


class Driver:
    """One process for the ``corewise`` commands and the Python of all pages."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
        self._process.communicate()

    def run(self, **request: object) -> None:
        """Run Python (``code``) or a ``command`` in ``folder``; an ``AssertionError`` says what went wrong."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that runs the pages is gone"
        error = json.loads(answer)["error"]
        assert not error, error


class Reader:
    """Does in a folder what a page says, from top to bottom."""

    def __init__(self, driver: Driver, folder: Path, done: set[str], *, thorough: bool = False) -> None:
        """Commands that are ``done`` are left out: what they make is in the folder, or they only look at it."""
        self._driver = driver
        self._folder = folder
        self._done = done
        self._thorough = thorough
        self._ports: dict[str, str] = {}
        self._servers: list[subprocess.Popen[str]] = []
        (folder / ".curlrc").write_text(CURLRC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        for server in self._servers:
            server.terminate()
            server.communicate(timeout=LONGEST_S)

    def follow(self, block: Block, page: str) -> None:
        """Write or run one block."""
        text = PORT.sub(lambda match: self._port(match[0]), block.text)
        if block.title:
            (self._folder / block.title).write_text(text)
        elif block.language == "python":
            # Empty lines above keep the page's line numbers in a traceback.
            code = "\n" * (block.line - 1) + text
            self._drive(code=code, page=page)
        elif block.language == "bash":
            for command in commands(text):
                self.command(command)

    def command(self, command: str) -> None:
        """Run one line of a shell; ``corewise``, ``python FILE`` and ``python -m`` in the driver."""
        if command in self._done:
            return
        words = shlex.split(command)
        if words[:2] == ["corewise", "serve"]:
            self._serve(words[1:])
        elif words[0] == "corewise":
            self._drive(command=words)
            if words[1] in LOOKING:
                self._done.add(command)
        elif words[0] == "python" and words[1].endswith(".py"):
            self._drive(script=words[1:])
        elif words[:2] == ["python", "-m"]:
            self._drive(module=words[2:])
        else:
            environment = {**os.environ, "CURL_HOME": str(self._folder)}
            environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command],
                cwd=self._folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=LONGEST_S,
                check=False,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    def _drive(self, **request: object) -> None:
        self._driver.run(folder=str(self._folder), thorough=self._thorough, **request)

    def _serve(self, arguments: list[str]) -> None:
        log = self._folder / "serve.log"
        with log.open("w") as errors:
            server = subprocess.Popen(
                [sys.executable, "-m", "corewise.cli", *arguments],
                cwd=self._folder,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._servers.append(server)
        assert server.stdout is not None
        started = iter(server.stdout.readline, "")
        assert any(line.startswith("ready:") for line in started), log.read_text()

    def _port(self, shown: str) -> str:
        """A free port in the place of the one that the page shows, the same one throughout the page."""
        if shown not in self._ports:
            self._ports[shown] = str(free_port())
        return self._ports[shown]
