"""Texts for models whose artifact carries a tokenizer: tokens, the model's inputs, and answers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corewise.artifact import Artifact
from corewise.artifact.texts import most_known_id
from corewise.common.errors import InputError
from corewise.pipeline import Call, TextEncoder, TokenPiece, Tokens, decode
from corewise.records.build import TensorSpec
from corewise.records.pipeline import Activation, TextPipeline
from corewise.records.ranges import InputRange
from corewise.samples.texts import Text, count_characters
from corewise.serving.protocol import ProtocolError
from corewise.serving.texts import Side, TextRequest, pieces

TEXT, PAIR = (TensorSpec(name=name, dtype="object", shape=(None,)) for name in ("text", "text_pair"))
"""What a request of the Open Inference Protocol may have in place of the model's own inputs."""
BUCKET = 8
"""Texts are padded to a multiple of this many tokens: those of about one length share calls, with little padding."""
TOKEN_CHARACTERS = 32
"""Characters of a text that are read for each token that the model takes, where it may not be cut: more than any
language needs."""


MOST_PADDED_TOKENS = 2**20
"""Texts of a request times the tokens of its longest one: what their arrays may take before they are booked."""


class TextInput:
    """One artifact's texts. Thread-safe."""

    def __init__(self, found: Artifact, pipeline: TextPipeline, ranges: Sequence[InputRange] | None = None) -> None:
        """``ranges`` are those of the model's inputs, if they are known.

        Raises ``ArtifactError`` where the tokenizer is none, and ``MissingExtra``.
        """
        self.pipeline = pipeline
        self._most_id = most_known_id(pipeline, ranges)
        self.encoder = TextEncoder(pipeline, found.folder / pipeline.tokenizer, most_id=self._most_id)
        self.calls_alone: dict[int, Call] = {}
        """The call of a text that is alone, by its tokens (``text_calls.split``)."""
        self._most_characters = TOKEN_CHARACTERS * pipeline.max_length

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The inputs of a request of texts."""
        return (TEXT, PAIR) if self.pipeline.pairs else (TEXT,)

    def arrays(self, texts: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], ...]:
        """The model's inputs for arrays of UTF-8 bytes (N,), as many as ``specs``.

        Raises ``ProtocolError`` for a text that is no UTF-8, or too long, and for several lengths where a model takes
        no mask: it would answer padding like text.
        """
        try:
            decoded = [[item.decode() for item in column.tolist()] for column in texts]
        except UnicodeDecodeError as error:
            raise ProtocolError(f"a text is not UTF-8: {error.reason}") from error
        items: list[Text] = list(zip(*decoded, strict=True)) if self.pipeline.pairs else decoded[0]
        tokens: list[Tokens] = []
        longest = 0
        for piece in pieces(TextRequest(items=items)):
            found = [Tokens(each.ids, each.types) for each in self.tokens(piece.asked, piece.start)]
            tokens += found
            longest = max(longest, *map(len, found))
            if len(items) * longest > MOST_PADDED_TOKENS:
                raise ProtocolError(
                    f"{len(items)} texts, padded to the {longest} tokens of the longest, are more than "
                    f"{MOST_PADDED_TOKENS} tokens",
                    "send long texts in requests of their own",
                    413,
                )
        lengths = sorted({len(each) for each in tokens})
        if len(lengths) > 1 and not self.pipeline.pads and self.pipeline.fixed_length is None:
            raise ProtocolError(
                f"the texts have from {lengths[0]} to {lengths[-1]} tokens, and the model takes no attention mask",
                "send texts of different lengths in requests of their own",
            )
        return self.inputs(tokens, longest)

    def tokens(self, asked: TextRequest, start: int = 0) -> list[Tokens]:
        """The tokens of each text of a request; errors count its texts from ``start``. Raises ``ProtocolError``."""
        if asked.ids:
            if asked.prompt is not None:
                raise ProtocolError(
                    "prompt_name names a prompt, which goes before texts and not before token ids",
                    "send texts, or leave prompt_name out",
                )
            return [self._given(ids, start + k, asked.truncate) for k, ids in enumerate(asked.ids)]
        noun = self.pipeline.noun
        for k, item in enumerate(asked.items, start):
            characters = count_characters(item)
            if asked.truncate is None and characters > self._most_characters:
                raise ProtocolError(
                    f"{noun} {k} has {characters} characters; at most {self._most_characters} are read for the "
                    f"{self.pipeline.max_length} tokens that the model takes",
                    "send it in parts, or ask for truncation",
                )
            if problem := self.encoder.problem(item):
                raise ProtocolError(f"{noun} {k} {problem}")
        try:
            found = self.encoder.encode(asked.items, prompt=asked.prompt, truncate=asked.truncate or False, first=start)
        except InputError as error:
            raise ProtocolError(error.what, error.fix) from error
        for k, each in enumerate(found, start):
            if problem := self.encoder.no_answer(each):
                raise ProtocolError(f"{noun} {k} {problem}")
        return found

    def inputs(self, tokens: Sequence[Tokens], longest: int) -> tuple[NDArray[Any], ...]:
        """The model's inputs for one call, (N, tokens) each, padded to a multiple of ``BUCKET`` if it has a mask."""
        step = BUCKET if self.pipeline.pads else 1
        return self.encoder.collate(tokens, min(self.pipeline.max_length, -(-longest // step) * step))

    def answers(
        self,
        outputs: Sequence[NDArray[Any]],
        items: Sequence[Text],
        tokens: Sequence[Tokens],
        activation: Activation | None = None,
    ) -> list[Any]:
        """One call's answers (``pipeline.decode``); ``activation`` in place of the pipeline's own."""
        pipeline = self.pipeline if activation is None else replace(self.pipeline, activation=activation)
        return decode(pipeline, outputs, items, tokens)

    def described(self, items: Sequence[str], special: bool, prompt: str | None) -> list[list[TokenPiece]]:
        """The tokens of each text, with or without special ones. Raises ``ProtocolError``."""
        for k, item in enumerate(items):
            if not item or len(item) > self._most_characters:
                raise ProtocolError(f"text {k} has {len(item)} characters", f"send from 1 to {self._most_characters}")
        try:
            return [self.encoder.pieces(item, special=special, prompt=prompt) for item in items]
        except InputError as error:
            raise ProtocolError(error.what, error.fix) from error

    def decoded(self, rows: Sequence[Sequence[int]], skip_special: bool) -> list[str]:
        """The text of each row of token ids."""
        return [self.encoder.text(ids, skip_special=skip_special) for ids in rows]

    def _given(self, ids: Sequence[int], number: int, side: Side | None) -> Tokens:
        if self.pipeline.pairs:
            raise ProtocolError("the model takes pairs, and token ids do not say where the second begins", "send texts")
        # Calls have rows of their own: only here it is known which row of the request is wrong.
        if self._most_id is not None and (largest := max(ids)) > self._most_id:
            raise ProtocolError(
                f"row {number} has the token {largest}, but the model knows 0 to {self._most_id}",
                "send ids of the model's own tokenizer, or texts",
            )
        most = self.pipeline.max_length
        if len(ids) > most and side is None:
            raise ProtocolError(
                f"row {number} has {len(ids)} tokens, the model takes {most}",
                "send it in parts, or ask for truncation",
            )
        ids = ids[:most] if side == "right" else ids[-most:]
        return Tokens(np.array(ids, np.int32), np.zeros(len(ids), np.int32))
