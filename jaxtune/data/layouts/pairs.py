"""Formats whose rows hold one task and its answer in named columns."""

from typing import Any

from jaxtune.data.layouts.dialogues import system_message
from jaxtune.data.records import Conversation, Message, NothingToLearn, RowError
from jaxtune.data.row_values import Row, kind, text_of

COT_ANSWER = "So the answer is"


def alpaca(row: Row, options: Any) -> list[Conversation]:
    """`alpaca`: an instruction with or without an input, and the output."""
    return [_task(row, text_of(row, "instruction"), text_of(row, "input", none=""), text_of(row, "output", none=""))]


def dolly(row: Row, options: Any) -> list[Conversation]:
    """`dolly`: as alpaca, under Dolly's names; the category is carried."""
    answer = text_of(row, "response", none="")
    return [_task(row, text_of(row, "instruction"), text_of(row, "context", none=""), answer, ("category",))]


def orca(row: Row, options: Any) -> list[Conversation]:
    """`orca`: a question under a system message; `source` is the submixture, from its column or the id (`niv.42`)."""
    (made,) = [_task(row, text_of(row, "question"), "", text_of(row, "response", none=""), ("teacher", "stage"))]
    source, identity = row.get("source"), row.get("id")
    if source is None and isinstance(identity, str) and "." in identity:
        source = identity.partition(".")[0]
    known = {"system": row.get("system"), "source": source}
    return [Conversation(made.messages, {**{k: v for k, v in known.items() if v}, **made.meta})]


def self_instruct(row: Row, options: Any) -> list[Conversation]:
    """`self_instruct`: an instruction with several instances, each a conversation of its own."""
    instances = row["instances"]
    if not isinstance(instances, list):
        raise RowError("wrong type", f"instances is {kind(instances)}; expected a list of {{input, output}} objects")
    instruction, out = text_of(row, "instruction"), []
    for n, instance in enumerate(instances, 1):
        if not isinstance(instance, dict) or "output" not in instance:
            found = f"keys {', '.join(instance)}" if isinstance(instance, dict) else kind(instance)
            raise RowError("wrong type", f"instance {n}: found {found}; expected keys input and output")
        try:
            given, answer = text_of(instance, "input", none=""), text_of(instance, "output", none="")
        except RowError as error:
            raise RowError(error.reason, f"instance {n}: {error}") from error
        out.append(_task({**row, **instance}, instruction, given, answer))
    if not out:
        raise NothingToLearn("no instances")
    return out


def cot(row: Row, options: Any) -> list[Conversation]:
    """`cot`: the question is answered by the chain of thought, then `So the answer is ANSWER.`"""
    question, answer = text_of(row, "question"), text_of(row, "answer", none="").strip()
    if not answer:
        raise NothingToLearn("empty answer")
    closing = f"{COT_ANSWER} {answer}" + ("" if answer.endswith((".", "!", "?")) else ".")
    thought = text_of(row, "chain_of_thought", none="").rstrip()
    said = f"{thought}\n{closing}" if thought else closing
    return [Conversation((*system_message(row), Message("user", question), Message("assistant", said)))]


def natural_instructions(row: Row, options: Any) -> list[Conversation]:
    """`natural_instructions`: the task's definition with the input; the first of several right outputs."""
    definition, output = row["definition"], row["output"]
    if isinstance(definition, list) and all(isinstance(part, str) for part in definition):
        definition = "\n".join(definition)
    if isinstance(output, list):
        output = output[0] if output else None
    values = {**row, "definition": definition, "output": output}
    return [
        _task(
            values, text_of(values, "definition"), text_of(values, "input", none=""), text_of(values, "output", none="")
        )
    ]


def raw_text(row: Row, options: Any) -> list[Conversation]:
    """`text`: text outside any chat, trained whole."""
    return [Conversation((Message("text", text_of(row, "text")),))]


def fields(row: Row, options: Any) -> list[Conversation]:
    """`fields`: the row's columns, for templates to be filled from."""
    raise RowError(
        "no templates",
        "format fields has no conversation of its own; give this source phrasings with data.train.N.templates",
    )


def _task(row: Row, instruction: str, extra: str, answer: str, carried: tuple[str, ...] = ()) -> Conversation:
    parts, content = {}, instruction
    if extra.strip():
        # Templates that know alpaca's two prompts read the parts; all others read the joined content.
        parts, content = {"instruction": instruction, "input": extra}, f"{instruction}\n\n{extra}"
    user = Message("user", content, fields=parts)
    meta = {name: row[name] for name in carried if row.get(name) is not None}
    return Conversation((*system_message(row), user, Message("assistant", answer)), meta)
