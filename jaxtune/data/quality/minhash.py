"""MinHash signatures and the keys of their bands, computed for a block of texts at a time.

Two texts agree in a hash with the probability of their Jaccard similarity J, and in all r hashes of one of b bands with
1 - (1 - J^r)^b: for J 0.8, 0.992 with the 16 bands of 6 that `bands_for(0.8)` chooses.
"""

from collections.abc import Sequence

import numpy as np

from jaxtune.data.quality.similarity import END, SHINGLE

HASHES = 96
_LEAST_FOUND = 0.99

_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xD6E8FEB86659FD93)
_AT_ONCE = 1 << 16  # characters: what one hash function works on stays in a core's cache


def _constants(first: int) -> np.ndarray:
    """As many 64-bit numbers as there are hashes, by splitmix64: the same with every version of numpy."""
    state = (np.arange(HASHES, dtype=np.uint64) + np.uint64(first)) * _BASE
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


_FLIPS = (_constants(1) >> np.uint64(32)).astype(np.uint32)
_FACTORS = (_constants(1001) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, hashes of each): the longest bands with which a pair of that similarity is found in 99 of 100 cases."""
    for rows in range(12, 1, -1):
        bands = HASHES // rows
        if chance(threshold, bands, rows) >= _LEAST_FOUND:
            return bands, rows
    return HASHES, 1


def chance(similarity: float, bands: int, rows: int) -> float:
    """The probability that two texts of that Jaccard similarity share a band's key."""
    return 1 - (1 - similarity**rows) ** bands


def signatures(texts: Sequence[str]) -> np.ndarray:
    """The least of each hash over a text's shingles, uint32 [texts, 96]; no text is empty."""
    ends = np.cumsum([len(text) + len(END) for text in texts])
    out = np.empty((len(texts), HASHES), np.uint32)
    start = 0
    while start < len(texts):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _AT_ONCE, side="right")))
        _sign(texts[start:stop], out[start:stop])
        start = stop
    return out


def _sign(texts: Sequence[str], out: np.ndarray) -> None:
    points = np.frombuffer((END.join(texts) + END).encode("utf-32-le", "surrogatepass"), "<u4")
    lengths = np.array([len(text) for text in texts], np.int64)
    starts = np.cumsum(lengths + len(END)) - lengths - len(END)
    hashes = _shingle_hashes(points)
    # reduceat takes the least between any two borders, in texts and between them: every other one is a text's.
    borders = np.stack([starts, starts + lengths], axis=1).reshape(-1)[:-1]
    permuted = np.empty_like(hashes)
    for k in range(HASHES):
        np.bitwise_xor(hashes, _FLIPS[k], out=permuted)
        np.multiply(permuted, _FACTORS[k], out=permuted)
        out[:, k] = np.minimum.reduceat(permuted, borders)[::2]


def band_keys(signature: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """A 64-bit key of each band of `rows` hashes, uint64 [texts, bands]."""
    parts = signature[:, : bands * rows].reshape(len(signature), bands, rows).astype(np.uint64)
    keys = np.zeros((len(signature), bands), np.uint64)
    for k in range(rows):
        keys = (keys + parts[:, :, k] + np.uint64(1)) * _BASE
        keys ^= keys >> np.uint64(32)
    return keys


def _shingle_hashes(points: np.ndarray) -> np.ndarray:
    """A 32-bit hash of every five code points in a row, uint32 [points - 4]."""
    count = len(points) - SHINGLE + 1
    hashes = np.zeros(count, np.uint64)
    for k in range(SHINGLE):
        hashes += points[k : k + count]
        hashes *= _BASE
    hashes ^= hashes >> np.uint64(32)
    hashes *= _MIX
    return (hashes >> np.uint64(32)).astype(np.uint32)
