"""Windows prepared ahead: a folder of shards for each stream, and how training reads them.

    PREPARED/KEY/about.json                                   what the stream is a function of, part by part
    PREPARED/KEY/windows-00000000-00000064.array_record       windows 0 .. 63, a record each
    PREPARED/KEY/windows-00000000-00000064.json               rows and tokens of each of them, size of the shard
    PREPARED/KEY/rows-00000640.json                           rows and tokens of the first 640 windows

KEY is the stream's fingerprint, so what lies in a folder can only be right or damaged, and two that write the same file
do not disturb each other. Files are written aside and renamed; a shard comes after its .json. Records carry checksums.
"""

import bisect
import contextlib
import dataclasses
import json
import os
import posixpath
import re
import socket
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune import hub
from jaxtune.data.ahead import window_records
from jaxtune.data.ahead.window_records import Damaged, OtherDraws
from jaxtune.data.files import spooling
from jaxtune.data.files.readers import open_array_record
from jaxtune.data.files.spool import OPENED, forget, remote_stamp, spooled, stamp_of
from jaxtune.data.windows import Window, WindowMaker

ASIDE = "aside-"  # of files that are being written: aside-HOST-PID-...
_SHARD = re.compile(r"windows-(\d+)-(\d+)\.array_record")
_ROWS = re.compile(r"rows-(\d+)\.json")
# One window a group, so that any is read alone; level 9 takes a hundredth of the time that tokenising takes.
_OPTIONS = "group_size:1,zstd:9"


class Shard(NamedTuple):
    """Windows `first` .. `stop` - 1 in one file."""

    first: int
    stop: int

    @property
    def name(self) -> str:
        """Its file's name."""
        return f"windows-{self.first:08}-{self.stop:08}.array_record"

    @property
    def summary_name(self) -> str:
        """The name of what is said of it."""
        return f"windows-{self.first:08}-{self.stop:08}.json"


class Summary(NamedTuple):
    """What is said of a shard: of each window its packed `rows` and `tokens` by side, of all their draws, examples,
    bad rows (with the first one's message) and the shard's size in bytes."""

    rows: list[int]
    tokens: list[list[int]]
    draws: int
    examples: int
    bad: int
    message: str
    size: int


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder on a disk or behind a URL, whose files appear whole or not at all."""

    path: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", self.path.rstrip("/") if hub.is_url(self.path) else os.path.abspath(self.path))

    @property
    def is_remote(self) -> bool:
        return hub.is_url(self.path)

    def file(self, name: str) -> str:
        """Path or URL of a file in it."""
        return f"{self.path}/{name}"

    def inside(self, name: str) -> "Folder":
        return Folder(self.file(name))

    @property
    def parent(self) -> "Folder":
        return Folder(self.path.rpartition("/")[0])

    def names(self) -> list[str]:
        """What is in it; nothing when it is not there."""
        if not self.is_remote:
            with contextlib.suppress(FileNotFoundError):
                return os.listdir(self.path)
            return []
        filesystem, root = hub.file_system(self.path)
        filesystem.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            return [posixpath.basename(entry.rstrip("/")) for entry in filesystem.ls(root, detail=False)]
        return []

    def read(self, name: str) -> Any:
        """A file's JSON; None when it is not there or no JSON."""
        try:
            with hub.open_file(self.file(name)) as file:
                return json.loads(file.read())
        except (OSError, ValueError):
            return None

    def write(self, name: str, value: Any) -> None:
        """Writes JSON."""
        content = json.dumps(value, indent=None, ensure_ascii=False).encode()

        def write(out: str) -> None:
            with open(out, "wb") as file:
                file.write(content)

        self.put(name, write)

    def put(self, name: str, write: Callable[[str], Any]) -> None:
        """Has `write(path)` make a file, and then lets it appear under its name."""
        if self.is_remote:
            filesystem, root = hub.file_system(self.path)
            with tempfile.TemporaryDirectory() as aside:
                local = os.path.join(aside, name)
                write(local)
                filesystem.put_file(local, f"{root}/{name}")
            return
        os.makedirs(self.path, exist_ok=True)
        prefix = f"{ASIDE}{socket.gethostname()}-{os.getpid()}-"
        descriptor, local = tempfile.mkstemp(dir=self.path, prefix=prefix)
        try:
            write(local)
            os.chmod(local, 0o666 & ~_umask())  # mkstemp's files are their owner's alone, and a cache may be shared
            os.fsync(descriptor)
            os.replace(local, self.file(name))
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(local)
            raise
        finally:
            os.close(descriptor)

    def remove(self, name: str) -> None:
        """Takes a file away, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            filesystem, root = hub.file_system(self.path)
            filesystem.rm_file(f"{root}/{name}")

    def shards(self) -> list[Shard]:
        """The shards in it, by their first windows."""
        found = (_SHARD.fullmatch(name) for name in self.names())
        return sorted(Shard(int(m[1]), int(m[2])) for m in found if m)


def _umask() -> int:
    """This process's umask; it can only be asked for by setting it, so the file system is asked where it is known."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status", encoding="ascii") as file:
        return int(next(line for line in file if line.startswith("Umask:")).split()[1], 8)
    return 0o022


