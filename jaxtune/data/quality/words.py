"""A text's words, read once for all that is asked of them.

A word is a run of letters, digits and underscores, apostrophes inside it included. Scripts that are written without
spaces have no such runs: a run of n characters of Chinese or Japanese counts as n / 2 words, of Thai, Lao, Khmer or
Burmese as n / 4 (rounded up), the mean lengths of their words; and two texts have its pairs of neighbouring characters
in common, or not.
"""

import functools
import re
from typing import NamedTuple

_WORD = re.compile(r"\w+(?:['’]\w+)*")
# Outside ASCII a word also holds the marks of vowels and accents, which are no letters of their own.
_MARKS = (
    r"\u0300-\u036f\u0591-\u05bd\u05bf-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff\u0e00-\u0eff"
    r"\u1000-\u1049\u1780-\u17d3\u200c\u200d\u3005\u30fc"
)
_WORD_OR_MARK = re.compile(rf"[\w{_MARKS}]+(?:['’][\w{_MARKS}]+)*")
_TWO_A_WORD = r"\u3005\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_FOUR_A_WORD = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_UNSPACED = re.compile(rf"([{_TWO_A_WORD}]+)|([{_FOUR_A_WORD}]+)")


class Words(NamedTuple):
    """What a text is made of: `said`, lower-case, in order; and how many words that counts as."""

    said: tuple[str, ...]
    number: int


@functools.lru_cache(maxsize=64)
def words(text: str) -> Words:
    """The words of a text; the last few texts are remembered, for several scores ask for the same ones.

    "I'm 30." -> ("i'm", "30"), 2; "我喜欢茶。" -> ("我喜", "喜欢", "欢茶"), 2
    """
    if text.isascii():
        said = tuple(_WORD.findall(text.lower()))
        return Words(said, len(said))
    found = _WORD_OR_MARK.findall(text.lower())
    if not _UNSPACED.search(text):
        return Words(tuple(found), len(found))
    parts: list[str] = []
    count = 0
    for word in found:
        end = 0
        for run in _UNSPACED.finditer(word):
            if run.start() > end:
                parts.append(word[end : run.start()])
                count += 1
            end, length = run.end(), run.end() - run.start()
            parts += [word[i : min(i + 2, end)] for i in range(run.start(), max(end - 1, run.start() + 1))]
            count += -(-length // (2 if run[1] else 4))
        if end < len(word):
            parts.append(word[end:])
            count += 1
    return Words(tuple(parts), count)


def unfolded(text: str) -> str:
    """The text with typewriter's apostrophes, as rules spell them."""
    return text.replace("’", "'")
