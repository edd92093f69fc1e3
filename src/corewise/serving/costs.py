"""What the stages of a request cost lately, by kind and size: what admission expects of the next."""

NEW_SHARE = 0.2
"""The weight of the newest measurement against all earlier ones."""
RISE, FALL = 0.3, 0.02
"""How fast a ``Tail`` follows times above and below it: it settles where one in sixteen is above."""
HALF_S = 0.1
"""A ``Tail`` without measurements halves in this time: a request that is refused because of it measures nothing."""


class Costs:
    """Moving estimates of seconds, for each kind of work and each power of two of its size. For one thread."""

    def __init__(self) -> None:
        self._by_size: dict[str, dict[int, float]] = {}

    def expected_s(self, kind: str, size: float) -> float:
        """Seconds for work of a size; in proportion from the nearest size that was seen, 0 if there is none."""
        seen = self._by_size.get(kind)
        if not seen:
            return 0.0
        bucket = int(size).bit_length()
        if bucket in seen:
            return seen[bucket]
        nearest = min(seen, key=lambda other: abs(other - bucket))
        return float(seen[nearest] * 2.0 ** (bucket - nearest))

    def note(self, kind: str, size: float, took_s: float) -> None:
        """Work of a size took so long."""
        seen = self._by_size.setdefault(kind, {})
        bucket = int(size).bit_length()
        old_s = seen.get(bucket, took_s)
        seen[bucket] = old_s + NEW_SHARE * (took_s - old_s)


class Tail:
    """A high quantile of times that vary, as a moving estimate."""

    def __init__(self) -> None:
        self._seconds = self._noted_s = 0.0

    def seconds(self, now_s: float) -> float:
        """The estimate."""
        return float(self._seconds * 0.5 ** ((now_s - self._noted_s) / HALF_S))

    def note(self, took_s: float, now_s: float) -> None:
        """It took so long."""
        old_s = self.seconds(now_s)
        self._seconds = old_s + (RISE if took_s > old_s else FALL) * (took_s - old_s)
        self._noted_s = now_s
