"""The command line in a process of its own."""

import sys

QUICK = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
from corewise.runtime import race
from corewise.search import end_to_end, pixels, trial
trial.MEASURE_S = race.WARM_S = 0.1
end_to_end.MEASURE_S = pixels.ROUND_S = 0.05
race.run_race.__kwdefaults__["round_s"] = 0.05
from corewise.cli import main
main()
"""


def command(*args, quick=True):
    """The command line; ``quick`` measures for moments only."""
    return [sys.executable, *(("-c", QUICK) if quick else ("-m", "corewise.cli")), *map(str, args)]