def folder_of(config: Any, fingerprint: str, *, cache_dir: str | None = None) -> Folder | None:
    """Where the windows of a stream lie, or would; None with data.prepared=off."""
    base = base_folder(config, cache_dir=cache_dir)
    return None if base is None else base.inside(f"{fingerprint}-{window_records.FORMAT}")


def base_folder(config: Any, *, cache_dir: str | None = None) -> Folder | None:
    """The folder that data.prepared names, in which every stream has one of its own."""
    named = config.data.prepared
    if named == "off":
        return None
    if named == "auto":
        return Folder(os.path.join(cache_dir or hub.cache_dir(), "prepared"))
    return Folder(named if hub.is_url(named) else os.path.expanduser(named))


def write_shard(maker: WindowMaker, folder: Folder, shard: Shard) -> Summary:
    """Makes the windows of a shard and writes them: the one function that pool and Beam run.

    Raises OSError when the disk does not take them.
    """
    from array_record.python import array_record_module

    rows: list[int] = []
    tokens: list[list[int]] = []
    draws = examples = bad = size = 0
    message = ""

    def write(out: str) -> None:
        nonlocal draws, examples, bad, size, message
        writer = array_record_module.ArrayRecordWriter(out, _OPTIONS)
        for number in range(shard.first, shard.stop):
            drawn, window = maker.draw(number), maker.make_anew(number)
            writer.write(window_records.encode(window, drawn, number, maker.rows))
            rows.append(len(window.splits) - 1)
            tokens.append(window.lengths.sum(axis=0).tolist())
            draws, examples, bad = draws + len(drawn.row), examples + len(window.ids), bad + len(window.bad)
            message = message or (window.bad[0][2] if window.bad else "")
        writer.close()
        size = os.path.getsize(out)
        try:
            whole = open_array_record(out, out).num_records() == shard.stop - shard.first
        except ValueError:
            whole = False
        if not whole:
            raise OSError(f"{folder.file(shard.name)}: could not be written whole; is there room on the disk?")

    def write_both(out: str) -> None:
        write(out)
        folder.write(shard.summary_name, Summary(rows, tokens, draws, examples, bad, message, size)._asdict())

    folder.put(shard.name, write_both)
    return Summary(rows, tokens, draws, examples, bad, message, size)


def read_summary(folder: Folder, shard: Shard) -> Summary | None:
    """What is said of a shard that is there; None when it, or the shard, is damaged."""
    told = folder.read(shard.summary_name)
    if not isinstance(told, dict) or set(told) != set(Summary._fields) or len(told["rows"]) != shard.stop - shard.first:
        return None
    filesystem, root = hub.file_system(folder.path)
    with contextlib.suppress(FileNotFoundError):
        if filesystem.size(f"{root}/{shard.name}") == told["size"]:
            return Summary(**told)
    return None


class Rows(NamedTuple):
    """Of each window its packed rows, int64 [windows], and its tokens on each side, int64 [windows sides]."""

    rows: np.ndarray
    tokens: np.ndarray


def write_rows(folder: Folder, found: Rows) -> None:
    """Writes the rows of all windows of a run, by which training counts its steps without reading every shard."""
    folder.write(f"rows-{len(found.rows):08}.json", {"rows": found.rows.tolist(), "tokens": found.tokens.tolist()})


