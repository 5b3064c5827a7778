"""What became of a row on its way to examples."""

import dataclasses
from typing import NamedTuple

from jaxtune.data.packing import Example, Pair
from jaxtune.data.records import Conversation, RowError

OVERLONG = "over length"
NOT_TRAINED = "no trained token"
HELD_OUT = "also held out"
# How far a row comes: read, parsed, valid, kept by what leaves rows out on purpose, within the length.
STAGES = ("parsed", "valid", "kept", "fits")


@dataclasses.dataclass
class RowResult:
    """What became of one row.

    `reason` says why (part of) it gives nothing, and `stage` which of STAGES that part did not reach; `bad` rows are
    those that cannot be read, with `message` in full. `left_out_tokens` are those of what is left out on purpose.
    Tokens are counted before shifting. Of `turns` trained answers kept, `stops` train their end-of-turn token.
    `reasoning_removed` counts the reasoning blocks that `data.reasoning` took out of its answers, `reasoning_left` the
    answers where it leaves a mark of reasoning that it should not.
    """

    examples: list[Example | Pair]
    tokens: int = 0
    trained: int = 0
    lost_tokens: int = 0
    left_out_tokens: int = 0
    turns: int = 0
    stops: int = 0
    reasoning_removed: int = 0
    reasoning_left: int = 0
    reason: str | None = None
    stage: str | None = None
    message: str = ""
    bad: bool = False

    def lose(self, reason: str, stage: str) -> None:
        """Notes that a part of the row is lost."""
        self.reason, self.stage = reason, stage


class Examined(NamedTuple):
    """A row: what became of it, and what it says, also where that is left out."""

    result: RowResult
    conversations: list[Conversation]


class Waiting(NamedTuple):
    """A conversation of row `row` that is to be rendered, and where to note what becomes of it."""

    result: RowResult
    row: int
    conversation: Conversation


class Hashes(NamedTuple):
    """What a row says, for other readers to leave out: hashes of it as a whole under every wording, and of each long
    text in it. Rows that are alike have the same `row`.
    """

    whole: frozenset[int]
    texts: frozenset[int]
    row: int


def fail(result: RowResult, error: RowError, where: str, *, stage: str = "valid") -> None:
    """Notes that the row cannot be read."""
    result.lose(error.reason, stage)
    result.message, result.bad = f"{where}: {error}", True
