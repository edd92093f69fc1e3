"""Raw texts in, answers out, in the order of the input: tokenized, put into calls, and run on all instances."""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from corewise.common.errors import InputError
from corewise.pipeline.answers import decode
from corewise.pipeline.calls import Call, CallCost, CallLimits, by_tokens, fill
from corewise.pipeline.packing import PackedCall, packed_arrays, unpacked, with_packing
from corewise.pipeline.tokens import TextEncoder, Tokens
from corewise.records.pipeline import Packing
from corewise.samples.texts import Text

Run = Callable[[Sequence[NDArray[Any]]], list[NDArray[Any]]]
"""One call of the model. Several threads call it at the same time, one more than there are instances."""
OnCut = Callable[[int], None]
"""Called with the number of an item, from 0, that has more tokens than the model takes, before its answer is given."""

WINDOW_ITEMS = 1024
"""Items that are sorted by length together. The next window is tokenized while this one runs."""
FIRST_ITEMS = 128
"""Items of the first window: no call runs while it is tokenized."""
VECTORS_ITEMS = 64
"""Items of a window if each token has a vector, of which a long text has more than a megabyte."""
WINDOW_CHARACTERS = 4_000_000
"""A window of long texts ends earlier, so that memory stays bounded."""
MULTIPLE = 4
"""Texts are padded to a multiple of this many tokens, because engines prepare each new shape once."""


@dataclass(frozen=True)
class Rejected:
    """The answer to an item that cannot be answered: why, as the end of a sentence that begins with the item."""

    reason: str


