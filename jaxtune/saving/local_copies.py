"""What a host's own disk has of a state: the shards of its devices in one file, a list of them, and a manifest.

FOLDER/arrays       the bytes of every shard, one after another; a shard that several devices hold once
FOLDER/index.json   which shards these are, at which places of which mesh, of which attempt, and the run's JSON
FOLDER/jaxtune_manifest.json

A place is a position in `mesh.devices.flat`.
"""

import json
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding

from jaxtune.saving.manifest import check_manifest, write_manifest

_ARRAYS, _INDEX = "arrays", "index.json"
Box = tuple[tuple[int, int], ...]  # (start, stop) of a shard along each dimension
Slices = tuple[slice, ...]


class Where(NamedTuple):
    """Where a shard's bytes are, and of which type its numbers."""

    file: pathlib.Path
    start: int
    dtype: str


class Copy(NamedTuple):
    """A host's copy of its part of a state.

    `attempt`: whose step it is (`attempts.py`). `mesh`: size of each axis. `unsplit`: the axes over which no leaf is
    split, so that places which differ only along these hold the same. `run`: the JSON that was saved beside the arrays.
    """

    attempt: str
    places: tuple[int, ...]
    mesh: dict[str, int]
    unsplit: tuple[str, ...]
    shards: dict[tuple[str, Box], Where]
    run: dict[str, Any]

    def find(self, name: str, index: Slices, leaf: jax.ShapeDtypeStruct) -> Where:
        """Returns where the shard `index` of a leaf is.

        Raises:
            ValueError: there is no such shard, or its numbers are of another type.
        """
        box = box_of(index, leaf.shape)
        found = self.shards.get((name, box))
        if found is None or found.dtype != str(leaf.dtype):
            have = "no such shard" if found is None else f"one of {found.dtype}"
            file = next(iter(self.shards.values())).file
            raise ValueError(
                f"{file}: expected the shard {box} of {name}, {leaf.dtype} {leaf.shape}; found {have}. Another "
                "version of jaxtune wrote it: remove that folder on all hosts to go on from storage"
            )
        return found

    def read(self, name: str, index: Slices, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        """Returns the shard `index` of a leaf; raises as `find` does."""
        where = self.find(name, index, leaf)
        shape = [stop - start for start, stop in box_of(index, leaf.shape)]
        size = int(np.prod(shape, dtype=np.int64)) * leaf.dtype.itemsize
        return np.fromfile(where.file, np.uint8, size, offset=where.start).view(leaf.dtype).reshape(shape)


class OnHost(NamedTuple):
    """A copy in host memory, to be written."""

    arrays: list[np.ndarray]
    listed: dict[str, Any]


def shards_of(named: Mapping[str, jax.Array]) -> list[tuple[str, Box, jax.Array]]:
    """Returns (leaf, box, shard) of what this host's devices hold, each box once."""
    found: dict[tuple[str, Box], jax.Array] = {}
    for name, leaf in named.items():
        for shard in leaf.addressable_shards:
            found.setdefault((name, box_of(shard.index, leaf.shape)), shard.data)
    return [(name, box, data) for (name, box), data in found.items()]


def places_of_host(mesh: Mesh) -> list[int]:
    """Returns the places of this host's devices."""
    return [place for place, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]


def copy_to_host(named: Mapping[str, jax.Array], mesh: Mesh, *, attempt: str, run: dict[str, Any]) -> OnHost:
    """Copies what this host's devices hold into its memory.

    Args:
        named: leaves by name, each with a `NamedSharding` on the mesh.
        attempt: whose step it is.
        run: JSON values.
    """
    shards = shards_of(named)
    for *_, data in shards:
        data.copy_to_host_async()
    arrays = [_on_host(data) for *_, data in shards]
    listed = {
        "attempt": attempt,
        "places": places_of_host(mesh),
        "mesh": dict(mesh.shape),
        "unsplit": _unsplit_axes(mesh, named.values()),
        "shards": [
            {"name": name, "box": box, "dtype": str(array.dtype), "bytes": array.nbytes}
            for (name, box, _), array in zip(shards, arrays, strict=True)
        ],
        "run": run,
    }
    return OnHost(arrays, listed)


def _on_host(data: jax.Array) -> np.ndarray:
    """A copy: on a CPU numpy would look into the very buffer that the next update is given."""
    array = np.asarray(data)
    return array.copy() if next(iter(data.devices())).platform == "cpu" else array


def _unsplit_axes(mesh: Mesh, leaves: Iterable[jax.Array]) -> list[str]:
    used: set[str] = set()
    for leaf in leaves:
        assert isinstance(leaf.sharding, NamedSharding)
        for names in leaf.sharding.spec:
            used |= {names} if isinstance(names, str) else set(names or ())
    return [axis for axis in mesh.axis_names if axis not in used]


def write_copy(folder: pathlib.Path, copy: OnHost) -> None:
    """Writes a copy aside and then in place, so that a folder that is there is whole; one that fails leaves nothing."""
    aside = folder.with_suffix(".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with (aside / _ARRAYS).open("wb") as file:
            for array in copy.arrays:
                array.tofile(file)
        (aside / _INDEX).write_text(json.dumps(copy.listed))
        write_manifest(epath.Path(aside))
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def read_copy(folder: pathlib.Path) -> Copy | str:
    """Returns what lies in a folder, its arrays not yet read, or what is wrong with it."""
    try:
        problem = check_manifest(epath.Path(folder))
        if problem is not None:
            return problem
        listed = json.loads((folder / _INDEX).read_text())
    except OSError as error:
        return f"it cannot be read ({error})"
    shards: dict[tuple[str, Box], Where] = {}
    start = 0
    for one in listed["shards"]:
        box = tuple((first, stop) for first, stop in one["box"])
        shards[one["name"], box] = Where(folder / _ARRAYS, start, one["dtype"])
        start += one["bytes"]
    return Copy(**{**listed, "shards": shards})


def box_of(index: Slices, shape: Sequence[int]) -> Box:
    """Returns slices as (start, stop) along each dimension."""
    return tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))
