"""Texts that are nearly the same: candidates by MinHash and its bands, each verified on the texts themselves.

Texts are normalised as for exact duplicates and read as sets of five characters in a row. Signatures are computed in
blocks, by worker processes where asked; of equal texts the first goes on; in each band rows are sorted by the key of
that band and some of equal key become pairs; pairs that agree in too few hashes are let go, the rest are verified in
the order of the rows, each against what is kept. What grows with the rows lies in files of `folder`, but for some
arrays of 8 bytes a row.
"""

import collections
import concurrent.futures
import hashlib
import itertools
import multiprocessing
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxtune.data.quality.duplicates import first_of_equal
from jaxtune.data.quality.minhash import HASHES, band_keys, bands_for, signatures
from jaxtune.data.quality.pairs import Pairs, neighbours
from jaxtune.data.quality.similarity import jaccard, rouge_l, shingles
from jaxtune.data.quality.words import words
from jaxtune.data.wording.content import normal

_READ = 2048  # texts asked for, and signed, at once
_RESOLVED = 1 << 16  # rows whose candidates are looked at together
_CANDIDATES = 8  # of a row, those that agree most
_LEAST_AGREEMENT = 0.5
_REMEMBERED = 4096  # texts whose shingles are at hand

Texts = Callable[[Sequence[int]], list[str]]
Progress = Callable[[int, int], None]


