"""Saving and restoring a run: Orbax writes the arrays, a manifest of hashes says whether they are still intact.

A checkpoint is OUTPUT/checkpoints/STEP with the items `state` (arrays) and `run` (JSON: data state, configuration,
metrics) and, once Orbax has committed both, `jaxtune_manifest.json`: size and SHA-256 of every file, and its own. A
folder without it was never finished; a folder that does not match it was damaged (Orbax itself restores flipped bits
silently). Neither is restored, and what is passed over is said.
"""

import concurrent.futures
import hashlib
import json
import logging
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

MANIFEST = "jaxtune_manifest.json"
CUT_OFF = "it has no manifest, so the save was cut off"


class Restored(NamedTuple):
    """A checkpoint read back: its step, the tree of arrays, and the JSON that was saved beside it."""

    step: int
    state: Any
    run: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: asynchronous saves, the newest `keep` kept, and the best by held-out loss."""

    def __init__(self, folder: str, *, keep: int) -> None:
        """Opens (and makes) `folder`, a local path or a gs:// URL."""
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every save in a dozen lines
        self.folder = epath.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=True)
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder.resolve(), options=options, item_handlers=handlers)
        self._finisher = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="manifest")
        self._finishing: concurrent.futures.Future | None = None
        self._passed_over: set[int] = set()

    def save(self, step: int, state: Any, *, run: dict[str, Any]) -> None:
        """Starts saving; returns when the arrays are copied to host memory and training may go on.

        Args:
            step: number of the last update done.
            state: tree of arrays.
            run: JSON values; `run["eval_loss"]`, if a number, says how good the checkpoint is.
        """
        self.wait()
        if step in self._manager.all_steps():  # an unusable folder of the same step: its place is needed
            self._manager.delete(step)
        self._passed_over.discard(step)
        arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(flatten(state)), run=ocp.args.JsonSave(run))
        self._manager.save(step, args=arguments, force=True)
        self._finishing = self._finisher.submit(self._finish, step)

    def wait(self) -> None:
        """Waits until the save under way is on disk with its manifest; raises what went wrong with it."""
        if self._finishing is not None:
            self._finishing.result()
            self._finishing = None

    def close(self) -> None:
        """Finishes the save under way and lets go of the folder."""
        self.wait()
        self._finisher.shutdown()
        self._manager.close()

    def _finish(self, step: int) -> None:
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            write_manifest(self.folder / str(step))
            self._delete_old()

    def _delete_old(self) -> None:
        steps = sorted(self._manager.all_steps())
        usable = [step for step in steps if (self.folder / str(step) / MANIFEST).exists()]
        kept = set([step for step in usable if step not in self._passed_over][-self._keep :])
        best = self.best_step()
        for step in steps:
            if step not in kept and step != best:
                self._manager.delete(step)

    def steps(self) -> list[int]:
        """Returns the steps that have a folder, usable or not."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """Returns the finished step with the lowest held-out loss, or None where none was evaluated."""
        losses = {}
        for step in set(self._manager.all_steps()) - self._passed_over:
            loss = (_read_manifest(self.folder / str(step)) or {}).get("eval_loss")
            if loss is not None:
                losses[step] = loss
        return min(losses, key=lambda step: (losses[step], step)) if losses else None

    def newest_usable(self, say: Any = print) -> int | None:
        """Returns the newest step whose files are what was written, or None where no save was ever finished.

        Says which are passed over and why.

        Raises:
            ValueError: finished checkpoints are there, and all of them are damaged; to start anew would lose the run.
        """
        damaged = False
        for step in sorted(self._manager.all_steps(), reverse=True):
            problem = check_manifest(self.folder / str(step))
            if problem is None:
                return step
            damaged |= problem != CUT_OFF
            if step not in self._passed_over:
                self._passed_over.add(step)
                say(f"checkpoint {self.folder / str(step)} is not usable: {problem}; using the one before it, if any")
        if damaged:
            raise ValueError(
                f"{self.folder}: every checkpoint here is damaged ({', '.join(map(str, sorted(self._passed_over)))}); "
                "expected at least one whose files are what was written. Put the files back from a copy, or give "
                "another output= to start anew"
            )
        return None

    def read_run(self, step: int) -> dict[str, Any]:
        """Returns the JSON saved with `step`, without its arrays."""
        return self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]

    def restore(self, step: int, abstract_state: Any) -> Restored:
        """Reads a checkpoint back onto any mesh.

        Args:
            step: a step that `newest_usable` returned.
            abstract_state: tree of ShapeDtypeStructs whose shardings say where each leaf goes; a subset of the
                saved leaves may be asked for.

        Raises:
            ValueError: a leaf is missing or has another shape than asked for.
        """
        wanted = flatten(abstract_state)
        saved = self._manager.item_metadata(step)["state"]
        shapes = {name: tuple(leaf.shape) for name, leaf in dict(saved).items()}
        for name, leaf in wanted.items():
            if shapes.get(name) != tuple(leaf.shape):
                raise ValueError(
                    f"checkpoint {self.folder / str(step)}: {name} has shape {shapes.get(name, 'no entry')}; this run "
                    f"expects {tuple(leaf.shape)}. It was written by a run with another model or tuning method."
                )
        partial = ocp.args.PyTreeRestore(
            wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        items = self._manager.restore(step, args=ocp.args.Composite(state=partial, run=ocp.args.JsonRestore()))
        leaves = [items["state"][name] for name in wanted]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), items["run"])


def flatten(tree: Any) -> dict[str, Any]:
    """Returns `{"trainable/groups/0/...": leaf, ...}`: names on disk that do not hang on any container class."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    if len(named) != len(paths):
        raise ValueError("two leaves of the state have the same name")
    return named


