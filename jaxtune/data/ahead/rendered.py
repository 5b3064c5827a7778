"""Rows kept as they were rendered, for as long as a command lasts: what the length pass read, windows are made of.

    CACHE/rendered/HOST-PID-RANDOM/PROCESS     blocks of rows, end to end, a file for each process that read some

A block is arrays, each in the smallest whole numbers that hold it: the rows' keys, how many examples each has, which of
them are bad and why; of the examples their lengths, tokens once and weights as runs of one value. Blocks are mapped
where they are read, so that memory stays as it is however many rows there are.
"""

import contextlib
import functools
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxtune.data.ahead.sharing import Shared
from jaxtune.data.ahead.window_records import array_bytes, arrays_of, runs_of
from jaxtune.data.examples import RowReader
from jaxtune.data.lengths import pair_keys
from jaxtune.data.packing import Example, Pair
from jaxtune.data.row_results import RowResult
from jaxtune.data.rows import PairRows, Rows, SequenceRows
from jaxtune.run_lock import process_start

_FOLDER = "rendered"
_BY_SIDES: dict[int, Rows] = {1: SequenceRows(0, True), 2: PairRows(0, True, 0, 0)}  # for their way with tokens
_BLOCKS_OPEN = 1024  # of each process
_FREE_BYTES = 1 << 30  # left on the disk for the windows


class Block(NamedTuple):
    """Where some rows of a reader lie, ascending by key, the first of which is `first`."""

    path: str
    offset: int
    size: int
    first: int


class Spool:
    """The rows that a command has rendered, until it closes this."""

    def __init__(self, cache_dir: str) -> None:
        base = os.path.join(cache_dir, _FOLDER)
        os.makedirs(base, exist_ok=True)
        _clear(base)
        self.folder = tempfile.mkdtemp(prefix=f"{socket.gethostname()}-{os.getpid()}-", dir=base)
        self.is_full = False  # the disk took no more
        self._kept: dict[int, dict[Shared, _Kept]] = {}  # by the reader

    def close(self) -> None:
        """Takes the rows away."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, reader: RowReader, readers: Shared, number: int, block: Block | None, *, rows: int) -> None:
        """Notes where `rows` rows of a reader lie, which is `number` of those shared; a block that the disk did not
        take is None. Blocks of one reading come in the order of their rows."""
        if block is None:
            self.is_full = True
            return
        kept = self._kept.setdefault(id(reader), {}).setdefault(readers, _Kept(reader, readers, number, []))
        kept.blocks.append((block, rows))

    def rows_of(self, reader: RowReader) -> int:
        """How many rows of a reader are here."""
        found = self._most(reader)
        return 0 if found is None else found.rows

    def reading(self, reader: RowReader) -> "RowReader | RenderedRows":
        """What reads the rows of a reader from here; itself where none of them are."""
        found = self._most(reader)
        if found is None:
            return reader
        blocks = [block for block, _ in found.blocks]
        return RenderedRows(found.readers, found.number, reader.sides, reader.varies, blocks)

    def _most(self, reader: RowReader) -> "_Kept | None":
        """Of several readings of a reader the one of most rows."""
        return max(self._kept.get(id(reader), {}).values(), key=lambda kept: kept.rows, default=None)


class _Kept(NamedTuple):
    """Blocks of one reading of a reader, with how many rows each has."""

    reader: RowReader
    readers: Shared
    number: int
    blocks: list[tuple[Block, int]]

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.blocks)


class RenderedRows:
    """Reads rows as `RowReader.read` does, from where they were kept; others are rendered. Travels to workers."""

    def __init__(self, readers: Shared, number: int, sides: int, varies: bool, blocks: Sequence[Block]) -> None:
        self._readers, self._number, self._blocks = readers, number, blocks
        self._sides, self._varies = sides, varies
        self._firsts = np.array([block.first for block in blocks], np.int64)

    def read(self, rows: Sequence[int], epochs: Sequence[int]) -> list[RowResult]:
        """Of each row in its epoch the examples, and whether and why it is bad."""
        wanted = keys_of(np.array(rows, np.int64), np.array(epochs, np.int64) if self._varies else None)
        out: list[RowResult | None] = [None] * len(wanted)
        blocks = np.searchsorted(self._firsts, wanted, side="right") - 1
        for b in np.unique(blocks[blocks >= 0]).tolist():
            at = np.flatnonzero(blocks == b)
            for i, result in zip(at.tolist(), _open(self._blocks[b], self._sides).read(wanted[at]), strict=True):
                out[i] = result
        missing = [i for i, result in enumerate(out) if result is None]
        if missing:
            reader: RowReader = self._readers.get()[self._number]
            again = reader.read([rows[i] for i in missing], [epochs[i] for i in missing])
            for i, result in zip(missing, again, strict=True):
                out[i] = result
        return [result for result in out if result is not None]


def keys_of(rows: np.ndarray, epochs: np.ndarray | None) -> np.ndarray:
    """What rows are found by, int64: their numbers, and their epochs where these matter."""
    return rows if epochs is None else pair_keys(rows, epochs)


def keep(folder: str, keys: np.ndarray, results: Sequence[RowResult], *, sides: int) -> Block | None:
    """Appends rows to this process's file; None when the disk has no room for them, and they are rendered again."""
    path = os.path.join(folder, str(os.getpid()))
    content = _encoded(keys, results, sides)
    if shutil.disk_usage(folder).free < _FREE_BYTES:
        return None
    with contextlib.suppress(OSError), open(path, "ab") as file:
        offset = file.tell()
        file.write(content)
        file.flush()
        return Block(path, offset, len(content), int(keys[0]))
    return None


