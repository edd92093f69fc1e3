"""Texts to token arrays, with the tokenizer of an artifact."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from corewise.common.errors import ArtifactError, InputError, MissingExtra
from corewise.common.phrases import shown
from corewise.common.references import guard
from corewise.records.pipeline import TextPipeline, TokenRole
from corewise.samples.texts import Text, count_characters, text_problem

CHARACTERS_PER_TOKEN = 128
"""Characters of a text that are read for each token that the model takes: more than any language needs, so that a text
of megabytes costs no more than one of the model's length."""
Side = Literal["right", "left"]
SIDES: tuple[Side, ...] = ("right", "left")
REBUILD = "make the artifact again with the tokenizer of its model"


class Untokenized(InputError):
    """An item has no tokens that the model takes; ``reason`` ends a sentence about it."""

    def __init__(self, item: str, reason: str, fix: str) -> None:
        super().__init__(f"{item} {reason}", fix)
        self.reason = reason


class Tokens(NamedTuple):
    """One tokenized item, without padding: ids and type ids, int32 (tokens,)."""

    ids: NDArray[np.int32]
    types: NDArray[np.int32]
    offsets: Sequence[tuple[int, int]] = ()
    """For the task ``tokens``: each token's first character and the one after its last; (0, 0) for special tokens."""
    words: Sequence[int | None] = ()
    """For the task ``tokens``: each token's word."""
    is_cut: bool = False
    """Whether the item had more tokens than the model takes."""

    def __len__(self) -> int:
        return len(self.ids)


class TokenPiece(NamedTuple):
    """One token as people see it: its number, its text, and its first character and the one after its last."""

    id: int
    text: str
    is_special: bool
    start: int
    end: int


