"""How numbers are written, the same everywhere: on the terminal, in the report's files, by each command."""

from corewise.records.build import Plan


def format_number(value: float) -> str:
    """``1.04``, ``87.3``, ``1,204``: three digits, or the whole number where it has more."""
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}" if abs(value) < 99.95 else f"{value:,.0f}"


def format_rate(per_s: float) -> str:
    """``55.4/s``, ``13,310/s``."""
    return f"{format_number(per_s)}/s"


def format_ms(ms: float) -> str:
    """``0.42 ms``, ``11.5 ms``, ``1,204 ms``."""
    return f"{format_number(ms)} ms"


def format_count(count: int, noun: str) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def format_plan(plan: Plan) -> str:
    """``1 thread x 2, batch 16``: threads of each instance, instances, batch."""
    return f"{format_count(plan.threads_per_instance, 'thread')} x {plan.instances}, batch {plan.batch}"
