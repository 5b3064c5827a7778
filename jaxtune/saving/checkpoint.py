"""Saving and restoring a run: Orbax writes the arrays, a manifest of hashes says whether they are still intact.

A checkpoint is OUTPUT/checkpoints/STEP with the items `state` (arrays) and `run` (JSON: data state, configuration,
metrics) and, once Orbax has committed both, a manifest (`manifest.py`; Orbax itself restores flipped bits silently).
A folder without one, or that does not match it, is not restored, and what is passed over is said.

All hosts of a run call everything here, in the same order; host 0 decides what there is and removes what is too old.
Where there is a local tier (`local_tier.py`), copies on the hosts' own disks stand beside it, and are taken when they
are as new.
"""

import concurrent.futures
import json
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from jaxtune import hosts, hub
from jaxtune.saving.local_tier import ATTEMPTS, LocalTier
from jaxtune.saving.manifest import CUT_OFF, MANIFEST, Share, check_manifest, read_manifest, write_manifest, write_share

_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax has not committed


class Restored(NamedTuple):
    """A checkpoint read back: its step, the tree of arrays, and the JSON that was saved beside it."""

    step: int
    state: Any
    run: dict[str, Any]


class Patience(NamedTuple):
    """How often a save that failed is tried again, the seconds before the first time (then twice as long each time),
    and the seconds after which a save that is not done has failed."""

    retries: int = 0
    retry_seconds: float = 0.0
    save_seconds: int = 1200


