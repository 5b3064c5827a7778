"""What is noted of each row while all are read: numbers only, so that millions of rows fit in memory."""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.data.quality.defects import DEFECTS, DefectFinder
from jaxtune.data.quality.difficulty import difficulty
from jaxtune.data.quality.duplicates import exact_key
from jaxtune.data.quality.exchanges import Exchange, exchanges
from jaxtune.data.quality.kinds import KINDS, better_kind_of, kind_of
from jaxtune.data.quality.languages import languages, spoken
from jaxtune.data.quality.scores import Scores, copies_instruction, is_refusal, score, shows_steps
from jaxtune.data.records import Conversation
from jaxtune.data.row_results import Examined
from jaxtune.data.row_texts import row_key, texts_of_all

UNASKED = len(KINDS)  # the kind of rows without an instruction: raw text, unreadable rows
# `key`: what the row says, 0 where it cannot be read; `asked`: its first instruction; `turns`: exchanges.
FACTS = np.dtype(
    [
        ("key", np.uint64),
        ("defects", np.uint32),  # a bit for each of defects.DEFECTS
        ("language", "S3"),
        ("unanswered", np.uint32),  # questions that end a conversation, or a path of a tree
        ("asked", np.uint64),
        ("kind", np.uint8),
        ("better_kind", np.uint8),
        ("turns", np.uint16),
        ("words", np.uint32),
        ("steps", np.uint16),
        ("constraints", np.uint16),
        ("refuses", np.bool_),
        ("copies", np.bool_),
        ("reasons", np.bool_),
        ("scores", np.float32, (len(Scores._fields),)),
    ]
)
_UNASKED = (0, UNASKED, UNASKED, *[0] * 4, *[False] * 3, (0.0,) * len(Scores._fields))
_NOTHING = (0, 0, b"", 0, *_UNASKED)


class Facts(NamedTuple):
    """The facts of rows [n], and the lengths of their trained answers in tokens, int32 [answers], with the row of each.

    `categories` counts what rows say of themselves in a column `category`, as Dolly's do.
    """

    rows: np.ndarray
    answers: np.ndarray
    answer_rows: np.ndarray
    categories: collections.Counter[str]


def facts_of(examined: Sequence[Examined], *, defects: DefectFinder, with_languages: bool) -> Facts:
    """The facts of some rows, in their order."""
    noted = []
    categories: collections.Counter[str] = collections.Counter()
    texts: list[str] = []
    speaking: list[int] = []
    for i, (_, conversations) in enumerate(examined):
        if not conversations:
            noted.append(_NOTHING)
            continue
        found = {name for conversation in conversations for name in defects.find(conversation)}
        bits = sum(1 << DEFECTS.index(name) for name in found)
        key, unanswered = row_key(texts_of_all(conversations)) or 0, sum(map(_unanswered, conversations))
        noted.append((key, bits, b"", unanswered, *_asked(exchanges(conversations[0]))))
        categories.update(str(c.meta["category"]) for c in conversations if "category" in c.meta)
        speaking.append(i)
        texts.append(spoken(conversations[0]))
    rows = np.array(noted, FACTS)
    if with_languages and texts:
        rows["language"][speaking] = np.array(languages(texts), "S3")
    answers, owners = _answers(examined)
    return Facts(rows, answers, owners, categories)


def with_defect(rows: np.ndarray, name: str) -> np.ndarray:
    """Whether each of some rows has a defect, bool [n]."""
    return (rows["defects"] >> np.uint32(DEFECTS.index(name))) & np.uint32(1) == 1


def joined(blocks: Sequence[Facts]) -> Facts:
    """The facts of blocks of rows, one after another."""
    firsts = np.cumsum([0, *(len(block.rows) for block in blocks)])
    categories: collections.Counter[str] = collections.Counter()
    for block in blocks:
        categories.update(block.categories)
    owners = [block.answer_rows + first for block, first in zip(blocks, firsts[:-1], strict=True)]
    return Facts(
        np.concatenate([np.zeros(0, FACTS), *(block.rows for block in blocks)]),
        np.concatenate([np.zeros(0, np.int32), *(block.answers for block in blocks)]),
        np.concatenate([np.zeros(0, np.int64), *owners]),
        categories,
    )


def _unanswered(conversation: Conversation) -> int:
    """Questions without an answer at the end of a conversation, and of those that its tree's other paths end with."""
    return int(conversation.messages[-1].role == "user") + int(conversation.meta.get("unanswered", 0))


def _asked(asked: Sequence[Exchange]) -> tuple[Any, ...]:
    """The facts of a conversation's exchanges: of its first instruction, and over all of them."""
    if not asked:
        return _UNASKED
    first = asked[0]
    hard = difficulty(first)
    scores = [score(one) for one in asked]
    return (
        exact_key([first.instruction, first.context]),
        KINDS.index(kind_of(first.instruction)),
        KINDS.index(better_kind_of(first.instruction)),
        min(len(asked), 65535),
        hard.words,
        min(hard.steps, 65535),
        min(hard.constraints, 65535),
        any(is_refusal(one.response) for one in asked),
        any(copies_instruction(one) for one in asked),
        any(shows_steps(one.response) for one in asked),
        tuple(scores[0]) if len(scores) == 1 else tuple(sum(of) / len(scores) for of in zip(*scores, strict=True)),
    )


def _answers(examined: Sequence[Examined]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each trained answer (runs of targets with a weight), int32, and the row of each, int64."""
    owners, weights = [], []
    for i, (result, _) in enumerate(examined):
        for example in result.examples:
            weights += [example.weights > 0, np.zeros(1, np.bool_)]  # a gap, so that runs end with their example
            owners.append((i, len(example.weights) + 1))
    if not weights:
        return np.zeros(0, np.int32), np.zeros(0, np.int64)
    trained = np.concatenate([np.zeros(1, np.bool_), *weights]).astype(np.int8)
    edges = np.diff(trained)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    of = np.repeat([i for i, _ in owners], [n for _, n in owners])
    return (ends - starts).astype(np.int32), of[starts].astype(np.int64)
