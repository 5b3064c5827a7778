"""Rows by index, wherever they are stored.

A source answers `len`, `row(i)` and `where(i)`; nothing above it knows a file format. JSON lines are indexed once by a
newline search; compressed, remote, JSON-array and Parquet files are first spooled into the cache in a form with
random access. Sources travel to worker processes: they hold paths and arrays, and open files when asked.
"""

import bisect
import gzip
import hashlib
import io
import json
import os
import shutil
import tempfile
import urllib.parse
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxtune import hub
from jaxtune.config import SourceConfig
from jaxtune.data.records import RowError

MissingSource = hub.MissingSource
_CHUNK = 1 << 24
_BOM = b"\xef\xbb\xbf"


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


def open_source(config: SourceConfig, *, cache_dir: str | None = None) -> Source:
    """Opens what `config.path` names: files, a folder, a glob, a URL, a saved dataset or a hub dataset."""
    cache = cache_dir or hub.cache_dir()
    path = os.path.expanduser(config.path)
    if os.path.isdir(path) and any(os.path.exists(os.path.join(path, f)) for f in ("state.json", "dataset_dict.json")):
        return HubDataset(*_choose_split(datasets.load_from_disk(path), config), path=config.path)
    local = config.path.startswith(hub.BUILTIN) or hub.is_url(path) or os.path.exists(path)
    if not local and hub.is_hub_id(config.path):
        return HubDataset(*_load_hub_dataset(config), path=config.path)
    for key in ("name", "split", "revision"):
        if config.model_dump()[key] is not None:
            raise ValueError(f"{config.path}: found {key}, but plain files have none; it is for datasets of the hub")
    parts = [_open_file(file, cache) for file in hub.resolve_files(config.path)]
    return parts[0] if len(parts) == 1 else Concatenated(parts)


class Concatenated:
    """Several sources one after another."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in parts]).tolist()
        self.fingerprint = _digest(*(part.fingerprint for part in parts))

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
    """One JSON object a line; blank lines and a byte-order mark are passed over."""

    def __init__(
        self, path: str, *, cache_dir: str, shown_as: str | None = None, lines: np.ndarray | None = None
    ) -> None:
        self.path = path
        self.shown_as = shown_as or path
        index = _cached_index(path, cache_dir)
        self.starts, self.lengths = index["starts"], index["lengths"]
        self.lines = lines if lines is not None else index["lines"]  # 1-based line of each row; empty: i + 1
        self.fingerprint = str(index["digest"])
        self._file: io.FileIO | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def _bytes(self, i: int) -> bytes:
        if self._file is None:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115  (kept open, row after row)
        return os.pread(self._file.fileno(), int(self.lengths[i]), int(self.starts[i]))

    def raw(self, i: int) -> str:
        return self._bytes(i).decode("utf-8", "replace").rstrip("\r")

    def row(self, i: int) -> dict[str, Any]:
        raw = self._bytes(i)
        try:
            value = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RowError(
                "not UTF-8", f"byte {error.start + 1} of the line is {raw[error.start]:#04x}; expected UTF-8 text"
            ) from error
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
        return f"{self.shown_as}:{int(self.lines[i]) if len(self.lines) else i + 1}"


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


class ArrowRows:
    """Rows of a Parquet file, spooled once to a memory-mapped Arrow file, since Parquet has no row access."""

    def __init__(self, path: str, *, cache_dir: str, shown_as: str | None = None) -> None:
        self.shown_as = shown_as or path
        self.fingerprint = _file_digest(path)
        self.path = _spooled(f"parquet:{path}", _stamp(path), ".arrow", cache_dir, lambda out: _to_arrow(path, out))
        self._batches: list[pa.RecordBatch] | None = None
        self._open()

    def _open(self) -> list[pa.RecordBatch]:
        if self._batches is None:
            reader = pa.ipc.open_file(pa.memory_map(self.path))
            self._batches = [reader.get_batch(k) for k in range(reader.num_record_batches)]
            self.ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64).tolist()
        return self._batches

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": None}

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def row(self, i: int) -> dict[str, Any]:
        batches = self._open()
        k = bisect.bisect_right(self.ends, i)
        return batches[k].slice(i - (self.ends[k - 1] if k else 0), 1).to_pylist()[0]

    def where(self, i: int) -> str:
        return f"{self.shown_as}:row {i + 1}"

    def raw(self, i: int) -> str:
        return json.dumps(self.row(i), ensure_ascii=False, default=str)


class HubDataset:
    """Rows of a `datasets.Dataset`, saved on disk or from the hub."""

    def __init__(self, dataset: Any, split: str | None, *, path: str) -> None:
        self.dataset = dataset
        self.name = path if split is None else f"{path}[{split}]"
        self.fingerprint = _digest(self.name, str(len(dataset)), str(dataset.features), _rows_digest(dataset))

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, i: int) -> dict[str, Any]:
        return dict(self.dataset[int(i)])

    def where(self, i: int) -> str:
        return f"{self.name}:row {i + 1}"

    def raw(self, i: int) -> str:
        return json.dumps(self.row(i), ensure_ascii=False, default=str)


def _rows_digest(dataset: Any) -> str:
    """A hash of all rows, block by block: the library's own fingerprint depends on how its cache was made."""
    digest = hashlib.blake2b(digest_size=16)
    for block in dataset.with_format("arrow").iter(batch_size=4096):
        for batch in block.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


