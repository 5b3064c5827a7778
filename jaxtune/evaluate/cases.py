"""Rows of a data file as questions with their right answers."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtune.config_data import SourceConfig
from jaxtune.data.files.sources import Source, open_source
from jaxtune.data.layouts.formats import Layout, find_layout
from jaxtune.data.records import Message, NothingToLearn, RowError

DEFAULT_GROUP = "task"
DETECTION_ROWS = 64


class Case(NamedTuple):
    """One question: the messages before the last assistant turn, and that turn's text; `tools` may be called."""

    messages: tuple[Message, ...]
    reference: str
    group: str | None
    where: str
    tools: tuple[Mapping[str, Any], ...] = ()


class Cases(NamedTuple):
    """The cases of one file; `skipped` counts rows that hold no question, by reason."""

    path: str
    layout: str
    cases: list[Case]
    skipped: dict[str, int]


def read_cases(
    path: str, *, by: str | None = None, limit: int | None = None, columns: Mapping[str, str] | None = None
) -> Cases:
    """Reads the questions of a data file, in any format that training reads.

    Args:
        path: file, folder, glob, URL or hub dataset, as `data.train.0.path`.
        by: the column that groups rows; None takes `task` where the first row has it.
        limit: at most so many rows, spread evenly over the file.
        columns: field of the format -> column of the rows.

    Raises:
        ValueError: no such file, a row that cannot be read (with file:line), no column `by`, or no question at all.
    """
    source = open_source(SourceConfig(path=path))
    if not len(source):
        raise ValueError(f"{path}: found no rows; expected at least one")
    first = [_row(source, i) for i in range(min(len(source), DETECTION_ROWS))]
    try:
        layout = find_layout(first, columns=columns)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if by is None and DEFAULT_GROUP in first[0]:
        by = DEFAULT_GROUP
    count = len(source) if limit is None else min(limit, len(source))
    cases: list[Case] = []
    skipped: Counter[str] = Counter()
    for i in (len(source) * n // count for n in range(count)):
        row = _row(source, i)
        if by is not None and by not in row:
            raise ValueError(f"{source.where(i)}: no column {by!r} to group by; found columns {', '.join(row)}")
        group = None if by is None else str(row[by])
        try:
            cases += [Case(asked, answer, group, source.where(i), t) for asked, answer, t in _questions(layout, row)]
        except NothingToLearn as nothing:
            skipped[nothing.reason] += 1
        except RowError as error:
            raise ValueError(f"{source.where(i)}: {error}") from error
    if not cases:
        reasons = ", ".join(f"{count} rows: {reason}" for reason, count in skipped.items())
        raise ValueError(f"{path}: found no question with an answer ({reasons}); expected at least one")
    return Cases(path, layout.describe(), cases, dict(skipped))


def _row(source: Source, i: int) -> dict[str, Any]:
    try:
        return source.row(i)
    except RowError as error:
        raise ValueError(f"{source.where(i)}: {error}") from error


def _questions(layout: Layout, row: Mapping[str, Any]) -> list[tuple[tuple[Message, ...], str, tuple[Any, ...]]]:
    pairs = []
    for conversation in layout.convert(row):
        messages = conversation.messages
        last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=0)
        if last == 0:
            raise NothingToLearn("no question before an answer")
        if not messages[last].content.strip():
            raise NothingToLearn("empty answer")
        pairs.append((messages[:last], messages[last].content, tuple(conversation.meta.get("tools", ()))))
    return pairs
