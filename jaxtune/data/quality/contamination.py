"""Whether rows share words with a benchmark: runs of n words, as GPT-3 (appendix C) looked for them.

Texts are compared as words in lower case, without punctuation. A run of n words (13) that also stands in a benchmark's
text is found, unless more than ten different texts of that benchmark hold it: that is the wording of its prompts, not
a question. A benchmark text of five words up to n - 1 is found where a row's text is all of it and no more; shorter
ones ("Yes", "New York") never are.
"""

import functools
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.config_data import SourceConfig
from jaxtune.data.files.readers import Source
from jaxtune.data.files.sources import open_source
from jaxtune.data.records import RowError

LEAST_WORDS = 5
COMMON = 10
_VERSION = "1"
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_PARTS = re.compile(f"{_UNSPACED.pattern}|{_UNSPACED.pattern.replace('[', '[^', 1)}+")
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64


class _Found(NamedTuple):
    """Where the hashed words of benchmarks stand: hashes ascending [N], and (file, row) of the first of each [N]."""

    hashes: np.ndarray
    files: np.ndarray
    rows: np.ndarray


class Benchmarks:
    """The texts of some benchmarks, to be looked up; worker processes get a copy.

    `paths` are files, folders, globs, URLs or hub ids as of `data.train.N.path`; every text of a row counts, whatever
    its column. Raises ValueError for one that cannot be read. `key` names the files' contents and the rules.
    """

    def __init__(self, paths: Sequence[str], *, ngram: int = 13, cache_dir: str | None = None) -> None:
        self.ngram = ngram
        self._sources = [open_source(SourceConfig(path=path), cache_dir=cache_dir) for path in paths]
        fingerprints = [source.fingerprint for source in self._sources]
        said = "\0".join([_VERSION, str(ngram), str(LEAST_WORDS), str(COMMON), *fingerprints])
        self.key = hashlib.blake2b(said.encode(), digest_size=16).hexdigest()
        known: dict[str, int] = {}
        runs, wholes = [], []
        for file, source in enumerate(self._sources):
            run, whole = self._read(source, known)
            if not len(run[0]) and not len(whole[0]):
                raise ValueError(
                    f"{paths[file]}: found no text of {LEAST_WORDS} words or more; expected a benchmark's rows"
                )
            runs.append((file, run))
            wholes.append((file, whole))
        self._runs, self._wholes = _joined(runs), _joined(wholes)
        # Of a row's words it is asked which number they have, and 0, of a word in no benchmark, ends a run.
        self._numbers = {word: number for number, word in enumerate(known, 1)}
        self._hashes = np.array([0, *known.values()], np.uint64)

    def found(self, texts: Sequence[str]) -> tuple[str, str] | None:
        """Where words of a row stand in a benchmark (`file:line`), and these words; None where there are none."""
        for text in texts:
            words = _words(text)
            if len(words) < LEAST_WORDS:
                continue
            hashes = self._hashes[[self._numbers.get(word, 0) for word in words]]
            if len(words) < self.ngram:
                at = _index(self._wholes.hashes, _hash_of_all(hashes)) if hashes.all() else -1
                if at >= 0:
                    return self._where(self._wholes, at), " ".join(words)
                continue
            place = self._run_in(hashes)
            if place is not None:
                at, start, end = place
                return self._where(self._runs, at), " ".join(words[start:end])
        return None

    def _run_in(self, hashes: np.ndarray) -> tuple[int, int, int] | None:
        """Of words [n]: the index of a run in the benchmarks, and the first and last word + 1 of all that follow on."""
        n = self.ngram
        known = np.concatenate([[0], np.cumsum(hashes != 0)])
        starts = np.flatnonzero(known[n:] - known[:-n] == n)
        if not len(starts) or not len(self._runs.hashes):
            return None
        runs = _hashes_of_runs(hashes, n)[starts]
        at = np.minimum(np.searchsorted(self._runs.hashes, runs), len(self._runs.hashes) - 1)
        hits = np.flatnonzero(self._runs.hashes[at] == runs)
        if not len(hits):
            return None
        first = last = int(starts[hits[0]])
        for start in starts[hits[1:]].tolist():
            if start != last + 1:
                break
            last = start
        return int(at[hits[0]]), first, last + n

    def _read(
        self, source: Source, known: dict[str, int]
    ) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """The hashes of a benchmark's runs and of its short texts, each with its row; no text counts twice."""
        n, seen = self.ngram, set()
        runs: list[np.ndarray] = []
        run_rows: list[np.ndarray] = []
        wholes, whole_rows = [], []
        for row in range(len(source)):
            for text in _texts_of(source, row):
                words = _words(text)
                if len(words) < LEAST_WORDS:
                    continue
                hashes = np.array([_learned(word, known) for word in words], np.uint64)
                whole = _hash_of_all(hashes)
                if whole in seen:
                    continue
                seen.add(whole)
                if len(words) < n:
                    wholes.append(whole)
                    whole_rows.append(row)
                else:
                    runs.append(np.unique(_hashes_of_runs(hashes, n)))
                    run_rows.append(np.full(len(runs[-1]), row, np.int64))
        short = np.array(wholes, np.uint64), np.array(whole_rows, np.int64)
        if not runs:
            return (np.zeros(0, np.uint64), np.zeros(0, np.int64)), short
        hashes, rows = np.concatenate(runs), np.concatenate(run_rows)
        once, first, texts = np.unique(hashes, return_index=True, return_counts=True)
        rare = texts <= COMMON
        return (once[rare], rows[first[rare]]), short

    def _where(self, found: _Found, at: int) -> str:
        return self._sources[found.files[at]].where(int(found.rows[at]))


