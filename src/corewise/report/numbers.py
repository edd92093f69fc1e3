"""Numbers as people read them, the same everywhere. Pure."""


def three_digits(value: float) -> str:
    """``1.04``, ``87.3``, ``13,310``: three digits, or the whole number if it has more."""
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}" if abs(value) < 99.95 else f"{value:,.0f}"


def rate(per_s: float, what: str = "") -> str:
    """``87.3/s``, or ``87.3 requests/s``."""
    return f"{three_digits(per_s)} {what}/s" if what else f"{three_digits(per_s)}/s"


def milliseconds(ms: float) -> str:
    """``11.5 ms``."""
    return f"{three_digits(ms)} ms"


def figure(value: float, unit: str) -> str:
    """A speed in its goal's unit: ``87.3 items/s``, ``11.5 ms``."""
    return f"{three_digits(value)} {unit}"


def times(ratio: float) -> str:
    """``4.24x``, ``12.3x``."""
    return f"{three_digits(ratio)}x"


def interval(low: float, high: float) -> str:
    """``[4.02, 4.41]``."""
    return f"[{three_digits(low)}, {three_digits(high)}]"


def megabytes(size_bytes: float) -> str:
    """``150 MB``."""
    return f"{size_bytes / 1e6:,.0f} MB"


def duration(seconds: float) -> str:
    """``8.4 s``, ``31 s``, ``4 min 12 s``, ``1 h 4 min``."""
    if seconds < 9.95:
        return f"{round(seconds, 1):g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def size(size_bytes: int) -> str:
    """``25.1 MiB``."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes / 2**10:.1f} KiB"


def counted(number: int, noun: str) -> str:
    """``1 plan``, ``7 plans``, ``1,024 plans``."""
    return f"{number} {noun}" if number == 1 else f"{number:,} {noun}s"


def clean(text: str) -> str:
    """One line that cannot steer a terminal: control characters and line ends become single spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
