"""Which row is drawn when: draw d of the mixture is a pure function of d.

Draws walk a circle of R points by a fixed stride near R / golden ratio and prime to R; leaf i owns `rates[i]`
neighbouring points. So any R draws in a row visit leaf i exactly rates[i] times, shares never drift by more than a few
draws, and the rank of a draw within its leaf is a count of lattice points, which Euclid's algorithm gives without
walking. Within a leaf, rank k is row `permute(k % rows)` of epoch `k // rows`, shuffled anew each epoch by a keyed
permutation that needs no memory. No state, so any draw can be had at any time on any host. A phase of a curriculum has
a circle of its own; ranks go on counting from one phase to the next.
"""

import bisect
import dataclasses
import fractions
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_MAX_POINTS = 1 << 40


class Draws(NamedTuple):
    """Consecutive draws: int64 arrays [n] of the leaf, the row in its source and the epoch (from 0)."""

    source: np.ndarray
    row: np.ndarray
    epoch: np.ndarray


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A source as the mixture sees it.

    Of all `size` rows the first `held_out` in the order of `held_key` are never drawn. `source` keys the
    permutations: leaves that are styles of one source share it, and each has its `part` (first, last exclusive) of
    every epoch's order, the whole by default. `epochs` is how often its rows are seen in one pass of the plan. `order`,
    int64, lists the rows to draw in place of a shuffle.
    """

    size: int
    epochs: float = 1.0
    held_out: int = 0
    source: int = 0
    held_key: int = 0
    part: tuple[int, int] | None = None
    order: np.ndarray | None = None

    @property
    def pool(self) -> int:
        """Rows that may be drawn, by all styles together."""
        return self.size - self.held_out if self.order is None else len(self.order)

    @property
    def rows(self) -> int:
        """Rows that this leaf draws in an epoch."""
        return self.pool if self.part is None else self.part[1] - self.part[0]


class Wheel:
    """Which leaf each draw falls on, for rates that stay."""

    def __init__(self, shares: Sequence[fractions.Fraction], *, seed: int) -> None:
        self.rates = integer_rates(shares)
        if not sum(self.rates):
            raise ValueError("data.train: no source has a row left to draw")
        self.ends = np.cumsum(np.array(self.rates, np.int64))
        self.points = int(self.ends[-1])
        self.stride = _stride(self.points)
        self.offset = _mix_int(seed, 0x6D69) % self.points

    def leaves(self, first: int, count: int) -> np.ndarray:
        """The leaf of each of the draws first .. first + count - 1, int64."""
        # x = (offset + d * stride) mod points, in two steps so that no product leaves 64 bits.
        x = self._walk((self.offset + first * self.stride) % self.points, count)
        return np.searchsorted(self.ends, x, side="right")

    def _walk(self, begin: int, count: int) -> np.ndarray:
        if count * self.stride < 1 << 62:
            return (begin + np.arange(count, dtype=np.int64) * self.stride) % self.points
        half = count // 2
        return np.concatenate(
            [self._walk(begin, half), self._walk((begin + half * self.stride) % self.points, count - half)]
        )

    def drawn_before(self, draw: int, leaf: int) -> int:
        """How many of the draws 0 .. draw - 1 fell on this leaf."""
        low, high = (int(self.ends[leaf - 1]) if leaf else 0), int(self.ends[leaf])
        # [x mod R >= c] = floor((x + R - c) / R) - floor(x / R); the floor(x / R) terms of the two ends cancel.
        return _floor_sum(draw, self.points, self.stride, self.offset + self.points - low) - _floor_sum(
            draw, self.points, self.stride, self.offset + self.points - high
        )


class Mixture:
    """Endless draws from leaves, by one list of shares for each phase.

    `ends` are the first draws of the phases after the first that are known: those that were asked for in draws, and,
    once they are reached, those of steps and tokens. Until then the phase before them goes on.
    """

    def __init__(
        self,
        leaves: Sequence[Leaf],
        phases: Sequence[Sequence[fractions.Fraction]],
        *,
        seed: int,
        ends: Sequence[int] = (),
    ) -> None:
        self.leaves, self.seed, self.ends = list(leaves), seed, tuple(ends)
        self.wheels = [Wheel(shares, seed=seed) for shares in phases]
        self._rows_of = np.array([max(1, leaf.rows) for leaf in leaves], np.int64)
        self._pools = np.array([max(1, leaf.pool) for leaf in leaves], np.int64)
        self._sizes = np.array([max(1, leaf.size) for leaf in leaves], np.int64)
        self._starts = np.array([leaf.part[0] if leaf.part else 0 for leaf in leaves], np.int64)
        self._held = np.array([leaf.held_out for leaf in leaves], np.int64)
        self._keys = np.array([leaf.source for leaf in leaves], np.int64)
        self._held_keys = np.array([leaf.held_key for leaf in leaves], np.int64)
        self._ordered = [i for i, leaf in enumerate(leaves) if leaf.order is not None]

    def ending(self, ends: Sequence[int]) -> "Mixture":
        """The same mixture with these phase boundaries."""
        other = object.__new__(Mixture)
        other.__dict__.update(self.__dict__, ends=tuple(ends))
        return other

    def block(self, first: int, count: int) -> Draws:
        """Draws first .. first + count - 1."""
        parts = []
        while count > 0:
            phase = self.phase_of(first)
            here = count if phase >= len(self.ends) else min(count, self.ends[phase] - first)
            parts.append(self._block(phase, first, here))
            first, count = first + here, count - here
        if len(parts) == 1:
            return parts[0]
        none = Draws(*(np.zeros(0, np.int64) for _ in range(3)))
        return Draws(*(np.concatenate(columns) for columns in zip(none, *parts, strict=True)))

    def phase_of(self, draw: int) -> int:
        """The phase that a draw is in, from 0."""
        return bisect.bisect_right(self.ends, draw)

    def drawn_before(self, draw: int, leaf: int) -> int:
        """How many of the draws 0 .. draw - 1 fell on this leaf."""
        total, begin = 0, 0
        for wheel, end in zip(self.wheels, (*self.ends, draw), strict=False):
            end = min(end, draw)
            total += wheel.drawn_before(end, leaf) - (wheel.drawn_before(begin, leaf) if begin else 0)
            if end == draw:
                break
            begin = end
        return total

    def _block(self, phase: int, first: int, count: int) -> Draws:
        leaf = self.wheels[phase].leaves(first, count)
        rank = np.empty(count, np.int64)
        order = np.argsort(leaf, kind="stable")
        present, at = np.unique(leaf[order], return_index=True)
        for i, start, stop in zip(present.tolist(), at.tolist(), [*at[1:].tolist(), count], strict=True):
            rank[order[start:stop]] = self.drawn_before(first, i) + np.arange(stop - start)
        return self._rows(leaf.astype(np.int64), rank)

    def _rows(self, leaf: np.ndarray, rank: np.ndarray) -> Draws:
        rows = self._rows_of[leaf]
        epoch, place = rank // rows, self._starts[leaf] + rank % rows
        source = self._keys[leaf].astype(np.uint64)
        row = permute(place, self._pools[leaf], _mix(np.uint64(self.seed), source, epoch.astype(np.uint64)))
        row = self._past_held_out(leaf, row)
        for i in self._ordered:
            at = np.flatnonzero(leaf == i)
            row[at] = np.asarray(self.leaves[i].order)[place[at]]
        return Draws(leaf, row, epoch)

    def _past_held_out(self, leaf: np.ndarray, row: np.ndarray) -> np.ndarray:
        held = self._held[leaf]
        if not held.any():
            return row
        keys = hold_out_keys(self.seed, self._held_keys[leaf])
        return np.where(held > 0, permute(row + held, self._sizes[leaf], keys), row)

    def first_seen_whole(self, leaf: int) -> int:
        """The number of draws after which a leaf has been seen its epochs."""
        wanted = max(1, round(self.leaves[leaf].rows * self.leaves[leaf].epochs))
        low, high = 0, 1
        while self.drawn_before(high, leaf) < wanted:
            low, high = high, high * 2
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.drawn_before(middle, leaf) >= wanted else (middle + 1, high)
        return low


class InOrder:
    """Rows of every source, each once, in a fixed order: for evaluation."""

    def __init__(self, rows: Sequence[np.ndarray]) -> None:
        self._source = np.concatenate([np.full(len(r), i, np.int64) for i, r in enumerate(rows)])
        self._row = np.concatenate([np.asarray(r, np.int64) for r in rows])
        self.total = len(self._row)

    def block(self, first: int, count: int) -> Draws:
        """Draws first .. first + count - 1, fewer at the end."""
        source = self._source[first : first + count]
        return Draws(source, self._row[first : first + count], np.zeros(len(source), np.int64))


def held_out_rows(size: int, count: int, *, seed: int, source: int) -> np.ndarray:
    """The rows of a source that `Mixture` never draws when `count` are held out, ascending."""
    at = np.arange(count, dtype=np.int64)
    return np.sort(permute(at, np.full(count, size, np.int64), hold_out_keys(seed, np.full(count, source))))


def not_held_out(at: np.ndarray, size: int, held: int, *, seed: int, source: int) -> np.ndarray:
    """The rows at places `at` of those that are not held out, in no telling order; all int64 [n]."""
    if not held:
        return at
    keys = hold_out_keys(seed, np.full(len(at), source))
    return permute(at + held, np.full(len(at), size, np.int64), keys)


def hold_out_keys(seed: int, leaf: np.ndarray) -> np.ndarray:
    """The permutation key that decides which rows of a source are held out."""
    return _mix(np.uint64(seed), leaf.astype(np.uint64), np.uint64(2**64 - 1))


def integer_rates(rates: Sequence[fractions.Fraction]) -> list[int]:
    """Whole numbers in the given proportions: exact while they fit, else rounded at one part in 2^40."""
    denominator = 1
    for rate in rates:
        denominator = math.lcm(denominator, rate.denominator)
        if denominator.bit_length() > 256:  # far past what fits
            every = sum(rates, fractions.Fraction(0))
            return [max(1, int(rate * _MAX_POINTS / every)) if rate else 0 for rate in rates]
    whole = [int(rate * denominator) for rate in rates]
    shared = math.gcd(*whole) or 1
    whole = [rate // shared for rate in whole]
    total = sum(whole)
    if total <= _MAX_POINTS:
        return whole
    return [max(1, rate * _MAX_POINTS // total) if rate else 0 for rate in whole]


def permute(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A keyed permutation of range(size), elementwise: int64 `index`, `size` and uint64 `key`, all [n].

    Four Feistel rounds on the smallest even number of bits that holds `size`; values that land outside walk on.
    """
    index, size, key = index.astype(np.uint64), size.astype(np.uint64), key.astype(np.uint64)
    bits = np.ceil(np.log2(np.maximum(size, 2).astype(np.float64))).astype(np.uint64)
    half = (bits + np.uint64(1)) // np.uint64(2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    out = index.copy()
    todo = np.arange(len(index))
    while len(todo):
        h, m, k = half[todo], mask[todo], key[todo]
        left, right = out[todo] >> h, out[todo] & m
        for turn in range(4):
            left, right = right, left ^ (_mix(k, right, np.uint64(turn)) & m)
        out[todo] = (left << h) | right
        todo = todo[out[todo] >= size[todo]]
    return out.astype(np.int64)


