"""Samples as people have them: texts, pairs of texts, images and recordings, before they are tensors."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from corewise.common.errors import SamplesError
from corewise.records.report import Preprocess
from corewise.samples import encodings
from corewise.samples.data import Samples, sample_name
from corewise.samples.drawing import Draw, draw
from corewise.samples.labels import digest_bytes, stack_labels
from corewise.samples.stored import Array, Spool
from corewise.samples.tensors import Item, collect, number_groups

RawKind = Literal["text", "pair", "image", "audio"]

NOUNS: dict[RawKind, str] = {"text": "texts", "pair": "pairs of texts", "image": "images", "audio": "recordings"}
MOST_SET_ASIDE = 0.1
"""The share of items that may be unusable: more of them is a mistake about the data and no accident."""
NAMED = 3
"""How many of them a message names."""
AHEAD = 2
"""Items for each thread that are made before they are asked for."""


class UnreadableItem(SamplesError):
    """One item cannot be used; where there are many, the others are. ``reason`` ends a sentence about it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} {reason}", "replace or remove it")
        self.reason = reason


class RawItem(NamedTuple):
    """One raw sample on its way in; ``problem`` says why it cannot be used, as the end of a sentence."""

    number: int
    value: Any
    label: Any = None
    name: str | None = None
    problem: str = ""
    group: int | None = None


@dataclass
class SetAside:
    """Items that cannot be used, while the others can."""

    noun: str
    source: str
    count: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        """Take note of one."""
        self.count += 1
        if self.count <= NAMED:
            self.named.append(f"{name} {reason}")

    def notes(self, total: int) -> tuple[str, ...]:
        """A sentence for the report. Raises ``SamplesError`` where too many of ``total`` are unusable."""
        if not self.count:
            return ()
        named = ", ".join(self.named) + (f" and {self.count - NAMED:,} more" if self.count > NAMED else "")
        if self.count > MOST_SET_ASIDE * total:
            raise SamplesError(
                f"{self.count:,} of {total:,} {self.noun} in {self.source} cannot be used: {named}",
                "replace or remove them",
            )
        were = "was" if self.count == 1 else "were"
        return (f"{self.count:,} of {total:,} {self.noun} {were} set aside: {named}",)


@dataclass(frozen=True, kw_only=True, eq=False)
class RawSamples:
    """Items as they are stored, with labels: a pipeline, or any function, makes ``Samples`` of them.

    ``items`` are strings (``text``), tuples of two strings (``pair``), paths, bytes, PIL images or uint8 arrays
    (``image``; also dicts of inputs with such arrays among them), and paths (``audio``). Files are opened when an item
    is made a tensor and not before. ``labels``, ``groups``, ``numbers``, ``names`` and ``notes`` are as in ``Samples``.
    """

    kind: RawKind
    items: Sequence[Any]
    labels: Array | None = None
    groups: Array | None = None
    source: str = "python"
    numbers: Array | None = None
    names: Sequence[str] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.items):
            raise SamplesError(f"there are no samples in {self.source}", "give at least 2; a few hundred are better")

    def __len__(self) -> int:
        return len(self.items)

    def describe(self, row: int) -> str:
        """Which of the user's samples an item is: ``sample 40 (cat/3.jpg)``."""
        number = row if self.numbers is None else int(self.numbers[row])
        return sample_name(number, None if self.names is None else self.names[row])

    def take(self, indices: Iterable[int] | Array) -> "RawSamples":
        """The items at ``indices``, in that order."""
        chosen = np.asarray(list(indices), np.int64)
        return replace(
            self,
            items=[self.items[index] for index in chosen],
            labels=None if self.labels is None else self.labels[chosen],
            groups=None if self.groups is None else self.groups[chosen],
            numbers=chosen if self.numbers is None else self.numbers[chosen],
            names=None if self.names is None else [self.names[index] for index in chosen],
        )

    def draw(self, most: int | None, seed: int) -> "RawSamples":
        """At most ``most`` items, drawn with ``seed``, in the order they had; groups stay whole."""
        chosen, notes = draw(len(self), most, seed, self.groups)
        return replace(self.take(chosen), notes=(*self.notes, *notes)) if notes else self

    def singles(self) -> "RawSamples":
        """Pairs as single texts, neighbours and one group each, with the pair's label twice: for embeddings."""
        if self.kind != "pair":
            return self
        both = np.repeat(np.arange(len(self)), 2)
        apart = self.take(both)
        groups = both if self.groups is None else self.groups[both]
        return replace(apart, kind="text", items=[text for pair in self.items for text in pair], groups=groups)

    def tensors(
        self,
        tensorize: Callable[[Any], Any],
        *,
        preprocess: Preprocess | None = None,
        spool: Path | None = None,
        threads: int = 1,
    ) -> Samples:
        """Samples of what ``tensorize`` makes of each item, one after the other.

        Args:
            tensorize: Takes an item and returns one sample's inputs, without batch dimension, as ``from_python`` takes
                them. An item for which it raises ``UnreadableItem`` is set aside, unless there are many of them.
            preprocess: What ``tensorize`` does, for the artifact.
            spool: The folder for a temporary file that keeps what is large; the system's by default.
            threads: How many items are made at the same time; ``tensorize`` must allow that.

        Raises:
            SamplesError: Naming the sample where its inputs are of another form than the first one's, and where more
                than a tenth of the items are unusable.
            OutputError: Where the temporary file cannot be written.
        """
        aside = SetAside(NOUNS[self.kind], self.source)
        usable: list[int] = []

        def attempt(item: Any) -> Any:
            try:
                return tensorize(item)
            except UnreadableItem as error:
                return error

        def made() -> Iterator[Item]:
            for row, inputs in enumerate(_map(attempt, self.items, threads)):
                if isinstance(inputs, UnreadableItem):
                    aside.add(self.names[row] if self.names else self.describe(row), inputs.reason)
                    continue
                usable.append(row)
                number = row if self.numbers is None else int(self.numbers[row])
                single = encodings.single(inputs, f"{self.describe(row)} of {self.source}")
                yield Item(number, single, name=self.names[row] if self.names else None)
            aside.notes(len(self))

        samples = collect(made(), source=self.source, preprocess=preprocess, spool=Spool(spool))
        return replace(
            samples,
            labels=None if self.labels is None else self.labels[usable],
            groups=None if self.groups is None else self.groups[usable],
            notes=(*self.notes, *aside.notes(len(self))),
            originals=self.take(usable) if self.kind == "image" else None,
        )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over every item's content, label and group."""
        digest = sha256(self.kind.encode())
        for item in self.items:
            for part in _content(item):
                digest.update(part)
        for values in (self.labels, self.groups):
            for part in digest_bytes(values):
                digest.update(part)
        return digest.hexdigest()


