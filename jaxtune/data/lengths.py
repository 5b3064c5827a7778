"""The length pass: every row rendered and tokenised once before the run, or taken from the cache of an earlier pass.

What is kept of a row is the lengths of its examples and what was lost, under a key of everything that decides it.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.data.examples import RowReader
from jaxtune.data.files.spool import digest_of
from jaxtune.data.records import NothingToLearn, RowError
from jaxtune.data.row_results import STAGES, RowResult
from jaxtune.data.saved_arrays import DAMAGED, read_arrays, write_arrays

Progress = Callable[[int, int], None]
_BLOCK = 1024
_VERSION = "5"  # of everything between a row and its tokens: raise it when the code's answer changes
_COLUMNS = (
    *("tokens", "trained", "lost", "left_out", "turns", "stops", "reason", "stage", "bad", "examples"),
    *("reasoning_removed", "reasoning_left"),
)


@dataclasses.dataclass(frozen=True)
class RowTable:
    """What became of each of `rows` (int64 [n]): arrays [n], and of all their examples in order `lengths` [examples
    sides], int32: of the sequence, or of encoder and decoder.

    `epochs` int64 [n] where a row's examples depend on the epoch, else None; entries ascend by epoch, then by row.
    `reason` indexes `reasons`, whose entry 0 is for rows without loss; `stage` is the number, from 1, of that of
    row_results.STAGES which (part of) the row did not reach; `messages` tells each bad row's full story.
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
        return np.searchsorted(pair_keys(self.rows, self.epochs), pair_keys(rows, epochs))

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


# As `read_here`, perhaps by other processes.
ReadAll = Callable[[Sequence[RowReader], Sequence[Wanted], Progress | None, int, int], Iterable[RowTable]]


def pairs(rows: np.ndarray, epochs: np.ndarray) -> Wanted:
    """The different (row, epoch) pairs of some draws."""
    keys = np.unique(pair_keys(rows, epochs))
    return Wanted(keys & ((1 << 40) - 1), keys >> 40)


