"""Row layouts of instruction data, and how each becomes conversations.

A format is one entry of `FORMATS`: the fields it reads with the column names they usually have, and a function from
the fields' values to conversations. A new format is a function and an entry.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtune.data.records import Conversation, Message, NothingToLearn, RowError

Row = Mapping[str, Any]

_ROLE_NAMES = {
    "messages": {"system": "system", "user": "user", "assistant": "assistant"},
    "sharegpt": {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "assistant": "assistant",
        "model": "assistant",
    },
}


@dataclasses.dataclass(frozen=True)
class Format:
    """Fields with their usual column names (the first is the field's own), which are needed, and the conversion."""

    fields: Mapping[str, tuple[str, ...]]
    required: tuple[str, ...]
    convert: Callable[[Row], list[Conversation]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A format with the column that each of its fields is read from.

    `columns` are those that the first rows have. An optional field that is not among them is looked for, under its
    usual names, in every row: rows of one source need not all have the same columns.
    """

    format: str
    columns: Mapping[str, str]

    def describe(self) -> str:
        """`alpaca (instruction, input, output <- response)`."""
        pairs = (field if field == column else f"{field} <- {column}" for field, column in self.columns.items())
        return f"{self.format} ({', '.join(pairs)})"

    def convert(self, row: Row) -> list[Conversation]:
        """The row's conversations; raises RowError for a malformed row, NothingToLearn for one without an answer."""
        spec = FORMATS[self.format]
        for field in spec.required:
            if self.columns[field] not in row:
                raise RowError("missing column", _missing(self.columns[field], list(row)))
        found = {field: self._column(field, row) for field in spec.fields}
        values = {field: row.get(column) for field, column in found.items() if column is not None}
        conversations = spec.convert(values)
        for conversation in conversations:
            _check_turns(conversation)
        return conversations

    def _column(self, field: str, row: Row) -> str | None:
        """The column of this row that holds the field: the layout's, else the first usual name that is there."""
        column, usual = self.columns.get(field), FORMATS[self.format].fields[field]
        if column is not None and (column in row or column not in usual):
            return column
        return next((name for name in usual if name in row), None)


def find_layout(rows: Sequence[Row], *, format: str = "auto", columns: Mapping[str, str] | None = None) -> Layout:
    """Decides format and columns from the first rows; `columns` (field -> column) wins over the usual names.

    Raises ValueError naming the columns found when no format fits, or when a named column is not there.
    """
    columns = dict(columns or {})
    found = list(dict.fromkeys(key for row in rows for key in row))
    for field, column in columns.items():
        if column not in found:
            raise ValueError(f"columns.{field}: {_missing(column, found)}")
    if format == "auto":
        format = _detect(rows, columns, found)
    spec = FORMATS[format]
    unknown = [field for field in columns if field not in spec.fields]
    if unknown:
        raise ValueError(
            f"columns.{unknown[0]}: format {format} has no such field{_near(unknown[0], list(spec.fields))}; "
            f"its fields are {', '.join(spec.fields)}"
        )
    chosen = {
        field: columns.get(field) or next((name for name in names if name in found), None)
        for field, names in spec.fields.items()
    }
    for field in spec.required:
        if chosen[field] is None:
            raise ValueError(f"format {format}: {_missing(field, found)}; map it with columns.{field}=COLUMN")
    return Layout(format, {field: column for field, column in chosen.items() if column is not None})


def _detect(rows: Sequence[Row], columns: Mapping[str, str], found: list[str]) -> str:
    """The first format whose required fields are all there; lists of messages are told apart by their keys."""
    for name, spec in FORMATS.items():
        if not set(columns) <= set(spec.fields):
            continue
        sources = {f: columns.get(f) or next((n for n in spec.fields[f] if n in found), None) for f in spec.required}
        if None in sources.values():
            continue
        if name in _ROLE_NAMES:
            column = str(sources["messages"])
            turns: list[Any] = next(
                (row[column] for row in rows if isinstance(row.get(column), list) and row[column]), []
            )
            if not (turns and isinstance(turns[0], dict) and ("from" in turns[0]) == (name == "sharegpt")):
                continue
        return name
    needs = "; ".join(f"{name} needs {', '.join(spec.required)}" for name, spec in FORMATS.items())
    raise ValueError(
        f"no format fits the columns found: {', '.join(found) or 'none'} ({needs}); "
        "name the columns, e.g. columns.prompt=QUESTION columns.completion=ANSWER"
    )


def _alpaca(row: Row) -> list[Conversation]:
    instruction, output = _text(row, "instruction"), _text(row, "output", none="")
    extra = _text(row, "input", none="")
    fields, content = {}, instruction
    if extra.strip():
        # Templates that know alpaca's two prompts read the parts; all others read the joined content.
        fields, content = {"instruction": instruction, "input": extra}, f"{instruction}\n\n{extra}"
    user = Message("user", content, fields=fields)
    return [Conversation((*_system(row), user, Message("assistant", output)))]


def _prompt_completion(row: Row) -> list[Conversation]:
    messages: list[Message] = []
    for field, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row.get(field), list):
            messages += _turns(row[field], "role", "content", "messages")
        else:
            messages.append(Message(role, _text(row, field, none="" if role == "assistant" else None)))
    return [_with_system(row, messages)]


def _messages(row: Row) -> list[Conversation]:
    return [_with_system(row, _turns(row["messages"], "role", "content", "messages"))]


def _sharegpt(row: Row) -> list[Conversation]:
    return [_with_system(row, _turns(row["messages"], "from", "value", "sharegpt"))]


def _raw_text(row: Row) -> list[Conversation]:
    return [Conversation((Message("text", _text(row, "text")),))]


# The order is that of detection: the more telling columns first.
FORMATS: dict[str, Format] = {
    "sharegpt": Format(
        {"messages": ("conversations", "messages", "conversation"), "system": ("system",)}, ("messages",), _sharegpt
    ),
    "messages": Format(
        {"messages": ("messages", "conversations", "conversation"), "system": ("system",)}, ("messages",), _messages
    ),
    "alpaca": Format(
        {
            "instruction": ("instruction",),
            "input": ("input", "context"),
            "output": ("output", "response"),
            "system": ("system",),
        },
        ("instruction", "output"),
        _alpaca,
    ),
    "prompt_completion": Format(
        {
            "prompt": ("prompt", "question"),
            "completion": ("completion", "answer", "response"),
            "system": ("system",),
        },
        ("prompt", "completion"),
        _prompt_completion,
    ),
    "text": Format({"text": ("text",)}, ("text",), _raw_text),
}


def _system(row: Row) -> tuple[Message, ...]:
    text = _text(row, "system", none="")
    return (Message("system", text),) if text.strip() else ()


def _with_system(row: Row, messages: Sequence[Message]) -> Conversation:
    """The messages after the system column's text, which may stand there a second time as the first message."""
    column = _system(row)
    if column and messages and messages[0].role == "system":
        if messages[0].content.strip() != column[0].content.strip():
            raise RowError(
                "two system messages",
                f"the column system has {column[0].content[:40]!r} and message 1 has {messages[0].content[:40]!r}; "
                "expected the same text, or one of the two",
            )
        return Conversation(tuple(messages))
    return Conversation((*column, *messages))


def _turns(turns: Any, role_key: str, content_key: str, names: str) -> list[Message]:
    if not isinstance(turns, list):
        raise RowError("wrong type", f"found {_kind(turns)}; expected a list of {{{role_key}, {content_key}}} objects")
    messages = []
    for n, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or role_key not in turn or content_key not in turn:
            found = f"keys {', '.join(turn)}" if isinstance(turn, Mapping) else _kind(turn)
            raise RowError("wrong type", f"message {n}: found {found}; expected keys {role_key} and {content_key}")
        role = _ROLE_NAMES[names].get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None:
            known = list(_ROLE_NAMES[names])
            near = _near(str(turn[role_key]), known)
            raise RowError(
                "unknown role",
                f"message {n}: found {role_key} {turn[role_key]!r}{near}; expected one of {', '.join(known)}",
            )
        messages.append(Message(role, _content(turn[content_key], n), weight=_weight(turn, n)))
    return messages


def _content(content: Any, n: int) -> str:
    """Text, or the text parts of a list of parts; None is an empty answer."""
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RowError("wrong type", f"message {n}: content is {_kind(content)}; expected text")
    return content


def _weight(turn: Row, n: int) -> float | None:
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowError("wrong type", f"message {n}: train is {_kind(train)}; expected true or false")
    if weight is not None and (
        isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e9
    ):
        raise RowError("wrong type", f"message {n}: weight is {weight!r}; expected a number of at least 0")
    if train is False:
        return 0.0
    return None if weight is None else float(weight)


def _text(row: Row, field: str, none: str | None = None) -> str:
    value = row.get(field)
    if value is None and none is not None:
        return none
    if not isinstance(value, str):
        raise RowError("wrong type", f"{field} is {_kind(value)}; expected text")
    return value


def _check_turns(conversation: Conversation) -> None:
    """Raises RowError for roles out of order, NothingToLearn where no answer is given."""
    roles = [message.role for message in conversation.messages]
    if roles == ["text"]:
        if not conversation.messages[0].content.strip():
            raise NothingToLearn("empty text")
        return
    if "system" in roles[1:]:
        n = roles.index("system", 1) + 1
        raise RowError("roles out of order", f"message {n} is a system message; expected it first, or not at all")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    shift = len(roles) - len(turns) + 1
    for n, role in enumerate(turns):
        expected = "assistant" if n % 2 else "user"
        if role != expected:
            before = f"after {turns[n - 1]}" if n else "first"
            raise RowError(
                "roles out of order", f"message {n + shift}: found {role} {before}; expected {expected} there"
            )
    if "assistant" not in roles:
        raise NothingToLearn("no assistant turn")
    if not any(m.content.strip() for m in conversation.messages if m.role == "assistant"):
        raise NothingToLearn("empty answer")


def _kind(value: Any) -> str:
    names = {type(None): "null", str: "text", list: "a list", dict: "an object", bool: "true or false"}
    return names.get(type(value), f"the number {value!r}" if isinstance(value, int | float) else type(value).__name__)


def _missing(column: str, found: list[str]) -> str:
    return f"no column {column!r}{_near(column, found)}; found columns {', '.join(found) or 'none'}"


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (nearest: {near[0]})" if near else ""
