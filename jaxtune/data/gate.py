"""What a run leaves out of a source on purpose, or corrects: rows by number, conversations by what they say."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from jaxtune.data.records import Conversation, Message


class Filter(Protocol):
    """Says of a conversation why it is left out, None when it is not; `key` names everything that decides."""

    key: str

    def reason(self, conversation: Conversation) -> str | None:
        """Why it is left out, in a few words to count it by."""


@dataclasses.dataclass(frozen=True)
class Gate:
    """Decides which rows and conversations of a source are trained on; travels to worker processes.

    `left_out`: reason -> its rows, int64 ascending (duplicates, contamination, verdicts). `corrected`: row -> the
    messages that a person put in place of the row's own. `filters`: those of `data.quality`.
    """

    left_out: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    corrected: Mapping[int, tuple[Message, ...]] = dataclasses.field(default_factory=dict)
    filters: Filter | None = None

    @property
    def key(self) -> str:
        """Names everything that decides."""
        digest = hashlib.blake2b(digest_size=16)
        for reason, rows in sorted(self.left_out.items()):
            digest.update(reason.encode() + b"\0" + rows.tobytes())
        told = {
            str(row): [m.as_dict() | {"weight": m.weight} for m in by] for row, by in sorted(self.corrected.items())
        }
        digest.update(json.dumps(told, sort_keys=True).encode())
        digest.update(b"" if self.filters is None else self.filters.key.encode())
        return digest.hexdigest()

    def why_row(self, row: int) -> str | None:
        """Why the row is left out whatever it says; None when it is not."""
        for reason, rows in self.left_out.items():
            at = int(np.searchsorted(rows, row))
            if at < len(rows) and rows[at] == row:
                return reason
        return None

    def why(self, conversation: Conversation) -> str | None:
        """Why a conversation is left out for what it says; None when it is not."""
        return None if self.filters is None else self.filters.reason(conversation)