class Checkpoints:
    """The checkpoints of one run: asynchronous saves, the newest `keep` kept, and the best by held-out loss."""

    def __init__(
        self, folder: str, *, keep: int, patience: Patience | None = None, say: Callable[[str], None] = print
    ) -> None:
        """Opens (and makes) `folder`, a local path or a gs:// URL; what another process left unfinished goes."""
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every save in a dozen lines
        self.folder = epath.Path(folder) if hub.is_url(folder) else epath.Path(folder).resolve()
        self._keep, self._patience, self._say = keep, patience or Patience(), say
        with hosts.together():
            if hosts.index() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._remove_unfinished()
        items = {"state": ocp.PyTreeCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
        handler = ocp.CompositeCheckpointHandler(**items)
        self._writer = ocp.AsyncCheckpointer(handler, timeout_secs=self._patience.save_seconds)
        self._finisher = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="manifest")
        self._finishing: tuple[int, concurrent.futures.Future] | None = None
        self._passed_over: set[int] = set()
        self._local: LocalTier | None = None

    def open_local(self, folder: str, mesh: Mesh) -> None:
        """Keeps copies of the newest states in `folder` of every host's own, too; see `LocalTier`."""
        self._local = LocalTier(folder, store=self.folder, mesh=mesh, say=self._say)

    def forget_local(self) -> None:
        """Says that copies of earlier starts do not count any more: this one goes on, and makes none."""
        with hosts.together():
            if hosts.index() == 0:
                (self.folder / ATTEMPTS).unlink(missing_ok=True)

    def check_local_room(self, state: Any) -> None:
        """Raises ValueError when a host's own disk is too small for the copies of `state`."""
        if self._local is not None:
            self._local.check_room(flatten(state))

    def save_locally(self, step: int, state: Any, *, run: dict[str, Any]) -> None:
        """Starts a copy on the hosts' own disks, if there is a local tier."""
        if self._local is not None:
            self._local.save(step, flatten(state), run)

    def drop_local(self) -> None:
        """Removes the copies on the hosts' own disks: the run is done."""
        if self._local is not None:
            self._local.clear()

    def save(self, step: int, state: Any, *, run: dict[str, Any], wait: bool = False) -> None:
        """Starts saving; returns when the arrays are copied to host memory and training may go on.

        A save that failed meanwhile is told, and this one is waited for. What fails then is tried again with pauses;
        the checkpoints before it stay as they are all the time.

        Args:
            step: number of the last update done.
            state: tree of arrays.
            run: JSON values; `run["eval_loss"]`, if a number, says how good the checkpoint is.
            wait: return only when the checkpoint is on disk with its manifest.

        Raises:
            ValueError: it could not be saved, however often it was tried.
        """
        last = self._finishing[0] if self._finishing else step
        failure = self._outcome()
        if failure is not None:
            self._say(f"warning: saving step {last} failed ({failure}); now step {step} is saved, and waited for")
        wait |= failure is not None
        named = flatten(state)
        for attempt in range(self._patience.retries + 1):
            failure = self._start(step, named, run)
            if failure is None and (wait or attempt):
                failure = self._outcome()
            if failure is None:
                return
            if attempt < self._patience.retries:
                pause = self._patience.retry_seconds * 2**attempt
                self._say(f"warning: saving step {step} failed ({failure}); trying again in {pause:g} s")
                time.sleep(pause)
        kept = self.finished()
        raise hosts.ToldToAll(
            f"step {step} cannot be saved in {self.folder}, tried {self._patience.retries + 1} times: {failure}. "
            + (f"Step {kept[-1]} is there and intact; m" if kept else "M")
            + "ake room or mend the disk, and give the same command to go on from there (checkpoint.retries, "
            "checkpoint.retry_seconds)"
        )

    def has_failed(self) -> bool:
        """Whether the save under way has ended on all hosts, and failed on any.

        While some hosts still wait for the one that failed, training goes on: there is nothing to be saved to yet.
        """
        done, failed = False, False
        if self._finishing is not None and self._finishing[1].done():
            done, failed = True, self._finishing[1].exception() is not None
        told = hosts.gather([done, failed])
        return all(done for done, _ in told) and any(failed for _, failed in told)

    def wait(self) -> None:
        """Waits until the save under way is on disk with its manifest; raises OSError if it failed, on any host."""
        failure = self._outcome()
        if failure is not None:
            raise OSError(failure)

    def settle(self) -> None:
        """Waits until what is being saved is, well or not, also on the hosts' own disks; what failed is told."""
        failure = self._outcome()
        if failure is not None:
            self._say(f"warning: a save failed ({failure})")
        if self._local is not None:
            self._local.settle()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Closes, but for an error of one host of several: the save under way may wait for a host that is gone."""
        if error is None or hosts.count() == 1 or isinstance(error, hosts.ToldToAll):
            self.close()

    def close(self) -> None:
        """Ends the save under way and lets go of the folder."""
        if self._finishing is not None:
            concurrent.futures.wait([self._finishing[1]])
        self._finisher.shutdown()
        self._writer.close()
        if self._local is not None:
            self._local.close()

    def _start(self, step: int, named: dict[str, Any], run: dict[str, Any]) -> str | None:
        """Starts a save; returns what went wrong at once."""
        self._passed_over.discard(step)
        arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(named), run=ocp.args.JsonSave(run))
        try:
            if hosts.index() == 0:  # an unusable folder of the same step: its place is needed
                self._remove_unfinished()
                self._remove(step)
            hosts.wait_for_all("place for a checkpoint")
            self._writer.save(self.folder / str(step), args=arguments)
        except Exception as error:  # Orbax and TensorStore tell a full disk in many types
            failed: concurrent.futures.Future = concurrent.futures.Future()
            failed.set_exception(error)
            self._finishing = (step, failed)
            return self._outcome() if hosts.count() == 1 else None
        self._finishing = (step, self._finisher.submit(self._finish, step))
        return None

    def _outcome(self) -> str | None:
        """Waits for the save under way; returns what went wrong with it, on any host."""
        if self._finishing is None:
            return None
        error, self._finishing = self._finishing[1].exception(), None
        return hosts.first_failure(error)

    def _finish(self, step: int) -> None:
        self._writer.wait_until_finished()
        share = Share(hosts.index(), hosts.count())
        if share.host:
            write_share(self.folder / str(step), share)
            return
        write_manifest(self.folder / str(step), share, wait_seconds=self._patience.save_seconds)
        self._delete_old()

    def _delete_old(self) -> None:
        steps = self._listed()
        usable = [step for step in steps if (self.folder / str(step) / MANIFEST).exists()]
        kept = set([step for step in usable if step not in self._passed_over][-self._keep :])
        best = self._best(steps)
        for step in steps:
            if step not in kept and step != best:
                self._remove(step)

    def _remove(self, step: int) -> None:
        """Removes a checkpoint, its manifest first: what is left when it is cut off is no checkpoint."""
        folder = self.folder / str(step)
        if folder.exists():
            (folder / MANIFEST).unlink(missing_ok=True)
            folder.rmtree()

    def _remove_unfinished(self) -> None:
        for path in self._paths():
            if _UNFINISHED in path.name:
                path.rmtree(missing_ok=True)

    def drop_after(self, step: int) -> None:
        """Removes the checkpoints after `step`: the run goes on from there, another way."""
        with hosts.together():
            if hosts.index() == 0:
                for later in self._listed():
                    if later > step:
                        self._remove(later)
        self.begin_local(step)

    def begin_local(self, step: int) -> None:
        """Says that the run goes on from `step`: copies of later steps on the hosts' own disks count no more."""
        if self._local is not None:
            self._local.begin(step)

    def _listed(self) -> list[int]:
        return sorted(int(path.name) for path in self._paths() if path.name.isdigit())

    def _paths(self) -> list[epath.Path]:
        try:
            return list(self.folder.iterdir())
        except FileNotFoundError:  # a bucket has no folder where nothing lies
            return []

    def steps(self) -> list[int]:
        """Returns the steps that have a folder, usable or not."""
        return hosts.from_first(self._listed() if hosts.index() == 0 else None)

    def has_saved(self) -> bool:
        """Whether there is a folder of any step, in storage or on a host's own disk, usable or not."""
        return bool(self.steps()) or (self._local is not None and self._local.has_any())

    def finished(self) -> list[int]:
        """Returns the steps that have a manifest and were not found damaged."""
        found = [step for step in self._listed() if (self.folder / str(step) / MANIFEST).exists()]
        return hosts.from_first([step for step in found if step not in self._passed_over])

    def best_step(self) -> int | None:
        """Returns the finished step with the lowest held-out loss, or None where none was evaluated."""
        return hosts.from_first(self._best(self._listed()))

    def best_loss(self) -> float | None:
        """Returns the held-out loss of the best step."""
        step = self.best_step()
        return None if step is None else self.read_run(step).get("eval_loss")

    def _best(self, steps: list[int]) -> int | None:
        losses = {}
        for step in set(steps) - self._passed_over:
            loss = (read_manifest(self.folder / str(step)) or {}).get("eval_loss")
            if loss is not None:
                losses[step] = loss
        return min(losses, key=lambda step: (losses[step], step)) if losses else None

    def newest_usable(self, say: Any = print, *, before: int | None = None) -> int | None:
        """Returns the newest step whose files are what was written, or None where no save was ever finished.

        Says which are passed over and why. Every host reads its share of the files, and all hear of all.

        Args:
            say: told of every checkpoint that is not usable, once.
            before: only of the steps before this one.

        Raises:
            ValueError: finished checkpoints are there, and all of them are damaged; to start anew would lose the run.
        """
        damaged, share, newer = False, Share(hosts.index(), hosts.count()), before
        for step in reversed(self.steps()):
            if before is not None and step >= before:
                continue
            copied = self._newest_local(at_least=step, below=newer)
            if copied is not None:
                return copied
            newer = step
            told = hosts.gather(check_manifest(self.folder / str(step), share))
            problem = next((one for one in told if one is not None), None)
            if problem is None:
                return step
            damaged |= problem != CUT_OFF
            if step not in self._passed_over:
                self._passed_over.add(step)
                say(f"checkpoint {self.folder / str(step)} is not usable: {problem}; using the one before it, if any")
        copied = self._newest_local(at_least=0, below=newer)
        if damaged and copied is None:
            raise ValueError(
                f"{self.folder}: every checkpoint here is damaged ({', '.join(map(str, sorted(self._passed_over)))}); "
                "expected at least one whose files are what was written. Put the files back from a copy, or give "
                "another output= to start anew"
            )
        return copied

    def _newest_local(self, *, at_least: int, below: int | None) -> int | None:
        return self._local.newest(at_least=at_least, below=below) if self._local is not None else None

    def is_local(self, step: int) -> bool:
        """Whether `newest_usable` has found this step on the hosts' own disks."""
        return self._local is not None and self._local.has(step)

    def read_run(self, step: int) -> dict[str, Any]:
        """Returns the JSON saved with `step`, without its arrays."""
        if self._local is not None and self._local.has(step):
            return self._local.read_run()
        return json.loads((self.folder / str(step) / "run" / "metadata").read_text())

    def restore(self, step: int, abstract_state: Any) -> Restored:
        """Reads a checkpoint back onto any mesh of any number of hosts.

        Args:
            step: a step that `newest_usable` returned.
            abstract_state: tree of ShapeDtypeStructs whose shardings say where each leaf goes; a subset of the
                saved leaves may be asked for.

        Raises:
            ValueError: a leaf is missing or has another shape than asked for.
        """
        wanted, folder = flatten(abstract_state), self.folder / str(step)
        if self._local is not None and self._local.has(step):
            copied = self._local.restore(wanted)
            state = jax.tree.unflatten(jax.tree.structure(abstract_state), [copied[name] for name in wanted])
            return Restored(step, state, self._local.read_run())
        saved = ocp.PyTreeCheckpointHandler().metadata(folder / "state")
        shapes = {name: tuple(leaf.shape) for name, leaf in dict(saved).items()}
        for name, leaf in wanted.items():
            if shapes.get(name) != tuple(leaf.shape):
                raise ValueError(
                    f"checkpoint {folder}: {name} has shape {shapes.get(name, 'no entry')}; this run "
                    f"expects {tuple(leaf.shape)}. It was written by a run with another model or tuning method."
                )
        partial = ocp.args.PyTreeRestore(
            wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        items = self._writer.restore(folder, args=ocp.args.Composite(state=partial))
        leaves = [items["state"][name] for name in wanted]
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
        return Restored(step, state, self.read_run(step))


def flatten(tree: Any) -> dict[str, Any]:
    """Returns `{"trainable/groups/0/...": leaf, ...}`: names on disk that do not hang on any container class."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    if len(named) != len(paths):
        raise ValueError("two leaves of the state have the same name")
    return named
