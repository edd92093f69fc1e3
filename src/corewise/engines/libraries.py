"""Keeping other people's quantizers and exporters off the terminal."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def quiet() -> Iterator[None]:
    """Run without progress bars, logs and warnings, and leave logging as it was.

    For calls into libraries only: what their errors say still arrives, as exceptions do.
    """
    root, silent = logging.getLogger(), logging.NullHandler()
    disabled = logging.root.manager.disable
    # logging.warning() would add a handler for good to a root logger that has none.
    root.addHandler(silent)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.removeHandler(silent)