def gather(
    items: Iterable[RawItem],
    kind: RawKind,
    *,
    source: str,
    max_samples: int | None = None,
    seed: int = 0,
) -> RawSamples:
    """Raw samples of a stream: at most ``max_samples``, drawn with ``seed``; those with a problem are set aside.

    Raises ``SamplesError`` where there are none, where more than a tenth are unusable, or where labels are wrong.
    """
    drawing = Draw(max_samples, seed)
    aside = SetAside(NOUNS[kind], source)
    places: dict[int, RawItem] = {}
    for item in items:
        if item.problem:
            aside.add(item.name or sample_name(item.number), item.problem)
            continue
        slot = drawing.slot()
        if slot is not None:
            places[slot] = item
    set_aside = aside.notes(drawing.seen + aside.count)
    kept = sorted(places.values(), key=lambda item: item.number)
    return RawSamples(
        kind=kind,
        items=[item.value for item in kept],
        labels=stack_labels(
            [item.label for item in kept], lambda row: sample_name(kept[row].number, kept[row].name), source
        ),
        groups=number_groups([item.group for item in kept]),
        source=source,
        numbers=np.array([item.number for item in kept], np.int64),
        names=[item.name or "" for item in kept] if any(item.name for item in kept) else None,
        notes=(*set_aside, *drawing.notes(NOUNS[kind])),
    )


def _map(function: Callable[[Any], Any], items: Sequence[Any], threads: int) -> Iterator[Any]:
    """``function`` of each item, in order; several threads work ``AHEAD`` items ahead."""
    if threads == 1:
        yield from map(function, items)
        return
    rest = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque(pool.submit(function, item) for item in islice(rest, threads * AHEAD))
        while waiting:
            made = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(rest, 1))
            yield made


def _content(item: Any) -> Iterator[bytes]:
    """What a fingerprint takes of an item: a file's content, not its name."""
    if isinstance(item, Path):
        yield item.read_bytes() if item.is_file() else b"missing"
    elif isinstance(item, bytes):
        yield item
    elif isinstance(item, str):
        yield item.encode("utf-8", "surrogatepass") + b"\0"
    elif isinstance(item, dict):
        for value in item.values():
            yield from _content(value)
    elif isinstance(item, tuple):
        for part in item:
            yield from _content(part)
    else:
        yield from digest_bytes(np.asarray(item))
