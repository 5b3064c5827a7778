"""How alike two texts are: Jaccard of their shingles, ROUGE-L of their words."""

from collections.abc import Sequence

SHINGLE = 5  # characters
END = "\0" * (SHINGLE - 1)


def shingles(text: str) -> frozenset[str]:
    """Every five characters in a row of a text that four ends follow: so a short text has shingles too."""
    ended = text + END
    return frozenset([ended[i : i + SHINGLE] for i in range(len(text))])


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """What two sets share, of what either has; 1 for two empty ones."""
    shared = len(a & b)
    either = len(a) + len(b) - shared
    return shared / either if either else 1.0


def rouge_l(a: Sequence[str], b: Sequence[str], *, above: float = 0.0) -> float:
    """ROUGE-L's F measure: 2 LCS / (words of a + words of b), of the longest common subsequence.

    Where the numbers of words alone leave nothing above `above`, 0 is returned at once.
    """
    if 2 * min(len(a), len(b)) <= above * (len(a) + len(b)):
        return 0.0
    return 2 * common_subsequence(a, b) / (len(a) + len(b))


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence, a bit for each word of `a` (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    every = row = (1 << len(a)) - 1
    for word in b:
        at = row & places.get(word, 0)
        if at:
            row = ((row + at) | (row - at)) & every
    return len(a) - row.bit_count()
