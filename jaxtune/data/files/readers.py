"""Rows by index: what a source is, and one for each kind of file.

Readers hold paths and a few numbers, and read through the pool of open files (`spool.py`), so that thousands of them
take no memory and no file descriptors; they travel to worker processes as they are. Workers import this and not
`sources`, whose libraries take longer to import than thousands of rows to read.
"""

import bisect
import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from jaxtune.data.files.line_index import ArrayFile, LineIndex
from jaxtune.data.files.spool import OPENED, digest_of, stamp_of
from jaxtune.data.records import RowError

_FIRST_LINES = 20  # of a file without a header, most of which say how many columns it has
COT_COLUMNS = ("question", "answer", "chain_of_thought")


class Source(Protocol):
    """Random access to rows; `fingerprint` changes when any row does."""

    fingerprint: str

    def __len__(self) -> int: ...

    def row(self, i: int) -> dict[str, Any]:
        """Row i as a dict; raises RowError when it cannot be read."""

    def where(self, i: int) -> str:
        """Where a person finds row i: `file:line`."""

    def raw(self, i: int) -> str:
        """Row i as it stands in its file, readable or not."""


class Concatenated:
    """Several sources one after another."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in parts]).tolist()
        self.fingerprint = digest_of(*(part.fingerprint for part in parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def _locate(self, i: int) -> tuple[Source, int]:
        part = bisect.bisect_right(self.ends, i)
        return self.parts[part], i - (self.ends[part - 1] if part else 0)

    def row(self, i: int) -> dict[str, Any]:
        part, j = self._locate(i)
        return part.row(j)

    def where(self, i: int) -> str:
        part, j = self._locate(i)
        return part.where(j)

    def raw(self, i: int) -> str:
        part, j = self._locate(i)
        return part.raw(j)


class JsonLines:
    """One JSON object a line; blank lines and a byte-order mark are passed over.

    `numbers` is the file with the line that each row began on in the file it is shown as.
    """

    def __init__(self, path: str, *, cache_dir: str, shown_as: str | None = None, numbers: str | None = None) -> None:
        self.path = path
        self.shown_as = shown_as or path
        self.index = LineIndex(path, cache_dir=cache_dir)
        self.fingerprint = self.index.fingerprint
        self._numbers = None if numbers is None else ArrayFile(numbers, len(self.index))

    def __len__(self) -> int:
        return len(self.index)

    def raw(self, i: int) -> str:
        return self.index.line(i).decode("utf-8", "replace").rstrip("\r")

    def row(self, i: int) -> dict[str, Any]:
        raw = self.index.line(i)
        text = decoded(raw)
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            near = raw.decode("utf-8", "replace")[max(0, error.pos - 15) : error.pos + 15]
            raise RowError(
                "invalid JSON",
                f"column {error.colno}: {error.msg}, near {near!r}; expected one complete JSON object a line",
            ) from error
        if b"\\u" in raw:
            _check_escapes(value)
        if not isinstance(value, dict):
            raise RowError(
                "not an object", f"found a JSON {type(value).__name__}; expected an object {{...}} with named columns"
            )
        return value

    def where(self, i: int) -> str:
        number = self.index.number(i) if self._numbers is None else int.from_bytes(self._numbers.read(i, 8), "little")
        return f"{self.shown_as}:{number}"


def decoded(raw: bytes) -> str:
    """The bytes as UTF-8 text; raises RowError naming the byte that is not."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(
            "not UTF-8", f"byte {error.start + 1} of the line is {raw[error.start]:#04x}; expected UTF-8 text"
        ) from error


