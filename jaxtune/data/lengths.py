"""The length pass: every row rendered and tokenised once before the run, or taken from the cache of an earlier pass.

What is kept of a row is the lengths of its examples and what was lost, under a key of everything that decides it.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.data.examples import RowReader
from jaxtune.data.records import NothingToLearn, RowError

Progress = Callable[[int, int], None]
_BLOCK = 1024
_VERSION = "4"  # of everything between a row and its tokens: raise it when the code's answer changes
_COLUMNS = (
    *("tokens", "trained", "lost", "turns", "stops", "reason", "bad", "examples"),
    *("reasoning_removed", "reasoning_left"),
)
# What reading a damaged file raises: the archive's errors, and those of what is not in it.
_DAMAGED = (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, NotImplementedError, zipfile.BadZipFile)


@dataclasses.dataclass(frozen=True)
class RowTable:
    """What became of each of `rows` (int64 [n]): arrays [n], and of all their examples in order `lengths` [examples
    sides], int32: of the sequence, or of encoder and decoder.

    `epochs` int64 [n] where a row's examples depend on the epoch, else None; entries ascend by epoch, then by row.
    `reason` indexes `reasons`, whose entry 0 is for rows without loss; `messages` tells each bad row's full story.
    """

    rows: np.ndarray
    epochs: np.ndarray | None
    columns: Mapping[str, np.ndarray]
    lengths: np.ndarray
    reasons: tuple[str, ...]
    messages: Mapping[int, str]

    def entries(self, rows: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """The table's entries for these draws, all of which must be in it."""
        if self.epochs is None:
            return np.searchsorted(self.rows, rows)
        return np.searchsorted(_pair_keys(self.rows, self.epochs), _pair_keys(rows, epochs))

    def examples_of(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lengths [examples sides] of the examples of the entries `at`, in order, and how many each entry has."""
        counts = self.columns["examples"][at]
        first = np.concatenate([[0], np.cumsum(self.columns["examples"])])[at]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.lengths[np.repeat(first, counts) + within], counts

    def mean_tokens(self) -> float:
        """Tokens that an average draw brings; rows without an example bring none."""
        return float(self.columns["tokens"].mean()) if len(self.rows) else 0.0

    def mean_lengths(self) -> np.ndarray:
        """Positions that an average draw takes on each side of a row, float64 [sides]."""
        return self.lengths.sum(axis=0, dtype=np.float64) / max(1, len(self.rows))


class Wanted(NamedTuple):
    """Rows to measure, int64 ascending; with their epochs where these matter, ascending by (epoch, row)."""

    rows: np.ndarray
    epochs: np.ndarray | None = None


def pairs(rows: np.ndarray, epochs: np.ndarray) -> Wanted:
    """The different (row, epoch) pairs of some draws."""
    keys = np.unique(_pair_keys(rows, epochs))
    return Wanted(keys & ((1 << 40) - 1), keys >> 40)


def _pair_keys(rows: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    return (epochs.astype(np.int64) << 40) | rows.astype(np.int64)


def measure(
    readers: Sequence[RowReader], wanted: Sequence[Wanted], *, cache_dir: str, progress: Progress | None = None
) -> list[RowTable]:
    """A table for each reader: from the cache, or by reading the rows.

    All tables of a stream are kept in one file, so that thousands of sources open at once; a source that was measured
    beside others before is found again under its own key.
    """
    folder = os.path.join(cache_dir, "lengths")
    own = [_wanted_key(key, which) for key, which in zip(reader_keys(readers), wanted, strict=True)]
    together = os.path.join(folder, f"{_digest(*own)}.npz")
    sides = [reader.sides for reader in readers]
    found = _load(together, wanted, sides)
    if found is not None:
        return found
    total, done, tables = sum(len(which.rows) for which in wanted), 0, []
    for reader, which, key in zip(readers, wanted, own, strict=True):
        path = os.path.join(folder, f"{key}.npz")
        saved = _load(path, [which], [reader.sides])
        if saved is None:
            saved = [_read_all(reader, which, progress, done, total)]
            if len(readers) > 1:
                _save(path, saved)
        tables += saved
        done += len(which.rows)
    _save(together, tables)
    return tables


def cached_hashes(
    readers: Sequence[RowReader], keys: Sequence[str], cache_dir: str, *, progress: Progress | None = None
) -> np.ndarray:
    """Content hashes of all rows of some readers, uint64 ascending, each once; from the cache, or by reading them.

    A text that stands in several rows of a source (an instruction, a list of options) is no row's own and is left out;
    rows that are alike count as one.
    """
    path = os.path.join(cache_dir, "lengths", f"hashes-{_digest(*keys)}.npz")
    saved = _arrays(path)
    if saved is not None and "hashes" in saved and saved["hashes"].dtype == np.uint64:
        return saved["hashes"]
    total, done = sum(len(reader.source) for reader in readers), 0
    whole: list[np.ndarray] = [np.zeros(0, np.uint64)]
    texts: dict[str, list[np.ndarray]] = {}  # of each source, which styles and templates share: [n, text and row]
    for reader in readers:
        for start in range(0, len(reader.source), _BLOCK):
            block = range(start, min(start + _BLOCK, len(reader.source)))
            hashes, said = _hashes_of(reader, block)
            whole.append(hashes)
            texts.setdefault(reader.source.fingerprint, []).append(said)
            done += len(block)
            if progress is not None:
                progress(done, total)
    found = np.unique(np.concatenate([*whole, *map(_of_one_row, texts.values())]))
    _write(path, {"hashes": found})
    return found


def _hashes_of(reader: RowReader, rows: range) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of some rows as a whole, uint64 [n], and of their texts, each with its row's, uint64 [m, 2]."""
    whole: set[int] = set()
    texts: set[tuple[int, int]] = set()
    for row in rows:
        with contextlib.suppress(RowError, NothingToLearn):  # told of where the row itself is counted
            hashes = reader.hashes(row)
            whole |= hashes.whole
            texts.update((text, hashes.row) for text in hashes.texts)
    return np.array(sorted(whole), np.uint64), np.array(sorted(texts), np.uint64).reshape(-1, 2)


def _of_one_row(said: Sequence[np.ndarray]) -> np.ndarray:
    """The texts that stand in one row only, of [n, text and row]."""
    each_once = np.unique(np.concatenate(said), axis=0)
    texts, rows = np.unique(each_once[:, 0], return_counts=True)
    return texts[rows == 1]


def reader_keys(readers: Sequence[RowReader]) -> list[str]:
    """Names everything that decides what a row becomes: data bytes, layout, templates, tokenizer, options, code."""
    tokenizers: dict[int, str] = {}
    keys = []
    for reader in readers:
        tokenizer = reader.template.tokenizer
        if id(tokenizer) not in tokenizers:  # hundreds of readers share one, and its text has megabytes
            special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
            tokenizers[id(tokenizer)] = _digest(tokenizer.backend_tokenizer.to_str(), special)
        keys.append(
            _digest(
                _VERSION,
                reader.source.fingerprint,
                repr(reader.layout),
                reader.template.text,
                reader.text_template.text,
                tokenizers[id(tokenizer)],
                repr(reader.options),
                reader.key,
            )
        )
    return keys


def _wanted_key(key: str, wanted: Wanted) -> str:
    digest = hashlib.blake2b(key.encode(), digest_size=16)
    for array in wanted:
        digest.update(b"\0" if array is None else array.tobytes())
    return digest.hexdigest()


def _read_all(reader: RowReader, wanted: Wanted, progress: Progress | None, done: int, total: int) -> RowTable:
    reasons: dict[str, int] = {"": 0}
    entries: list[tuple[int, ...]] = []
    lengths: list[tuple[int, ...]] = []
    messages: dict[int, str] = {}
    rows, epochs = wanted
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK].tolist()
        when = [0] * len(block) if epochs is None else epochs[start : start + _BLOCK].tolist()
        for row, r in zip(block, reader.read(block, when), strict=True):
            code = reasons.setdefault(r.reason or "", len(reasons))
            lengths += [example.lengths for example in r.examples]
            counts = (r.tokens, r.trained, r.lost_tokens, r.turns, r.stops, code, r.bad, len(r.examples))
            entries.append((*counts, r.reasoning_removed, r.reasoning_left))
            if r.bad:
                messages[row] = r.message
        if progress is not None:
            progress(done + min(start + _BLOCK, len(rows)), total)
    array = np.array(entries, np.int64).reshape(-1, len(_COLUMNS))
    columns = {key: array[:, i].copy() for i, key in enumerate(_COLUMNS)}
    of_each = np.array(lengths, np.int32).reshape(-1, reader.sides)
    return RowTable(rows, epochs, columns, of_each, tuple(reasons), messages)