def read_rows(folder: Folder, windows: int) -> Rows | None:
    """The rows of the first `windows` windows; None where they were not all prepared."""
    known = sorted(int(m[1]) for name in folder.names() if (m := _ROWS.fullmatch(name)))
    for number in known[bisect.bisect_left(known, windows) :]:
        told = folder.read(f"rows-{number:08}.json")
        if isinstance(told, dict) and {"rows", "tokens"} <= set(told) and len(told["rows"]) == number:
            return Rows(np.array(told["rows"][:windows], np.int64), np.array(told["tokens"][:windows], np.int64))
    return None


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The shards of a stream as training finds them; `pieces` (first, stop, shard) ascend and do not overlap.

    Travels to worker processes. Shards behind a URL are fetched into `cache` when the first of their windows is needed.
    """

    folder: Folder
    pieces: tuple[tuple[int, int, Shard], ...]
    cache: str

    @classmethod
    def of(cls, folder: Folder, cache: str) -> "Prepared":
        """What a folder holds now."""
        pieces: list[tuple[int, int, Shard]] = []
        reached = 0
        for shard in folder.shards():  # two settings may have cut the windows differently
            if shard.stop > reached:
                pieces.append((max(reached, shard.first), shard.stop, shard))
                reached = shard.stop
        return cls(folder, tuple(pieces), cache)

    def covered(self, windows: int) -> int:
        """How many of the first `windows` windows are there."""
        return sum(max(0, min(stop, windows) - first) for first, stop, _ in self.pieces)

    def find(self, maker: WindowMaker, number: int) -> tuple[Window | None, str]:
        """As `windows.PreparedWindows` says: the window of a whole record of the same draws."""
        at = bisect.bisect_right(self.pieces, number, key=lambda piece: piece[0]) - 1
        if at < 0 or number >= self.pieces[at][1]:
            return None, ""
        shard = self.pieces[at][2]
        try:
            return self.read(maker, shard, number), ""
        except OtherDraws:
            return None, (
                f"{self.folder.path}: windows from {number:,} on were prepared of other draws (a phase of the mixture "
                "ends where only the run knows) and are made anew"
            )
        except Damaged as problem:
            return None, (
                f"{self.folder.file(shard.name)} is damaged ({problem}); its windows that cannot be read are made "
                "anew. `python -m jaxtune.prepare ... --check` mends it"
            )

    def read(self, maker: WindowMaker, shard: Shard, number: int) -> Window:
        """A window of a shard; raises Damaged, or OtherDraws."""
        draws = maker.draw(number)
        if self.folder.is_remote:
            with contextlib.suppress(Damaged):
                return read_window(self.fetched(shard), shard, number, maker, draws)
            forget(self.fetched(shard))  # damaged here, perhaps not there
        return read_window(self.fetched(shard), shard, number, maker, draws)

    def fetched(self, shard: Shard) -> str:
        """The shard as a local file; raises Damaged where it cannot be had."""
        file = self.folder.file(shard.name)
        if not self.folder.is_remote:
            return file
        try:
            return spooled(file, remote_stamp(file), ".array_record", self.cache, lambda out: spooling.fetch(file, out))
        except OSError as error:
            raise Damaged(f"{type(error).__name__}: {error}") from error


def read_window(path: str, shard: Shard, number: int, maker: WindowMaker, draws: Any) -> Window:
    """A window of a shard in a local file; raises Damaged, or OtherDraws."""
    try:
        reader = OPENED.get((path, stamp_of(path)), lambda: open_array_record(path, path))
        record = reader.read([number - shard.first])[0]
    except OtherDraws:
        raise
    except Exception as error:  # the library's own are RuntimeErrors, of an index or of a hash
        raise Damaged(str(error).splitlines()[0][:200]) from error
    return window_records.decode(record, draws, number, maker.rows)


def missing_ranges(wanted: Sequence[Shard], there: Sequence[Shard]) -> list[Shard]:
    """The parts of the wanted shards that no other covers::

    missing_ranges([(0, 4), (4, 8)], [(0, 3)]) == [(3, 4), (4, 8)]
    """
    out = []
    for shard in wanted:
        first = shard.first
        for other in sorted(there):
            if other.stop <= first or other.first >= shard.stop:
                continue
            if other.first > first:
                out.append(Shard(first, other.first))
            first = max(first, other.stop)
        if first < shard.stop:
            out.append(Shard(first, shard.stop))
    return out
