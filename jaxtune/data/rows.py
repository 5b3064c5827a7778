"""What the rows of a batch are made of: sequences for a decoder alone, or pairs for an encoder-decoder.

A row has one side of `length` positions, or two, the encoder's first. Whatever differs between the two kinds of row on
the way from examples to arrays is said here, once.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from jaxtune.batch import Batch, PairBatch
from jaxtune.data import packing
from jaxtune.data.packing import Example, Pair


@dataclasses.dataclass(frozen=True)
class Rows(abc.ABC):
    """How examples become rows; `length` is that of the side with the targets, `packing` whether they share rows."""

    length: int
    packing: bool
    kind: ClassVar[type]
    side_of: ClassVar[tuple[int, ...]]  # of each field of an example

    @property
    @abc.abstractmethod
    def room(self) -> tuple[int, ...]:
        """Positions of a row on each side."""

    @abc.abstractmethod
    def pack(self, lengths: np.ndarray, *, seed: int, window: int) -> list[list[int]]:
        """Rows of a window's examples, of int64 `lengths` [examples sides], in an order drawn from (seed, window)."""

    @abc.abstractmethod
    def lay_out(self, rows: Sequence[Sequence[tuple[Any, int]]]) -> Batch | PairBatch:
        """Arrays of rows of (example, source)."""

    @abc.abstractmethod
    def describe(self, fill: Sequence[float]) -> str:
        """Says how full rows are, from the share of positions filled on each side."""

    @abc.abstractmethod
    def tokens_once(self, joined: Any, lengths: np.ndarray) -> list[np.ndarray]:
        """The tokens of joined examples, none stored twice; `lengths` int64 [examples sides]."""

    @abc.abstractmethod
    def joined_again(self, tokens: Sequence[np.ndarray], lengths: np.ndarray, weights: np.ndarray) -> Any:
        """The joined examples of `tokens_once`, with their float32 weights."""

    @property
    def key(self) -> str:
        """Names everything that decides what rows look like."""
        return f"{self.length}:{self.packing}"

    def joined(self, examples: Sequence[Any]) -> Any:
        """Examples end to end, as one."""
        dtypes = (np.int32, np.int32, np.float32)
        columns = [[example[i] for example in examples] for i in range(len(dtypes))]
        return self.kind(
            *(np.concatenate([np.zeros(0, dtype), *column]) for dtype, column in zip(dtypes, columns, strict=True))
        )

    def one_of(self, joined: Any, first: np.ndarray, lengths: np.ndarray) -> Any:
        """One of the examples that were joined, from where it begins and how long it is on each side, int64 [sides]."""
        return self.kind(
            *(
                array[first[side] : first[side] + lengths[side]]
                for array, side in zip(joined, self.side_of, strict=True)
            )
        )


@dataclasses.dataclass(frozen=True)
class SequenceRows(Rows):
    """Rows of sequences for a decoder alone."""

    kind = Example
    side_of = (0, 0, 0)

    @property
    def room(self) -> tuple[int, ...]:
        return (self.length,)

    def pack(self, lengths: np.ndarray, *, seed: int, window: int) -> list[list[int]]:
        one_side = lengths[:, 0].tolist()
        return packing.pack_window(one_side, self.length, seed=seed, window=window, packing=self.packing)

    def lay_out(self, rows: Sequence[Sequence[tuple[Any, int]]]) -> Batch:
        return packing.lay_out(rows, self.length)

    def tokens_once(self, joined: Any, lengths: np.ndarray) -> list[np.ndarray]:
        """Each example's inputs and then its last target: [a0 a1 a2 | b0 b1] with targets one to the left."""
        first, last = _borders(lengths[:, 0])
        whole = np.empty(len(first), np.int32)
        whole[~last] = joined.tokens
        whole[last] = joined.targets[np.cumsum(lengths[:, 0]) - 1]
        assert np.array_equal(whole[~first], joined.targets), "targets are not the tokens one to the left"
        return [whole]

    def joined_again(self, tokens: Sequence[np.ndarray], lengths: np.ndarray, weights: np.ndarray) -> Example:
        first, last = _borders(lengths[:, 0])
        whole = tokens[0].astype(np.int32)
        return Example(whole[~last], whole[~first], weights)

    def describe(self, fill: Sequence[float]) -> str:
        return f"packing fills {fill[0]:.1%} of {self.length} positions a row"


@dataclasses.dataclass(frozen=True)
class PairRows(Rows):
    """Rows of pairs for an encoder-decoder; every target sequence begins with the input `start_token`."""

    encoder_length: int
    start_token: int
    kind = Pair
    side_of = (0, 1, 1)

    @property
    def room(self) -> tuple[int, ...]:
        return self.encoder_length, self.length

    @property
    def key(self) -> str:
        return f"{super().key}:{self.encoder_length}:{self.start_token}"

    def pack(self, lengths: np.ndarray, *, seed: int, window: int) -> list[list[int]]:
        return packing.pack_pairs(
            lengths, self.encoder_length, self.length, seed=seed, window=window, packing=self.packing
        )

    def lay_out(self, rows: Sequence[Sequence[tuple[Any, int]]]) -> PairBatch:
        return packing.lay_out_pairs(rows, self.encoder_length, self.length, start_token=self.start_token)

    def tokens_once(self, joined: Any, lengths: np.ndarray) -> list[np.ndarray]:
        return [joined.encoder_tokens, joined.targets]

    def joined_again(self, tokens: Sequence[np.ndarray], lengths: np.ndarray, weights: np.ndarray) -> Pair:
        return Pair(tokens[0].astype(np.int32), tokens[1].astype(np.int32), weights)

    def describe(self, fill: Sequence[float]) -> str:
        encoder, decoder = fill
        return (
            f"packing fills {encoder:.1%} of {self.encoder_length} encoder positions and {decoder:.1%} of "
            f"{self.length} decoder positions a row"
        )


def row_kind(length: int, *, packing: bool, encoder_length: int | None, start_token: int) -> Rows:
    """Rows of sequences, or with an `encoder_length` of pairs."""
    if encoder_length is None:
        return SequenceRows(length, packing)
    return PairRows(length, packing, encoder_length, start_token)


def _borders(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where examples of `lengths` positions, with one token more than these, begin and end; bool [tokens]."""
    ends = np.cumsum(lengths + 1)
    first, last = np.zeros((2, int(ends[-1]) if len(ends) else 0), bool)
    first[ends - lengths - 1] = True
    last[ends - 1] = True
    return first, last
