"""Texts that are the same but for case and white space."""

from collections.abc import Sequence

import numpy as np

from jaxtune.data.wording.content import hash_of, normal


def exact_key(texts: Sequence[str]) -> int:
    """A 64-bit hash of texts, normalised: NFC, no case, every run of white space one space."""
    return hash_of("\0".join(map(normal, texts)))


def first_of_equal(keys: np.ndarray) -> np.ndarray:
    """For each key the index of the first that is the same, -1 where it is the first itself; int64 [n].

    [7, 5, 7, 7, 5] -> [-1, -1, 0, 0, 1]. Three arrays of n numbers of 8 bytes are held besides.
    """
    out = np.full(len(keys), -1, np.int64)
    if not len(keys):
        return out
    order = np.argsort(keys, kind="stable")  # equal keys stay in the order of their indices
    ordered = keys[order]
    again = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    if not len(again):
        return out
    # The first of a run of equal keys stands before the first of its repeats.
    starts = np.ones(len(again), bool)
    starts[1:] = again[1:] != again[:-1] + 1
    first = (again[starts] - 1)[np.cumsum(starts) - 1]
    out[order[again]] = order[first]
    return out
