"""The command line in a process of its own."""

import json
import subprocess
import sys

QUICK = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
from corewise.common import stats
from corewise.runtime import race
from corewise.search import elastic, end_to_end, finals, pixels, search, trial
trial.MEASURE_S = race.WARM_S = 0.1
elastic.REQUESTS, elastic.ROUNDS = 100, 1
elastic.DUEL_S = elastic.SHORTEST_DUEL_S = 0.05
end_to_end.MEASURE_S = pixels.ROUND_S = 0.05
race.run_race.__kwdefaults__["round_s"] = 0.05
finals.ROUNDS = stats.MIN_ROUNDS
trial.HOPELESS = 0.0  # on a busy machine any build may look hopelessly slow
search.find_contradiction = lambda *of: None  # moments often contradict each other
"""
IN_PROCESS = """
from corewise.engines import engine
from corewise.runtime.client import InProcess
from corewise.search.trial import SearchContext
SearchContext.client = lambda context, build, share=1.0: InProcess(engine(build.engine))
"""
MAIN = """
from corewise.cli import main
main()
"""
SEVERAL = """
import contextlib, io, json, subprocess, sys
from corewise.cli import main

outcomes = []
for arguments in json.loads(sys.argv[1]):
    if arguments[0] == "!":
        done = subprocess.run(arguments[1:], capture_output=True, text=True)
        outcomes.append([done.returncode, done.stdout, done.stderr])
        continue
    sys.argv = ["corewise", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as exit:
            code = exit.code
    outcomes.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(outcomes))
"""


def several(commands, cwd=None, before=""):
    """The exit code, output and errors of each command, all in one process, which imports libraries once.

    After a "!" it is another program's. ``before`` is Python that runs first.
    """
    given = json.dumps([[str(part) for part in arguments] for arguments in commands])
    done = subprocess.run(
        [sys.executable, "-c", before + SEVERAL, given],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def command(*args, quick=True, in_process=False, before=""):
    """The command line; ``quick`` measures for moments only, and ``in_process`` in the process of the command.

    ``before`` is Python that runs first.
    """
    code = (QUICK if quick else "") + (IN_PROCESS if in_process else "") + before
    return [sys.executable, *(("-c", code + MAIN) if code else ("-m", "corewise.cli")), *map(str, args)]
