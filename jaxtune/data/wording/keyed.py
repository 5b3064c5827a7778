"""Random choices that depend on a key alone: the same in every process, at any time, in any order of rows."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
_MASK = (1 << 64) - 1
_STRIDE = 0x9E3779B97F4A7C15


def key_of(*parts: object) -> int:
    """A 64-bit hash of the parts' texts."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class Keyed:
    """Numbers drawn one after another, each a hash of the key and of how many were drawn before (splitmix64)."""

    def __init__(self, *parts: object) -> None:
        self._state = key_of(*parts)

    def below(self, n: int) -> int:
        """A number of 0 .. n - 1."""
        self._state = (self._state + _STRIDE) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return ((z ^ (z >> 31)) * n) >> 64

    def choice(self, items: Sequence[T]) -> T:
        """One of the items; raises IndexError when there is none."""
        return items[self.below(len(items))]

    def order(self, n: int) -> list[int]:
        """0 .. n - 1 in an order of the key's."""
        out = list(range(n))
        for i in range(n - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out
