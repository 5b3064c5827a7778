"""Row layouts of instruction data, and how each becomes conversations.

A format is one entry of `FORMATS`: the fields it reads with the column names they usually have, and a function from
the fields' values to conversations. A new format is a function and an entry.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from jaxtune.data.layouts import dialogues, pairs
from jaxtune.data.layouts.cleaning import ShareGptOptions
from jaxtune.data.layouts.message_trees import OasstOptions, oasst
from jaxtune.data.layouts.row_functions import convert_by_function, load_function
from jaxtune.data.records import Conversation, Message, NothingToLearn, RowError
from jaxtune.data.row_values import Row, missing, near

_FLAT_TREE = {"message_id", "parent_id", "role", "text"}
_MAX_KEYS = 256  # lists of keys remembered of a source


class NoOptions(BaseModel):
    """The options of formats that have none."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclasses.dataclass(frozen=True)
class Format:
    """Fields with their usual column names (the first is the field's own), which are needed, and the conversion.

    `fits(values)` tells formats with the same columns apart, by a row's values of the needed fields; `telling` are
    columns without which the format is not found, though it can be named. Neither matters to a format that is named.
    """

    fields: Mapping[str, tuple[str, ...]]
    required: tuple[str, ...]
    convert: Callable[[Row, Any], list[Conversation]]
    fits: Callable[[Row], bool] | None = None
    telling: tuple[str, ...] = ()
    options: type[BaseModel] = NoOptions


@dataclasses.dataclass(frozen=True)
class Layout:
    """A format with the column that each of its fields is read from.

    `columns` are those that the first rows have. An optional field that is not among them is looked for, under its
    usual names, in every row: rows of one source need not all have the same columns.
    """

    format: str
    columns: Mapping[str, str]
    options: BaseModel = dataclasses.field(default_factory=NoOptions)
    system: str | None = None

    def describe(self) -> str:
        """`alpaca (instruction, input, output <- response)`."""
        if ":" in self.format:
            return self.format
        pairs = (field if field == column else f"{field} <- {column}" for field, column in self.columns.items())
        return f"{self.format} ({', '.join(pairs)})" if self.columns else self.format

    def convert(self, row: Row) -> list[Conversation]:
        """The row's conversations; raises RowError for a malformed row, NothingToLearn for one without an answer."""
        if ":" in self.format:
            conversations = convert_by_function(self.format, row)
        else:
            conversations = FORMATS[self.format].convert(self._values(row), self.options)
        out, nothing = [], NothingToLearn("no assistant turn")
        for conversation in conversations:
            opened = self._with_system(conversation)
            try:
                check_turns(opened)
                out.append(opened)
            except NothingToLearn as reason:
                nothing = reason
        if not out:
            raise nothing
        return out

    def fields(self, row: Row) -> dict[str, Any]:
        """The row's columns, and the format's fields under their own names: what task templates are filled from."""
        return {**row, **({} if ":" in self.format else self._values(row))}

    def _values(self, row: Row) -> dict[str, Any]:
        spec = FORMATS[self.format]
        for field in spec.required:
            if self.columns[field] not in row:
                raise RowError("missing column", missing(self.columns[field], list(row)))
        return {field: row.get(column) for field, column in self._columns_of(row).items()}

    def _columns_of(self, row: Row) -> Mapping[str, str]:
        """The column of each field that a row with these keys has."""
        keys = tuple(row)
        known = self._known_columns.get(keys)
        if known is None:
            fields = FORMATS[self.format].fields
            found = {field: self._column(field, row) for field in (*fields, *(set(self.columns) - set(fields)))}
            known = {field: column for field, column in found.items() if column is not None}
            if len(self._known_columns) < _MAX_KEYS:
                self._known_columns[keys] = known
        return known

    @functools.cached_property
    def _known_columns(self) -> dict[tuple[str, ...], Mapping[str, str]]:
        """What `_columns_of` has found: rows of a source have few different lists of keys."""
        return {}

    def _column(self, field: str, row: Row) -> str | None:
        """The column of this row that holds the field: the layout's, else the first usual name that is there."""
        column, usual = self.columns.get(field), FORMATS[self.format].fields.get(field, ())
        if column is not None and (column in row or column not in usual):
            return column
        return next((name for name in usual if name in row), None)

    def _with_system(self, conversation: Conversation) -> Conversation:
        roles = [message.role for message in conversation.messages[:1]]
        if not self.system or roles in ([], ["system"], ["text"]):
            return conversation
        opened = (Message("system", self.system), *conversation.messages)
        return dataclasses.replace(conversation, messages=opened)