def _load_hub_dataset(config: SourceConfig) -> tuple[Any, str | None]:
    try:
        return _choose_split(datasets.load_dataset(config.path, config.name, revision=config.revision), config)
    except ValueError:
        raise  # a wrong name or split: the library lists the right ones
    except Exception as error:
        raise MissingSource(hub.hub_problem(config.path, error, kind="dataset", revision=config.revision)) from error


def _choose_split(loaded: Any, config: SourceConfig) -> tuple[Any, str | None]:
    """The split asked for, `train`, or the only one; with its name where there is one."""
    if not isinstance(loaded, dict):
        only = None if loaded.split is None else str(loaded.split)
        if config.split not in (None, only):
            raise ValueError(
                f"{config.path}: found {only or 'a dataset without splits'}; expected split {config.split!r}"
            )
        return loaded, only
    split = config.split or ("train" if "train" in loaded else next(iter(loaded)) if len(loaded) == 1 else None)
    if split not in loaded:
        found = ", ".join(loaded)
        raise ValueError(f"{config.path}: split {split!r} is not there; found {found}; set `split` to one of these")
    return loaded[split], split


def _open_file(file: str, cache: str) -> Source:
    """Opens one file by what its name and first bytes say."""
    local = file
    if hub.is_url(file):
        local = _spooled(file, _remote_stamp(file), _suffix(file), cache, lambda out: _fetch(file, out))
    if file.endswith(".parquet"):
        return ArrowRows(local, cache_dir=cache, shown_as=file)
    if not file.endswith(hub.DATA_SUFFIXES):
        expected = ", ".join(hub.DATA_SUFFIXES)
        raise ValueError(f"{file}: found a file of unknown kind; expected a name ending {expected}")
    if file.endswith(".gz"):
        packed = local
        local = _spooled(f"gz:{file}", _stamp(packed), _suffix(file[:-3]), cache, lambda out: _gunzip(packed, out))
    if file.removesuffix(".gz").endswith(".json") and _first_character(local) == b"[":
        array = local
        local = _spooled(f"array:{local}", _stamp(array), ".jsonl", cache, lambda out: _explode(array, out, file))
        return JsonLines(local, cache_dir=cache, shown_as=file, lines=np.load(local + ".lines.npy"))
    return JsonLines(local, cache_dir=cache, shown_as=file)


def _cached_index(path: str, cache: str) -> dict[str, np.ndarray]:
    """Offsets of a JSON-lines file's rows, from the cache when the file is the one indexed before."""
    out = _spooled(f"index2:{os.path.abspath(path)}", _stamp(path), ".npz", cache, lambda out: _write_index(path, out))
    with np.load(out) as saved:
        return {key: saved[key] for key in saved.files}


