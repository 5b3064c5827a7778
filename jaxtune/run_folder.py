"""The folder of a run: who may write it, and whether a new run may go on from what it holds."""

import pathlib
import secrets
import time
from collections.abc import Callable
from typing import Any

from jaxtune import hosts
from jaxtune.config import Config
from jaxtune.decode import ConfigError, from_tree, read_yaml, to_yaml
from jaxtune.run_lock import RunLock

SEEN_AFTER_SECONDS = 20.0  # by another host: network file systems keep what they know of a folder for a while

# What may differ between a run and its continuation: how long, how it is watched, and how (not what) is computed.
MAY_CHANGE = (
    "output",
    "train.epochs",
    "train.steps",
    "train.microbatch_rows",
    "train.max_bad_steps",
    "train.preempted_exit_code",
    "train.hang_seconds",
    "train.spike_factor",
    "train.spike_patience",
    "train.max_rollbacks",
    "log",
    "eval",
    "checkpoint",
    "export",
    "mesh",
    "model.attention",
    "model.remat",
    "data.eval",
    "data.workers",
    "data.max_lost",
)

# What a run writes over, and a model's own files: where one of them lies without a run's config.yaml, it is not ours.
NOT_A_RUN = ("config.json", "adapter_config.json", "*.safetensors", "README.md", "metrics.jsonl", "hf", "adapter")


def open_run_folder(path: str, *, say: Callable[[str], None] = print) -> "RunFolder":
    """Returns OUTPUT, held by host 0 of this run; the others see that it is the same folder.

    Raises:
        ValueError: as `RunFolder` does, or a host does not see what host 0 writes.
    """
    with hosts.together():
        folder = RunFolder(path, say=say, holds=hosts.index() == 0)
    if hosts.count() == 1:
        return folder
    token = hosts.from_first(secrets.token_hex(8))
    mark = folder.path / f".hosts-{token}"
    try:
        with hosts.together():
            if hosts.index() == 0:
                mark.write_text(token)
        with hosts.together():
            _wait_for(mark)
        if hosts.index() == 0:
            mark.unlink()
    except ValueError:
        folder.release()
        raise
    return folder


def _wait_for(mark: Any) -> None:
    deadline = time.monotonic() + SEEN_AFTER_SECONDS
    while not mark.exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"output: {mark.parent} is not the folder that host 0 writes: its files do not appear here. "
                "Expected a folder that all hosts share (NFS, a mounted bucket or disk) by the same path"
            )
        time.sleep(0.2)


class RunFolder:
    """OUTPUT, held by one process at a time through a lock that a dead holder does not keep."""

    def __init__(self, path: str, *, say: Callable[[str], None] = print, holds: bool = True) -> None:
        """Makes the folder and takes its lock; a process that does not hold it, another host of the run, only looks.

        Raises:
            ValueError: another live run holds the folder, it holds something that is no run, or it cannot be written.
        """
        if "://" in path:
            raise ValueError(
                f"output: found {path}; expected a folder of this machine's file system. Mount the bucket (gcsfuse, "
                "s3fs, a Drive) and give the path where it is mounted, or copy the folder when the run has ended"
            )
        self.path = pathlib.Path(path).expanduser()
        try:
            self._lock = None
            if holds:
                self.path.mkdir(parents=True, exist_ok=True)
                self._refuse_what_is_no_run()
                self._lock = RunLock(str(self.path), say=say)
        except OSError as error:
            raise ValueError(f"output: {path} cannot be written ({error}); expected a folder of its own") from None

    def release(self) -> None:
        """Gives the folder up."""
        if self._lock is not None:
            self._lock.release()

    def check_lock(self) -> None:
        """Raises ValueError when another run has taken the folder over; call it before what that would destroy."""
        if self._lock is not None:
            self._lock.check()

    def _refuse_what_is_no_run(self) -> None:
        if (self.path / "config.yaml").exists():
            return
        found = [file.name for pattern in NOT_A_RUN for file in self.path.glob(pattern)]
        if found:
            raise ValueError(
                f"output: {self.path} holds {', '.join(found[:3])} but no run (config.yaml), and a run would write "
                "over what is there; expected a folder of its own. Give another output="
            )

    def check_resume(self, config: Config, *, has_saved: bool) -> None:
        """Raises ValueError unless this run may write here and, where something was saved, continues what is there.

        Until a run has saved something it binds the folder to nothing: a key may be put right and the run begun again.
        Then it must not differ in a key that decides what is learned (all such keys are listed), and with
        `checkpoint.resume=never` nothing saved may be there at all.
        """
        file = self.path / "config.yaml"
        if not file.exists():
            if has_saved:
                raise ValueError(
                    f"output: {self.path} holds checkpoints but no config.yaml, so nobody knows what they are of; "
                    "put the file back, or give another output="
                )
            return
        try:
            old = from_tree(read_yaml(str(file)))
        except ConfigError as error:
            raise ValueError(
                f"output: {file} is not the configuration of a run that this version can go on with:\n{error}\n"
                "Give another output=, or put the file back as the run wrote it."
            ) from None
        if not has_saved:
            return
        if config.checkpoint.resume == "never":
            raise ValueError(
                f"output: {self.path} already holds a run and checkpoint.resume is never; expected an empty folder. "
                "Give another output=, or checkpoint.resume=auto to go on with it."
            )
        changes = differences(old, config)
        if changes:
            listed = "\n".join(f"  {key}: {before!r} there, {now!r} now" for key, before, now in changes)
            raise ValueError(
                f"output: {self.path} holds a run that this one cannot continue, for these keys differ:\n{listed}\n"
                "Give another output=, or the old values."
            )

    def write_config(self, config: Config) -> None:
        """Writes the resolved configuration; nothing is lost when the machine stops in between."""
        aside = self.path / "config.yaml.tmp"
        aside.write_text(to_yaml(config), encoding="utf-8")
        aside.replace(self.path / "config.yaml")


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """Returns (key, old value, new value) for every key that differs and may not."""
    before, now = leaves_of(old.model_dump()), leaves_of(new.model_dump())
    keys = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
    return [
        (key, before.get(key), now.get(key))
        for key in keys
        if not any(key == allowed or key.startswith(allowed + ".") for allowed in MAY_CHANGE)
    ]


def leaves_of(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns {dotted key: value} of a configuration as nested dicts and lists of dicts."""
    if isinstance(tree, dict) and tree:
        return {name: leaf for key, value in tree.items() for name, leaf in leaves_of(value, f"{prefix}{key}.").items()}
    if isinstance(tree, tuple | list) and tree and isinstance(tree[0], dict):
        pairs = enumerate(tree)
        return {name: leaf for key, value in pairs for name, leaf in leaves_of(value, f"{prefix}{key}.").items()}
    return {prefix[:-1]: tree}