def _check_escapes(value: Any) -> None:
    """Raises RowError for half of a surrogate pair, which JSON can write and no text can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("ascii", "backslashreplace").decode()
        near = error.object[max(0, error.start - 15) : error.start].encode("utf-8", "replace").decode()
        raise RowError(
            "not Unicode", f"found {half}, half of a surrogate pair, after {near!r}; expected both halves, or neither"
        ) from error


class CommaSeparated(JsonLines):
    """The rows of a CSV file, an object each; a list [header, cells] is a row that does not fit the header."""

    def _misfit(self, i: int) -> tuple[list[str], list[str]] | None:
        line = self.index.line(i)
        return tuple(json.loads(line)) if line.startswith(b"[") else None

    def raw(self, i: int) -> str:
        misfit = self._misfit(i)
        if misfit is None:
            return super().raw(i)
        text = io.StringIO()
        csv.writer(text, lineterminator="").writerow(misfit[1])
        return text.getvalue()

    def row(self, i: int) -> dict[str, Any]:
        misfit = self._misfit(i)
        if misfit is not None:
            raise _misfitting(misfit[1], misfit[0])
        return super().row(i)


def _misfitting(cells: Sequence[str], columns: Sequence[str]) -> RowError:
    return RowError(
        "wrong number of columns", f"found {len(cells)} columns; expected {len(columns)}: {', '.join(columns)}"
    )


class TaskInstances(JsonLines):
    """The instances of a NaturalInstructions task, a line each, with what the whole task says added to every row."""

    def __init__(self, path: str, *, cache_dir: str, shown_as: str, task: str) -> None:
        super().__init__(path, cache_dir=cache_dir, shown_as=shown_as)
        self._task = task

    def _shared(self) -> Mapping[str, Any]:
        def read() -> Any:
            with open(self._task, encoding="utf-8") as file:
                return json.load(file)

        return OPENED.get((self._task, self.index.stamp), read)

    def row(self, i: int) -> dict[str, Any]:
        return {**self._shared(), **super().row(i)}

    def where(self, i: int) -> str:
        return f"{self.shown_as}:instance {i + 1}"


class Tabbed:
    """Tab-separated lines, without quoting: as they stand under the first line's names, or FLAN's without a header.

    The first line is a header when every cell is a name of its own (letters, digits, _). Without one a file of three
    columns is FLAN's chain of thought, where the two characters \\n stand for a line break.
    """

    def __init__(self, path: str, *, cache_dir: str, shown_as: str) -> None:
        self.shown_as = shown_as
        self.index = LineIndex(path, cache_dir=cache_dir)
        self.fingerprint = self.index.fingerprint
        cells = [self._cells(i) for i in range(min(len(self.index), _FIRST_LINES))]
        first = cells[0] if cells else []
        self.has_header = len(set(first)) == len(first) > 1 and all(re.fullmatch(r"[A-Za-z_]\w*", c) for c in first)
        if not self.has_header and sum(len(c) == len(COT_COLUMNS) for c in cells) * 2 < len(cells):
            raise ValueError(
                f"{shown_as}: found {len(first)} columns and no header; expected a first line of column names, or "
                f"three columns ({', '.join(COT_COLUMNS)})"
            )
        self.columns = tuple(first) if self.has_header else COT_COLUMNS

    def __len__(self) -> int:
        return len(self.index) - self.has_header

    def _cells(self, line: int) -> list[str]:
        """Cells of a line, readable or not: a line that is not UTF-8 is told of as a row."""
        return self.index.line(line).decode("utf-8", "replace").rstrip("\r").split("\t")

    def raw(self, i: int) -> str:
        return self.index.line(i + self.has_header).decode("utf-8", "replace").rstrip("\r")

    def row(self, i: int) -> dict[str, Any]:
        cells = decoded(self.index.line(i + self.has_header)).rstrip("\r").split("\t")
        if len(cells) != len(self.columns):
            raise _misfitting(cells, self.columns)
        if not self.has_header:
            cells = [cell.replace("\\n", "\n") for cell in cells]
        return dict(zip(self.columns, cells, strict=True))

    def where(self, i: int) -> str:
        return f"{self.shown_as}:{self.index.number(i + self.has_header)}"


class ArrowRows:
    """Rows of an Arrow file in the cache, memory-mapped while it is in use."""

    def __init__(self, path: str, *, shown_as: str, fingerprint: str) -> None:
        self.shown_as, self.path, self.fingerprint = shown_as, path, fingerprint
        self._stamp = stamp_of(path)
        self._rows = self._opened()[1][-1]

    def _opened(self) -> tuple[list[pa.RecordBatch], list[int]]:
        """Batches, and the number of rows up to the end of each."""

        def read() -> Any:
            reader = pa.ipc.open_file(pa.memory_map(self.path))
            batches = [reader.get_batch(k) for k in range(reader.num_record_batches)]
            return batches, np.cumsum([0, *(batch.num_rows for batch in batches)], dtype=np.int64).tolist()

        return OPENED.get((self.path, self._stamp), read)

    def __len__(self) -> int:
        return self._rows

    def row(self, i: int) -> dict[str, Any]:
        batches, ends = self._opened()
        if not 0 <= i < self._rows:
            raise IndexError(i)
        k = bisect.bisect_right(ends, i) - 1
        return batches[k].slice(i - ends[k], 1).to_pylist()[0]

    def where(self, i: int) -> str:
        return f"{self.shown_as}:row {i + 1}"

    def raw(self, i: int) -> str:
        return json.dumps(self.row(i), ensure_ascii=False, default=str)


class ArrayRecords:
    """Records of an ArrayRecord file, each a JSON object."""

    def __init__(self, path: str, *, shown_as: str, fingerprint: str) -> None:
        self.shown_as, self.path, self.fingerprint = shown_as, path, fingerprint
        self._stamp = stamp_of(path)
        self._rows = self._opened().num_records()

    def _opened(self) -> Any:
        return OPENED.get((self.path, self._stamp), lambda: open_array_record(self.path, self.shown_as))

    def __len__(self) -> int:
        return self._rows

    def raw(self, i: int) -> str:
        return self._bytes(i).decode("utf-8", "replace")

    def _bytes(self, i: int) -> bytes:
        return self._opened().read([i])[0]

    def row(self, i: int) -> dict[str, Any]:
        raw = self._bytes(i)
        try:
            value = json.loads(raw)
        except ValueError as error:
            raise RowError(
                "invalid JSON",
                f"the record begins {raw[:20]!r}; expected the bytes of a JSON object; write the columns as JSON "
                "(serialized tf.Example protos are not read)",
            ) from error
        if not isinstance(value, dict):
            raise RowError(
                "not an object", f"found a JSON {type(value).__name__}; expected an object {{...}} with named columns"
            )
        return value

    def where(self, i: int) -> str:
        return f"{self.shown_as}:record {i + 1}"


def open_array_record(path: str, shown_as: str) -> Any:
    """The array_record package's reader of a file; raises ValueError where the package or a whole file is missing."""
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise ValueError(f"{shown_as}: {error}; ArrayRecord files need the package array_record") from error
    try:
        reader = array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0")
    except Exception as error:
        raise ValueError(f"{shown_as}: not a readable ArrayRecord file ({error})") from error
    if not reader.ok():
        raise ValueError(f"{shown_as}: not a readable ArrayRecord file; write or fetch it again")
    return reader
