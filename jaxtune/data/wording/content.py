"""What an example says, as a number: to tell that two are the same under other wordings, columns or white space."""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxtune.data.records import Conversation

LONG_CHARACTERS, LONG_WORDS = 40, 6  # a text this long is a row's own; shorter ones are labels, options, names
_NAMES_OF_ROWS = ("id", "idx", "index", "uid", "guid", "key")  # columns that name a row and say nothing


def normal(text: str) -> str:
    """The text in NFC, without case, every run of white space one space."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def content_hashes(conversation: Conversation, fields: Mapping[str, Any] | None = None) -> list[int]:
    """64-bit hashes of what the user says and, where the row is worded by templates, of the row's own texts.

    Two examples with a hash in common ask the same. A few-shot prompt counts as its question alone; raw text as
    itself.
    """
    asked = conversation.meta.get("query")
    if asked is None:
        asked = "\n".join(m.content for m in conversation.messages if m.role in ("user", "text"))
    return [question_hash(asked)] if fields is None else [question_hash(asked), fields_hash(fields)]


def question_hash(asked: str) -> int:
    """A hash of a question."""
    return hash_of(normal(asked))


def fields_hash(fields: Mapping[str, Any]) -> int:
    """A hash of a row's texts, whatever their columns are called, and of its numbers; names of rows do not count."""
    said = {said for key, value in fields.items() if not _names_row(key) for said in _said(key, value)}
    return hash_of("\0".join(sorted(said - {""})))


def text_hashes(values: Iterable[Any], answers: Iterable[str] = ()) -> set[int]:
    """A hash of each long text in some rows or texts, but for `answers`, which unlike rows may share (a refusal).

    Long is of 40 characters and 6 words, where a script has words: of these hashes one in common is enough for two
    rows to say the same, whatever else stands in them. They are never equal to those of `content_hashes`.
    """
    answered = {normal(answer) for answer in answers}
    return {hash_of("text\0" + text) for value in values for text in _texts(value) if text not in answered}


def _texts(value: Any) -> Iterator[str]:
    """The long texts of a row or of what one of its columns holds; names of rows do not count."""
    if isinstance(value, str):
        text = normal(value)
        if len(text) >= LONG_CHARACTERS and (len(text.split()) >= LONG_WORDS or not text.isascii()):
            yield text
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if not _names_row(key):
                yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _names_row(column: str) -> bool:
    column = column.lower().lstrip("_")
    return column in _NAMES_OF_ROWS or column.endswith(("_id", "_idx"))


def _said(column: str, value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield normal(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _said(f"{column}.{key}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _said(column, inner)
    elif value is not None:
        yield f"{column}={value}"


def hash_of(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
