"""The words of the data path: messages, conversations, and what can be wrong with a row."""

import dataclasses
from collections.abc import Mapping
from typing import Any

ROLES = ("system", "user", "assistant", "tool", "text")


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn: who speaks, what is said, and how much its tokens count.

    `weight` None leaves the choice to `data.train_on`; a number is the weight of this message's tokens whatever
    `train_on` says. `fields` are further keys that a chat template may read beside role and content: alpaca's
    `instruction` and `input`, whose joined form is `content`. Role `text` is raw text outside any chat; role `tool` is
    what a tool gave back. `tool_calls` are an answer's calls: {"id", "type": "function", "function": {"name",
    "arguments"}}, the arguments as an object.
    """

    role: str
    content: str
    weight: float | None = None
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tool_calls: tuple[Mapping[str, Any], ...] = ()

    @property
    def is_blank(self) -> bool:
        """Whether it says nothing and calls nothing."""
        return not self.tool_calls and not self.content.strip()

    def as_dict(self) -> dict[str, Any]:
        """The message as chat templates see it."""
        calls = {"tool_calls": list(self.tool_calls)} if self.tool_calls else {}
        return {"role": self.role, "content": self.content, **self.fields, **calls}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages in order, and whatever else the row carried that later stages may ask for.

    `meta["tools"]` are the functions that may be called: {"type": "function", "function": {"name", ...}}.
    """

    messages: tuple[Message, ...]
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class RowError(ValueError):
    """A row that cannot be read; `reason` is a few words to count it by, the message is the full story."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:  # worker processes send these home
        return RowError, (self.reason, str(self))


class NothingToLearn(Exception):
    """A well-formed row without anything to train on; `reason` says why in a few words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
