"""Two runs never write one folder: a lock that a dead holder does not keep, on a disk or in a bucket.

FOLDER/.lock/NUMBER is JSON with host, pid, start and heartbeat (seconds since the epoch). Who wants the folder makes
the number after the last one, which succeeds for one alone: files and objects alike can be made on the condition that
none is there. Then it looks again, and withdraws if anybody else is alive. The holder beats by writing its file anew.
"""

import contextlib
import json
import os
import pathlib
import posixpath
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxtune import hub

HEARTBEAT_SECONDS = 20.0
DEAD_AFTER_SECONDS = 180.0  # nine missed heartbeats: a host that still breathes writes one in this time
_ATTEMPTS = 5


class RunLock:
    """The lock of one folder, held by this process from `__init__` to `release`."""

    def __init__(self, folder: str, *, say: Callable[[str], None] = print) -> None:
        """Takes the lock of `folder`, a local path that exists or a URL.

        Raises:
            ValueError: another live run holds it.
        """
        self._fs, root = hub.file_system(folder)
        self._folder, self._place = folder, posixpath.join(root, ".lock")
        self._say = say
        self._stop = threading.Event()
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "start": process_start(os.getpid())}
        self._number = self._take()
        self._lost: dict[str, Any] | None = None
        self._pulse = threading.Thread(target=self._beat, daemon=True, name="run-lock-heartbeat")
        self._pulse.start()

    def release(self) -> None:
        """Gives the folder up."""
        self._stop.set()
        self._pulse.join(timeout=5)
        self._remove(self._number)

    def check(self) -> None:
        """Raises ValueError when another run has taken the folder, having heard nothing of this one for too long."""
        if self._lost is not None:
            raise ValueError(
                f"output: {self._folder} was taken over by another run ({_told(self._lost)}), for this one gave no "
                f"sign of life for {DEAD_AFTER_SECONDS:.0f} s (a machine asleep, a storage that did not answer), so it "
                "stops here; give one of the two another output="
            )

    def _take(self) -> int:
        for _ in range(_ATTEMPTS):
            found = self._holders()
            self._refuse_living(found)
            number = 1 + max(found, default=0)
            try:
                self._fs.makedirs(self._place, exist_ok=True)
                self._fs.pipe_file(self._file(number), self._content(), mode="create")
            except FileExistsError:
                continue  # somebody else was faster: is it alive?
            others = {other: holder for other, holder in self._holders().items() if other != number}
            try:
                self._refuse_living(others)
            except ValueError:
                self._remove(number)
                raise
            if others:
                holder = others[max(others)]
                self._say(f"taking over {self._folder} from a run that ended without a word ({_told(holder)})")
            for other in others:
                self._remove(other)
            return number
        raise ValueError(f"output: {self._folder} is wanted by many runs at once; give each of them its own output")

    def _refuse_living(self, holders: dict[int, dict[str, Any]]) -> None:
        for holder in holders.values():
            if _is_alive(holder):
                raise ValueError(
                    f"output: {self._folder} is being written by another run ({_told(holder)}, last seen "
                    f"{time.time() - holder['heartbeat']:.0f} s ago); expected a folder of its own for each run. Stop "
                    "that run, or give another output=."
                )

    def _holders(self) -> dict[int, dict[str, Any]]:
        """What is written under every number; one that cannot be read, of a run cut off while it wrote, is {}."""
        self._fs.invalidate_cache()
        try:
            names = [posixpath.basename(entry) for entry in self._fs.ls(self._place, detail=False)]
        except FileNotFoundError:
            return {}
        return {int(name): self._read(int(name)) for name in names if name.isdigit()}

    def _read(self, number: int) -> dict[str, Any]:
        for _ in range(3):  # a local file is made before it is filled
            with contextlib.suppress(ValueError, FileNotFoundError):
                holder = json.loads(self._fs.cat_file(self._file(number)))
                if isinstance(holder, dict) and {"host", "pid", "heartbeat"} <= set(holder):
                    return holder
            time.sleep(0.1)
        return {}

    def _file(self, number: int) -> str:
        return posixpath.join(self._place, str(number))

    def _content(self) -> bytes:
        return f'{json.dumps(self._me)[:-1]}, "heartbeat": {time.time():.3f}}}'.encode()

    def _remove(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self._fs.rm_file(self._file(number))
        with contextlib.suppress(OSError):
            self._fs.rmdir(self._place)  # where nothing else is in it; a bucket has no folders

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # a full disk may have room again next time
                others = {number: holder for number, holder in self._holders().items() if number != self._number}
                alive = [holder for holder in others.values() if _is_alive(holder)]
                if alive:
                    self._lost = alive[0]
                    return
                if hub.is_url(self._folder):
                    self._fs.pipe_file(self._file(self._number), self._content())
                else:  # in place and of the same length: a file that is replaced may be missing from a listing
                    with open(self._file(self._number), "r+b") as file:
                        file.write(self._content())


def _told(holder: dict[str, Any]) -> str:
    return f"host {holder['host']}, process {holder['pid']}" if holder else "its lock is empty"


def _is_alive(holder: dict[str, Any]) -> bool:
    """A holder on this host is asked for; one elsewhere is judged by its heartbeat."""
    if not holder:
        return False
    if holder["host"] == socket.gethostname():
        return process_start(holder["pid"]) == holder.get("start")
    return time.time() - holder["heartbeat"] < DEAD_AFTER_SECONDS


def process_start(pid: int) -> str | None:
    """Returns what tells a process from a later one of the same number, or None when there is no such process."""
    stat = pathlib.Path(f"/proc/{pid}/stat")
    if stat.exists():
        state, *fields = stat.read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]  # proc(5), field 22: start in ticks since boot; Z and X are dead
    if pathlib.Path("/proc/self").exists():
        return None
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError, ValueError):
        return None
    return "alive"
