"""Examples into rows: T positions for a decoder alone, S and T for the two sides of an encoder-decoder.

A window of examples is packed at once, best fit by decreasing length, and its rows are shuffled, both as pure functions
of the window. `lay_out` and `lay_out_pairs` then write the arrays that the model reads.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxtune.batch import Batch, PairBatch
from jaxtune.data.mixing import mixture


class Example(NamedTuple):
    """What an example gives to a row: int32 `tokens` and `targets`, float32 `weights`, all [n], already shifted."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions it takes on each side of a row, of which there is one."""
        return (len(self.tokens),)


class Pair(NamedTuple):
    """What a pair gives to a row: int32 `encoder_tokens` [m]; int32 `targets` and float32 `weights` [n].

    The decoder's inputs are not kept: they are the targets one to the right.
    """

    encoder_tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions it takes on each side of a row: encoder, decoder."""
        return len(self.encoder_tokens), len(self.targets)


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


def pack_pairs(
    lengths: np.ndarray, encoder_length: int, length: int, *, seed: int, window: int, packing: bool = True
) -> list[list[int]]:
    """As `pack_window` for int64 `lengths` [pairs 2] of encoder and decoder, neither side over its length in any row.

    Largest first, by the side that fills more of its row. Of the rows with room for both sides a pair goes into the one
    whose room is shaped most like it, so that the two sides fill together: the least room left, in either measure,
    takes 3 % more rows on T0. Pairs (6 2), (2 6) and (5 5) in rows of 8 and 8::

        pack_pairs([[6, 2], [2, 6], [5, 5]], 8, 8, ...) == [[0, 1], [2]]    # or the rows the other way round
    """
    pairs = np.asarray(lengths, np.int64).reshape(-1, 2)
    if packing:
        shares = (pairs * (length, encoder_length)).astype(np.float64)  # whole numbers, of length * encoder_length
        room = np.full((2, len(pairs)), float(length * encoder_length))
        rows: list[list[int]] = []
        for i in np.argsort(-shares.max(axis=1), kind="stable").tolist():
            encoder, decoder = shares[i]
            at = np.flatnonzero((room[0, : len(rows)] >= encoder) & (room[1, : len(rows)] >= decoder))
            if len(at):
                # The cosine of the angle between room and pair. Each operation rounds alike on every machine.
                free, open_ = room[0, at], room[1, at]
                row = int(at[np.argmax((free * encoder + open_ * decoder) / np.sqrt(free * free + open_ * open_))])
                rows[row].append(i)
            else:
                row = len(rows)
                rows.append([i])
            room[:, row] -= encoder, decoder
        for row_pairs in rows:
            row_pairs.sort()
    else:
        rows = [[i] for i in range(len(pairs))]
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


def lay_out_pairs(
    rows: Sequence[Sequence[tuple[Pair, int]]], encoder_length: int, length: int, *, start_token: int
) -> PairBatch:
    """Arrays [rows encoder_length] and [rows length] of rows of (pair, source).

    Pairs (8 7 1 -> 4 1) of source 3 and (2 3 4 1 -> 5 6 1) of source 0 and one row of 10 and 10, start token 0::

        encoder_tokens       [8 7 1 2 3 4 1 0 0 0]
        encoder_positions    [0 1 2 0 1 2 3 0 0 0]
        encoder_segment_ids  [1 1 1 2 2 2 2 0 0 0]
        tokens               [0 4 0 5 6 0 0 0 0 0]
        targets              [4 1 5 6 1 0 0 0 0 0]
        positions            [0 1 0 1 2 0 0 0 0 0]
        segment_ids          [1 1 2 2 2 0 0 0 0 0]
        loss_weights         [1 1 1 1 1 0 0 0 0 0]
        source_ids           [3 3 0 0 0 0 0 0 0 0]
    """
    encoder, decoder = (len(rows), encoder_length), (len(rows), length)
    batch = PairBatch(
        encoder_tokens=np.zeros(encoder, np.int32),
        encoder_positions=np.zeros(encoder, np.int32),
        encoder_segment_ids=np.zeros(encoder, np.int32),
        tokens=np.zeros(decoder, np.int32),
        targets=np.zeros(decoder, np.int32),
        positions=np.zeros(decoder, np.int32),
        segment_ids=np.zeros(decoder, np.int32),
        loss_weights=np.zeros(decoder, np.float32),
        source_ids=np.zeros(decoder, np.int32),
    )
    for r, row in enumerate(rows):
        read, at = 0, 0
        for segment, (pair, source) in enumerate(row, 1):
            m, n = pair.lengths
            batch.encoder_tokens[r, read : read + m] = pair.encoder_tokens
            batch.encoder_positions[r, read : read + m] = np.arange(m)
            batch.encoder_segment_ids[r, read : read + m] = segment
            batch.tokens[r, at] = start_token
            batch.tokens[r, at + 1 : at + n] = pair.targets[:-1]
            batch.targets[r, at : at + n] = pair.targets
            batch.positions[r, at : at + n] = np.arange(n)
            batch.segment_ids[r, at : at + n] = segment
            batch.loss_weights[r, at : at + n] = pair.weights
            batch.source_ids[r, at : at + n] = source
            read, at = read + m, at + n
    return batch