def write_manifest(folder: epath.Path) -> None:
    """Writes size and SHA-256 of every file of a committed checkpoint, aside and then in place."""
    run_file = folder / "run" / "metadata"
    run = json.loads(run_file.read_text()) if run_file.exists() else {}
    manifest = {"files": {name: _fingerprint(path) for name, path in _files(folder)}, "eval_loss": run.get("eval_loss")}
    aside = folder / f"{MANIFEST}.tmp"
    aside.write_text(json.dumps({**manifest, "sha256": _digest_of(manifest)}, indent=1, sort_keys=True))
    aside.rename(folder / MANIFEST)


def check_manifest(folder: epath.Path) -> str | None:
    """Returns what is wrong with a checkpoint folder, or None when every file is what was written."""
    if not (folder / MANIFEST).exists():
        return CUT_OFF
    manifest = _read_manifest(folder)
    if manifest is None:
        return "its manifest cannot be read"
    expected = manifest["files"]
    found = dict(_files(folder))
    for name, want in expected.items():
        if name not in found:
            return f"{name} is missing"
        have = _fingerprint(found[name])
        if have["bytes"] != want["bytes"]:
            return f"{name} has {have['bytes']} bytes instead of {want['bytes']}"
        if have["sha256"] != want["sha256"]:
            return f"{name} has changed since it was written (its SHA-256 differs)"
    return None


def _read_manifest(folder: epath.Path) -> dict[str, Any] | None:
    """Returns what the manifest says; None where there is none, or it is not as it was written."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return None
    try:
        content = json.loads(manifest.read_bytes())
        digest = content.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return content if digest == _digest_of(content) else None


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files(folder: epath.Path) -> list[tuple[str, epath.Path]]:
    found: list[tuple[str, epath.Path]] = []
    for path in folder.iterdir():
        if path.is_dir():
            found += [(f"{path.name}/{name}", inner) for name, inner in _files(path)]
        elif not path.name.startswith(MANIFEST):
            found.append((path.name, path))
    return sorted(found)


def _fingerprint(path: epath.Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}
