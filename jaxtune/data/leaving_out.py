"""Rows that a run leaves out on purpose, found before any is rendered: duplicates, benchmarks' texts, verdicts.

Rows are compared by what they say, over all sources; of those alike the first is kept, in the order of the sources.
Leaves that read one source (styles, templates) leave out the same rows of it.
"""

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np

from jaxtune.config import Config
from jaxtune.data.examples import RowReader
from jaxtune.data.files.spool import digest_of
from jaxtune.data.gate import Gate
from jaxtune.data.leaves import OpenLeaf
from jaxtune.data.lengths import Progress
from jaxtune.data.quality.contamination import Benchmarks
from jaxtune.data.quality.duplicates import first_of_equal
from jaxtune.data.quality.filters import Filters, rules_digest
from jaxtune.data.quality.near import near_duplicates
from jaxtune.data.records import Message
from jaxtune.data.row_texts import row_key, texts_of
from jaxtune.data.saved_arrays import read_arrays, write_arrays
from jaxtune.data.verdicts import UNFIXED, Verdict, read_verdicts

EXACT, NEAR, IN_BENCHMARK = "exact duplicate", "near duplicate", "in a benchmark"
_VERSION = "1"  # of what rows are compared by
_BLOCK = 4096
_NEAR_RULES = ("near", "pairs", "minhash", "similarity", "words")


