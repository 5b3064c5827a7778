"""The local tier of checkpoints: copies on the hosts' own disks, so that a run that begins again need not read storage.

FOLDER/RUN/STEP/HOST has what the devices of host HOST held (`local_copies.py`). Writing it sends nothing to anybody.
Along mesh axes over which no leaf is split (slice, data) several disks hold the same, so that a host whose disk is new
or damaged is sent its shards by another. Hosts that come back with other numbers than before sit down where their disks
fit, and the arrays move from there to where they belong.

A part is what all places hold that differ only along those axes. A step is whole when some disk has each part.
"""

import concurrent.futures
import hashlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding

from jaxtune import hosts, hub, placement
from jaxtune.local_copies import Copy, OnHost, copy_to_host, read_copy, shards_of, write_copy

KEPT = 2  # steps: while one is being written, the one before it is whole on all disks
IDENTITY = "local_tier"  # in OUTPUT/checkpoints: which of a disk's folders is this run's


class Seats(NamedTuple):
    """Who reads a step from which disk.

    `devices`: which device, by its number in the mesh, sits at each place. `sources`: whether the device at a place
    reads its part for all. `all_have_own`: every device's host has its part, and nothing need be sent.
    """

    devices: list[int]
    sources: list[bool]
    all_have_own: bool


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
            store: the run's checkpoints in storage, where its identity is kept.
            mesh: that states lie on.

        Raises:
            ValueError: a host cannot write there, or the path is a URL or names a variable that is not set.
        """
        self._mesh, self._say = mesh, say
        with hosts.together():
            own = own_folder(folder)
            if hosts.index() == 0 and not (store / IDENTITY).exists():
                (store / IDENTITY).write_text(secrets.token_hex(8))
        identity = hosts.from_first((store / IDENTITY).read_text() if hosts.index() == 0 else None)
        of_store = hashlib.sha256(str(store).encode()).hexdigest()[:12]
        self.folder = own / f"{of_store}-{identity}"
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
        """Raises ValueError when a host's disk cannot hold the copies that are kept and the one that is written."""
        with hosts.together():
            size = (KEPT + 1) * sum(data.nbytes for *_, data in shards_of(named))
            have = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
            free = shutil.disk_usage(self.folder).free
            if size - have > free:
                raise ValueError(
                    f"checkpoint.local.path: {self.folder.parent} has {free / 2**30:.1f} GiB free; {KEPT + 1} copies "
                    f"of this host's part of the state need {size / 2**30:.1f} GiB. Give a larger disk, or none "
                    "(checkpoint.local.path=null)"
                )

    def save(self, step: int, named: Mapping[str, jax.Array], run: dict[str, Any]) -> None:
        """Starts a copy; returns when the arrays are in host memory and training may go on.

        A copy that cannot be written is told at the next one, and does not stop the run.

        Args:
            step: number of the last update done.
            named: leaves by name, each with a `NamedSharding` on the mesh.
            run: JSON values.
        """
        self.settle()
        self._writing = step, self._writer.submit(self._write, step, copy_to_host(named, self._mesh, run))

    def _write(self, step: int, copy: OnHost) -> None:
        write_copy(self._own(step), copy)
        for old in self._steps()[:-KEPT]:
            shutil.rmtree(self.folder / str(old), ignore_errors=True)

    def settle(self) -> None:
        """Waits until all hosts have written the copy under way; what failed is told."""
        step, writing = self._writing or (None, None)
        error, self._writing = writing.exception() if writing is not None else None, None
        told = hosts.gather(None if error is None else f"{type(error).__name__}: {error}")
        failed = [host for host, message in enumerate(told) if message is not None]
        if failed:
            where = f" on {len(failed)} host(s), {hosts.names()[failed[0]]} first" if hosts.count() > 1 else ""
            self._say(f"warning: the local copy of step {step} could not be written{where}: {told[failed[0]]}")

    def newest(self, *, at_least: int, below: int | None) -> int | None:
        """Returns the newest step in [at_least, below) that the disks of all hosts together hold whole, or None.

        Says once which are passed over and why.
        """
        self._found = None
        for step in sorted({step for steps in hosts.gather(self._steps()) for step in steps}, reverse=True):
            if step < at_least or (below is not None and step >= below):
                continue
            copy = self._look(step)
            told = hosts.gather(None if copy is None else {**copy._asdict(), "shards": {}, "run": None})
            first = next((host for host, one in enumerate(told) if one is not None), None)
            problem, seats = "no host has a copy that is intact", None
            if first is not None:
                problem, seats = self._seated(told, told[first])
            if seats is None or first is None:
                self._say_once(f"the local copies of step {step} are not used: {problem}")
                continue
            run = hosts.gather(copy.run if copy is not None and hosts.index() == first else None)[first]
            self._found = _Found(step, copy, tuple(told[first]["unsplit"]), seats, run)
            return step
        return None

    def _seated(self, told: Sequence[Mapping[str, Any] | None], first: Mapping[str, Any]) -> tuple[str, Seats | None]:
        """Returns what is wrong with a step, or who reads it from where."""
        mesh = dict(self._mesh.shape)
        for one in told:
            if one is not None and one["mesh"] != mesh:
                return f"they are of a mesh {_words(one['mesh'])}, this run's is {_words(mesh)}", None
            if one is not None and one["unsplit"] != first["unsplit"]:
                return "they are of runs that split their arrays differently", None
        owners = [device.process_index for device in self._mesh.devices.flat]
        held = [set(one["places"]) if one is not None else set() for one in told]
        return "a part of the state is on no disk", find_seats(mesh, first["unsplit"], owners, held)

    def _look(self, step: int) -> Copy | None:
        """Returns what this host's disk has of a step; what is damaged is told, by whichever host has it.

        The folder with this host's number has what its devices held. Where there is none, those of other numbers are
        looked at: the host had another one, or the disk is shared.
        """
        own = self._own(step)
        others = [path for path in sorted(own.parent.glob("*")) if path.name.isdigit()]
        there = [own] if own in others else others
        looked = [(path, read_copy(path)) for path in there]
        damage = [f"{path}: {what}" for path, what in looked if isinstance(what, str)]
        for host, lines in enumerate(hosts.gather(damage)):
            for line in lines:
                self._say_once(f"{hosts.names()[host]}: a local copy is not usable: {line}")
        copies = [what for _, what in looked if not isinstance(what, str)]
        if not copies:
            return None
        places = sorted({place for copy in copies for place in copy.places})
        shards = {key: where for copy in copies for key, where in copy.shards.items()}
        return copies[0]._replace(places=tuple(places), shards=shards)

    def _say_once(self, sentence: str) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            self._say(sentence)

    def has_any(self) -> bool:
        """Whether a host's disk has a folder of any step, usable or not."""
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
            ValueError: a leaf was saved with another shape, type or sharding than asked for.
        """
        assert self._found is not None
        _, copy, unsplit, seats, _ = self._found
        devices = self._mesh.devices
        seated = Mesh(
            devices.reshape(-1)[seats.devices].reshape(devices.shape),
            self._mesh.axis_names,
            axis_types=self._mesh.axis_types,
        )
        sources = np.array(seats.sources).reshape(devices.shape)
        out: dict[str, jax.Array] = {}
        for name, leaf in wanted.items():

            def read(index: Any, name: str = name, leaf: jax.ShapeDtypeStruct = leaf) -> np.ndarray:
                assert copy is not None  # a host without one is asked for nothing
                return copy.read(name, index, leaf)

            if seats.all_have_own:
                out[name] = jax.make_array_from_callback(leaf.shape, leaf.sharding, read, dtype=leaf.dtype)
            else:
                where = NamedSharding(seated, leaf.sharding.spec)
                with jax.set_mesh(seated):
                    array = placement.from_sources(
                        read, leaf.shape, leaf.dtype, where, unsplit=unsplit, sources=sources
                    )
                out[name] = jax.device_put(array, leaf.sharding)
        return out

    def drop_after(self, step: int) -> None:
        """Removes the copies after `step`: the run goes on from there, and will write them anew."""
        self.settle()
        for later in self._steps():
            if later > step:
                shutil.rmtree(self.folder / str(later), ignore_errors=True)
        hosts.wait_for_all("later local copies are gone")

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
        return sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdigit())


def find_seats(
    mesh: Mapping[str, int], unsplit: Sequence[str], owners: Sequence[int], held: Sequence[set[int]]
) -> Seats | None:
    """Says which devices read which parts from their hosts' disks, or None where a part is on no disk.

    mesh {slice 2, fsdp 2}, unsplit [slice], one device a host; places 0 1 | 2 3 hold parts 0 1 | 0 1:

        held {0} {1} {2} {3}   all read their own
        held {0} {1} {} {}     0 and 1 read, 2 and 3 are sent theirs
        held {} {1} {2} {}     1 and 2 read
        held {1} {0} {} {}     the devices of hosts 0 and 1 change seats, read, and what they read moves back
        held {0} {} {2} {}     None: part 1 is lost

    Args:
        mesh: size of each axis.
        unsplit: the axes along which all places hold the same.
        owners: the host of each device, by its number in the mesh.
        held: of each host, the places that its disk has.
    """
    shape = tuple(mesh.values())
    split = [number for number, axis in enumerate(mesh) if axis not in unsplit]
    corners = np.stack(np.unravel_index(np.arange(len(owners)), shape))[split]
    parts = [tuple(corner) for corner in corners.T.tolist()]
    parts_held = [{parts[place] for place in places} for places in held]
    as_they_are = list(range(len(owners)))
    for devices in (as_they_are, _where_disks_fit(owners, held)):
        has = [parts[place] in parts_held[owners[device]] for place, device in enumerate(devices)]
        first = {part: place for place, part in reversed(list(enumerate(parts))) if has[place]}
        if len(first) == len(set(parts)):
            sources = [first[part] == place for place, part in enumerate(parts)]
            return Seats(devices, sources, all_have_own=all(has) and devices == as_they_are)
    return None


def _where_disks_fit(owners: Sequence[int], held: Sequence[set[int]]) -> list[int]:
    """Seats each host's devices at the places that its disk has, as far as they are free; the others take the rest."""
    free = [[device for device, owner in enumerate(owners) if owner == host] for host in range(len(held))]
    seats: dict[int, int] = {}
    for host, places in enumerate(held):
        for place in sorted(places - seats.keys())[: len(free[host])]:
            seats[place] = free[host].pop(0)
    rest = iter([device for devices in free for device in devices])
    return [seats[place] if place in seats else next(rest) for place in range(len(owners))]


def _words(mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "of one device"


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
