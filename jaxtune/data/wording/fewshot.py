"""Few-shot prompts: other rows of the source, worded as the question is, shown before it."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxtune.data.records import Conversation, Message, NothingToLearn, RowError
from jaxtune.data.wording.content import content_hashes, fields_hash
from jaxtune.data.wording.keyed import Keyed
from jaxtune.data.wording.wordings import Fields, Pair, Wording

NO_EXEMPLAR = "no other row to show as exemplar"
NONE_FITS = "no exemplar fits shot_tokens"
_TRIES = 8  # candidates looked at for each exemplar wanted, where many are skipped, equal or held out

CountTokens = Callable[[Sequence[str]], list[int]]


@dataclasses.dataclass(frozen=True)
class Exemplars:
    """The rows that may be shown: `rows` int64 (None: all of `size`), the fields of each, and who is held out."""

    rows: np.ndarray | None
    size: int
    fields: Callable[[int], Fields | None]
    is_held_out: Callable[[Sequence[int]], bool]

    def __len__(self) -> int:
        return self.size if self.rows is None else len(self.rows)

    def row(self, k: int) -> int:
        """The k-th of the rows."""
        return k if self.rows is None else int(self.rows[k])


def choose(
    exemplars: Exemplars, wording: Wording, fields: Fields, asked: Pair, *, row: int, shots: int, keyed: Keyed
) -> list[Pair]:
    """Up to `shots` pairs of other rows in the same wording, none of which says the same as the question or another.

    Rows are looked at in an order of the key's, at most `_TRIES` for each pair wanted.
    """
    seen = {fields_hash(fields), _hash(asked.input)}
    found: list[Pair] = []
    for k in _distinct(keyed, len(exemplars), _TRIES * shots):
        other = exemplars.row(k)
        shown = None if other == row else exemplars.fields(other)
        if shown is None:
            continue
        try:
            pair = wording.render(shown, keyed)
        except RowError:  # told of when the row's own turn comes
            continue
        if pair is None or not pair.input.strip() or not pair.target.strip():
            continue
        hashes = {fields_hash(shown), _hash(pair.input)}
        if hashes & seen or exemplars.is_held_out(sorted(hashes)):
            continue
        seen |= hashes
        found.append(pair)
        if len(found) == shots:
            break
    if not found:
        raise NothingToLearn(NO_EXEMPLAR)
    return found


def framed(wording: Wording, pairs: Sequence[Pair], asked: str, *, budget: int, count_tokens: CountTokens) -> str:
    """The prompt with as many of the exemplars, first ones first, as `budget` tokens have room for beside the question.

    Raises NothingToLearn when there is room for none.
    """
    shown = [wording.frame.exemplar(pair) for pair in pairs]
    question = wording.frame.whole("", asked)
    # A token has at least one byte, save for the few that a tokenizer adds: short prompts need no counting.
    if sum(len(text.encode("utf-8", "surrogatepass")) + 2 for text in (question, *shown)) > budget:
        used, *lengths = count_tokens([question, *shown])
        kept = []
        for text, length in zip(shown, lengths, strict=True):
            if used + length > budget:
                break
            used += length
            kept.append(text)
        shown = kept
    if not shown:
        raise NothingToLearn(NONE_FITS)
    return wording.frame.whole("".join(shown), asked)


def _distinct(keyed: Keyed, n: int, most: int) -> Iterator[int]:
    """Up to `most` different numbers of 0 .. n - 1: the head of a shuffle whose moves alone are kept."""
    moved: dict[int, int] = {}
    for i in range(min(n, most)):
        j = i + keyed.below(n - i)
        yield moved.get(j, j)
        moved[j] = moved.get(i, i)


def _hash(text: str) -> int:
    return content_hashes(Conversation((Message("user", text),)))[0]
