"""Files in the format of Hugging Face's tokenizers, as data."""

import json
from pathlib import Path

from corewise.common.errors import InputError, MissingExtra
from corewise.common.references import guard

MOST_TOKENS = 512
"""Tokens of a text if neither the model nor its files say how many it takes."""
TOKENIZER = "give the model's own tokenizer.json"


def read_tokenizer(path: Path) -> tuple[bytes, int]:
    """The content of a ``tokenizer.json``, and the id of its padding token (0 where it has none).

    Raises ``InputError`` if it is another file or a damaged one, and ``MissingExtra`` without the package
    ``tokenizers``.
    """
    try:
        content = path.read_bytes()
        data = json.loads(content)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}", "check the path") from error
    except ValueError as error:
        raise InputError(f"{path} is not a tokenizer: {error}", TOKENIZER) from error
    if not isinstance(data, dict) or "model" not in data:
        raise InputError(f"{path} is not a tokenizer: it has no model", TOKENIZER)
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtra("tokenizers", "text", f"reading {path}") from error
    with guard(InputError, f"{path} is not a tokenizer", TOKENIZER):
        Tokenizer.from_buffer(content)
    padding = data.get("padding")
    return content, int(padding.get("pad_id", 0)) if isinstance(padding, dict) else 0