class TextEncoder:
    """Tokenizes texts as a pipeline says, and stacks them as the model's inputs. Thread-safe.

    Tokenizing uses threads of its own (Hugging Face's ``tokenizers``) and lets other Python threads run.
    """

    def __init__(self, pipeline: TextPipeline, tokenizer: Path | bytes, *, most_id: int | None = None) -> None:
        """Open the file ``tokenizer``, or take its content; ``most_id`` is the largest token id that the model knows.

        Raises ``ArtifactError`` if it is not a tokenizer, and ``MissingExtra`` without the package ``tokenizers``.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingExtra("tokenizers", "text", "tokenizing texts") from error
        self.pipeline = pipeline
        name = tokenizer if isinstance(tokenizer, Path) else pipeline.tokenizer
        with guard(ArtifactError, f"{name} is not a tokenizer", REBUILD):
            content = tokenizer if isinstance(tokenizer, bytes) else tokenizer.read_bytes()
            self._untruncated = Tokenizer.from_buffer(content)
        self._untruncated.no_padding()
        self._untruncated.no_truncation()
        self._most_characters = CHARACTERS_PER_TOKEN * pipeline.max_length
        largest = 0 if most_id is None else max(self._untruncated.get_vocab().values(), default=0)
        self._most_id = most_id if most_id is not None and largest > most_id else None

    @cached_property
    def _truncating(self) -> dict[Side, Any]:
        """Tokenizers that cut, by the side."""
        from tokenizers import Tokenizer

        made: dict[Side, Any] = {}
        for side in SIDES:
            made[side] = Tokenizer.from_str(self._untruncated.to_str())
            made[side].enable_truncation(self.pipeline.max_length, direction=side)
        return made

    def problem(self, item: Any) -> str:
        """Why an item cannot be answered, as the end of a sentence; empty if it can."""
        texts = item if self.pipeline.pairs else (item,)
        if self.pipeline.pairs and not (isinstance(item, list | tuple) and len(item) == 2):
            return f"is {shown(item)}, where the model takes pairs of texts"
        if not self.pipeline.pairs and isinstance(item, list | tuple):
            return f"is {shown(item)}, where the model takes single texts"
        return next((problem for text in texts if (problem := text_problem(text))), "")

    def no_answer(self, tokens: Tokens) -> str:
        """Why an item with these tokens cannot be answered, as the end of a sentence; empty if it can."""
        if not len(tokens):
            return "has no tokens: the tokenizer removes all of its characters"
        # An engine may read memory behind a table that it looks up.
        if self._most_id is not None and (largest := int(tokens.ids.max())) > self._most_id:
            return f"has the token {largest}, but the model knows 0 to {self._most_id}"
        return ""

    def encode_usable(
        self, items: Sequence[Any], prompt: str | None = None
    ) -> tuple[list[str], list[int], list[Tokens]]:
        """The problem of each item, empty without one; the places of the items without one, and their tokens.

        Raises ``InputError`` if the prompt is unknown.
        """
        problems = [self.problem(item) for item in items]
        places = [place for place, problem in enumerate(problems) if not problem]
        try:
            tokens = dict(zip(places, self.encode([items[place] for place in places], prompt=prompt), strict=True))
        except Untokenized:  # one of them
            tokens = {}
            for place in places:
                try:
                    (tokens[place],) = self.encode([items[place]], prompt=prompt)
                except Untokenized as error:
                    problems[place] = error.reason
        problems = [problem or self.no_answer(tokens[place]) for place, problem in enumerate(problems)]
        places = [place for place in places if not problems[place]]
        return problems, places, [tokens[place] for place in places]

    def encode(
        self, items: Sequence[Text], *, prompt: str | None = None, truncate: bool | Side = True, first: int = 0
    ) -> list[Tokens]:
        """Tokenize items.

        Args:
            items: Texts, or pairs of them, without a ``problem``.
            prompt: The name of the prompt that goes before each text; the pipeline's default otherwise.
            truncate: Cut what is longer than the model takes, instead of raising; at this side, or the pipeline's.
            first: The number of the first item, in errors.

        Returns:
            The tokens of each item, special tokens included.

        Raises:
            InputError: The prompt is unknown.
            Untokenized: An item is too long and ``truncate`` is false, or the tokenizer refuses one: many do so with
                an unknown word if they have no token for such.
        """
        prefix = self._prefix(prompt)
        side = self.pipeline.truncation if truncate is True else truncate or None
        tokenizer = self._untruncated if side is None else self._truncating[side]
        of_tokens = self.pipeline.task == "tokens"
        encode = tokenizer.encode_batch if of_tokens else tokenizer.encode_batch_fast
        try:
            with guard(InputError, "cannot be tokenized", REBUILD):
                texts, encoded = self._read(encode, items, prefix, side)
        except InputError as error:
            raise Untokenized(f"a {self.pipeline.noun}", error.what, error.fix) from error
        if of_tokens:
            # Of a very long text that is cut at its left, only the end was read.
            is_end = side == "left" and not prefix
            made = [
                Tokens(
                    np.array(one.ids, np.int32),
                    np.array(one.type_ids, np.int32),
                    _moved(one.offsets, len(item) - len(text) if is_end else 0),
                    one.word_ids,
                    self._is_cut(one),
                )
                for one, item, text in zip(encoded, items, texts, strict=True)
            ]
        else:
            made = [
                Tokens(np.array(one.ids, np.int32), np.array(one.type_ids, np.int32), is_cut=self._is_cut(one))
                for one in encoded
            ]
        most = self.pipeline.max_length
        for number, tokens in enumerate(made, first):
            if len(tokens) > most:
                raise Untokenized(
                    f"{self.pipeline.noun} {number}",
                    f"has {len(tokens)} tokens, the model takes {most}",
                    "send it in parts, or ask for truncation",
                )
        return made

    def pieces(self, text: str, *, special: bool = True, prompt: str | None = None) -> list[TokenPiece]:
        """The tokens of one text of any length, with or without special ones. Raises ``InputError`` as ``encode``."""
        whole = self._prefix(prompt) + text
        found = self._untruncated.encode(whole, add_special_tokens=special)
        return [
            TokenPiece(number, token if is_special else whole[start:end], bool(is_special), start, end)
            for number, token, is_special, (start, end) in zip(
                found.ids, found.tokens, found.special_tokens_mask, found.offsets, strict=True
            )
        ]

    def text(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids."""
        decoded: str = self._untruncated.decode(list(ids), skip_special_tokens=skip_special)
        return decoded

    def collate(self, rows: Sequence[Tokens], tokens: int | None = None) -> tuple[NDArray[Any], ...]:
        """The model's inputs, (N, tokens) each, padded to ``tokens`` (default: the longest row's, or the fixed length).

        Rows are padded on the right: ids with the pipeline's ``pad_id``, all else with 0.
        """
        length = self.pipeline.fixed_length or max(tokens or 0, *map(len, rows), 1)
        made = []
        for each in self.pipeline.inputs:
            array = np.full((len(rows), length), self.pipeline.pad_id if each.role == "ids" else 0, each.dtype)
            for row, one in zip(array, rows, strict=True):
                row[: len(one)] = _values(one, each.role)
            made.append(array)
        return tuple(made)

    def _prefix(self, prompt: str | None) -> str:
        name = self.pipeline.default_prompt if prompt is None else prompt
        if name is None:
            return ""
        if name not in self.pipeline.prompts:
            known = ", ".join(self.pipeline.prompts) or "none"
            raise InputError(f"the model has no prompt {name!r:.80}", f"its prompts are: {known}")
        return self.pipeline.prompts[name]

    def _read(
        self, encode: Callable[[Sequence[Text]], list[Any]], items: Sequence[Text], prefix: str, side: Side | None
    ) -> tuple[list[Text], list[Any]]:
        """What is read of each item with its prompt, and its encoding.

        An item is read as a whole if what ``_cut`` leaves of it has no more tokens than the model takes, as spaces or a
        long address do: its words may come behind them.
        """
        texts = [self._cut(item, prefix, side) for item in items]
        encoded = encode(texts)
        short = [
            place
            for place, (item, text) in enumerate(zip(items, texts, strict=True))
            if count_characters(text) < count_characters(item) + len(prefix) and not self._is_cut(encoded[place])
        ]
        for place in short:
            texts[place] = self._cut(items[place], prefix, None)
            (encoded[place],) = encode([texts[place]])
        return texts, encoded

    def _is_cut(self, encoded: Any) -> bool:
        """Whether the tokenizer cut something off.

        ``overflowing`` copies all that was cut off, so it is read only of encodings that are full.
        """
        return len(encoded) >= self.pipeline.max_length and bool(encoded.overflowing)

    def _cut(self, item: Text, prefix: str, side: Side | None) -> Text:
        """The item with its prompt, without characters that no model of this length reads if it is cut at a side."""
        if isinstance(item, str):
            return self._shorten(prefix + item, side)
        first, second = item
        return self._shorten(prefix + first, side), self._shorten(second, side)

    def _shorten(self, text: str, side: Side | None) -> str:
        if side is None or len(text) <= self._most_characters:
            return text
        return text[: self._most_characters] if side == "right" else text[-self._most_characters :]


def _moved(offsets: Sequence[tuple[int, int]], by: int) -> Sequence[tuple[int, int]]:
    """Places in a text, ``by`` characters further on; those of special tokens, (0, 0), stay."""
    return [(start + by, end + by) if end else (start, end) for start, end in offsets] if by else offsets


def _values(tokens: Tokens, role: TokenRole) -> NDArray[np.int32] | int:
    if role == "mask":
        return 1
    if role == "positions":
        return np.arange(len(tokens), dtype=np.int32)
    return tokens.types if role == "types" else tokens.ids
