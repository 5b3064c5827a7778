"""The cache of files made from data files, and the few files that are open at a time.

What is made of a file is found again by the file's path, size and time of change. It is written aside and renamed, so
that neither a crash nor a second process leaves half a file; one that is damaged all the same is made again.
"""

import collections
import hashlib
import os
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

import fsspec

_OPEN_AT_ONCE = 128
_MADE = 1e9


class Pool:
    """The things opened last, at most `limit`: thousands of sources never hold thousands of file descriptors.

    What is pushed out closes when its last user lets go of it, so that threads share the pool; a forked child starts
    with an empty one.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._pid = limit, -1
        self._lock = threading.Lock()
        self._opened: collections.OrderedDict[tuple[str, str], Any] = collections.OrderedDict()

    def get(self, key: tuple[str, str], open_it: Callable[[], Any]) -> Any:
        """What stands under (path, stamp), opened by `open_it` if it is not open."""
        self._start_anew_after_fork()
        with self._lock:
            if key in self._opened:
                self._opened.move_to_end(key)
                return self._opened[key]
        opened = open_it()
        with self._lock:
            self._opened[key] = opened
            while len(self._opened) > self._limit:
                self._opened.popitem(last=False)
        return opened

    def _start_anew_after_fork(self) -> None:
        if self._pid != os.getpid():  # the lock may be held by a thread that is not here
            self._lock, self._opened, self._pid = threading.Lock(), collections.OrderedDict(), os.getpid()

    def drop(self, path: str) -> None:
        """Lets go of what was opened from a path, or from files beside it (same name, longer)."""
        self._start_anew_after_fork()
        with self._lock:
            for key in [key for key in self._opened if key[0].startswith(path)]:
                del self._opened[key]

    def __len__(self) -> int:
        return len(self._opened)


OPENED = Pool(_OPEN_AT_ONCE)


def read_at(path: str, stamp: str, offset: int, count: int) -> bytes:
    """Bytes of a file through the pool; raises ValueError when the file is no longer the one stamped."""
    file = OPENED.get((path, stamp), lambda: _open_stamped(path, stamp))
    return os.pread(file.fileno(), count, offset)


def _open_stamped(path: str, stamp: str) -> Any:
    file = open(path, "rb", buffering=0)  # noqa: SIM115  (the pool keeps it)
    if _stamp_of(path, os.fstat(file.fileno())) != stamp:
        file.close()
        raise ValueError(f"{path}: the file has changed since it was opened; start again with files at rest")
    return file


def spooled(name: str, stamp: str, suffix: str, cache: str, write: Callable[[str], None]) -> str:
    """The cache's file for (name, stamp), written by `write(path)` when it is not there whole.

    What `write` puts beside its file (same name, longer) moves with it, first. Sizes of all are kept with it. Their
    time of change is always the same: two processes that make the same file at once do not disturb each other.
    """
    folder = os.path.join(cache, "sources")
    path = os.path.join(folder, digest_of(name, stamp) + suffix)
    if _is_whole(path):
        return path
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        base = os.path.basename(path)
        write(os.path.join(aside, base))
        sizes = {file.removeprefix(base): os.path.getsize(os.path.join(aside, file)) for file in os.listdir(aside)}
        with open(os.path.join(aside, base + ".sizes"), "w", encoding="utf-8") as out:
            out.write(urllib.parse.urlencode(sorted(sizes.items())))
        for file in sorted(os.listdir(aside), key=len, reverse=True):
            os.utime(os.path.join(aside, file), (time.time(), _MADE))
            os.replace(os.path.join(aside, file), os.path.join(folder, file))
    OPENED.drop(path)
    return path


def _is_whole(path: str) -> bool:
    """Whether the file and those beside it have the sizes they were written with."""
    try:
        with open(path + ".sizes", encoding="utf-8") as file:
            sizes = urllib.parse.parse_qsl(file.read(), keep_blank_values=True, strict_parsing=True)
        return all(os.path.getsize(path + suffix) == int(size) for suffix, size in sizes)
    except (OSError, ValueError):
        return False


def forget(path: str) -> None:
    """Marks a cached file as damaged, so that `spooled` makes it again."""
    if os.path.exists(path + ".sizes"):
        os.remove(path + ".sizes")


def stamp_of(path: str) -> str:
    """Path, size and time of change: what a file is known by without being read."""
    return _stamp_of(path, os.stat(path))


def _stamp_of(path: str, status: os.stat_result) -> str:
    return f"{os.path.abspath(path)}:{status.st_size}:{status.st_mtime_ns}"


def remote_stamp(url: str) -> str:
    """The same for a URL, from what its store tells."""
    filesystem, inner = fsspec.core.url_to_fs(url)
    info = filesystem.info(inner)
    known = {key: str(info[key]) for key in ("size", "etag", "ETag", "mtime", "updated", "LastModified") if key in info}
    return urllib.parse.urlencode(sorted(known.items()))


def file_digest(path: str) -> str:
    """A hash of the file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def digest_of(*parts: str) -> str:
    """A hash of texts."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()
