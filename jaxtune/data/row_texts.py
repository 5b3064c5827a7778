"""What a row says, whatever its format and wording: to compare it with other rows, benchmarks and verdicts."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.data.examples import RowReader
from jaxtune.data.quality.duplicates import exact_key
from jaxtune.data.records import Conversation, NothingToLearn, RowError


def texts_of(reader: RowReader, row: int) -> list[str]:
    """The texts of a row: of its turns in order, or where templates word it of its columns; none when unreadable."""
    try:
        raw = reader.source.row(row)
        if reader.phrasing is not None and reader.phrasing.reads_fields:
            return _strings(reader.layout.fields(raw))
        return texts_of_all(reader.layout.convert(raw))
    except (RowError, NothingToLearn):
        return []


def texts_of_all(conversations: Sequence[Conversation]) -> list[str]:
    """The texts of conversations, turn by turn; a call of a tool is a text too."""
    return [
        text
        for conversation in conversations
        for message in conversation.messages
        for text in (message.content, *(str(call) for call in message.tool_calls))
        if text.strip()
    ]


def row_key(texts: Sequence[str]) -> int | None:
    """64 bits that rows have in common when their texts are the same but for case and white space."""
    return exact_key(texts) if texts else None


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, Mapping):
        return [text for inner in value.values() for text in _strings(inner)]
    if isinstance(value, list | tuple):
        return [text for inner in value for text in _strings(inner)]
    return [] if value is None else [str(value)]
