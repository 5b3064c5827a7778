"""Windows made ahead: which of them a run needs, which are missing, and who makes them.

`write_shard` makes a range of windows, as a pure function of their numbers. A pool of processes runs it on one machine,
Apache Beam on many; what they make, they write themselves. Nothing else is kept: a preparer that was killed finds what
is there, and makes the rest.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxtune.config import Config
from jaxtune.data.ahead.attaching import ABOUT, about, whole_run, why_none
from jaxtune.data.ahead.claims import clean
from jaxtune.data.ahead.prepared import (
    ASIDE,
    Folder,
    Prepared,
    Rows,
    Shard,
    Summary,
    missing_ranges,
    read_rows,
    read_summary,
    write_rows,
)
from jaxtune.data.ahead.window_records import Damaged, OtherDraws
from jaxtune.data.stream import Stream
from jaxtune.data.windows import WindowMaker

_SHARD_WINDOWS = 64  # tens of MB: few files for a long run, little lost by a kill
_SHARDS = 16  # at least as many of a short run, for several processes

Done = Callable[[Shard, Summary], None]
Make = Callable[[WindowMaker, Folder, Sequence[Shard], Done], None]  # makes shards; `Done` hears of each


class Outcome(NamedTuple):
    """What a folder holds at the end, and how much of it was made now, in so many seconds."""

    windows: int
    made_windows: int
    made_draws: int
    rows: int
    draws: int
    examples: int
    tokens: int
    fill: tuple[float, ...]
    bytes: int
    seconds: float

    def describe(self) -> str:
        """What was written, for a person."""
        fill = " and ".join(f"{share:.1%}" for share in self.fill)
        return (
            f"{self.windows:,} windows: {self.draws:,} draws, {self.examples:,} examples, {self.rows:,} rows, "
            f"{self.tokens:,} tokens in {self.bytes / 1e6:,.1f} MB ({self.bytes / max(1, self.tokens):.2f} bytes a "
            f"token); packing fills {fill}"
        )


def prepare(
    config: Config,
    stream: Stream,
    folder: Folder,
    make: Make,
    *,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> Outcome:
    """Has `make` make what is missing of the windows that a run draws; says what is there and what is not.

    Raises ValueError where a window has a row that data.on_bad_row calls an error.
    """
    began = time.perf_counter()
    maker = dataclasses.replace(whole_run(config, stream), prepared=None)
    clean(folder, ASIDE)
    found: dict[Shard, Summary] = {}
    _look(folder, found, say)
    made: set[Shard] = set()
    first_look = True
    while True:
        wanted = _wanted(config, stream, maker, found)
        todo = missing_ranges(wanted, list(found))
        if first_look:
            say(_said(stream, folder, wanted, todo))
            if not folder.read(ABOUT):
                folder.write(ABOUT, about(stream))
            first_look = False
        if not todo:
            break

        def done(shard: Shard, summary: Summary, last: int = wanted[-1].stop) -> None:
            found[shard] = summary
            made.add(shard)
            progress(sum(s.stop - s.first for s in found if s.first < last), last)
            _refuse_bad(config, summary)

        make(maker, folder, todo, done)
        _look(folder, found, say)
    for summary in found.values():
        _refuse_bad(config, summary)
    rows = _rows_of(maker, found, wanted[-1].stop if wanted else 0)
    if maker.count is not None and read_rows(folder, maker.count) is None:
        write_rows(folder, rows)
    return _outcome(maker, rows, found, made, time.perf_counter() - began)


def check(stream: Stream, config: Config, folder: Folder, *, cache: str, say: Callable[[str], None]) -> int:
    """Reads every record; takes shards with damaged ones away, to be made again, and returns how many."""
    maker = dataclasses.replace(whole_run(config, stream), prepared=None)
    prepared, gone = Prepared.of(folder, cache), 0
    for shard in folder.shards():
        try:
            for number in range(shard.first, shard.stop):
                prepared.read(maker, shard, number)
        except (Damaged, OtherDraws) as problem:
            say(f"{folder.file(shard.name)} is damaged ({problem}) and is made again")
            _remove(folder, shard)
            gone += 1
    return gone


def _look(folder: Folder, found: dict[Shard, Summary], say: Callable[[str], None]) -> None:
    """Brings `found` to what is there, with what is said of each shard; damaged ones are taken away."""
    there = folder.shards()
    for gone in set(found) - set(there):
        del found[gone]
    for shard in there:
        summary = found.get(shard) or read_summary(folder, shard)
        if summary is not None:
            found[shard] = summary
        else:
            say(f"{folder.file(shard.name)} is not whole and is made again")
            _remove(folder, shard)


def _remove(folder: Folder, shard: Shard) -> None:
    folder.remove(shard.name)  # first: a shard without its summary is not whole
    folder.remove(shard.summary_name)


def _said(stream: Stream, folder: Folder, wanted: Sequence[Shard], todo: Sequence[Shard]) -> str:
    windows = wanted[-1].stop if wanted else 0
    missing = sum(shard.stop - shard.first for shard in todo)
    if not todo:
        return f"hit: all {windows:,} windows of this run are in {folder.path}; nothing to do"
    if missing < windows:
        return f"partly: {windows - missing:,} of {windows:,} windows are in {folder.path}; the others are made now"
    why = why_none(folder.parent, stream)
    return f"miss: nothing is prepared of this stream{'; ' + why if why else ''}. It goes into {folder.path}"


def _wanted(config: Config, stream: Stream, maker: WindowMaker, found: dict[Shard, Summary]) -> list[Shard]:
    """The shards that a run reads from, as far as can be known."""
    if maker.count is not None:
        return _cells(maker.count, maker.count)
    known = _known_rows(maker, found)
    likely = max(1, config.train.batch_rows * (config.train.steps or 0) // 64)
    return _cells(windows_needed(known.rows, stream.lanes, _rows_of_lane(config, stream, known)), likely, whole=True)


def _cells(windows: int, likely: int, *, whole: bool = False) -> list[Shard]:
    """The windows cut into shards, whose size follows from how many there are likely to be; the last may be `whole`."""
    size = min(_SHARD_WINDOWS, 1 << max(0, likely // _SHARDS).bit_length() - 1) if likely >= _SHARDS else 1
    return [Shard(k, k + size if whole else min(k + size, windows)) for k in range(0, windows, size)]


def _rows_of_lane(config: Config, stream: Stream, known: Rows) -> int:
    """Rows that each lane gives in a run of so many steps; where a phase ends as only the run knows, until there."""
    steps = config.train.steps or 0
    unknown = next((end for end in stream.phase_ends if end.kind != "draws"), None)
    if unknown is not None and unknown.kind == "steps":
        steps = min(steps, unknown.at)
    elif unknown is not None and len(known.rows):
        per_row = known.tokens.sum() / max(1, known.rows.sum())
        steps = min(steps, -(-unknown.at // max(1, int(per_row * stream.batch_rows))))
    return steps * (stream.batch_rows // stream.lanes)


def windows_needed(rows: np.ndarray, lanes: int, rows_of_lane: int) -> int:
    """How many windows are read until every lane has given so many rows; `rows` int64 are those of the first windows.

    Beyond these it goes by their mean, and asks for one more at least: with two lanes and windows of 3, 5 and 4 rows::

        windows_needed([3, 5, 4], 2, 5) == 3       # lane 0 reads windows 0 and 2, lane 1 window 1
        windows_needed([3, 5, 4], 2, 10) == 6      # 5 rows of each further window do not do: 3 of each lane
    """
    if not rows_of_lane:
        return 0
    if not len(rows):
        return lanes
    needed = 0
    for lane in range(lanes):
        reached = np.flatnonzero(np.cumsum(rows[lane::lanes]) >= rows_of_lane)
        if not len(reached):
            mean = max(1.0, float(rows.mean()))
            return max(len(rows) + 1, int(np.ceil(rows_of_lane / mean)) * lanes)
        needed = max(needed, int(reached[0]) * lanes + lane + 1)
    return needed


def _known_rows(maker: WindowMaker, found: dict[Shard, Summary]) -> Rows:
    """Rows and tokens of the windows from the first on, as far as they are there without a gap."""
    last = 0
    for shard in sorted(found):
        if shard.first > last:
            break
        last = max(last, shard.stop)
    return _rows_of(maker, found, last)


def _rows_of(maker: WindowMaker, found: dict[Shard, Summary], windows: int) -> Rows:
    sides = len(maker.rows.room)
    out = Rows(np.zeros(windows, np.int64), np.zeros((windows, sides), np.int64))
    for shard, summary in found.items():
        stop = min(shard.stop, windows)
        if shard.first < stop:
            out.rows[shard.first : stop] = summary.rows[: stop - shard.first]
            out.tokens[shard.first : stop] = np.array(summary.tokens[: stop - shard.first]).reshape(-1, sides)
    return out


def _refuse_bad(config: Config, summary: Summary) -> None:
    if summary.bad and config.data.on_bad_row == "error":
        raise ValueError(f"{summary.message}; repair it, or set data.on_bad_row=skip to go on without such rows")


def _outcome(maker: WindowMaker, rows: Rows, found: dict[Shard, Summary], made: set[Shard], seconds: float) -> Outcome:
    total, room = int(rows.rows.sum()), np.array(maker.rows.room)
    return Outcome(
        windows=len(rows.rows),
        made_windows=sum(shard.stop - shard.first for shard in made),
        made_draws=sum(found[shard].draws for shard in made),
        rows=total,
        draws=sum(summary.draws for summary in found.values()),
        examples=sum(summary.examples for summary in found.values()),
        tokens=int(rows.tokens.sum()),
        fill=tuple((rows.tokens.sum(axis=0) / (max(1, total) * room)).tolist()),
        bytes=sum(summary.size for summary in found.values()),
        seconds=seconds,
    )