def _encoded(keys: np.ndarray, results: Sequence[RowResult], sides: int) -> bytes:
    kind = _BY_SIDES[sides]
    examples = [example for result in results for example in result.examples]
    lengths = np.array([example.lengths for example in examples], np.int64).reshape(-1, sides)
    joined = kind.joined(examples)
    values, runs, of_each = runs_of(joined.weights, lengths[:, -1])
    messages = {i: result.message for i, result in enumerate(results) if result.bad}
    arrays = [
        keys,
        np.array([len(result.examples) for result in results], np.int64),
        lengths.reshape(-1),
        of_each,
        values,
        runs,
        np.frombuffer(json.dumps(messages).encode(), np.uint8),
        *kind.tokens_once(joined, lengths),
    ]
    return b"".join(map(array_bytes, arrays))


class _Rows:
    """The rows of a block, mapped."""

    def __init__(self, body: memoryview, sides: int) -> None:
        keys, counts, lengths, of_each, self._values, self._runs, messages, *self._tokens = arrays_of(body)
        self._keys = keys.astype(np.int64)
        self._examples = _places(counts)
        self._lengths = lengths.astype(np.int64).reshape(-1, sides)
        self._run_places = _places(of_each)
        tokens = self._lengths + 1 if sides == 1 else self._lengths
        self._token_places = [_places(tokens[:, side]) for side in range(sides)]
        self._messages = {int(i): message for i, message in json.loads(messages.tobytes()).items()}

    def read(self, wanted: np.ndarray) -> list[RowResult | None]:
        """The rows of these keys, each None where it is not here."""
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        here = self._keys[at] == wanted
        return [self._row(i) if found else None for i, found in zip(at.tolist(), here.tolist(), strict=True)]

    def _row(self, i: int) -> RowResult:
        examples = [self._example(e) for e in range(self._examples[i], self._examples[i + 1])]
        return RowResult(examples, bad=i in self._messages, message=self._messages.get(i, ""))

    def _example(self, e: int) -> Example | Pair:
        runs = slice(self._run_places[e], self._run_places[e + 1])
        weights = np.repeat(self._values[runs], self._runs[runs])
        sides = [
            tokens[places[e] : places[e + 1]].astype(np.int32)
            for tokens, places in zip(self._tokens, self._token_places, strict=True)
        ]
        if len(sides) == 1:
            return Example(sides[0][:-1], sides[0][1:], weights)
        return Pair(sides[0], sides[1], weights)


@functools.lru_cache(maxsize=_BLOCKS_OPEN)
def _open(block: Block, sides: int) -> _Rows:
    return _Rows(np.memmap(block.path, np.uint8, "r", block.offset, (block.size,)).data, sides)


def _places(counts: np.ndarray) -> np.ndarray:
    """Where each of things with these counts begins, and where the last one ends, int64."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _clear(base: str) -> None:
    """Takes away what commands of this host left here that were killed."""
    mine = f"{socket.gethostname()}-"
    for name in os.listdir(base):
        pid = name.removeprefix(mine).partition("-")[0]
        if name.startswith(mine) and pid.isdigit() and process_start(int(pid)) is None:
            shutil.rmtree(os.path.join(base, name), ignore_errors=True)
