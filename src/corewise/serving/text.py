"""Text as people write it, for models whose artifact carries a tokenizer."""

from collections.abc import Sequence

import numpy as np

from corewise import artifact
from corewise.artifact import Artifact
from corewise.artifact.checks import input_ranges
from corewise.common.errors import ArtifactError, MissingExtra
from corewise.common.references import guard
from corewise.records.build import TensorSpec
from corewise.serving.protocol import ProtocolError

SPEC = TensorSpec(name="text", dtype="object", shape=(None,))
"""What a request may have in place of the model's own inputs."""
BUCKET = 8
"""Texts are padded to a multiple of so many tokens: those of about one length share calls, with little padding."""
MOST_TOKENS = 512
"""Where neither the model nor the tokenizer says."""
TOKEN_BYTES = 32
"""Bytes of text that are read for each token that the model takes: more than any language needs."""


class TextInput:
    """Texts to the model's inputs. Thread-safe."""

    def __init__(self, found: Artifact) -> None:
        """Raises ``ArtifactError`` where the tokenizer does not fit the model, and ``MissingExtra``."""
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingExtra("tokenizers", "serve", f"serving {found.folder}") from error
        path = found.folder / artifact.TOKENIZER
        with guard(ArtifactError, f"{path} is no tokenizer", artifact.REBUILD):
            self._tokenizer = Tokenizer.from_file(str(path))
        padding, truncation = self._tokenizer.padding or {}, self._tokenizer.truncation or {}
        self._pad_id = int(padding.get("pad_id", 0))
        self._specs = found.manifest.inputs
        if not all(len(spec.shape) == 2 and spec.dtype in ("int32", "int64") for spec in self._specs):
            raise ArtifactError(f"{found.folder} has a tokenizer and inputs that are no tokens", artifact.REBUILD)
        fixed = [spec.shape[1] for spec in self._specs if spec.shape[1] is not None]
        self._fixed = fixed[0] if fixed else None
        # More than the model has positions for would be refused, padding included.
        longest = [each.longest[1] or MOST_TOKENS for each in input_ranges(found) or () if len(each.longest) == 2]
        self._most = self._fixed or min([int(truncation.get("max_length", MOST_TOKENS)), *longest])
        self._most_bytes = TOKEN_BYTES * self._most
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def arrays(self, texts: Sequence[bytes]) -> tuple[np.ndarray, ...]:
        """The model's inputs for these texts. Raises ``ProtocolError`` for one that is no UTF-8 or too long."""
        if (longest_bytes := max(map(len, texts))) > self._most_bytes:
            raise ProtocolError(
                f"a text has {longest_bytes} bytes; at most {self._most_bytes} are read for the {self._most} tokens "
                "that the model takes",
                "send it in parts",
            )
        try:
            # One at a time: other threads run between two calls.
            encoded = [self._tokenizer.encode_batch([text.decode()])[0] for text in texts]
        except UnicodeDecodeError as error:
            raise ProtocolError(f"a text is no UTF-8: {error.reason}") from error
        longest = max(len(one.ids) for one in encoded)
        if longest > self._most:
            raise ProtocolError(f"a text has {longest} tokens, the model takes {self._most}", "send it in parts")
        length = self._fixed or min(self._most, -(-longest // BUCKET) * BUCKET)
        parts = {"ids": [one.ids for one in encoded], "type": [one.type_ids for one in encoded]}
        parts["mask"] = [one.attention_mask for one in encoded]
        made = []
        for spec in self._specs:
            role = next((role for role in ("mask", "type") if role in spec.name.lower()), "ids")
            rows = np.full((len(encoded), length), self._pad_id if role == "ids" else 0, spec.dtype)
            for row, values in zip(rows, parts[role], strict=True):
                row[: len(values)] = values
            made.append(rows)
        return tuple(made)
