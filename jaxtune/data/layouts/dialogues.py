"""Formats whose rows hold a dialogue: lists of messages by role, and lists of texts by turns."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtune.data.layouts import cleaning
from jaxtune.data.records import Conversation, Message, NothingToLearn, RowError
from jaxtune.data.row_values import Row, kind, near, text_of
from jaxtune.data.tool_calls import parse_calls, parse_tools, result_text

_CALL = "call"  # a turn that is a call: part of the answer that it belongs to


class Keys(NamedTuple):
    """The keys of one message, and the names that roles have there."""

    role: str
    content: str
    roles: Mapping[str, str]


_MESSAGES = Keys(
    "role",
    "content",
    {
        "system": "system",
        "developer": "system",
        "user": "user",
        "assistant": "assistant",
        "tool": "tool",
        "function": "tool",
    },
)
_SHAREGPT = Keys(
    "from",
    "value",
    {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "bing": "assistant",
        "bard": "assistant",
        "assistant": "assistant",
        "model": "assistant",
        "function_call": _CALL,
        "tool_call": _CALL,
        "observation": "tool",
        "tool": "tool",
        "tool_response": "tool",
        "function_response": "tool",
    },
)
# Dialogues of a user with a service, where SYSTEM is the service.
_SPEAKERS = Keys("speaker", "utterance", {"USER": "user", "SYSTEM": "assistant", "user": "user", "system": "assistant"})


def messages(row: Row, options: Any) -> list[Conversation]:
    """`messages`: a list of {role, content}, or of {speaker, utterance}."""
    turns = row["messages"]
    spoken = isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and "speaker" in turns[0]
    return [_opened(row, read_turns(turns, _SPEAKERS if spoken else _MESSAGES))]


def sharegpt(row: Row, options: cleaning.ShareGptOptions) -> list[Conversation]:
    """`sharegpt`: a list of {from, value}, by FastChat's cleaning rules where the options ask for them."""
    return [_opened(row, cleaning.clean(read_turns(row["messages"], _SHAREGPT), options))]