def _words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; scripts without spaces as their single characters."""
    found = _WORD.findall(text.lower())
    if text.isascii() or not _UNSPACED.search(text):
        return found
    return [part for word in found for part in _PARTS.findall(word)]


def _texts_of(source: Source, row: int) -> Iterator[str]:
    try:
        yield from _texts(source.row(row))
    except RowError as error:
        raise ValueError(f"{source.where(row)}: {error}; a benchmark is read whole") from error


def _texts(value: Any) -> Iterator[str]:
    """All texts that a value of a row holds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _hashes_of_runs(words: np.ndarray, n: int) -> np.ndarray:
    """A hash of every n words in a row, uint64 [W - n + 1]: sum of w_k p^k, as a difference of two running sums."""
    powers, inverses = _powers(1 << len(words).bit_length())
    sums = np.zeros(len(words) + 1, np.uint64)
    np.cumsum(words * powers[: len(words)], out=sums[1:])
    return (sums[n:] - sums[:-n]) * inverses[: len(words) - n + 1]


@functools.lru_cache(maxsize=24)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """p^k and p^-k modulo 2^64 for k below `count`."""

    def of(base: int) -> np.ndarray:
        factors = np.full(count, base, np.uint64)
        factors[0] = 1
        return np.cumprod(factors, dtype=np.uint64)

    return of(_BASE), of(pow(_BASE, -1, 1 << 64))


def _learned(word: str, known: dict[str, int]) -> int:
    """The hash of a word, kept in `known`."""
    if word not in known:
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        known[word] = int.from_bytes(digest, "little") or 1
    return known[word]


def _hash_of_all(words: np.ndarray) -> int:
    return int(_hashes_of_runs(words, len(words))[0])


def _index(ascending: np.ndarray, value: int) -> int:
    at = int(np.searchsorted(ascending, np.uint64(value)))
    return at if at < len(ascending) and int(ascending[at]) == value else -1


def _joined(parts: Sequence[tuple[int, tuple[np.ndarray, np.ndarray]]]) -> _Found:
    """The hashes of all files in order; of one that several have, the first file's row."""
    hashes = np.concatenate([np.zeros(0, np.uint64), *(hashes for _, (hashes, _) in parts)])
    files = np.concatenate([np.zeros(0, np.int64), *(np.full(len(rows), file, np.int64) for file, (_, rows) in parts)])
    rows = np.concatenate([np.zeros(0, np.int64), *(rows for _, (_, rows) in parts)])
    once, first = np.unique(hashes, return_index=True)
    return _Found(once, files[first], rows[first])
