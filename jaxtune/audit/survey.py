"""A configuration's streams opened to be looked over: every row read, nothing stopped, duplicates found."""

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune import hub
from jaxtune.audit.facts import Facts
from jaxtune.audit.looking import Look, Noted
from jaxtune.config import Config
from jaxtune.data.chat.templates import ChatTemplate
from jaxtune.data.examples import RowReader
from jaxtune.data.leaving_out import IN_BENCHMARK, AllRows, duplicates_of, near_first, row_keys
from jaxtune.data.loader import open_eval_stream, open_stream
from jaxtune.data.measuring import Survey
from jaxtune.data.quality.contamination import Benchmarks
from jaxtune.data.quality.defects import DefectFinder
from jaxtune.data.row_texts import texts_of
from jaxtune.data.stream import Stream
from jaxtune.inputs import Reading
from jaxtune.metrics import Terminal

_LISTED = 100_000  # rows of one list in audit.json


@dataclasses.dataclass(frozen=True)
class Copies:
    """Rows that say what an earlier one says: numbers of `rows`, int64 ascending, and of those they repeat."""

    rows: AllRows
    again: np.ndarray
    first: np.ndarray

    def as_json(self) -> dict[str, Any]:
        """How many, and `file:line` of each with that of the row it repeats."""
        pairs = itertools.islice(zip(self.again.tolist(), self.first.tolist(), strict=True), _LISTED)
        listed = [{"where": self.rows.where(a), "of": self.rows.where(f)} for a, f in pairs]
        return {"count": len(self.again), "rows": listed}


@dataclasses.dataclass(frozen=True)
class Surveyed:
    """All that was found: the training stream, and the evaluation stream where there is one."""

    config: Config
    reading: Reading
    stream: Stream
    look: Look
    problems: tuple[str, ...]
    eval_stream: Stream | None
    eval_look: Look | None
    exact: Copies
    near: Copies | None
    contaminated: tuple[dict[str, str], ...]
    seconds: Mapping[str, float]

    @property
    def template(self) -> ChatTemplate:
        """The template of the first source."""
        return self.stream.maker.readers[0].template


def survey(
    config: Config,
    reading: Reading,
    terminal: Terminal,
    *,
    workers: int,
    skip: Sequence[str] = (),
    cache_dir: str | None = None,
) -> Surveyed:
    """Reads all data of `config`, of which `reading` opened the model folder; `skip`: near, languages.

    Raises ValueError where nothing can be read: sources that are not there, a refused template, shares that cannot be
    met.
    """
    cache = cache_dir or hub.cache_dir()
    problems: list[str] = []
    seconds: dict[str, float] = {}
    noted = Noted(DefectFinder(reading.tokenizer.all_special_tokens), "languages" not in skip)

    def looked(kind: str) -> tuple[Look, Any]:
        with terminal.counting(f"reading the {kind} data") as progress:
            look = Look(workers=workers, noted=noted, cache_dir=cache, progress=progress)
            asked = Survey(look.measure)
            opener = open_stream if kind == "training" else open_eval_stream
            stream = opener(config, **reading.options, cache_dir=cache, progress=progress, survey=asked)
        problems.extend(asked.problems)
        seconds[f"{kind} rows"] = look.seconds
        return look, stream

    look, stream = looked("training")
    eval_look, eval_stream = looked("evaluation")
    began = time.perf_counter()
    rows = AllRows(look.leaves)
    with terminal.counting("comparing rows") as progress:
        keys = _keys(rows, look)
        if keys is None:
            keys = row_keys(rows, cache_dir=cache, progress=progress)
    exact = Copies(rows, *duplicates_of(keys))
    seconds["exact duplicates"], began = time.perf_counter() - began, time.perf_counter()
    near = None
    if "near" not in skip:
        with terminal.counting("looking for near duplicates") as progress:
            first = near_first(rows, keys, cache_dir=cache, progress=progress, workers=workers)
        again = np.flatnonzero(first >= 0)
        near = Copies(rows, again, first[again])
        seconds["near duplicates"] = time.perf_counter() - began
    return Surveyed(
        config=config,
        reading=reading,
        stream=stream,
        look=look,
        problems=tuple(problems),
        eval_stream=eval_stream,
        eval_look=eval_look if eval_stream is not None else None,
        exact=exact,
        near=near,
        contaminated=_contaminated(config, look, cache),
        seconds=seconds,
    )


def overlap(surveyed: Surveyed) -> dict[str, Any]:
    """Rows of the training data that evaluation has too: the whole row, or its first instruction."""
    if surveyed.eval_look is None:
        return {}
    out: dict[str, Any] = {}
    for name in ("key", "asked"):
        evaluated = np.unique(np.concatenate([facts.rows[name] for facts in surveyed.eval_look.facts]))
        listed: list[str] = []
        count = 0
        for where, facts in _used(surveyed.look):
            common = np.flatnonzero(np.isin(facts.rows[name], evaluated) & (facts.rows[name] != 0))
            common = common[where.used[common]]
            count += len(common)
            listed += [where(int(i)) for i in common[: max(0, _LISTED - len(listed))]]
        out["rows" if name == "key" else "instructions"] = {"count": count, "rows": listed}
    return out


class _Where:
    """Says where the entries of a leaf's table stand, and which of them are trained on."""

    def __init__(self, reader: RowReader, rows: np.ndarray, used: np.ndarray) -> None:
        self.reader, self.rows, self.used = reader, rows, used

    def __call__(self, entry: int) -> str:
        return self.reader.source.where(int(self.rows[entry]))


def _used(look: Look) -> list[tuple[_Where, Facts]]:
    return [
        (_Where(leaf.reader, table.rows, table.columns["examples"] > 0), facts)
        for leaf, table, facts in zip(look.leaves, look.tables, look.facts, strict=True)
    ]


def _keys(rows: AllRows, look: Look) -> np.ndarray | None:
    """The keys of all rows as they were noted.

    None where rows are worded, so that what was noted is not the row's, or where some are held out and were not read.
    """
    keys = np.zeros(len(rows), np.uint64)
    places = {name: int(first) for name, first in zip(rows.readers, rows.firsts, strict=False)}
    leaves = zip(look.leaves, look.tables, look.facts, rows.names, strict=True)
    for leaf, table, facts, name in leaves:
        reader = leaf.reader
        worded = reader.phrasing is not None or reader.options.reasoning != "keep" or reader.gate.corrected
        if worded or leaf.held_out:
            return None
        keys[places[name] + table.rows] = facts.rows["key"]
    return keys


def _contaminated(config: Config, look: Look, cache: str) -> tuple[dict[str, str], ...]:
    """Rows left out because a benchmark has their words: where, of which of its rows, and the words."""
    wanted = config.data.decontaminate
    if not wanted.paths:
        return ()
    benchmarks = Benchmarks(wanted.paths, ngram=wanted.ngram, cache_dir=cache)
    out: dict[str, dict[str, str]] = {}
    for leaf in look.leaves:
        for row in leaf.reader.gate.left_out.get(IN_BENCHMARK, np.zeros(0, np.int64)).tolist():
            found = benchmarks.found(texts_of(leaf.reader, row))
            if found is not None and len(out) < _LISTED:
                here = leaf.reader.source.where(row)
                out[here] = {"where": here, "benchmark": found[0], "words": found[1]}
    return tuple(out.values())
