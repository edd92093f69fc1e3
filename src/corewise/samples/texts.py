"""Texts as people store them: which columns hold them, and what no tokenizer should be given."""

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Any, NamedTuple

from corewise.common.errors import SamplesError
from corewise.common.phrases import shown, with_article

MOST_CHARACTERS = 1_000_000
NAMED, NAME_CHARACTERS = 20, 40
"""Columns that a message lists, and characters of each name."""
COMPARED = 1000
"""Columns that a misspelt name is compared with."""
NAME_WORDS, ENDINGS = 4, (".", "!", "?")
"""Words of a column's name, at most, and what only sentences end with, where nobody says that it is a name."""
TEXT_COLUMNS = ("text", "sentence")
LABEL_COLUMNS = ("label", "labels")

NAME_BY_OPTION = "say with --text which is the text"
"""What to do about a table in which nothing tells which column is the text."""

Text = str | tuple[str, str]


def count_characters(item: Text) -> int:
    """The characters of a text, or of both texts of a pair."""
    return len(item) if isinstance(item, str) else sum(map(len, item))


def text_problem(value: Any) -> str:
    """Why a value is no text that a model can be given, as the end of a sentence; nothing where it is one."""
    if not isinstance(value, str):
        return f"is {shown(value)}, which is not a text"
    if not value.strip():
        return "is empty"
    if len(value) > MOST_CHARACTERS:
        return f"has {len(value):,} characters, but at most {MOST_CHARACTERS:,} are allowed"
    if "\0" in value:
        return f"has a null byte at character {value.index(chr(0))}"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # Files are read with "surrogateescape": U+DC80 to U+DCFF stand for bytes that are not UTF-8.
        kind = "is not UTF-8" if "\udc80" <= value[error.start] <= "\udcff" else "has half of a surrogate pair"
        return f"{kind} at character {error.start}"
    return ""


class Columns(NamedTuple):
    """The columns of a table that hold the text, the second text of a pair, and the label.

    What is ``None`` is looked for in ``resolve``.
    """

    text: str | None = None
    pair: str | None = None
    label: str | None = None

    def resolve(self, header: Collection[str], source: str, fix: str = NAME_BY_OPTION) -> "Columns":
        """With the names of ``header``.

        Raises ``SamplesError`` where a column is not there, or nothing tells which is the text: ``fix`` is the advice.
        """
        if not header:
            raise SamplesError(f"{source} has no columns", "add a column of texts")
        for name in (self.text, self.pair, self.label):
            if name is not None and name not in header:
                near = get_close_matches(name, [*islice(header, COMPARED)], n=1)
                raise SamplesError(
                    f"{source} has no column {name!r}; it has {_listed(header)}",
                    f"did you mean {near[0]!r}?" if near else "name one of these",
                )
        free = [name for name in header if name not in self]
        text = self.text or next((name for name in TEXT_COLUMNS if name in free), None)
        label = self.label or next((name for name in LABEL_COLUMNS if name in free), None)
        others = [name for name in free if name != label]
        if text is None and len(others) == 1:
            text = others[0]
            if len(text.split()) > NAME_WORDS or text.endswith(ENDINGS):  # of a file without a header
                raise SamplesError(
                    f"{source} has the column {text!r:.80}, which reads like a text",
                    "put a line with the columns' names before it, or name it with --text if it is a name",
                )
        if text is None:
            raise SamplesError(
                f"{source} has the columns {_listed(header)}",
                fix if others else "add a column of texts",
            )
        return Columns(text, self.pair, label)

    def item(self, record: Mapping[str, Any]) -> tuple[Text, Any, str]:
        """A record's text or pair, its label, and what is wrong with it (empty: nothing)."""
        texts: list[tuple[str, Any]] = [(name, record.get(name)) for name in (self.text, self.pair) if name is not None]
        problems = [
            f"has {with_article(name)} that {problem}" for name, text in texts if (problem := text_problem(text))
        ]
        label = None if self.label is None else record.get(self.label)
        if self.label is not None and (label is None or (isinstance(label, str) and not label)):
            problems.append(f"has no {self.label}")
        value = texts[0][1] if self.pair is None else (texts[0][1], texts[1][1])
        return value, label, problems[0] if problems else ""


def check_once(columns: Columns, header: Sequence[str], source: str) -> None:
    """Raise ``SamplesError`` where a column that is used is there twice: nothing says which one is meant."""
    for name in columns:
        if name is not None and header.count(name) > 1:
            raise SamplesError(f"{source} has the column {_listed([name])} twice", "rename one of them")


def _listed(names: Collection[str]) -> str:
    """Names of columns in one line, however many there are."""
    shown = [" ".join(name.split())[:NAME_CHARACTERS] for name in islice(names, NAMED)]
    return ", ".join(shown) + (f" and {len(names) - NAMED:,} more" if len(names) > NAMED else "")


GUESSED = Columns()


def number_or_text(text: str) -> int | float | str:
    """A cell of a table as the number that it says, else as it is."""
    for kind in (int, float):
        try:
            return text if "_" in text else kind(text)  # Python takes 1_2 for 12
        except ValueError:
            continue
    return text