def find_layout(
    rows: Sequence[Row],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    system: str | None = None,
) -> Layout:
    """Decides format and columns from the first rows; `columns` (field -> column) wins over the usual names.

    Args:
        options: of the format, as docs/data-formats.md lists them.
        system: the system message of conversations that have none.

    Raises:
        ValueError: naming the columns found when no format fits or a named column is not there, or a wrong option.
    """
    columns = dict(columns or {})
    found = list(dict.fromkeys(key for row in rows for key in row))
    if ":" in format:
        if columns or options:
            key = "columns" if columns else "options"
            raise ValueError(f"{key}: found beside format {format}, which is given the row as it is")
        load_function(format)
        return Layout(format, {}, system=system)
    for field, column in columns.items():
        if column not in found:
            raise ValueError(f"columns.{field}: {missing(column, found)}")
    if set(found) >= _FLAT_TREE and "replies" not in found and format in ("auto", "oasst") and not columns:
        raise ValueError(
            "found single messages of OpenAssistant trees (message_id, parent_id), which cannot be put together row by "
            "row; give the export of whole trees (files named *.trees.jsonl.gz), or columns.text=text to train each "
            "message as text"
        )
    if format == "auto":
        format = _detect(rows, columns, found)
    spec = FORMATS[format]
    unknown = [field for field in columns if field not in spec.fields]
    if unknown and format != "fields":
        raise ValueError(
            f"columns.{unknown[0]}: format {format} has no such field{near(unknown[0], list(spec.fields))}; "
            f"its fields are {', '.join(spec.fields)}"
        )
    chosen = {
        field: columns.get(field) or next((name for name in names if name in found), None)
        for field, names in spec.fields.items()
    }
    for field in spec.required:
        if chosen[field] is None:
            raise ValueError(f"format {format}: {missing(field, found)}; map it with columns.{field}=COLUMN")
    chosen |= columns
    kept = {field: column for field, column in chosen.items() if column is not None}
    return Layout(format, kept, read_options(format, options or {}), system)


