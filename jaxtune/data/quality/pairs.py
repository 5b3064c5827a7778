"""Pairs of rows that share a band's key: bounded for each row, sorted, on disk, read back in blocks of rows."""

import os

import numpy as np

_NEIGHBOURS = 2
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def neighbours(keys: np.ndarray, finer: np.ndarray) -> np.ndarray:
    """Pairs of rows of equal key, ascending uint64 of (later row << 32 | earlier row).

    A bucket of a thousand rows has half a million pairs; these are no more than three a row: with the bucket's first
    row, and with the next two in the order of `finer`, the key of another band, which puts the most alike together.
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    same = ordered[1:] == ordered[:-1]
    shares = np.zeros(len(keys), bool)
    shares[1:] = same
    shares[:-1] |= same
    rows = order[shares]
    if not len(rows):
        return np.zeros(0, np.uint64)
    bucket = ordered[shares]
    starts = np.concatenate([[True], bucket[1:] != bucket[:-1]])
    number = np.cumsum(starts) - 1
    firsts = rows[starts][number]
    later, earlier = [rows[~starts]], [firsts[~starts]]
    fine = np.lexsort((rows, finer[rows], number))
    rows, number = rows[fine], number[fine]
    for step in range(1, _NEIGHBOURS + 1):
        together = np.flatnonzero(number[step:] == number[:-step])
        one, other = rows[together + step], rows[together]
        later.append(np.maximum(one, other))
        earlier.append(np.minimum(one, other))
    return np.unique(np.concatenate(later).astype(np.uint64) << _SHIFT | np.concatenate(earlier).astype(np.uint64))


class Pairs:
    """Sorted pairs of several bands in files of a folder, read for `size` later rows at a time."""

    def __init__(self, folder: str, count: int, size: int) -> None:
        self.blocks = -(-count // size)
        self._folder, self._borders = folder, np.arange(self.blocks + 1, dtype=np.uint64) * np.uint64(size) << _SHIFT
        self._ends: list[np.ndarray] = []

    def write(self, pairs: np.ndarray) -> None:
        """Adds a band's pairs, which are ascending."""
        pairs.tofile(self._file(len(self._ends)))
        self._ends.append(np.searchsorted(pairs, self._borders))

    def read(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(later, earlier) rows of a block's different pairs, by later row; int64."""
        parts = [
            np.fromfile(self._file(band), np.uint64, int(ends[block + 1] - ends[block]), offset=8 * int(ends[block]))
            for band, ends in enumerate(self._ends)
        ]
        pairs = np.unique(np.concatenate(parts))
        return (pairs >> _SHIFT).astype(np.int64), (pairs & _LOW).astype(np.int64)

    def _file(self, band: int) -> str:
        return os.path.join(self._folder, f"pairs-{band}")