def _save(path: str, tables: Sequence[RowTable]) -> None:
    """Writes tables end to end."""
    told = [
        {
            "rows": len(t.rows),
            "varies": t.epochs is not None,
            "lengths": len(t.lengths),
            "reasons": t.reasons,
            "messages": {str(k): v for k, v in t.messages.items()},
        }
        for t in tables
    ]
    arrays: dict[str, Any] = {key: np.concatenate([t.columns[key] for t in tables]) for key in _COLUMNS}
    arrays["row_numbers"] = np.concatenate([t.rows for t in tables])
    arrays["epochs"] = np.concatenate([np.zeros_like(t.rows) if t.epochs is None else t.epochs for t in tables])
    arrays["lengths"] = np.concatenate([t.lengths for t in tables])
    arrays["told"] = np.frombuffer(json.dumps(told).encode(), np.uint8)
    _write(path, arrays)


def _write(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays, aside first, so that no half file is ever found."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), delete=False) as aside:
        np.savez(aside, **arrays)  # type: ignore[arg-type]
    os.replace(aside.name, path)


def _arrays(path: str) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None when it is not there or damaged, as its checksums tell."""
    if not os.path.exists(path):
        return None
    try:
        with np.load(path) as saved:
            return {key: saved[key] for key in saved.files}
    except (*_DAMAGED, AttributeError):  # AttributeError: a single array, which has no names
        return None


def _load(path: str, wanted: Sequence[Wanted], sides: Sequence[int]) -> list[RowTable] | None:
    """The tables of a file; None when it is not there, damaged, or not of these rows."""
    arrays = _arrays(path)
    try:
        tables = None if arrays is None else _tables(arrays)
    except _DAMAGED:
        return None
    if tables is None or len(tables) != len(wanted):
        return None
    fit = all(_fits(table, which, n) for table, which, n in zip(tables, wanted, sides, strict=True))
    return tables if fit else None


def _fits(table: RowTable, wanted: Wanted, sides: int) -> bool:
    """Whether a table is of these rows, and whole."""
    if not np.array_equal(table.rows, wanted.rows):
        return False
    if table.epochs is None or wanted.epochs is None:
        if table.epochs is not wanted.epochs:
            return False
    elif not np.array_equal(table.epochs, wanted.epochs):
        return False
    columns = all(len(column) == len(table.rows) for column in table.columns.values())
    return columns and table.lengths.shape == (int(table.columns["examples"].sum()), sides)


def _tables(arrays: Mapping[str, np.ndarray]) -> list[RowTable]:
    tables, row, length = [], 0, 0
    for told in json.loads(arrays["told"].tobytes()):
        here, there = slice(row, row + told["rows"]), slice(length, length + told["lengths"])
        row, length = here.stop, there.stop
        tables.append(
            RowTable(
                rows=arrays["row_numbers"][here],
                epochs=arrays["epochs"][here] if told["varies"] else None,
                columns={key: arrays[key][here] for key in _COLUMNS},
                lengths=arrays["lengths"][there],
                reasons=tuple(told["reasons"]),
                messages={int(k): v for k, v in told["messages"].items()},
            )
        )
    return tables


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()
