"""How much a run draws: one pass over the plan, the rows of every window, lanes."""

import math
import sys
from collections.abc import Sequence

import numpy as np

from jaxtune.config import Config
from jaxtune.data import lengths
from jaxtune.data.mixing import mixture
from jaxtune.data.rows import Rows
from jaxtune.data.windows import WindowMaker, window_lengths

_MIN_WINDOWS_PER_LANE = 8
_ROWS_OF_A_WINDOW = 64  # half a row of each window stays empty on average: fill is then about 99 %


def epoch_draws(config: Config, draws: mixture.Mixture) -> int:
    """Draws of one pass over the plan: as many as there are examples, or as data.stop says."""
    if config.data.stop == "plan":
        return sum(max(1, round(leaf.rows * leaf.epochs)) if leaf.rows else 0 for leaf in draws.leaves)
    ends = [draws.first_seen_whole(i) for i, rate in enumerate(draws.wheels[0].rates) if rate]
    return min(ends) if config.data.stop == "first_exhausted" else max(ends)


def choose_window(config: Config, rates: Sequence[int], means: Sequence[np.ndarray], rows: Rows) -> int:
    """Draws packed together: as asked for, else a power of two that makes about 64 full rows.

    `rates` are the leaves' shares, `means` the lengths of an average draw of each, on each side. It must not depend on
    the length of the run, which may change when a run goes on.
    """
    if config.data.window != "auto":
        return config.data.window
    if not rows.packing:
        return 512
    mean = sum(rate * one for rate, one in zip(rates, means, strict=True)) / max(1, sum(rates))
    per_row = float(min(rows.room / np.maximum(mean, 1.0)))
    return int(min(4096, max(256, 2 ** math.ceil(math.log2(_ROWS_OF_A_WINDOW * per_row) - 0.25))))


def choose_lanes(config: Config, maker: WindowMaker, tables: Sequence[lengths.RowTable]) -> int:
    """The largest of 1, 2, 4, 8 that divides the batch and leaves each lane enough windows over the run."""
    windows = maker.count
    if windows is None:
        windows = estimated_draws(config, maker, tables) // maker.size
    rows = config.train.batch_rows
    return max(n for n in (1, 2, 4, 8) if n == 1 or (rows % n == 0 and windows >= n * _MIN_WINDOWS_PER_LANE))


def estimated_draws(config: Config, maker: WindowMaker, tables: Sequence[lengths.RowTable]) -> int:
    """Draws of a run that ends after so many steps, from the mean lengths of examples on the side that fills first."""
    rows = (config.train.steps or sys.maxsize) * config.train.batch_rows
    if not maker.rows.packing:
        return rows
    rates = maker.draws.wheels[0].rates if isinstance(maker.draws, mixture.Mixture) else [1] * len(tables)
    means = sum(rate * table.mean_lengths() for rate, table in zip(rates, tables, strict=True)) / max(1, sum(rates))
    return int(rows * min(maker.rows.room / np.maximum(means, 1.0)))


def count_rows(maker: WindowMaker, tables: Sequence[lengths.RowTable]) -> tuple[np.ndarray, tuple[float, ...]]:
    """Rows of every window of the run, and the share of positions filled on each side, by packing all lengths."""
    counts, tokens = [], np.zeros(len(maker.rows.room), np.int64)
    for window in range(maker.count or 0):
        found = window_lengths(maker.draw(window), tables)
        rows = maker.pack(found, window)
        rows = rows[: maker.rows_taken(window, len(rows))]
        tokens += found[[example for row in rows for example in row]].sum(axis=0)
        counts.append(len(rows))
    fill = tuple((tokens / (max(1, sum(counts)) * np.array(maker.rows.room))).tolist())
    return np.array(counts, np.int64), fill
