"""The folder of a run: who may write it, and whether a new run may go on from what it holds."""

import pathlib
from collections.abc import Callable
from typing import Any

from jaxtune.config import Config
from jaxtune.decode import ConfigError, from_tree, read_yaml, to_yaml
from jaxtune.run_lock import RunLock

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
    "data.eval",
    "data.workers",
    "data.max_lost",
)

# What a run writes over, and a model's own files: where one of them lies without a run's config.yaml, it is not ours.
NOT_A_RUN = ("config.json", "adapter_config.json", "*.safetensors", "README.md", "metrics.jsonl", "hf", "adapter")


class RunFolder:
    """OUTPUT, held by one process at a time through a lock that a dead holder does not keep."""

    def __init__(self, path: str, *, say: Callable[[str], None] = print) -> None:
        """Makes the folder and takes its lock.

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
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_what_is_no_run()
            self._lock = RunLock(str(self.path), say=say)
        except OSError as error:
            raise ValueError(f"output: {path} cannot be written ({error}); expected a folder of its own") from None

    def release(self) -> None:
        """Gives the folder up."""
        self._lock.release()

    def check_lock(self) -> None:
        """Raises ValueError when another run has taken the folder over; call it before what that would destroy."""
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
