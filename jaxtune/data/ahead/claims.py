"""Who is making which shard: several preparers of one thing divide the work.

A claim is a file of its own with host, process and heartbeat, made on the condition that none is there. One whose
process is gone, or that has not been heard of for a while, is taken over. Claims only spare double work: shards appear
whole and are the same whoever makes them, so nothing depends on a claim being right.
"""

import contextlib
import json
import os
import socket
import threading
import time
from typing import Any

from jaxtune import hub
from jaxtune.data.ahead.prepared import Folder, Shard
from jaxtune.run_lock import process_start

HEARTBEAT_SECONDS = 15.0
STALE_AFTER_SECONDS = 60.0
_CLAIM = "claim-"


class Claims:
    """The claims of this process in one folder; a context, at whose end all are given up."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._filesystem, self._root = hub.file_system(folder.path)
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "start": process_start(os.getpid())}
        self._held: set[str] = set()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._pulse = threading.Thread(target=self._beat, daemon=True, name="claims-heartbeat")

    def __enter__(self) -> "Claims":
        if not self._folder.is_remote:
            os.makedirs(self._folder.path, exist_ok=True)
        self._pulse.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._pulse.join(timeout=5)
        for name in list(self._held):
            self._remove(name)

    def take(self, shard: Shard) -> bool:
        """Whether this process makes the shard now; False while somebody else does."""
        name = f"{_CLAIM}{shard.first:08}-{shard.stop:08}"
        for _ in range(2):
            try:
                self._filesystem.pipe_file(f"{self._root}/{name}", self._content(), mode="create")
            except FileExistsError:
                if not self._is_stale(name):
                    return False
                self._remove(name)
                continue
            with self._lock:
                self._held.add(name)
            return True
        return False

    def drop_stale(self) -> None:
        """Takes away the claims of those that are gone."""
        for name in self._folder.names():
            if name.startswith(_CLAIM) and self._is_stale(name):
                self._remove(name)

    def release(self, shard: Shard) -> None:
        """Gives a shard up, made or not."""
        self._remove(f"{_CLAIM}{shard.first:08}-{shard.stop:08}")

    def _content(self) -> bytes:
        return json.dumps({**self._me, "heartbeat": time.time()}).encode()

    def _is_stale(self, name: str) -> bool:
        holder = self._read(name)
        if holder is None:
            return False  # gone meanwhile, or being written: asked for again soon
        if holder["host"] == self._me["host"] and process_start(holder["pid"]) != holder["start"]:
            return True
        return time.time() - holder["heartbeat"] > STALE_AFTER_SECONDS

    def _read(self, name: str) -> dict[str, Any] | None:
        for _ in range(5):  # a local file is made before it is filled
            self._filesystem.invalidate_cache()
            holder = self._folder.read(name)
            if isinstance(holder, dict) and {"host", "pid", "start", "heartbeat"} <= set(holder):
                return holder
            if name not in self._folder.names():
                return None
            time.sleep(0.1)
        return {"host": "", "pid": 0, "start": "", "heartbeat": 0.0}  # cut off while it was written

    def _remove(self, name: str) -> None:
        with self._lock:
            self._held.discard(name)
        with contextlib.suppress(OSError):
            self._folder.remove(name)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with self._lock:
                held = list(self._held)
            for name in held:
                with contextlib.suppress(OSError):
                    self._filesystem.pipe_file(f"{self._root}/{name}", self._content())


def clean(folder: Folder, prefix: str) -> None:
    """Takes away what killed preparers left behind: their claims, and what those of this host were writing."""
    Claims(folder).drop_stale()
    if folder.is_remote:
        return
    mine = f"{prefix}{socket.gethostname()}-"
    for name in folder.names():
        pid = name.removeprefix(mine).partition("-")[0]
        if name.startswith(mine) and pid.isdigit() and process_start(int(pid)) is None:
            folder.remove(name)
