"""What readers of the guides have: photos, and texts with a tokenizer."""

from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

WORDS = ("a", "seven", "red", "blue", "house", "birds", "sing", "near", "the", "old", "river", "today")


def write_photos(folder: Path) -> None:
    """``photos/bright`` and ``photos/dark``, twenty small JPEGs each."""
    random = np.random.default_rng(0)
    for name, mean in (("bright", 180), ("dark", 70)):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(20):
            pixels = np.clip(random.normal(mean, 40, (40, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.jpg")


def write_texts(folder: Path) -> None:
    """``texts.txt``, a text a line, and a ``tokenizer.json`` that knows its words."""
    random = np.random.default_rng(0)
    lines = [" ".join(random.choice(WORDS, random.integers(2, 6))) for _ in range(80)]
    (folder / "texts.txt").write_text("\n".join(lines) + "\n")
    numbers = {word: number for number, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    tokenizer = Tokenizer(WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