def pair_keys(rows: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """A number for each (row, epoch), int64, ascending by epoch, then by row."""
    return (epochs.astype(np.int64) << 40) | rows.astype(np.int64)


def measure(
    readers: Sequence[RowReader],
    wanted: Sequence[Wanted],
    *,
    cache_dir: str,
    progress: Progress | None = None,
    read_all: ReadAll | None = None,
) -> list[RowTable]:
    """A table for each reader: from the cache, or by reading the rows, by `read_all` if given.

    All tables of a stream are kept in one file, so that thousands of sources open at once; a source that was measured
    beside others before is found again under its own key.
    """
    folder = os.path.join(cache_dir, "lengths")
    own = [_wanted_key(key, which) for key, which in zip(reader_keys(readers), wanted, strict=True)]
    together = os.path.join(folder, f"{digest_of(*own)}.npz")
    sides = [reader.sides for reader in readers]
    found = _load(together, wanted, sides)
    if found is not None:
        return found
    paths = [os.path.join(folder, f"{key}.npz") for key in own]
    saved = [_load(path, [which], [n]) for path, which, n in zip(paths, wanted, sides, strict=True)]
    missing = [i for i, tables in enumerate(saved) if tables is None]
    total = sum(len(which.rows) for which in wanted)
    done = total - sum(len(wanted[i].rows) for i in missing)
    read = (read_all or read_here)([readers[i] for i in missing], [wanted[i] for i in missing], progress, done, total)
    for i, table in zip(missing, read, strict=True):
        saved[i] = [table]
        if len(readers) > 1:
            _save(paths[i], [table])
    whole = [table for tables in saved if tables is not None for table in tables]
    _save(together, whole)
    return whole


def cached_hashes(
    readers: Sequence[RowReader], keys: Sequence[str], cache_dir: str, *, progress: Progress | None = None
) -> np.ndarray:
    """Content hashes of all rows of some readers, uint64 ascending, each once; from the cache, or by reading them.

    A text that stands in several rows of a source (an instruction, a list of options) is no row's own and is left out;
    rows that are alike count as one.
    """
    path = os.path.join(cache_dir, "lengths", f"hashes-{digest_of(*keys)}.npz")
    saved = read_arrays(path)
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
    write_arrays(path, {"hashes": found})
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
            tokenizers[id(tokenizer)] = digest_of(tokenizer.backend_tokenizer.to_str(), special)
        keys.append(
            digest_of(
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


def read_here(
    readers: Sequence[RowReader], wanted: Sequence[Wanted], progress: Progress | None, done: int, total: int
) -> Iterator[RowTable]:
    """The table of the rows wanted of each reader, read by this process; `done` of `total` rows were read before."""
    for reader, which in zip(readers, wanted, strict=True):
        blocks = []
        for block in portions(which):
            blocks.append(tabulate(reader, block, reader.read(*numbers(block))))
            done += len(block.rows)
            if progress is not None:
                progress(done, total)
        yield joined(reader, which, blocks)


def portions(wanted: Wanted) -> Iterator[Wanted]:
    """The rows wanted, block by block."""
    for start in range(0, len(wanted.rows), _BLOCK):
        yield portion(wanted, start, start + _BLOCK)


def portion(wanted: Wanted, start: int, stop: int) -> Wanted:
    """Some of the rows wanted."""
    return Wanted(wanted.rows[start:stop], None if wanted.epochs is None else wanted.epochs[start:stop])


def numbers(wanted: Wanted) -> tuple[list[int], list[int]]:
    """Rows and epochs as `RowReader.read` takes them."""
    return wanted.rows.tolist(), [0] * len(wanted.rows) if wanted.epochs is None else wanted.epochs.tolist()


def tabulate(reader: RowReader, wanted: Wanted, results: Sequence[RowResult]) -> RowTable:
    """The table of some rows, of what became of each."""
    reasons: dict[str, int] = {"": 0}
    entries = []
    for r in results:
        code = reasons.setdefault(r.reason or "", len(reasons))
        stage = 0 if r.stage is None else 1 + STAGES.index(r.stage)
        counts = (r.tokens, r.trained, r.lost_tokens, r.left_out_tokens, r.turns, r.stops)
        entries.append((*counts, code, stage, r.bad, len(r.examples), r.reasoning_removed, r.reasoning_left))
    array = np.array(entries, np.int64).reshape(-1, len(_COLUMNS))
    columns = {key: array[:, i].copy() for i, key in enumerate(_COLUMNS)}
    of_each = np.array([e.lengths for r in results for e in r.examples], np.int32).reshape(-1, reader.sides)
    messages = {row: r.message for row, r in zip(wanted.rows.tolist(), results, strict=True) if r.bad}
    return RowTable(wanted.rows, wanted.epochs, columns, of_each, tuple(reasons), messages)


def joined(reader: RowReader, wanted: Wanted, tables: Sequence[RowTable]) -> RowTable:
    """One table of those of portions, which are all the rows wanted, in order."""
    reasons: dict[str, int] = {"": 0}
    for table in tables:
        for reason in table.reasons:
            reasons.setdefault(reason, len(reasons))
    columns = {key: np.concatenate([np.zeros(0, np.int64), *(t.columns[key] for t in tables)]) for key in _COLUMNS}
    codes = [np.array([reasons[reason] for reason in t.reasons])[t.columns["reason"]] for t in tables]
    columns["reason"] = np.concatenate([np.zeros(0, np.int64), *codes])
    of_each = np.concatenate([np.zeros((0, reader.sides), np.int32), *(t.lengths for t in tables)])
    messages = {row: message for t in tables for row, message in t.messages.items()}
    return RowTable(wanted.rows, wanted.epochs, columns, of_each, tuple(reasons), messages)


def keep(readers: Sequence[RowReader], wanted: Sequence[Wanted], tables: Sequence[RowTable], *, cache_dir: str) -> None:
    """Puts tables where `measure` will find them, for these readers and rows."""
    own = [_wanted_key(key, which) for key, which in zip(reader_keys(readers), wanted, strict=True)]
    _save(os.path.join(cache_dir, "lengths", f"{digest_of(*own)}.npz"), tables)


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
    write_arrays(path, arrays)


def _load(path: str, wanted: Sequence[Wanted], sides: Sequence[int]) -> list[RowTable] | None:
    """The tables of a file; None when it is not there, damaged, or not of these rows."""
    arrays = read_arrays(path)
    try:
        tables = None if arrays is None else _tables(arrays)
    except DAMAGED:
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