def lima(row: Row, options: Any) -> list[Conversation]:
    """`lima`: a list of texts, user and assistant by turns; what follows the last answer is cut off."""
    turns = row["turns"]
    if not isinstance(turns, list):
        raise RowError("wrong type", f"turns is {kind(turns)}; expected a list of texts, user and assistant by turns")
    said: list[Message] = []
    for n, turn in enumerate(turns, 1):
        if not isinstance(turn, str):
            raise RowError("wrong type", f"turn {n} is {kind(turn)}; expected text")
        said.append(Message("assistant" if len(said) % 2 else "user", turn))
    return [_opened(row, said[: len(said) // 2 * 2])]


def questions(row: Row, options: Any) -> list[Conversation]:
    """`questions`: turns of a user alone, as benchmarks have them."""
    raise NothingToLearn("questions without answers")


def prompt_completion(row: Row, options: Any) -> list[Conversation]:
    """`prompt_completion`: texts, or lists of messages; answer options are listed after the question."""
    said: list[Message] = []
    for field, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row.get(field), list):
            said += read_turns(row[field], _MESSAGES)
        else:
            said.append(Message(role, text_of(row, field, none="" if role == "assistant" else None)))
    choices = _choices(row.get("options"))
    if choices and said[0].role == "user":
        said[0] = dataclasses.replace(said[0], content=f"{said[0].content}\n{choices}")
    return [_opened(row, said)]


def _choices(options: Any) -> str:
    """Lines `A. text`; the letters are the keys of an object, as MedQA has them."""
    if isinstance(options, Mapping):
        options = {key: value for key, value in options.items() if value is not None}
    elif isinstance(options, list):
        options = {chr(ord("A") + i): value for i, value in enumerate(options)}
    else:
        return ""
    if not all(isinstance(value, str) for value in options.values()):
        raise RowError("wrong type", "options holds something else than texts; expected a list or an object of texts")
    return "\n".join(f"{key}. {value}" for key, value in options.items())


def read_turns(turns: Any, keys: Keys) -> list[Message]:
    """Messages of a row's list; calls go into the answer they follow. Raises RowError naming the message."""
    role_key, content_key, roles = keys
    if not isinstance(turns, list):
        raise RowError("wrong type", f"found {kind(turns)}; expected a list of {{{role_key}, {content_key}}} objects")
    out: list[Message] = []
    for n, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or role_key not in turn or not _says_something(turn, content_key):
            found = f"keys {', '.join(turn)}" if isinstance(turn, Mapping) else kind(turn)
            raise RowError("wrong type", f"message {n}: found {found}; expected keys {role_key} and {content_key}")
        role = roles.get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None:
            raise RowError(
                "unknown role",
                f"message {n}: found {role_key} {turn[role_key]!r}{near(str(turn[role_key]), list(roles))}; "
                f"expected one of {', '.join(roles)}",
            )
        message = _message(role, turn, content_key, n)
        before = out[-1] if out else None
        if role == _CALL and before is not None and before.role == "assistant":
            out[-1] = dataclasses.replace(
                before,
                tool_calls=before.tool_calls + message.tool_calls,
                weight=before.weight if message.weight is None else message.weight,
            )
        else:
            out.append(message)
    return out


def _says_something(turn: Mapping[str, Any], content_key: str) -> bool:
    return content_key in turn or bool(turn.get("tool_calls") or turn.get("function_call"))


def _message(role: str, turn: Mapping[str, Any], content_key: str, n: int) -> Message:
    where, weight = f"message {n}", _weight(turn, n)
    if role == _CALL:
        return Message("assistant", "", weight, tool_calls=parse_calls(turn[content_key], where=where))
    content = _content(turn.get(content_key), n)
    if role == "tool":
        known = {key: turn[key] for key in ("tool_call_id", "name") if isinstance(turn.get(key), str)}
        return Message(role, result_text(content), weight, fields=known)
    calls = turn.get("tool_calls") or turn.get("function_call")
    if calls and role != "assistant":
        raise RowError("bad tool call", f"{where}: a {role} message has tool calls; expected them in answers only")
    thought = turn.get("reasoning_content")
    if isinstance(thought, str) and thought.strip() and role == "assistant":
        content = f"<think>\n{thought.strip()}\n</think>\n\n{content}"
    return Message(role, content, weight, tool_calls=parse_calls(calls, where=where) if calls else ())


def _content(content: Any, n: int) -> str:
    """Text, or the text parts of a list of parts; None is an empty answer."""
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RowError("wrong type", f"message {n}: content is {kind(content)}; expected text")
    return content


def _weight(turn: Mapping[str, Any], n: int) -> float | None:
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowError("wrong type", f"message {n}: train is {kind(train)}; expected true or false")
    if weight is not None and (
        isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e9
    ):
        raise RowError("wrong type", f"message {n}: weight is {weight!r}; expected a number of at least 0")
    if train is False:
        return 0.0
    return None if weight is None else float(weight)


def _opened(row: Row, said: Sequence[Message]) -> Conversation:
    """The messages after the system column's text, which may stand there a second time as the first message."""
    tools = parse_tools(row.get("tools"))
    column = system_message(row)
    opening = [*column, *said][:1]
    # Rows in the text form list their tools in the system message already.
    listed = bool(opening) and opening[0].role == "system" and "<tools>" in opening[0].content
    meta = {"tools": tools} if tools and not listed else {}
    if column and said and said[0].role == "system":
        if said[0].content.strip() != column[0].content.strip():
            raise RowError(
                "two system messages",
                f"the column system has {column[0].content[:40]!r} and message 1 has {said[0].content[:40]!r}; "
                "expected the same text, or one of the two",
            )
        return Conversation(tuple(said), meta)
    return Conversation((*column, *said), meta)


def system_message(row: Row) -> tuple[Message, ...]:
    """The system column as a message; nothing where it is blank or absent."""
    text = text_of(row, "system", none="")
    return (Message("system", text),) if text.strip() else ()
