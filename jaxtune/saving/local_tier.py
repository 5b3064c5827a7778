"""The local tier of checkpoints: copies on the hosts' own disks, so that a run that begins again need not read storage.

FOLDER/RUN/STEP/HOST has what the devices of host HOST held (`local_copies.py`). Writing it sends nothing to anybody.
Along mesh axes over which no leaf is split (slice, data) several disks hold the same, so that a host whose disk is new
or damaged is sent its shards by another. Hosts that come back with other numbers than before sit down where their disks
fit, and the arrays move from there to where they belong. Who reads what is found by `find_seats` (`local_seats.py`).
"""

import concurrent.futures
import hashlib
import os
import pathlib
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding

from jaxtune import hosts, hub, placement
from jaxtune.saving.attempts import Attempts
from jaxtune.saving.local_copies import Copy, OnHost, copy_to_host, places_of_host, read_copy, shards_of, write_copy
from jaxtune.saving.local_seats import Seats, find_seats
from jaxtune.sharding import mesh_words

KEPT = 2  # steps: while one is being written, the one before it is whole on all disks
ATTEMPTS = "local_tier.json"  # in OUTPUT/checkpoints; gone with it, so that a run begun anew finds nothing of the old


class _Found(NamedTuple):
    step: int
    copy: Copy | None  # on this host's disk
    unsplit: tuple[str, ...]
    seats: Seats
    run: dict[str, Any]