def read_options(format: str, options: Mapping[str, Any]) -> BaseModel:
    """The format's options, checked; raises ValueError with the nearest name, or what is wrong with a value."""
    spec = FORMATS[format].options
    for name in options:
        if name not in spec.model_fields:
            known = ", ".join(spec.model_fields) or "none"
            raise ValueError(
                f"options.{name}: format {format} has no such option{near(name, list(spec.model_fields))}; "
                f"its options are {known}"
            )
    try:
        return spec.model_validate({k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
    except ValidationError as error:
        problem = error.errors()[0]
        path = ".".join(map(str, problem["loc"]))
        words = problem["msg"].removeprefix("Value error, ")
        raise ValueError(f"options.{path}: found {problem['input']!r}; {words[0].lower()}{words[1:]}") from error


def _detect(rows: Sequence[Row], columns: Mapping[str, str], found: list[str]) -> str:
    """The first format whose needed fields are all there and look as they should."""
    for name, spec in FORMATS.items():
        if name == "fields" or not set(columns) <= set(spec.fields):
            continue
        needed = (*spec.required, *spec.telling)
        chosen = {f: columns.get(f) or next((n for n in spec.fields[f] if n in found), None) for f in needed}
        if None in chosen.values():
            continue
        if spec.fits is None or any(spec.fits(v) for v in _needed_values(rows, spec.required, chosen)):
            return name
    needs = "; ".join(
        f"{name} needs {', '.join(spec.required)}" for name, spec in FORMATS.items() if name not in _UNNAMED
    )
    raise ValueError(
        f"no format fits the columns found: {', '.join(found) or 'none'} ({needs}); "
        "name the columns, e.g. columns.prompt=QUESTION columns.completion=ANSWER"
    )


def _needed_values(
    rows: Sequence[Row], required: Sequence[str], chosen: Mapping[str, str | None]
) -> Iterable[dict[str, Any]]:
    """The first row whose needed columns all hold something."""
    for row in rows:
        values = {field: row.get(str(chosen[field])) for field in required}
        if all(values.values()):
            yield values
            return


def _turns_with(key: str) -> Callable[[Row], bool]:
    def fits(values: Row) -> bool:
        turns = values["messages"]
        return isinstance(turns, list) and isinstance(turns[0], Mapping) and key in turns[0]

    return fits


def _is_message_list(values: Row) -> bool:
    turns = values["messages"]
    return isinstance(turns, list) and isinstance(turns[0], Mapping) and "from" not in turns[0]


def _is_text_list(values: Row) -> bool:
    turns = values["turns"]
    return isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)


def _is_tree(values: Row) -> bool:
    prompt = values["prompt"]
    if isinstance(prompt, list):
        return isinstance(prompt[0], Mapping) and "parent_id" in prompt[0]
    return isinstance(prompt, Mapping) and "replies" in prompt


def _tells_of_instances(values: Row) -> bool:
    return isinstance(values["instances"], list)


_SYSTEM = ("system", "system_prompt")
# Found, but not for a configuration to name; and named, but not to be found.
_UNNAMED = ("questions", "fields")
# The order is that of detection: the more telling columns first.
FORMATS: dict[str, Format] = {
    "oasst": Format(
        {
            "prompt": ("prompt", "messages"),
            "tree_state": ("tree_state",),
            "tree_id": ("message_tree_id",),
        },
        ("prompt",),
        oasst,
        fits=_is_tree,
        options=OasstOptions,
    ),
    "sharegpt": Format(
        {"messages": ("conversations", "messages", "conversation"), "system": _SYSTEM, "tools": ("tools",)},
        ("messages",),
        dialogues.sharegpt,
        fits=_turns_with("from"),
        options=ShareGptOptions,
    ),
    "messages": Format(
        {"messages": ("messages", "conversations", "conversation", "turns"), "system": _SYSTEM, "tools": ("tools",)},
        ("messages",),
        dialogues.messages,
        fits=_is_message_list,
    ),
    "lima": Format(
        {"turns": ("conversations", "data", "dialogue"), "system": _SYSTEM},
        ("turns",),
        dialogues.lima,
        fits=_is_text_list,
    ),
    "questions": Format({"turns": ("turns",)}, ("turns",), dialogues.questions, fits=_is_text_list),
    "self_instruct": Format(
        {"instruction": ("instruction",), "instances": ("instances",), "system": ("system",)},
        ("instruction", "instances"),
        pairs.self_instruct,
        fits=_tells_of_instances,
    ),
    "dolly": Format(
        {
            "instruction": ("instruction",),
            "context": ("context", "input"),
            "response": ("response", "output"),
            "category": ("category",),
            "system": ("system",),
        },
        ("instruction", "response"),
        pairs.dolly,
        telling=("category",),
    ),
    "natural_instructions": Format(
        {
            "definition": ("definition", "Definition"),
            "input": ("input", "example_input"),
            "output": ("output", "example_output"),
            "positive_examples": ("positive_examples", "Positive Examples"),
            "negative_examples": ("negative_examples", "Negative Examples"),
            "explanation": ("explanation", "example_explanation"),
            "system": ("system",),
        },
        ("definition", "input", "output"),
        pairs.natural_instructions,
    ),
    "alpaca": Format(
        {
            "instruction": ("instruction",),
            "input": ("input", "context"),
            "output": ("output", "response"),
            "system": ("system",),
        },
        ("instruction", "output"),
        pairs.alpaca,
    ),
    "cot": Format(
        {
            "question": ("question",),
            "answer": ("answer",),
            "chain_of_thought": ("chain_of_thought", "rationale", "cot"),
            "system": ("system",),
        },
        ("question", "answer", "chain_of_thought"),
        pairs.cot,
    ),
    "orca": Format(
        {
            "system": _SYSTEM,
            "question": ("question",),
            "response": ("response",),
            "id": ("id",),
            "source": ("source",),
            "teacher": ("teacher",),
            "stage": ("stage",),
        },
        ("question", "response"),
        pairs.orca,
        telling=("system",),
    ),
    "prompt_completion": Format(
        {
            "prompt": ("prompt", "question", "query", "problem", "inputs"),
            "completion": ("completion", "answer", "response", "solution", "targets"),
            "options": ("options",),
            "system": _SYSTEM,
            "tools": ("tools",),
        },
        ("prompt", "completion"),
        dialogues.prompt_completion,
    ),
    "text": Format({"text": ("text",)}, ("text",), pairs.raw_text),
    "fields": Format({}, (), pairs.fields),
}


def check_turns(conversation: Conversation) -> None:
    """Raises RowError for roles out of order, NothingToLearn where no answer is given."""
    messages = conversation.messages
    roles = [message.role for message in messages]
    if roles == ["text"]:
        if not messages[0].content.strip():
            raise NothingToLearn("empty text")
        return
    if "system" in roles[1:]:
        n = roles.index("system", 1) + 1
        raise RowError("roles out of order", f"message {n} is a system message; expected it first, or not at all")
    first = 1 if roles[:1] == ["system"] else 0
    for n in range(first, len(roles)):
        before = messages[n - 1] if n > first else None
        expected = _may_follow(before)
        if roles[n] not in expected:
            after = "first" if before is None else f"after {before.role}"
            after += " with a tool call" if before is not None and before.tool_calls else ""
            raise RowError(
                "roles out of order",
                f"message {n + 1}: found {roles[n]} {after}; expected {' or '.join(expected)} there",
            )
    if "assistant" not in roles:
        raise NothingToLearn("no assistant turn")
    if all(m.is_blank for m in messages if m.role == "assistant"):
        raise NothingToLearn("empty answer")


def _may_follow(before: Message | None) -> tuple[str, ...]:
    if before is None:
        return ("user",)
    if before.role == "user":
        return ("assistant",)
    if before.role == "tool":
        return ("assistant", "tool")
    return ("tool",) if before.tool_calls else ("user", "tool")
