"""A person's verdicts on rows, saved from the page of an audit: kept, dropped, or corrected."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jaxtune.data.records import ROLES, Message

CHOICES = ("keep", "drop", "fix")
DROPPED = "dropped by a verdict"
UNFIXED = "to be fixed, says a verdict"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What to do with the rows that say what `key` is of; `messages` stand in their place where they are corrected."""

    key: int
    where: str
    choice: str
    messages: tuple[Message, ...] = ()

    @property
    def left_out(self) -> str | None:
        """Why the row is left out; None when it is not."""
        if self.choice == "drop":
            return DROPPED
        return UNFIXED if self.choice == "fix" and not self.messages else None


def read_verdicts(path: str) -> dict[int, Verdict]:
    """The verdicts of a file, by the key of their rows (`row_texts.row_key`); raises ValueError naming what is wrong.

    The file is the JSON that audit.html saves: `{"verdicts": [{"key": "9f...", "where": "data.jsonl:7", "verdict":
    "drop"}, ...]}`; `fix` has the whole corrected conversation as `messages`, without which the row is left out. Of two
    verdicts on one row the later counts.
    """
    try:
        with open(path, encoding="utf-8") as file:
            told = json.load(file)
    except OSError as error:
        raise ValueError(f"data.verdicts: {path} cannot be read ({error.strerror}); expected a file") from None
    except ValueError as error:
        raise ValueError(f"data.verdicts: {path} is not valid JSON ({error}); expected a file of audit.html") from None
    listed = told.get("verdicts") if isinstance(told, dict) else None
    if not isinstance(listed, list):
        raise ValueError(f"data.verdicts: {path} has no list of verdicts; expected a file saved by audit.html")
    found = [_verdict(entry, f"data.verdicts: {path}, verdict {i + 1}") for i, entry in enumerate(listed)]
    return {verdict.key: verdict for verdict in found}


def _verdict(entry: Any, here: str) -> Verdict:
    if not isinstance(entry, dict) or entry.get("verdict") not in CHOICES:
        found = entry.get("verdict") if isinstance(entry, dict) else entry
        raise ValueError(f"{here}: found {found!r}; expected keep, drop or fix")
    try:
        key = int(entry["key"], 16)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{here}: key is {entry.get('key')!r}; expected the 16 hexadecimal digits of a row") from None
    messages = tuple(_message(m, here) for m in entry.get("messages") or ())
    if messages and entry["verdict"] != "fix":
        raise ValueError(f"{here}: found messages beside {entry['verdict']}; only a fix has them")
    return Verdict(key, str(entry.get("where", "")), entry["verdict"], messages)


def _message(told: Mapping[str, Any], here: str) -> Message:
    if not isinstance(told, dict) or told.get("role") not in ROLES or not isinstance(told.get("content"), str):
        raise ValueError(f"{here}: a message is {told!r}; expected a role ({', '.join(ROLES)}) and a content of text")
    weight = told.get("weight")
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0):
        raise ValueError(f"{here}: a weight is {weight!r}; expected a number of at least 0")
    calls = told.get("tool_calls") or ()
    if not isinstance(calls, list | tuple) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"{here}: tool_calls is {calls!r}; expected a list of objects")
    fields = {k: v for k, v in told.items() if k not in ("role", "content", "weight", "tool_calls")}
    if not all(isinstance(value, str) for value in fields.values()):
        raise ValueError(f"{here}: a message has {', '.join(fields)}; expected texts")
    return Message(told["role"], told["content"], weight=weight, fields=fields, tool_calls=tuple(calls))