class PackedProgram(Protocol):
    """What answers rows of several texts, beside the usual program."""

    @property
    def packing(self) -> Packing:
        """The rows that it takes."""
        ...

    def pays(self, saved_ms: float) -> bool:
        """Whether calls that save ``saved_ms`` may be packed: it is open, or is worth opening now."""
        ...

    def run(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """One call, as ``Run``."""
        ...

    def close(self) -> None:
        """Give back memory and threads."""
        ...


class _Window(NamedTuple):
    """Items in work: the answers that are known, and the calls that run for the others."""

    answers: list[Any]
    places: list[int]
    """The places in ``answers`` of the items that are in calls."""
    items: list[Text]
    tokens: list[Tokens]
    running: list[tuple[tuple[int, ...], "Future[list[NDArray[Any]]]"]]
    """The places in ``items`` of each call's texts, and its outputs."""


class TextRunner:
    """Runs texts through a model's instances. Thread-safe."""

    def __init__(
        self,
        encoder: TextEncoder,
        run: Run,
        *,
        instances: int,
        limits: CallLimits,
        cost: CallCost = by_tokens,
        packed: PackedProgram | None = None,
    ) -> None:
        """Make a runner.

        Args:
            encoder: The model's pipeline and tokenizer.
            run: Takes calls from several threads at the same time.
            instances: How many calls it runs at once.
            limits: The most that one call may have.
            cost: Which calls are cheap; with ``packed`` in milliseconds.
            packed: The program whose rows have several texts, used where that takes less time.
        """
        self.encoder = encoder
        self._run = run
        self._instances = instances
        self._limits = limits
        self._cost = cost
        self._packed = packed
        self.calls_ended = 0
        """Rises while the engine answers."""

    def answers(
        self, items: Iterable[Any], *, prompt: str | None = None, on_cut: OnCut = lambda number: None
    ) -> Iterator[Any]:
        """The answer to each item, in order, as ``answers.decode`` gives it; ``Rejected`` for one that has a problem.

        Items are taken as they are needed, at most two windows ahead of the answers, so that memory is bounded.

        Args:
            items: Texts, or pairs of texts where the pipeline says so; any number, also without an end.
            prompt: The name of the prompt that goes before each text.
            on_cut: Called for each item of which a part is not read.

        Raises:
            InputError: The prompt is unknown.
            EngineError: The engine fails.
        """
        pipeline = self.encoder.pipeline
        is_large = pipeline.task == "vectors" and pipeline.pooling == "none"
        windows = _windows(items, VECTORS_ITEMS if is_large else WINDOW_ITEMS)
        ahead: deque[_Window] = deque()
        taken = 0
        # One more than instances: the next call's arrays are ready when an instance is.
        pool = ThreadPoolExecutor(self._instances + 1, "corewise-text")
        try:
            for window in windows:
                started = self._start(window, prompt, pool)
                for place, tokens in zip(started.places, started.tokens, strict=True):
                    if tokens.is_cut:
                        on_cut(taken + place)
                taken += len(window)
                ahead.append(started)
                while len(ahead) > 1:
                    yield from self._finish(ahead.popleft())
            while ahead:
                yield from self._finish(ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def predict(self, items: Any, *, prompt: str | None = None) -> Any:
        """The answers to a list of items, together (``stacked``); to an iterator, as an iterator; to one item, alone.

        Args:
            items: As in ``answers``, as is ``prompt``. Two texts are one item for a model of pairs.

        Returns:
            Of a list: vectors, float32 (N, D), scores (N,), or a list of answers. Of an iterator: an iterator.
            A warning says at the end how many items have more tokens than the model takes.

        Raises:
            InputError: An item has a problem, with its number; or what was given has no items, such as a table.
        """
        if isinstance(items, np.ndarray):
            items = items.tolist()  # a pair is then a list
        elif hasattr(items, "to_pylist") and not hasattr(items, "columns"):  # of pyarrow: its items are no str
            items = items.to_pylist()
        is_pair = isinstance(items, list | tuple) and len(items) == 2 and all(isinstance(each, str) for each in items)
        is_one = isinstance(items, str) or (is_pair and self.encoder.pipeline.pairs)
        if not is_one:
            _check_kind(items)
        seen = _Seen()
        answers = self._checked([items] if is_one else items, prompt, seen)
        if isinstance(items, Iterator):
            return self._and_warned(answers, seen)
        made = list(answers)
        self._warn(seen, 4)  # the caller of the model's own ``predict``
        return made[0] if is_one else stacked(made)

    def _checked(self, items: Iterable[Any], prompt: str | None, seen: "_Seen") -> Iterator[Any]:
        noun = self.encoder.pipeline.noun
        for answer in self.answers(items, prompt=prompt, on_cut=seen.add_cut):
            if isinstance(answer, Rejected):
                raise InputError(f"{noun} {seen.items} {answer.reason}", f"correct or remove this {noun}")
            seen.items += 1
            yield answer

    def _and_warned(self, answers: Iterator[Any], seen: "_Seen") -> Iterator[Any]:
        yield from answers
        self._warn(seen, 3)

    def _warn(self, seen: "_Seen", stacklevel: int) -> None:
        """Say how many items were cut, if any were."""
        if seen.cut:
            pipeline = self.encoder.pipeline
            several = "pairs of texts" if pipeline.pairs else "texts"
            which = f"the {pipeline.noun}" if seen.items == 1 else f"{seen.cut:,} of {seen.items:,} {several}"
            which += " was" if seen.cut == 1 else " were"
            warnings.warn(
                f"{which} cut to the {pipeline.max_length:,} tokens that the model takes; give long texts in parts",
                stacklevel=stacklevel,
            )

    def calls(self, lengths: Sequence[int]) -> list[Call]:
        """How texts of these lengths, in tokens, are put into calls."""
        return fill(
            lengths,
            limits=self._limits,
            cost=self._cost,
            instances=self._instances,
            multiple=MULTIPLE,
            pads=self.encoder.pipeline.pads,
        )

    def _start(self, window: Sequence[Any], prompt: str | None, pool: ThreadPoolExecutor) -> _Window:
        """Tokenize a window, and begin its calls."""
        problems, places, tokens = self.encoder.encode_usable(window, prompt)
        items = [window[place] for place in places]
        running = [
            (call.places, pool.submit(self._call, call, tokens))
            for call in self._all_calls([len(one) for one in tokens])
        ]
        answers: list[Any] = [Rejected(problem) if problem else None for problem in problems]
        return _Window(answers, places, items, tokens, running)

    def _all_calls(self, lengths: Sequence[int]) -> Sequence[Call | PackedCall]:
        if self._packed is None:
            return self.calls(lengths)
        packed = self._packed
        return with_packing(lengths, self.calls, self._cost, packed.packing, self._instances, packed.pays)

    def _call(self, call: Call | PackedCall, tokens: Sequence[Tokens]) -> list[NDArray[Any]]:
        pipeline = self.encoder.pipeline
        if isinstance(call, PackedCall):
            assert self._packed is not None  # or nothing would be packed
            ids = [[tokens[place].ids for place in row] for row in call.rows]
            vectors, *_ = self._packed.run(packed_arrays(ids, self._packed.packing, pipeline.pad_id))
            outputs = [unpacked(call, vectors)]
        else:
            rows = [tokens[place] for place in call.places]
            outputs = self._run(self.encoder.collate(rows, min(call.tokens, pipeline.max_length)))
        self.calls_ended += 1
        return outputs

    def close(self) -> None:
        """Give back what ``packed`` has."""
        if self._packed is not None:
            self._packed.close()

    def _finish(self, window: _Window) -> Iterator[Any]:
        """The answers of a window, when its calls have ended."""
        for places, future in window.running:
            items, tokens = [window.items[place] for place in places], [window.tokens[place] for place in places]
            decoded = decode(self.encoder.pipeline, future.result(), items, tokens)
            for place, answer in zip(places, decoded, strict=True):
                window.answers[window.places[place]] = answer
        yield from window.answers


@dataclass
class _Seen:
    """The items of one ``predict``."""

    items: int = 0
    cut: int = 0

    def add_cut(self, number: int) -> None:
        """Count an item that was cut."""
        self.cut += 1


def _check_kind(items: Any) -> None:
    """Raise ``InputError`` for what has columns, whose iteration gives their names, and for what gives no items."""
    given = f"predict was given {type(items).__name__}"
    if isinstance(items, Mapping) and "input_ids" in items:
        raise InputError(f"{given} with tokens", "call the model itself with tokens: model(**tokens)")
    if isinstance(items, Mapping) or hasattr(items, "columns"):
        raise InputError(f"{given}, which has columns", 'give one column as a list, such as list(table["text"])')
    if isinstance(items, bytes) or not isinstance(items, Iterable):
        raise InputError(
            given, "give a text, or a list or an iterator of texts or of pairs; for files there is corewise.predict"
        )


def _windows(items: Iterable[Any], most: int) -> Iterator[list[Any]]:
    window: list[Any] = []
    characters, size = 0, min(most, FIRST_ITEMS)
    for item in items:
        window.append(item)
        texts = item if isinstance(item, list | tuple) else (item,)
        characters += sum(len(text) for text in texts if isinstance(text, str))
        if len(window) >= size or characters >= WINDOW_CHARACTERS:
            yield window
            window, characters, size = [], 0, most
    if window:
        yield window


def stacked(answers: Iterable[Any]) -> NDArray[np.float32] | list[Any]:
    """Vectors of one length as an array (N, D), scores as an array (N,); other answers as a list."""
    made = list(answers)
    if made and all(isinstance(answer, float) for answer in made):
        return np.array(made, np.float32)
    if made and all(isinstance(answer, np.ndarray) and answer.ndim == 1 for answer in made):
        return np.stack(made)
    return made