def _write_index(path: str, out: str) -> None:
    """Finds every line in one pass: newline positions by numpy, a hash of the bytes on the way."""
    digest = hashlib.blake2b(digest_size=16)
    found, firsts, offset, last, previous = [], [], 0, b"\n", b"\n"
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            data = np.frombuffer(chunk, np.uint8)
            newlines = np.flatnonzero(data == 10)
            found.append(newlines + offset)
            # The byte after each newline tells a blank line; at a chunk's edge it is the next chunk's first byte.
            if previous == b"\n":
                firsts.append(data[:1])
            inside = newlines[:-1] if len(newlines) and newlines[-1] == len(data) - 1 else newlines
            firsts.append(data[inside + 1])
            offset += len(chunk)
            previous = last = chunk[-1:]
    ends = np.concatenate([np.zeros(0, np.int64), *found])
    first = np.concatenate([np.zeros(0, np.uint8), *firsts])
    if offset and last != b"\n":
        ends = np.append(ends, offset)
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)[: len(ends)]
    with open(path, "rb") as file:
        if file.read(3) == _BOM and len(starts):
            starts[0] = 3
        keep = np.ones(len(starts), bool)
        for i in np.flatnonzero((first <= 32) | (starts == ends) | (starts == 3)):
            file.seek(int(starts[i]))
            keep[i] = bool(file.read(int(ends[i] - starts[i])).strip())
    lines = np.zeros(0, np.int64) if keep.all() else np.flatnonzero(keep) + 1
    lengths = (ends - starts)[keep]
    with open(out, "wb") as saved:
        np.savez(saved, starts=starts[keep], lengths=lengths, lines=lines, digest=np.array(digest.hexdigest()))


def _explode(path: str, out: str, shown_as: str) -> None:
    """Writes a JSON array as JSON lines, and beside it the line of the array's file that each item began on."""
    with open(path, "rb") as file:
        data = file.read().removeprefix(_BOM)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = error.start - data.rfind(b"\n", 0, error.start)
        raise ValueError(
            f"{shown_as}:{line}: byte {byte} of the line is {data[error.start]:#04x}; expected UTF-8 text"
        ) from error
    decoder, lines, line, seen = json.JSONDecoder(), [], 1, 0
    position = text.index("[") + 1
    with open(out, "w", encoding="utf-8") as target:
        while True:
            while position < len(text) and text[position] in " \t\r\n":
                position += 1
            line, seen = line + text.count("\n", seen, position), position
            if text[position : position + 1] == "]":
                break
            try:
                item, end = decoder.raw_decode(text, position)
                while end < len(text) and text[end] in " \t\r\n":
                    end += 1
                if text[end : end + 1] not in (",", "]"):
                    raise json.JSONDecodeError("expected ',' or ']' after an item", text, end)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{shown_as}:{error.lineno}: column {error.colno}: {error.msg}; expected a JSON array of objects"
                ) from error
            target.write(json.dumps(item, ensure_ascii=True) + "\n")
            lines.append(line)
            position = end + 1 if text[end] == "," else end
    np.save(out + ".lines.npy", np.array(lines, np.int64))


def _to_arrow(path: str, out: str) -> None:
    try:
        parquet = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from error
    with pa.OSFile(out, "wb") as sink, pa.ipc.new_file(sink, parquet.schema_arrow) as writer:
        for batch in parquet.iter_batches(batch_size=4096):
            writer.write_batch(batch)


def _gunzip(path: str, out: str) -> None:
    try:
        with gzip.open(path, "rb") as packed, open(out, "wb") as target:
            shutil.copyfileobj(packed, target, _CHUNK)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error}); fetch or compress it again") from error


def _fetch(url: str, out: str) -> None:
    with hub.open_file(url) as remote, open(out, "wb") as target:
        shutil.copyfileobj(remote, target, _CHUNK)


def _spooled(name: str, stamp: str, suffix: str, cache: str, write: Callable[[str], None]) -> str:
    """The cache's file for (name, stamp), written by `write(path)` when it is not there yet.

    It is written aside and renamed, so that neither a crash nor a second process leaves half a file. What `write`
    puts beside its file (same name, longer) moves with it, first.
    """
    folder = os.path.join(cache, "sources")
    path = os.path.join(folder, _digest(name, stamp) + suffix)
    if os.path.exists(path):
        return path
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        base = os.path.basename(path)
        write(os.path.join(aside, base))
        for file in sorted(os.listdir(aside), key=len, reverse=True):
            os.replace(os.path.join(aside, file), os.path.join(folder, file))
    return path


def _suffix(file: str) -> str:
    return max((s for s in hub.DATA_SUFFIXES if file.endswith(s)), key=len, default="")


def _first_character(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(4096).removeprefix(_BOM).lstrip()[:1]


def _stamp(path: str) -> str:
    status = os.stat(path)
    return f"{os.path.abspath(path)}:{status.st_size}:{status.st_mtime_ns}"


def _remote_stamp(url: str) -> str:
    filesystem, inner = fsspec.core.url_to_fs(url)
    info = filesystem.info(inner)
    known = {key: str(info[key]) for key in ("size", "etag", "ETag", "mtime", "updated", "LastModified") if key in info}
    return urllib.parse.urlencode(sorted(known.items()))


def _file_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()
