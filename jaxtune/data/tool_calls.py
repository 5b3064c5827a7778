"""Calls of tools: read from rows, and written as text for templates that know nothing of them.

The text form is the one that Hermes and Qwen models use. An answer's calls follow what it says:

    <tool_call>
    {"name": "add", "arguments": {"a": 1}}
    </tool_call>

results come back in a user turn, each between `<tool_response>` lines, and the tools stand as JSON, one a line,
between `<tools>` lines in the system message.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxtune.data.records import Conversation, Message, RowError
from jaxtune.data.row_values import kind

_RESPONSE = ("<tool_response>", "</tool_response>")


def parse_calls(value: Any, *, where: str) -> tuple[Mapping[str, Any], ...]:
    """The calls in a row's value: one call or a list, as objects or JSON text, bare or as OpenAI writes them.

    Raises RowError naming `where` for text that is not JSON and for calls without a name.
    """
    value = _decoded(value, f"{where}: the tool call")
    calls = []
    for call in value if isinstance(value, list | tuple) else [value]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            found = f"keys {', '.join(map(str, call))}" if isinstance(call, Mapping) else kind(call)
            raise RowError("bad tool call", f"{where}: a tool call has {found}; expected keys name and arguments")
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            arguments = _decoded(arguments or "{}", f"{where}: the arguments of {function['name']}")
        if not isinstance(arguments, Mapping | None):
            raise RowError(
                "bad tool call",
                f"{where}: the arguments of {function['name']} are {kind(arguments)}; expected an object",
            )
        made = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments or {})}}
        calls.append({"id": call["id"], **made} if isinstance(call.get("id"), str) else made)
    return tuple(calls)


def parse_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """The tools in a row's column, a list or its JSON text; empty where there are none. Raises RowError."""
    if value is None or value == "" or value == []:
        return ()
    value = _decoded(value, "the column tools")
    tools = []
    for tool in value if isinstance(value, list | tuple) else [value]:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError("bad tools", f"tools: found {kind(tool)} without a name; expected name and parameters")
        tools.append({"type": "function", "function": dict(function)})
    return tuple(tools)


def result_text(content: str) -> str:
    """A tool's result without the text form's own tags around it."""
    inner = content.strip()
    if inner.startswith(_RESPONSE[0]) and inner.endswith(_RESPONSE[1]) and inner.count(_RESPONSE[0]) == 1:
        return inner[len(_RESPONSE[0]) : -len(_RESPONSE[1])].strip("\n")
    return content


def with_ids(messages: Sequence[Message]) -> list[Message]:
    """The messages with an id on every call, and on every result that of its call, as some templates ask for.

    Ids that are there stay; others are `call00000`, `call00001`, ...: nine letters and digits, as Mistral's must be.
    """
    out: list[Message] = []
    waiting: list[dict[str, Any]] = []
    count = 0
    for message in messages:
        if message.tool_calls:
            waiting = []
            for call in message.tool_calls:
                waiting.append({"id": f"call{count:05d}", **call})
                count += 1
            message = dataclasses.replace(message, tool_calls=tuple(waiting))
        elif message.role == "tool" and waiting:
            call = waiting.pop(0)
            known = {"tool_call_id": call["id"], "name": call["function"]["name"]}
            message = dataclasses.replace(message, fields={**known, **message.fields})
        out.append(message)
    return out


def uses_tools(conversation: Conversation) -> bool:
    """Whether tools are offered, called or answer."""
    return bool(conversation.meta.get("tools")) or any(m.role == "tool" or m.tool_calls for m in conversation.messages)


def as_text(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """The messages in the text form: system, user and assistant only."""
    out: list[Message] = []
    listed = _listed(tools)
    if listed and (not messages or messages[0].role != "system"):
        out.append(Message("system", listed))
    for i, message in enumerate(messages):
        if i == 0 and message.role == "system" and listed:
            content = f"{message.content}\n\n{listed}" if message.content.strip() else listed
            out.append(dataclasses.replace(message, content=content))
        elif message.role == "tool":
            result = f"{_RESPONSE[0]}\n{message.content}\n{_RESPONSE[1]}"
            if i and messages[i - 1].role == "tool":  # results of calls made together share a turn
                result = f"{out.pop().content}\n{result}"
            out.append(Message("user", result, weight=message.weight))
        elif message.tool_calls:
            written = [f"<tool_call>\n{_json(call['function'])}\n</tool_call>" for call in message.tool_calls]
            said = [message.content] if message.content.strip() else []
            out.append(dataclasses.replace(message, content="\n".join([*said, *written]), tool_calls=()))
        else:
            out.append(message)
    return tuple(out)


def pieces_of(call: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """What must be in a text that holds the call: its name and each value, each in the ways it may be written."""
    yield (call["function"]["name"],)
    yield from _leaves(call["function"]["arguments"])


def _leaves(value: Any) -> Iterator[tuple[str, ...]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield written(key)
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield written(value)


def written(value: Any) -> tuple[str, ...]:
    """The ways a template may write a value: as it is, as JSON, and as JSON inside JSON text."""
    plain = str(value)
    forms = [plain, *(json.dumps(value, ensure_ascii=ascii).strip('"') for ascii in (False, True))]
    return tuple(dict.fromkeys([*forms, *(json.dumps(form)[1:-1] for form in forms)]))


def _listed(tools: Sequence[Mapping[str, Any]]) -> str:
    if not tools:
        return ""
    lines = "\n".join(_json(tool["function"]) for tool in tools)
    return (
        f"You can call these functions:\n<tools>\n{lines}\n</tools>\n"
        "To call one, write its name and arguments as JSON:\n"
        '<tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>'
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _decoded(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RowError(
            "bad tool call", f"{what} is not JSON (column {error.colno}: {error.msg}): {value[:60]!r}"
        ) from error
