"""Examples into rows of T positions.

A window of examples is packed at once, best fit by decreasing length, and its rows are shuffled, both as pure functions
of the window. `lay_out` then writes the arrays that the model reads.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxtune.batch import Batch
from jaxtune.data import mixture


class Example(NamedTuple):
    """What an example gives to a row: int32 `tokens` and `targets`, float32 `weights`, all [n], already shifted."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def pack_window(
    lengths: Sequence[int], length: int, *, seed: int, window: int, packing: bool = True
) -> list[list[int]]:
    """Rows of example numbers, each row's lengths summing to at most `length`.

    Longest first, each into the row with the least room that takes it, else a new row; within a row examples keep the
    order of the draws. Without `packing` every example has its own row. Rows are in an order that depends on
    (seed, window) alone. Lengths 5 3 4 2 2 in rows of 8 become [5 3] and [4 2 2]::

        pack_window([5, 3, 4, 2, 2], 8, ...) == [[0, 1], [2, 3, 4]]    # or the rows the other way round
    """
    if packing:
        rows: list[list[int]] = []
        room: list[tuple[int, int]] = []  # (room left, row), ascending
        for example in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            need = lengths[example]
            at = bisect.bisect_left(room, (need, -1))
            if at == len(room):
                left, row = length, len(rows)
                rows.append([])
            else:
                left, row = room.pop(at)
            rows[row].append(example)
            if left > need:
                bisect.insort(room, (left - need, row))
        for row_examples in rows:
            row_examples.sort()
    else:
        rows = [[i] for i in range(len(lengths))]
    return [rows[i] for i in shuffled(len(rows), seed=seed, window=window)]


def shuffled(count: int, *, seed: int, window: int) -> list[int]:
    """range(count) in an order drawn from (seed, window)."""
    key = np.full(count, mixture.window_key(seed, window), np.uint64)
    return mixture.permute(np.arange(count, dtype=np.int64), np.full(count, count, np.int64), key).tolist()


def lay_out(rows: Sequence[Sequence[tuple[Example, int]]], length: int) -> Batch:
    """Arrays [rows length] of rows of (example, source).

    Two examples with tokens a0..a3 (source 4) and b0..b2 (source 0) and one row of 6; the last token of each is a
    target only::

        tokens       [a0 a1 a2 b0 b1  0]
        targets      [a1 a2 a3 b1 b2  0]
        positions    [ 0  1  2  0  1  0]
        segment_ids  [ 1  1  1  2  2  0]
        loss_weights [ 0  1  1  0  1  0]
        source_ids   [ 4  4  4  0  0  0]
    """
    shape = (len(rows), length)
    batch = Batch(
        tokens=np.zeros(shape, np.int32),
        targets=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        segment_ids=np.zeros(shape, np.int32),
        loss_weights=np.zeros(shape, np.float32),
        source_ids=np.zeros(shape, np.int32),
    )
    for r, row in enumerate(rows):
        at = 0
        for segment, (example, source) in enumerate(row, 1):
            span = slice(at, at + len(example.tokens))
            batch.tokens[r, span] = example.tokens
            batch.targets[r, span] = example.targets
            batch.positions[r, span] = np.arange(len(example.tokens))
            batch.segment_ids[r, span] = segment
            batch.loss_weights[r, span] = example.weights
            batch.source_ids[r, span] = source
            at = span.stop
    return batch
