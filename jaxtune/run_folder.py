"""The folder of a run: who may write it, where its files grow, and whether a new run may go on from what it holds."""

import pathlib
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from jaxtune import hosts, hub
from jaxtune.config import Config
from jaxtune.decode import ConfigError, from_tree, read_yaml, to_yaml
from jaxtune.run_lock import RunLock

STORES = ("gs://", "s3://")
SEEN_AFTER_SECONDS = 20.0  # by another host: network file systems keep what they know of a folder for a while
PUBLISH_SECONDS = 60.0  # how old what a bucket shows of growing files may be

# What may differ between a run and its continuation: how long, how it is watched, and how (not what) is computed.
MAY_CHANGE = (
    "output",
    "train.epochs",
    "train.steps",
    "train.microbatch_rows",
    "train.compiler_options",
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
    "data.prepared",
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
    """OUTPUT, a folder or a bucket's, held by one process at a time through a lock that a dead holder does not keep.

    `path` is where it lies. `local` is where files grow (metrics, TensorBoard's events): OUTPUT itself on a disk; an
    object in a bucket cannot grow, so there it is a folder of this machine, which `publish` copies over.
    """

    def __init__(self, path: str, *, say: Callable[[str], None] = print, holds: bool = True) -> None:
        """Makes the folder and takes its lock; a process that does not hold it, another host of the run, only looks.

        Raises:
            ValueError: another live run holds the folder, it holds something that is no run, or it cannot be written.
        """
        if hub.is_url(path) and not path.startswith(STORES):
            raise ValueError(f"output: found {path}; expected a folder, or one of {', '.join(STORES)}")
        self.path = epath.Path(path).expanduser()
        self._say = say
        try:
            self._lock = None
            if holds:
                self.path.mkdir(parents=True, exist_ok=True)
                self._refuse_what_is_no_run()
                self._lock = RunLock(str(self.path), say=say)
        except (OSError, ImportError) as error:
            raise ValueError(f"output: {path} cannot be written ({error}); expected a folder of its own") from None
        self.local = pathlib.Path(path).expanduser()
        # What hosts that do not hold the folder write in a bucket must not replace what the others do.
        self._target = self.path if holds else self.path / "hosts" / str(hosts.index())
        self._published: dict[pathlib.Path, tuple[int, int]] = {}
        self._end = threading.Event()
        self._publisher: threading.Thread | None = None
        if hub.is_url(path):
            self.local = pathlib.Path(tempfile.mkdtemp(prefix="jaxtune-run-"))
            if holds:
                self._fetch_grown()
            self._publisher = threading.Thread(target=self._publish_often, daemon=True, name="run-folder-publisher")
            self._publisher.start()

    def release(self) -> None:
        """Publishes what is not yet published, and gives the folder up."""
        try:
            if self._publisher is not None:
                self._end.set()
                self._publisher.join()
                self.publish()
                shutil.rmtree(self.local)
        finally:
            if self._lock is not None:
                self._lock.release()

    def publish(self) -> None:
        """Copies the files that have grown to a bucket; on a disk they are there already."""
        if self._publisher is None:
            return
        for file in sorted(self.local.rglob("*")):
            if not file.is_file():
                continue
            state = (file.stat().st_size, file.stat().st_mtime_ns)
            if self._published.get(file) != state:
                target = self._target / file.relative_to(self.local).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
                self._published[file] = state

    def _publish_often(self) -> None:
        while not self._end.wait(PUBLISH_SECONDS):
            try:
                self.publish()
            except OSError as error:
                self._say(f"warning: {self.path}: logs could not be written ({error}); tried again in a minute")

    def _fetch_grown(self) -> None:
        """Brings the records of a run that is gone on with here, to be appended to."""
        for file in self.path.glob("*.jsonl"):
            (self.local / file.name).write_bytes(file.read_bytes())

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
        if config.checkpoint.changed_data == "accept":
            changes = [change for change in changes if not change[0].startswith("data.")]
        if changes:
            listed = "\n".join(f"  {key}: {before!r} there, {now!r} now" for key, before, now in changes)
            raise ValueError(
                f"output: {self.path} holds a run that this one cannot continue, for these keys differ:\n{listed}\n"
                "Give another output=, or the old values."
            )

    def write_config(self, config: Config) -> None:
        """Writes the resolved configuration; nothing is lost when the machine stops in between."""
        if hub.is_url(str(self.path)):  # an object is written whole or not at all
            (self.path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            return
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