class AllRows:
    """The rows of some leaves, numbered on through them.

    Leaves that are one source in several styles count once; so do those that word one file by several templates, which
    is how task mixtures are meant. A file that two sources give as it is counts twice.
    """

    def __init__(self, leaves: Sequence[OpenLeaf]) -> None:
        self.names = [_name(leaf) for leaf in leaves]
        self.readers: dict[str, RowReader] = {}
        for name, leaf in zip(self.names, leaves, strict=True):
            self.readers.setdefault(name, leaf.reader)
        self.each = tuple(self.readers.values())
        self.firsts = np.cumsum([0, *(len(reader.source) for reader in self.each)])

    def __len__(self) -> int:
        return int(self.firsts[-1])

    @property
    def key(self) -> str:
        """Names the rows and how they are read."""
        return digest_of(_VERSION, *self.readers)

    def place(self, number: int) -> tuple[RowReader, int]:
        """The reader and the row of a number."""
        at = int(np.searchsorted(self.firsts, number, side="right")) - 1
        return self.each[at], number - int(self.firsts[at])

    def where(self, number: int) -> str:
        """`file:line` of a row."""
        reader, row = self.place(number)
        return reader.source.where(row)

    def texts(self, numbers: Sequence[int]) -> list[str]:
        """What each of these rows says, as one text."""
        return ["\n".join(texts_of(*self.place(int(number)))) for number in numbers]

    def by_source(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of each source, int64 ascending, of ascending numbers."""
        cuts = np.searchsorted(numbers, self.firsts)
        return {
            name: numbers[cuts[i] : cuts[i + 1]] - self.firsts[i]
            for i, name in enumerate(self.readers)
            if cuts[i + 1] > cuts[i]
        }


def gates(
    config: Config, leaves: Sequence[OpenLeaf], *, cache_dir: str, progress: Progress | None = None
) -> tuple[list[Gate], list[str]]:
    """What is left out of each leaf by data.quality, data.dedup, data.decontaminate and data.verdicts; and warnings.

    Raises ValueError for a file of verdicts or a benchmark that cannot be read.
    """
    data = config.data
    filters = Filters(data.quality) if data.quality.is_set else None
    plain = [Gate(filters=filters) for _ in leaves]
    if data.dedup == "keep" and not data.decontaminate.paths and data.verdicts is None:
        return plain, []
    rows = AllRows(leaves)
    found: dict[str, np.ndarray] = {}
    verdicts = read_verdicts(data.verdicts) if data.verdicts is not None else {}
    keys = row_keys(rows, cache_dir=cache_dir, progress=progress)
    judged = {int(i): verdicts[key] for i, key in _matching(keys, verdicts)}
    for number, verdict in judged.items():
        worded = bool(verdict.messages) and _is_worded(rows.place(number)[0])  # which no messages can stand for
        if reason := UNFIXED if worded else verdict.left_out:
            found[reason] = np.append(found.get(reason, np.zeros(0, np.int64)), number)
    if data.dedup != "keep":
        found[EXACT] = np.union1d(duplicates_of(keys)[0], _held_elsewhere(rows, leaves, keys, config.seed))
    if data.decontaminate.paths:
        benchmarks = Benchmarks(data.decontaminate.paths, ngram=data.decontaminate.ngram, cache_dir=cache_dir)
        found[IN_BENCHMARK] = contaminated(rows, benchmarks, cache_dir=cache_dir, progress=progress)
    if data.dedup == "near":  # a row that is gone anyway takes no other with it
        gone = np.unique(np.concatenate(list(found.values())))
        near = near_first(rows, keys, without=gone, cache_dir=cache_dir, progress=progress)
        found[NEAR] = np.flatnonzero(near >= 0)
    stale = len(verdicts) - len({verdict.key for verdict in judged.values()})
    warnings = (
        [f"data.verdicts: {stale:,} of {len(verdicts):,} verdicts are on rows that are not there"] if stale else []
    )
    by_reason = {reason: rows.by_source(np.sort(numbers)) for reason, numbers in found.items()}
    corrections = _corrections(rows, judged)
    gated = [
        dataclasses.replace(
            gate,
            left_out={reason: of[name] for reason, of in by_reason.items() if name in of},
            corrected=corrections.get(name, {}),
        )
        for gate, name in zip(plain, rows.names, strict=True)
    ]
    return gated, warnings


def row_keys(rows: AllRows, *, cache_dir: str, progress: Progress | None = None) -> np.ndarray:
    """The key of each row, uint64 [n], 0 for rows that cannot be read; from the cache, or by reading them."""
    path = os.path.join(cache_dir, "left_out", f"keys-{rows.key}.npz")
    saved = read_arrays(path)
    if saved is not None and "keys" in saved and len(saved["keys"]) == len(rows):
        return saved["keys"]
    keys, number = np.zeros(len(rows), np.uint64), 0
    for reader in rows.each:
        for row in range(len(reader.source)):
            keys[number] = row_key(texts_of(reader, row)) or 0
            number += 1
            if progress is not None and number % _BLOCK == 0:
                progress(number, len(rows))
    write_arrays(path, {"keys": keys})
    return keys


def duplicates_of(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows that say what an earlier row says, and those of the earlier ones, int64 ascending."""
    readable = np.flatnonzero(keys != 0)
    first = first_of_equal(keys[readable])
    again = np.flatnonzero(first >= 0)
    return readable[again], readable[first[again]]


def near_first(
    rows: AllRows,
    keys: np.ndarray,
    *,
    without: np.ndarray | None = None,
    cache_dir: str,
    progress: Progress | None = None,
    workers: int = 1,
) -> np.ndarray:
    """For each row the first that says nearly the same, int64 [n]; -1 for none, and for exact duplicates.

    Rows of the numbers `without` are not looked at.
    """
    without = np.zeros(0, np.int64) if without is None else without
    repeated = duplicates_of(keys)[0]
    left = np.setdiff1d(without, repeated)
    compared = hashlib.blake2b(keys.tobytes() + left.tobytes(), digest_size=16).hexdigest()
    key = digest_of(rows.key, rules_digest(_NEAR_RULES), compared)
    path = os.path.join(cache_dir, "left_out", f"near-{key}.npz")
    saved = read_arrays(path)
    if saved is not None and "first" in saved and len(saved["first"]) == len(rows):
        return saved["first"]
    alone = np.setdiff1d(np.flatnonzero(keys != 0), np.union1d(repeated, left))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
        near = near_duplicates(
            lambda numbers: rows.texts(alone[np.asarray(numbers)]), len(alone), folder=folder, progress=progress,
            workers=workers,
        )  # fmt: skip
    first = np.full(len(rows), -1, np.int64)
    found = np.flatnonzero(near >= 0)
    first[alone[found]] = alone[near[found]]
    write_arrays(path, {"first": first})
    return first


def contaminated(
    rows: AllRows, benchmarks: Benchmarks, *, cache_dir: str, progress: Progress | None = None
) -> np.ndarray:
    """Numbers of the rows that share words with a benchmark, int64 ascending."""
    path = os.path.join(cache_dir, "left_out", f"benchmarks-{digest_of(rows.key, benchmarks.key)}.npz")
    saved = read_arrays(path)
    if saved is not None and "rows" in saved:
        return saved["rows"]
    found, number = [], 0
    for reader in rows.each:
        for row in range(len(reader.source)):
            if benchmarks.found(texts_of(reader, row)) is not None:
                found.append(number)
            number += 1
            if progress is not None and number % _BLOCK == 0:
                progress(number, len(rows))
    write_arrays(path, {"rows": np.array(found, np.int64)})
    return np.array(found, np.int64)


def _held_elsewhere(rows: AllRows, leaves: Sequence[OpenLeaf], keys: np.ndarray, seed: int) -> np.ndarray:
    """Numbers of the rows trained on that say what a row held out for evaluation says, int64 ascending."""
    places = dict(zip(rows.readers, rows.firsts.tolist(), strict=False))
    held = [places[name] + leaf.held_rows(seed) for leaf, name in zip(leaves, rows.names, strict=True) if leaf.held_out]
    if not held:
        return np.zeros(0, np.int64)
    numbers = np.unique(np.concatenate(held))
    same = np.flatnonzero(np.isin(keys, keys[numbers]) & (keys != 0))
    return np.setdiff1d(same, numbers)


def _matching(keys: np.ndarray, verdicts: Mapping[int, Verdict]) -> list[tuple[int, int]]:
    """(row number, key) of the rows that have a verdict."""
    wanted = np.array(sorted(verdicts), np.uint64)
    return [(int(i), int(keys[i])) for i in np.flatnonzero(np.isin(keys, wanted))] if len(wanted) else []


def _corrections(rows: AllRows, judged: Mapping[int, Verdict]) -> dict[str, dict[int, tuple[Message, ...]]]:
    out: dict[str, dict[int, tuple[Message, ...]]] = {}
    names = list(rows.readers)
    for number, verdict in judged.items():
        if verdict.messages and not _is_worded(rows.place(number)[0]):
            at = int(np.searchsorted(rows.firsts, number, side="right")) - 1
            out.setdefault(names[at], {})[number - int(rows.firsts[at])] = verdict.messages
    return out


def _name(leaf: OpenLeaf) -> str:
    reader = leaf.reader
    worded = _is_worded(reader)
    return digest_of(reader.source.fingerprint, repr(reader.layout), "worded" if worded else str(leaf.node.source))


def _is_worded(reader: RowReader) -> bool:
    return reader.phrasing is not None and reader.phrasing.reads_fields
