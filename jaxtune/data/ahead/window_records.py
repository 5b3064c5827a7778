"""A packed window as bytes, and back: what `prepare` writes and training reads.

A record is a checksum, a digest of the draws that the window is of, and arrays, each in the smallest whole numbers that
hold it. Targets are tokens one to the left, so they are stored once; weights are runs of one value; whose an example is
follows from the draws, so only their counts are kept.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence

import numpy as np

from jaxtune.data.mixing import mixture
from jaxtune.data.rows import Rows
from jaxtune.data.windows import Window

FORMAT = 1  # raise it when records change: those of before are then of another folder
_CHECKSUM, _DIGEST = 8, 16
_KINDS = ("<u1", "<u2", "<u4", "<u8", "<f4")
_HEAD = struct.Struct("<BI")  # of each array: its kind, and how many values


class Damaged(ValueError):
    """A record that is not what was written."""


class OtherDraws(ValueError):
    """A whole record of another window, or of the same one under another mixture."""


def encode(window: Window, draws: mixture.Draws, number: int, rows: Rows) -> bytes:
    """Bytes of window `number`, made of `draws`."""
    values, runs, _ = runs_of(window.joined.weights)
    bad = json.dumps(window.bad, ensure_ascii=False).encode()
    arrays = [
        _counts(window.ids, draws),
        window.lengths.reshape(-1),
        values,
        runs,
        window.order,
        np.diff(window.splits),
        np.frombuffer(bad, np.uint8),
        *rows.tokens_once(window.joined, window.lengths),
    ]
    body = b"".join([_digest(draws, number), *map(array_bytes, arrays)])
    return hashlib.blake2b(body, digest_size=_CHECKSUM).digest() + body


def decode(record: bytes, draws: mixture.Draws, number: int, rows: Rows) -> Window:
    """The window of a record, equal to the one encoded; raises Damaged, or OtherDraws."""
    body = record[_CHECKSUM:]
    if hashlib.blake2b(body, digest_size=_CHECKSUM).digest() != record[:_CHECKSUM]:
        raise Damaged("its checksum is another")
    if body[:_DIGEST] != _digest(draws, number):
        raise OtherDraws("it is of other draws")
    counts, lengths, values, runs, order, of_rows, bad, *tokens = arrays_of(body[_DIGEST:])
    of_each = lengths.astype(np.int64).reshape(-1, len(rows.room))
    names = np.stack([draws.source, draws.row, draws.epoch], axis=1).astype(np.int64)
    return Window(
        joined=rows.joined_again(tokens, of_each, np.repeat(values, runs.astype(np.int64))),
        lengths=of_each,
        ids=np.repeat(names, counts.astype(np.int64), axis=0),
        order=order.astype(np.int64),
        splits=np.concatenate([[0], np.cumsum(of_rows, dtype=np.int64)]),
        bad=tuple((source, row, message) for source, row, message in json.loads(bad.tobytes())),
    )


def _digest(draws: mixture.Draws, number: int) -> bytes:
    """What a window is known by: its number, which decides the order of its rows, and its draws."""
    digest = hashlib.blake2b(str(number).encode(), digest_size=_DIGEST)
    for array in (draws.source, draws.row, draws.epoch):
        digest.update(array.astype("<i8").tobytes())
    return digest.digest()


def _counts(ids: np.ndarray, draws: mixture.Draws) -> np.ndarray:
    """How many examples each draw gave, from their names in the order of the draws, int64 [draws]."""
    counts, at, names = np.zeros(len(draws.source), np.int64), 0, ids.tolist()
    for i, name in enumerate(np.stack([draws.source, draws.row, draws.epoch], axis=1).tolist()):
        first = at
        while at < len(names) and names[at] == name:
            at += 1
        counts[i] = at - first
    assert at == len(names), "examples are not in the order of their draws"
    return counts


def runs_of(weights: np.ndarray, lengths: Sequence[int] | np.ndarray = ()) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The value and the length of each run of one weight, and how many runs each part has, where parts of `lengths`
    are given: then no run reaches from one into the next. Two parts of 3 weights each::

        runs_of([0, 0, 1, 1, 1, 1], [3, 3]) == ([0, 1, 1], [2, 1, 3], [2, 1])
    """
    bits = weights.view(np.uint32)
    ends_run = np.diff(bits, append=~bits[-1:]) != 0
    last = np.cumsum(np.asarray(lengths, np.int64)) - 1
    ends_run[last] = True
    ends = np.flatnonzero(ends_run)
    of_each = np.diff(np.searchsorted(ends, last, side="right"), prepend=0)
    return weights[ends], np.diff(ends, prepend=-1), of_each


def array_bytes(array: np.ndarray) -> bytes:
    """An array of whole numbers, none negative, or of float32, with a head that says which and how many."""
    if array.dtype == np.float32:
        kind = "<f4"
    else:
        top = int(array.max(initial=0))
        kind = next(k for k in _KINDS[:-1] if top <= np.iinfo(k).max)
        assert int(array.min(initial=0)) >= 0
    return _HEAD.pack(_KINDS.index(kind), len(array)) + array.astype(kind).tobytes()


def arrays_of(body: bytes | memoryview) -> Iterator[np.ndarray]:
    """The arrays of `array_bytes`, end to end; views of what is given."""
    at = 0
    while at < len(body):
        kind, count = _HEAD.unpack_from(body, at)
        at += _HEAD.size
        yield np.frombuffer(body, _KINDS[kind], count, at)
        at += count * np.dtype(_KINDS[kind]).itemsize


def is_same(one: Window, other: Window) -> bool:
    """Whether two windows are equal, bit for bit; notes apart."""
    arrays: Sequence[tuple[np.ndarray, np.ndarray]] = [
        *zip(one.joined, other.joined, strict=True),
        *zip(one[1:5], other[1:5], strict=True),
    ]
    return one.bad == other.bad and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in arrays
    )