class LocalTier:
    """The newest states of one run on the disks of its hosts. All hosts call everything here, in the same order."""

    def __init__(self, folder: str, *, store: epath.Path, mesh: Mesh, say: Callable[[str], None] = print) -> None:
        """Opens (and makes) this run's part of `folder`; what a run before it in the same `store` left goes.

        Args:
            folder: of each host's own; `~` and `$NAME` are the host's.
            store: the run's checkpoints in storage, where its attempts are kept.
            mesh: that states lie on.

        Raises:
            ValueError: a host cannot write there, or the path is a URL or names a variable that is not set.
        """
        self._mesh, self._say = mesh, say
        with hosts.together():
            own = own_folder(folder)
        self._attempts = Attempts(store / ATTEMPTS)
        of_store = hashlib.sha256(str(store).encode()).hexdigest()[:12]
        self.folder = own / f"{of_store}-{self._attempts.run}"
        with hosts.together():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(
                    f"checkpoint.local.path: {own} cannot be written on this host ({error}); expected a folder on a "
                    "disk of its own, or in memory (/dev/shm/jaxtune)"
                ) from None
        for other in own.glob(f"{of_store}-*"):
            if other != self.folder:
                shutil.rmtree(other, ignore_errors=True)
        self._writer = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="local-tier")
        self._writing: tuple[int, concurrent.futures.Future] | None = None
        self._found: _Found | None = None
        self._told: set[str] = set()

    def check_room(self, named: Mapping[str, jax.Array]) -> None:
        """Raises ValueError when a disk cannot hold the copies that are kept and the one that is written.

        Several processes may share a disk; what they need is added up.
        """
        disk = [socket.gethostname(), self.folder.stat().st_dev]
        own = (KEPT + 1) * sum(data.nbytes for *_, data in shards_of(named))
        told = hosts.gather([disk, own, str(self.folder), _size(self.folder)])
        here = [one for one in told if one[0] == disk]
        size = sum(need for _, need, _, _ in here)
        have = sum({folder: there for _, _, folder, there in here}.values())  # processes may share a folder too
        with hosts.together():
            free = shutil.disk_usage(self.folder).free
            if size - have > free:
                others = [f"{path} {_size(path) / 2**30:.1f} GiB" for path in self.folder.parent.glob("*-*")]
                others = [line for line in others if not line.startswith(str(self.folder))]
                left = f", or remove what other runs left ({', '.join(others[:3])})" if others else ""
                raise ValueError(
                    f"checkpoint.local.path: {self.folder.parent} has {free / 2**30:.1f} GiB free; {KEPT + 1} copies "
                    f"of this host's part of the state need {size / 2**30:.1f} GiB. Give a larger disk, or none "
                    f"(checkpoint.local.path=null){left}"
                )

    def begin(self, step: int) -> None:
        """Says that the run goes on from `step`: what was copied after it is of a past that is done again, and goes."""
        self.settle()
        self._attempts.begin(step)
        for later in self._steps():
            if later > step:
                shutil.rmtree(self.folder / str(later), ignore_errors=True)
        hosts.wait_for_all("later local copies are gone")

    def save(self, step: int, named: Mapping[str, jax.Array], run: dict[str, Any]) -> None:
        """Starts a copy; returns when the arrays are in host memory and training may go on.

        A copy that cannot be written is told at the next one, and does not stop the run.

        Args:
            step: number of the last update done.
            named: leaves by name, each with a `NamedSharding` on the mesh.
            run: JSON values.
        """
        self.settle()
        copy = copy_to_host(named, self._mesh, attempt=self._attempts.current, run=run)
        self._writing = step, self._writer.submit(self._write, step, copy)

    def _write(self, step: int, copy: OnHost) -> None:
        write_copy(self._own(step), copy)
        for old in self._steps()[:-KEPT]:
            shutil.rmtree(self.folder / str(old), ignore_errors=True)

    def settle(self) -> None:
        """Waits until all hosts have written the copy under way; what failed is told."""
        step, writing = self._writing or (None, None)
        error, self._writing = writing.exception() if writing is not None else None, None
        failure = hosts.first_failure(error)
        if failure is not None:
            self._say(f"warning: the local copy of step {step} could not be written: {failure}")

    def newest(self, *, at_least: int, below: int | None) -> int | None:
        """Returns the newest step in [at_least, below) that the disks of all hosts together hold whole, or None.

        Says once which are passed over and why.
        """
        self.settle()
        self._found = None
        for step in sorted({step for steps in hosts.gather(self._steps()) for step in steps}, reverse=True):
            if step < at_least or (below is not None and step >= below):
                continue
            copy = self._look(step)
            told = hosts.gather(None if copy is None else {**copy._asdict(), "shards": {}, "run": None})
            first = next((host for host, one in enumerate(told) if one is not None), None)
            problem, seats = "no disk has a whole copy of this attempt's", None
            if first is not None:
                problem, seats = self._seated(told, told[first])
            if seats is None or first is None:
                self._say_once(f"the local copies of step {step} are not used: {problem}")
                continue
            run = hosts.gather(copy.run if copy is not None and hosts.index() == first else None)[first]
            self._found = _Found(step, copy, tuple(told[first]["unsplit"]), seats, run)
            return step
        return None

    def _look(self, step: int) -> Copy | None:
        """Returns what this host's disk has of a step, of the attempt that the step is of.

        The folder with this host's number has what its devices held. Where it does not have what they are to hold now,
        those of other numbers are looked at: the host had another one, or the disk is shared. What is damaged is told.
        """
        own = self._own(step)
        others = [path for path in sorted(own.parent.glob("*")) if path.name.isdigit() and path != own]
        copies, damage = [], []
        for path in ([own] if own.exists() else []) + others:
            found = read_copy(path)
            if isinstance(found, str):
                damage.append(f"{path}: {found}")
            elif found.attempt == self._attempts.token_of(step):
                copies.append(found)
            if path == own and copies and set(places_of_host(self._mesh)) <= set(copies[0].places):
                break
        for host, lines in enumerate(hosts.gather(damage)):
            for line in lines:
                self._say_once(f"{hosts.names()[host]}: a local copy is not usable: {line}")
        if not copies:
            return None
        places = sorted({place for copy in copies for place in copy.places})
        shards = {key: where for copy in copies for key, where in copy.shards.items()}
        return copies[0]._replace(places=tuple(places), shards=shards)

    def _seated(self, told: Sequence[Mapping[str, Any] | None], first: Mapping[str, Any]) -> tuple[str, Seats | None]:
        """Returns what is wrong with a step, or who reads it from where."""
        mesh = dict(self._mesh.shape)
        for one in told:
            if one is not None and one["mesh"] != mesh:
                return f"they are of a mesh {mesh_words(one['mesh'])}, this run's is {mesh_words(mesh)}", None
            if one is not None and one["unsplit"] != first["unsplit"]:
                return "they are of runs that split their arrays differently", None
        owners = [device.process_index for device in self._mesh.devices.flat]
        held = [set(one["places"]) if one is not None else set() for one in told]
        return "a part of the state is on no disk", find_seats(mesh, first["unsplit"], owners, held)

    def _say_once(self, sentence: str) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            self._say(sentence)

    def has_any(self) -> bool:
        """Whether a host's disk has a copy of any step, usable or not."""
        return any(hosts.gather(bool(self._steps())))

    def has(self, step: int) -> bool:
        """Whether this step is the one that `newest` has found."""
        return self._found is not None and self._found.step == step

    def read_run(self) -> dict[str, Any]:
        """Returns the JSON of the step that `newest` has found."""
        assert self._found is not None
        return self._found.run

    def restore(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Returns leaves of the step that `newest` has found, to the bit.

        Args:
            wanted: by name, with the sharding of each on the mesh; a subset of what was saved may be asked for.

        Raises:
            ValueError: on all hosts: a leaf was saved with another shape, type or sharding than asked for.
        """
        assert self._found is not None
        _, copy, unsplit, seats, _ = self._found
        seated = Mesh(seats.of(self._mesh), self._mesh.axis_names, axis_types=self._mesh.axis_types)
        sources = np.array(seats.sources).reshape(seated.devices.shape)
        reading = {device for device, reads in zip(seated.devices.flat, sources.flat, strict=True) if reads}
        where = {name: NamedSharding(seated, leaf.sharding.spec) for name, leaf in wanted.items()}
        with hosts.together():  # those that are sent theirs would wait for one that cannot read
            for name, leaf in wanted.items():
                for device, index in where[name].addressable_devices_indices_map(leaf.shape).items():
                    if copy is not None and index is not None and (seats.all_have_own or device in reading):
                        copy.find(name, index, leaf)
        out: dict[str, jax.Array] = {}
        for name, leaf in wanted.items():

            def read(index: Any, name: str = name, leaf: jax.ShapeDtypeStruct = leaf) -> np.ndarray:
                assert copy is not None  # a host without one is asked for nothing
                return copy.read(name, index, leaf)

            if seats.all_have_own:
                out[name] = jax.make_array_from_callback(leaf.shape, leaf.sharding, read, dtype=leaf.dtype)
                continue
            with jax.set_mesh(seated):
                array = placement.from_sources(
                    read, leaf.shape, leaf.dtype, where[name], unsplit=unsplit, sources=sources
                )
            out[name] = jax.device_put(array, leaf.sharding)
        return out

    def clear(self) -> None:
        """Removes everything: the run is done, and its last state is in storage."""
        self.settle()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Ends the copy under way."""
        self._writer.shutdown()

    def _own(self, step: int) -> pathlib.Path:
        return self.folder / str(step) / str(hosts.index())

    def _steps(self) -> list[int]:
        """The steps of which this disk has a copy that was written to its end."""
        found = [path for path in self.folder.glob("*/*") if path.name.isdigit() and path.parent.name.isdigit()]
        return sorted({int(path.parent.name) for path in found})


def own_folder(folder: str) -> pathlib.Path:
    """Returns `checkpoint.local.path` as this host reads it, `~` and `$NAME` filled in.

    Raises:
        ValueError: it is a URL, or names a variable that is not set here.
    """
    if hub.is_url(folder):
        raise ValueError(
            f"checkpoint.local.path: found {folder}; expected a folder on each host's own disk, e.g. /dev/shm/jaxtune"
        )
    path = os.path.expandvars(folder)
    if "$" in path:
        raise ValueError(f"checkpoint.local.path: found {folder}; a variable in it is not set on this host")
    return pathlib.Path(path).expanduser().absolute()


def _size(folder: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