def near_duplicates(
    texts: Texts,
    count: int,
    *,
    folder: str,
    threshold: float = 0.8,
    rouge: float = 0.7,
    progress: Progress | None = None,
    workers: int = 1,
) -> np.ndarray:
    """For each text the first that is kept and of which it is a near duplicate, -1 for one that is kept; int64 [count].

    A text is a near duplicate of an earlier one that is kept where their Jaccard similarity is at least `threshold` or
    their ROUGE-L above `rouge` (Self-Instruct's rule); nothing else is ever named. Of pairs as alike as `threshold` 99
    in 100 are found (`minhash.bands_for`); of less alike ones, which ROUGE-L alone takes, those that share a band.
    The answer is the same with any number of workers. `texts` is asked for every text once, in order, in this process;
    `progress` is told (done, count) of reading and verifying together. The files made in `folder` are gone at the end.
    """
    if not count:
        return np.zeros(0, np.int64)
    bands, rows = bands_for(threshold)
    own = tempfile.mkdtemp(prefix="near-", dir=folder)
    tell = progress or _silent
    try:
        with _Spool(own, bands) as spool:
            for done in _sign_all(texts, count, spool, rows, workers):
                tell(done // 2, count)
            first = first_of_equal(spool.joined_keys())
            alone = np.flatnonzero(first < 0)
            pairs = Pairs(own, len(alone), _RESOLVED)
            keys = spool.band(0)[alone]
            for band in range(bands):
                following = spool.band((band + 1) % bands)[alone]
                pairs.write(neighbours(keys, following))
                keys = following
            kept = _Kept(spool, alone, threshold, rouge)
            for done in _resolve(kept, pairs, spool.agreements(count)):
                tell((count + count * done // len(alone)) // 2, count)
        return _of_all(first, alone, kept.first)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _of_all(first: np.ndarray, alone: np.ndarray, near: np.ndarray) -> np.ndarray:
    """The answer for all rows: rows that are equal to an earlier one go where that one went, or to it."""
    out = np.full(len(first), -1, np.int64)
    found = np.flatnonzero(near >= 0)
    out[alone[found]] = alone[near[found]]
    again = np.flatnonzero(first >= 0)
    went = out[first[again]]
    out[again] = np.where(went >= 0, went, first[again])
    return out


class _Signed(NamedTuple):
    """A block of texts [n]: normalised and encoded, with their ends; a key of the whole; band keys; 8 bits a hash."""

    encoded: bytes
    ends: np.ndarray
    keys: np.ndarray
    bands: np.ndarray
    bits: np.ndarray


def _sign(texts: list[str], bands: int, rows: int) -> _Signed:
    normalised = [normal(text) or " " for text in texts]
    encoded = [text.encode("utf-8", "surrogatepass") for text in normalised]
    keys = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in encoded)
    signed = signatures(normalised)
    ends = np.cumsum([len(text) for text in encoded])
    bits = (signed & np.uint32(255)).astype(np.uint8)
    return _Signed(b"".join(encoded), ends, np.frombuffer(keys, "<u8"), band_keys(signed, bands, rows), bits)


def _sign_all(texts: Texts, count: int, spool: "_Spool", rows: int, workers: int) -> Iterator[int]:
    """Fills the spool, block after block; yields how many texts it holds."""
    blocks = (range(start, min(start + _READ, count)) for start in range(0, count, _READ))
    if workers <= 1:
        for block in blocks:
            spool.add(_sign(texts(block), spool.bands, rows))
            yield block.stop
        return
    context = multiprocessing.get_context("spawn")  # threads may run here
    waiting: collections.deque[tuple[int, concurrent.futures.Future[_Signed]]] = collections.deque()
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_end_with_parent) as pool:
        for block in blocks:
            waiting.append((block.stop, pool.submit(_sign, texts(block), spool.bands, rows)))
            if len(waiting) > 2 * workers:
                done, signed = waiting.popleft()
                spool.add(signed.result())
                yield done
        for done, signed in waiting:
            spool.add(signed.result())
            yield done


def _end_with_parent() -> None:
    """In a worker: ends it when the process that started it has gone, killed or not."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


class _Spool:
    """What was computed of the texts, in files: the texts themselves, a file of keys for each band, bits of hashes."""

    def __init__(self, folder: str, bands: int) -> None:
        self._folder, self.bands = folder, bands
        self._texts = open(os.path.join(folder, "texts"), "w+b")  # noqa: SIM115 (closed with the spool)
        self._ends: list[np.ndarray] = [np.zeros(1, np.int64)]
        self._keys: list[np.ndarray] = []
        self._all_ends: np.ndarray | None = None

    def __enter__(self) -> "_Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self._texts.close()

    def add(self, signed: _Signed) -> None:
        self._texts.write(signed.encoded)
        self._ends.append(signed.ends + self._ends[-1][-1])
        self._keys.append(signed.keys)
        for band in range(self.bands):
            self._append(f"band-{band}", signed.bands[:, band])
        self._append("bits", signed.bits)

    def joined_keys(self) -> np.ndarray:
        """The keys of all texts; they are not held any longer."""
        keys, self._keys = np.concatenate(self._keys), []
        return keys

    def band(self, band: int) -> np.ndarray:
        """The band's key of every text."""
        return np.fromfile(os.path.join(self._folder, f"band-{band}"), np.uint64)

    def agreements(self, count: int) -> np.ndarray:
        """Eight bits of each hash of every text, mapped from their file."""
        return np.memmap(os.path.join(self._folder, "bits"), np.uint8, "r", shape=(count, HASHES))

    def text(self, i: int) -> str:
        """The text, normalised."""
        if self._all_ends is None:
            self._texts.flush()
            self._all_ends, self._ends = np.concatenate(self._ends), []
        start, end = self._all_ends[i : i + 2].tolist()
        return os.pread(self._texts.fileno(), end - start, start).decode("utf-8", "surrogatepass")

    def _append(self, name: str, values: np.ndarray) -> None:
        with open(os.path.join(self._folder, name), "ab") as file:
            file.write(np.ascontiguousarray(values).tobytes())


class _Read(NamedTuple):
    """A text as it is compared."""

    shingles: frozenset[str]
    words: tuple[str, ...]


class _Kept:
    """Which of the texts that stand alone are kept: `first` [n] is -1 for these, else the kept one they are near to."""

    def __init__(self, spool: _Spool, alone: np.ndarray, threshold: float, rouge: float) -> None:
        self.first = np.full(len(alone), -1, np.int64)
        self.alone = alone
        self._spool, self._threshold, self._rouge = spool, threshold, rouge
        self._remembered: collections.OrderedDict[int, _Read] = collections.OrderedDict()

    def settle(self, i: int, candidates: Sequence[int]) -> None:
        """Compares text i with the kept texts that its candidates stand for, first ones first."""
        standing = {j if self.first[j] < 0 else int(self.first[j]) for j in candidates}
        mine = self._read(i)
        for j in sorted(standing):
            if self._alike(mine, self._read(j)):
                self.first[i] = j
                return

    def _alike(self, a: _Read, b: _Read) -> bool:
        sizes = sorted((len(a.shingles), len(b.shingles)))
        if sizes[0] >= self._threshold * sizes[1] and jaccard(a.shingles, b.shingles) >= self._threshold:
            return True
        return rouge_l(a.words, b.words, above=self._rouge) > self._rouge

    def _read(self, i: int) -> _Read:
        read = self._remembered.get(i)
        if read is None:
            text = self._spool.text(int(self.alone[i]))
            read = self._remembered[i] = _Read(shingles(text), words(text).said)
            if len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        else:
            self._remembered.move_to_end(i)
        return read


def _resolve(kept: _Kept, pairs: Pairs, bits: np.ndarray) -> Iterator[int]:
    """Settles every text that has candidates, in order; yields how many texts are behind."""
    for block in range(pairs.blocks):
        later, earlier = pairs.read(block)
        agreement = _agreement(bits, kept.alone[later], kept.alone[earlier])
        worth = np.flatnonzero(agreement >= _LEAST_AGREEMENT)
        later, earlier, agreement = later[worth], earlier[worth], agreement[worth]
        order = np.lexsort((earlier, -agreement, later))
        later, earlier = later[order], earlier[order]
        starts = np.flatnonzero(np.diff(later, prepend=-1))
        for start, end in itertools.pairwise([*starts.tolist(), len(later)]):
            kept.settle(int(later[start]), earlier[start : min(end, start + _CANDIDATES)].tolist())
        yield min((block + 1) * _RESOLVED, len(kept.alone))


def _agreement(bits: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """In what share of their hashes the texts of each pair agree: an estimate of their Jaccard similarity."""
    out = np.empty(len(a), np.float32)
    for start in range(0, len(a), 1 << 16):
        part = slice(start, start + (1 << 16))
        out[part] = (bits[a[part]] == bits[b[part]]).mean(axis=1)
    return out


def _silent(done: int, count: int) -> None:
    pass