def _mix(a: Any, b: Any, c: Any) -> np.ndarray:
    """A uint64 hash of three numbers (the finaliser of splitmix64, twice)."""
    with np.errstate(over="ignore"):
        z: np.ndarray = np.asarray(a) * np.uint64(0x9E3779B97F4A7C15) + np.asarray(b) * np.uint64(0xD1B54A32D192ED03)
        z = z + np.asarray(c) * np.uint64(0x8CB92BA72F3D8DD7) + np.uint64(0x632BE59BD9B4E019)
        for _ in range(2):
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
    return z


def _mix_int(a: int, b: int) -> int:
    return int(_mix(np.uint64(a), np.uint64(b), np.uint64(0)))


def _stride(points: int) -> int:
    """The number nearest points / golden ratio that is prime to `points`."""
    if points == 1:
        return 0
    near = round(points * 0.6180339887498949)
    return next(s for d in range(points) for s in (near + d, near - d) if 0 < s < points and math.gcd(s, points) == 1)


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """sum over j in 0 .. n - 1 of floor((a j + b) / m), by Euclid's algorithm: O(log m)."""
    total = 0
    while n > 0:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            break
        n, b, m, a = top // m, top % m, a, m
    return total


def window_key(seed: int, window: int) -> int:
    """The permutation key that orders a window's rows."""
    return int(_mix(np.uint64(seed), np.uint64(window), np.uint64(0x77)))
