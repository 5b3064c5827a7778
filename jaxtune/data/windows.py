"""Windows of draws: made by number alone, and the order in which lanes need them."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxtune.data import lengths
from jaxtune.data.examples import RowReader
from jaxtune.data.mixing import mixture
from jaxtune.data.packing import Example, Pair
from jaxtune.data.rows import Rows
from jaxtune.data.workers import end_with

_FIRST_WINDOWS = 8  # as many as there can be lanes when `data.lanes` is auto
_LONG = 64  # windows: in shorter epochs small windows would leave more of the rows empty


class PhaseEnd(NamedTuple):
    """Where a phase of the mixture ends: after so many `steps`, `tokens` of data, or `draws`, since the run began."""

    kind: str
    at: int

    def __str__(self) -> str:
        return f"{self.at:,} {self.kind}"


class Window(NamedTuple):
    """A packed window: its examples end to end, whose they are, and its rows.

    `joined`: arrays [sum of lengths]; `lengths` int64 [examples sides]; `ids` int64 [examples 3] of (source, row,
    epoch); row r holds examples `order[splits[r]:splits[r + 1]]`. `bad`: (source, row, message). `note`: what the
    trainer should tell of it, once.
    """

    joined: Example | Pair
    lengths: np.ndarray
    ids: np.ndarray
    order: np.ndarray
    splits: np.ndarray
    bad: tuple[tuple[int, int, str], ...]
    note: str = ""


class PreparedWindows(Protocol):
    """Windows made beforehand; see `data.prepared`."""

    def find(self, maker: "WindowMaker", number: int) -> tuple[Window | None, str]:
        """The window, None where it was not made or cannot be used; then with what to tell of it, if anything."""
        ...


@dataclasses.dataclass(frozen=True)
class WindowMaker:
    """Makes any window by its number; what workers run. `readers` has one for each leaf of the mixture.

    Windows that are `prepared` are read, the others made.
    """

    readers: tuple[RowReader, ...]
    draws: mixture.Mixture | mixture.InOrder
    epoch_draws: int
    total: int | None
    size: int
    rows: Rows
    seed: int
    prepared: PreparedWindows | None = None

    @property
    def per_epoch(self) -> int:
        """Windows in one epoch of the plan."""
        return self._windows_of(self.epoch_draws)

    @property
    def count(self) -> int | None:
        """Windows in all; None when the stream has no end."""
        if self.total is None:
            return None
        epochs, rest = divmod(self.total, self.epoch_draws)
        return epochs * self.per_epoch + self._windows_of(rest)

    def first_draw(self, window: int) -> int:
        """The first draw of a window."""
        return self._span(window)[0]

    def ending(self, ends: Sequence[int]) -> "WindowMaker":
        """The same windows with these boundaries of the mixture's phases."""
        assert isinstance(self.draws, mixture.Mixture)
        return dataclasses.replace(self, draws=self.draws.ending(ends))

    def draw(self, window: int) -> mixture.Draws:
        """The draws of a window; none past the end."""
        past = self.count is not None and window >= self.count
        first, last = (0, 0) if past else self._span(window)
        return self.draws.block(first, last - first)

    def rows_taken(self, window: int, rows: int) -> int:
        """How many of a window's `rows` the run takes: all, save where a part of an epoch ends within it.

        The window is cut and packed as in a whole epoch, so that a run given more epochs later goes on with its other
        rows.
        """
        first, last = self._span(window)
        wanted = last - first if self.total is None else min(last, self.total) - first
        return -(-rows * wanted // (last - first))

    def _span(self, window: int) -> tuple[int, int]:
        """First and last draw (exclusive) of a window of the endless plan."""
        epoch, part = divmod(window, self.per_epoch)
        begin, end = epoch * self.epoch_draws, (epoch + 1) * self.epoch_draws
        return begin + self._place(part), min(begin + self._place(part + 1), end)

    @property
    def _opening(self) -> int:
        """Draws of each of the first windows of a long epoch.

        All lanes need a window before the first batch, so these are a quarter as large: the first step comes sooner,
        and lanes do not go on wanting their next windows all at once.
        """
        return self.size // 4 if self.size >= 4 and self.epoch_draws >= _LONG * self.size else self.size

    def _place(self, part: int) -> int:
        """The draw of an epoch that its window `part` begins with."""
        return min(part, _FIRST_WINDOWS) * self._opening + max(0, part - _FIRST_WINDOWS) * self.size

    def _windows_of(self, draws: int) -> int:
        """How many windows the first draws of an epoch reach into."""
        opened = min(draws, _FIRST_WINDOWS * self._opening)
        return -(-opened // self._opening) + -(-(draws - opened) // self.size)

    def pack(self, lengths: np.ndarray, window: int) -> list[list[int]]:
        """Rows of the window's examples, of int64 `lengths` [examples sides]."""
        return self.rows.pack(lengths, seed=self.seed, window=window)

    def make(self, window: int) -> Window:
        """A window: as it was prepared, else made now."""
        if self.prepared is None:
            return self.make_anew(window)
        found, note = self.prepared.find(self, window)
        return self.make_anew(window)._replace(note=note) if found is None else found

    def make_anew(self, window: int) -> Window:
        """Reads, renders, tokenises and packs a window."""
        draws = self.draw(window)
        results: list[Any] = [None] * len(draws.source)
        for s in np.unique(draws.source).tolist():
            at = np.flatnonzero(draws.source == s)
            read = self.readers[s].read(draws.row[at].tolist(), draws.epoch[at].tolist())
            for i, result in zip(at.tolist(), read, strict=True):
                results[i] = result
        examples, ids, bad = [], [], []
        for i, result in enumerate(results):
            name = (int(draws.source[i]), int(draws.row[i]), int(draws.epoch[i]))
            examples += result.examples
            ids += [name] * len(result.examples)
            if result.bad:
                bad.append((name[0], name[1], result.message))
        of_each = np.array([e.lengths for e in examples], np.int64).reshape(-1, len(self.rows.room))
        rows = self.pack(of_each, window)
        return Window(
            joined=self.rows.joined(examples),
            lengths=of_each,
            ids=np.array(ids, np.int64).reshape(-1, 3),
            order=np.array([e for row in rows for e in row], np.int64),
            splits=np.cumsum([0, *map(len, rows)]),
            bad=tuple(bad),
        )


class LaneWindows:
    """The windows that some lanes need from a state on, in the order of their numbers; a Grain data source."""

    def __init__(self, maker: WindowMaker, *, lanes: int, at: Mapping[int, int]) -> None:
        self.maker, self.lanes, self.mine = maker, lanes, sorted(at)
        rounds = {lane: window // lanes for lane, window in at.items()}
        self.level = max(rounds.values())
        # Lanes drift apart by a few windows; those behind come first.
        self.behind = sorted(k * lanes + lane for lane in self.mine for k in range(rounds[lane], self.level))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trainer": os.getpid()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        end_with(state.pop("trainer"))  # a worker unpickles this, and must not go on without its trainer
        self.__dict__.update(state)

    def __len__(self) -> int:
        count = self.maker.count
        rounds = (1 << 40) if count is None else max(0, -(-count // self.lanes) - self.level)
        return len(self.behind) + rounds * len(self.mine)

    def number(self, i: int) -> int:
        if i < len(self.behind):
            return self.behind[i]
        k, lane = divmod(i - len(self.behind), len(self.mine))
        return (self.level + k) * self.lanes + self.mine[lane]

    def __getitem__(self, i: int) -> tuple[int, Window]:
        number = self.number(int(i))
        return number, self.maker.make(number)


def window_lengths(draws: mixture.Draws, tables: Sequence[lengths.RowTable]) -> np.ndarray:
    """Lengths of the examples of some draws, int64 [examples sides], in the order of the draws."""
    owner, found = [], []
    for s in np.unique(draws.source).tolist():
        at = np.flatnonzero(draws.source == s)
        of_each, counts = tables[s].examples_of(tables[s].entries(draws.row[at], draws.epoch[at]))
        owner.append(np.repeat(at, counts))
        found.append(of_each)
    if not found:
        return np.zeros((0, tables[0].lengths.shape[1]), np.int64)
    order = np.argsort(np.concatenate(owner), kind="stable")
    return np.concatenate(found)[order].astype(np.int64)
