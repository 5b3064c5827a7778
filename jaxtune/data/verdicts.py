"""A person's verdicts on rows, saved from the page of an audit: kept, dropped, or corrected."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from jaxtune.data.layouts.formats import check_turns
from jaxtune.data.records import ROLES, Conversation, Message, NothingToLearn, RowError

CHOICES = ("keep", "drop", "fix")
DROPPED = "dropped by a verdict"
UNFIXED = "to be fixed, says a verdict"
_KEY, _HALF = re.compile("[0-9a-fA-F]{16}"), re.compile("[\ud800-\udfff]")


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
    digits = entry.get("key")
    if not isinstance(digits, str) or not _KEY.fullmatch(digits):
        raise ValueError(f"{here}: key is {digits!r}; expected the 16 hexadecimal digits of a row")
    listed = entry.get("messages") or ()
    if not isinstance(listed, list | tuple):
        raise ValueError(f"{here}: messages is {listed!r}; expected a list of messages")
    messages = tuple(_message(m, here) for m in listed)
    if messages and entry["verdict"] != "fix":
        raise ValueError(f"{here}: found messages beside {entry['verdict']}; only a fix has them")
    try:
        if messages:
            check_turns(Conversation(messages))
    except (RowError, NothingToLearn) as error:
        raise ValueError(f"{here}: {error}; expected a whole conversation with an answer") from None
    return Verdict(int(digits, 16), str(entry.get("where", "")), entry["verdict"], messages)


def _message(told: Mapping[str, Any], here: str) -> Message:
    if not isinstance(told, dict) or told.get("role") not in ROLES or not isinstance(told.get("content"), str):
        raise ValueError(f"{here}: a message is {told!r}; expected a role ({', '.join(ROLES)}) and a content of text")
    weight = told.get("weight")
    number = isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight < float("inf")
    if weight is not None and not number:
        raise ValueError(f"{here}: a weight is {weight!r}; expected a number of at least 0")
    if _HALF.search(told["content"]):
        raise ValueError(f"{here}: a content holds half of a surrogate pair, which is no character; expected text")
    calls = told.get("tool_calls") or ()
    if not isinstance(calls, list | tuple) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"{here}: tool_calls is {calls!r}; expected a list of objects")
    fields = {k: v for k, v in told.items() if k not in ("role", "content", "weight", "tool_calls")}
    if not all(isinstance(value, str) for value in fields.values()):
        raise ValueError(f"{here}: a message has {', '.join(fields)}; expected texts")
    return Message(told["role"], told["content"], weight=weight, fields=fields, tool_calls=tuple(calls))
