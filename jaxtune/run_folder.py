"""The folder of a run: who may write it, and whether a new run may go on from what it holds."""

import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxtune.config import Config
from jaxtune.decode import from_tree, to_yaml

HEARTBEAT_SECONDS = 20.0
DEAD_AFTER_SECONDS = 180.0  # nine missed heartbeats: a host that still breathes writes one in this time

# What may differ between a run and its continuation: how long, how it is watched, and how (not what) is computed.
MAY_CHANGE = (
    "output",
    "train.epochs",
    "train.steps",
    "train.microbatch_rows",
    "train.max_bad_steps",
    "train.preempted_exit_code",
    "log",
    "eval",
    "checkpoint",
    "export",
    "mesh",
    "model.attention",
    "model.remat",
    "data.workers",
    "data.max_lost",
)


class RunFolder:
    """OUTPUT, held by one process at a time through a lock that a dead holder does not keep."""

    def __init__(self, path: str, *, say: Callable[[str], None] = print) -> None:
        """Makes the folder and takes its lock.

        Raises:
            ValueError: another live run holds the folder, or it cannot be written.
        """
        self.path = pathlib.Path(path)
        self._say = say
        self._stop = threading.Event()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise ValueError(f"output: {path} cannot be written ({error}); expected a folder of its own") from None
        self._pulse = threading.Thread(target=self._beat, daemon=True, name="run-folder-heartbeat")
        self._pulse.start()

    @property
    def lock(self) -> pathlib.Path:
        """The lock file: JSON with host, pid, start and heartbeat (seconds since the epoch)."""
        return self.path / ".lock"

    def release(self) -> None:
        """Gives the folder up."""
        self._stop.set()
        self._pulse.join(timeout=5)
        self.lock.unlink(missing_ok=True)

    def _take_lock(self) -> None:
        for _ in range(2):
            try:
                handle = os.open(self.lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                holder = self._holder()
                if _is_alive(holder):
                    raise ValueError(
                        f"output: {self.path} is being written by another run (host {holder.get('host')}, process "
                        f"{holder.get('pid')}, last seen {time.time() - holder.get('heartbeat', 0):.0f} s ago); "
                        "expected a folder of its own for each run. Stop that run, or give another output=."
                    ) from None
                self._say(f"taking over {self.path} from a run that ended without a word ({holder or 'empty lock'})")
                self.lock.unlink(missing_ok=True)
            else:
                os.write(handle, json.dumps(_me()).encode())
                os.close(handle)
                return
        raise ValueError(f"output: {self.path} was taken by another run just now; give another output=")

    def _holder(self) -> dict[str, Any]:
        try:
            return json.loads(self.lock.read_text())
        except (ValueError, FileNotFoundError):
            return {}

    def _beat(self) -> None:
        start = _me()
        while not self._stop.wait(HEARTBEAT_SECONDS):
            aside = self.lock.with_suffix(".beat")
            aside.write_text(json.dumps({**start, "heartbeat": time.time()}))
            aside.replace(self.lock)

    def check_resume(self, config: Config) -> bool:
        """Returns whether the folder holds a run that this one continues.

        Raises:
            ValueError: it holds a run that differs in a key that decides what is learned (all such keys are listed),
                or any run at all under `checkpoint.resume=never`.
        """
        file = self.path / "config.yaml"
        if not file.exists():
            return False
        if config.checkpoint.resume == "never":
            raise ValueError(
                f"output: {self.path} already holds a run and checkpoint.resume is never; expected an empty folder. "
                "Give another output=, or checkpoint.resume=auto to go on with it."
            )
        old = from_tree(_read(file))
        changes = differences(old, config)
        if changes:
            listed = "\n".join(f"  {key}: {before!r} there, {now!r} now" for key, before, now in changes)
            raise ValueError(
                f"output: {self.path} holds a run that this one cannot continue, for these keys differ:\n{listed}\n"
                "Give another output=, or the old values."
            )
        return True

    def write_config(self, config: Config) -> None:
        """Writes the resolved configuration; nothing is lost when the machine stops in between."""
        aside = self.path / "config.yaml.tmp"
        aside.write_text(to_yaml(config), encoding="utf-8")
        aside.replace(self.path / "config.yaml")


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """Returns (key, old value, new value) for every key that differs and may not."""
    before, now = _leaves(old.model_dump()), _leaves(new.model_dump())
    keys = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
    return [
        (key, before.get(key), now.get(key))
        for key in keys
        if not any(key == allowed or key.startswith(allowed + ".") for allowed in MAY_CHANGE)
    ]


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {name: leaf for key, value in tree.items() for name, leaf in _leaves(value, f"{prefix}{key}.").items()}
    if isinstance(tree, tuple | list) and tree and isinstance(tree[0], dict):
        pairs = enumerate(tree)
        return {name: leaf for key, value in pairs for name, leaf in _leaves(value, f"{prefix}{key}.").items()}
    return {prefix[:-1]: tree}


def _read(file: pathlib.Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(file.read_text(encoding="utf-8"))


def _me() -> dict[str, Any]:
    now = time.time()
    return {"host": socket.gethostname(), "pid": os.getpid(), "start": _process_start(os.getpid()), "heartbeat": now}


def _is_alive(holder: dict[str, Any]) -> bool:
    """A holder on this host is asked for; one elsewhere is judged by its heartbeat."""
    if holder.get("host") == socket.gethostname():
        return _process_start(holder.get("pid", -1)) == holder.get("start")
    return time.time() - holder.get("heartbeat", 0) < DEAD_AFTER_SECONDS


def _process_start(pid: int) -> str | None:
    """Returns what tells a process from a later one of the same number, or None when there is no such process."""
    stat = pathlib.Path(f"/proc/{pid}/stat")
    if stat.exists():
        return stat.read_text().rpartition(")")[2].split()[19]  # proc(5), field 22: start in ticks since boot
    if pathlib.Path("/proc/self").exists():
        return None
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError, ValueError):
        return None
    return "alive"
