"""Where each line of a file is: found once, by a newline search at the speed of reading, and kept in the cache.

The index stays on disk: 12 bytes a row, of which only those asked for are read. Opening an indexed file reads a few
dozen bytes, whatever its size.
"""

import hashlib
import json
import os
import struct

import numpy as np

from jaxtune.data.files.spool import forget, read_at, spooled, stamp_of

CHUNK = 1 << 24
BOM = b"\xef\xbb\xbf"
_PLACE = np.dtype([("start", "<u8"), ("length", "<u4")])
_LONGEST = 2**32 - 1


class LineIndex:
    """The rows of a file: its lines that are not blank, without line ends and byte-order mark."""

    def __init__(self, path: str, *, cache_dir: str) -> None:
        self.path, self.stamp = path, stamp_of(path)
        for attempt in (1, 2):
            self._index = spooled("lines", self.stamp, ".index", cache_dir, lambda out: _write_index(path, out))
            try:
                with open(self._index, encoding="utf-8") as file:
                    known = json.load(file)
                self.fingerprint, self._rows, self._blank = str(known["digest"]), int(known["rows"]), known["blank"]
                break
            except (ValueError, KeyError, TypeError):
                if attempt == 2:
                    raise
                forget(self._index)
        self._places, self._numbers = (ArrayFile(self._index + name, self._rows) for name in (".places", ".numbers"))

    def __len__(self) -> int:
        return self._rows

    def line(self, i: int) -> bytes:
        """The bytes of row i."""
        start, length = struct.unpack("<QI", self._places.read(i, _PLACE.itemsize))
        return read_at(self.path, self.stamp, start, length)

    def number(self, i: int) -> int:
        """The line that row i stands on, from 1."""
        return struct.unpack("<Q", self._numbers.read(i, 8))[0] if self._blank else i + 1


class ArrayFile:
    """Items of a .npy file of `rows` items, one at a time, the file neither loaded nor kept open."""

    def __init__(self, path: str, rows: int) -> None:
        self._path, self._rows = path, rows
        self._known: tuple[str, int] | None = None  # stamp, and size of the header; set at once, for threads

    def read(self, i: int, size: int) -> bytes:
        """The bytes of item i, of `size` each."""
        if not 0 <= i < self._rows:
            raise IndexError(i)
        if self._known is None:
            self._known = stamp_of(self._path), os.path.getsize(self._path) - self._rows * size
        stamp, header = self._known
        return read_at(self._path, stamp, header + i * size, size)


def _write_index(path: str, out: str) -> None:
    """Finds every line in one pass: newline positions by numpy, a hash of the bytes on the way."""
    digest = hashlib.blake2b(digest_size=16)
    found, firsts, offset, last = [], [], 0, b"\n"
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            data = np.frombuffer(chunk, np.uint8)
            newlines = np.flatnonzero(data == 10)
            found.append(newlines + offset)
            # The byte after each newline tells a blank line; at a chunk's edge it is the next chunk's first byte.
            if last == b"\n":
                firsts.append(data[:1])
            inside = newlines[:-1] if len(newlines) and newlines[-1] == len(data) - 1 else newlines
            firsts.append(data[inside + 1])
            offset += len(chunk)
            last = chunk[-1:]
    ends = np.concatenate([np.zeros(0, np.int64), *found])
    first = np.concatenate([np.zeros(0, np.uint8), *firsts])
    if offset and last != b"\n":
        ends = np.append(ends, offset)
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)[: len(ends)]
    keep = _not_blank(path, starts, ends, first)
    places = np.empty(int(keep.sum()), _PLACE)
    places["start"], lengths = starts[keep], (ends - starts)[keep]
    if len(lengths) and lengths.max() > _LONGEST:
        raise ValueError(f"{path}: a line has {lengths.max()} bytes; expected at most {_LONGEST} in one row")
    places["length"] = lengths
    _save(out + ".places", places)
    if not keep.all():
        _save(out + ".numbers", (np.flatnonzero(keep) + 1).astype("<u8"))
    with open(out, "w", encoding="utf-8") as saved:
        json.dump({"digest": digest.hexdigest(), "rows": len(places), "blank": not keep.all()}, saved)


def _not_blank(path: str, starts: np.ndarray, ends: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Which lines hold more than white space; moves the first past a byte-order mark."""
    keep = np.ones(len(starts), bool)
    with open(path, "rb") as file:
        if file.read(3) == BOM and len(starts):
            starts[0] = 3
        for i in np.flatnonzero((first <= 32) | (starts == ends) | (starts == 3)):
            file.seek(int(starts[i]))
            keep[i] = bool(file.read(int(ends[i] - starts[i])).strip())
    return keep


def _save(path: str, array: np.ndarray) -> None:
    with open(path, "wb") as file:  # np.save would add .npy to the name
        np.save(file, array)
