"""Hugging Face folder to parameters and back, one tensor at a time, by the family's one table of names."""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxtune import placement
from jaxtune.convert.folder import DTYPES, HFFolder
from jaxtune.models.decoder_config import StackedLayer
from jaxtune.models.family import Family, Weight
from jaxtune.models.layers import LoRAParam
from jaxtune.models.registry import family_of
from jaxtune.sharding import own_shape

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Place:
    """Where one tensor lives among the parameters: the leaf's path and, in a stacked leaf, its layer (and expert)."""

    name: str
    path: Path
    index: tuple[int, ...]
    transpose: bool
    optional: bool


def name_table(family: Family, config: Any, names: Container[str] = ()) -> dict[str, Place]:
    """Writes the family's table out for every layer: tensor name -> place, in the order of a checkpoint.

    Args:
        config: as the family reads it; its `stacks()` says where the layers of a placeholder are.
        names: tensors of the folder at hand; some checkpoints of a family begin their names otherwise.
    """
    stacks = config.stacks()
    by_stack: dict[str | None, list[Weight]] = {}
    for weight in family.weights(config):
        stack = next((stack for stack in stacks if f"{{{stack}}}" in weight.hf), None)
        by_stack.setdefault(stack, []).append(weight)
    places: list[Place] = []
    told: set[str | None] = set()
    for weight in family.weights(config):
        stack = next((stack for stack in stacks if f"{{{stack}}}" in weight.hf), None)
        if stack is None:
            places.append(Place(weight.hf, weight.path, (), weight.transpose, weight.optional))
        elif stack not in told:  # all of a layer's tensors stand together
            told.add(stack)
            for number, layer in enumerate(stacks[stack]):
                for inner in by_stack[stack]:
                    if inner.sparse is None or inner.sparse == layer.kind.sparse:
                        places += _in_layer(inner, {stack: number}, layer, config)
    renamed = {ours: theirs for ours, theirs in family.prefixes if not any(p.name in names for p in places[:1])}
    return {(name := _renamed(place.name, renamed, names)): replace(place, name=name) for place in places}


def _in_layer(weight: Weight, number: dict[str, int], layer: StackedLayer, config: Any) -> Iterator[Place]:
    """Yields the places of one entry in one layer: one, or one for each expert."""
    path = (*layer.path, *weight.path)
    if "{expert}" not in weight.hf:
        yield Place(weight.hf.format(**number), path, (layer.index,), weight.transpose, weight.optional)
        return
    for expert in range(config.experts.count):
        name = weight.hf.format(**number, expert=expert)
        yield Place(name, path, (layer.index, expert), weight.transpose, weight.optional)


def _renamed(name: str, prefixes: dict[str, str], names: Container[str]) -> str:
    """Returns the name as this folder has it, by the first change of its beginning that leads to a tensor of it."""
    for ours, theirs in prefixes.items():
        if name.startswith(ours) and theirs + name.removeprefix(ours) in names:
            return theirs + name.removeprefix(ours)
    return name


def table_of(folder: HFFolder) -> tuple[Family, dict[str, Place]]:
    """Returns a folder's family, and the places of its tensors."""
    family = family_of(folder.config, where=folder.path)
    return family, name_table(family, family.read_config(folder.config), folder.tensors)


def leaf_shape(place: Place, variable: nnx.Variable) -> tuple[int, ...]:
    """Returns the shape that the checkpoint must have for a place, from the parameter's own declaration."""
    shape = own_shape(variable)[len(place.index) :]
    return shape[::-1] if place.transpose else shape


def variables_of(state: nnx.State) -> dict[Path, Any]:
    """Returns path -> variable of the state's parameters, adapters left out."""
    return {path: variable for path, variable in nnx.to_flat_state(state) if not isinstance(variable, LoRAParam)}


def leaves_of(state: nnx.State) -> dict[Path, Any]:
    """Returns path -> value (array, ShapeDtypeStruct or sharding) of the state's parameters, adapters left out."""
    return {path: variable.get_value() for path, variable in variables_of(state).items()}


def file_dtypes(folder: HFFolder) -> Callable[[Path], Any]:
    """Returns `dtype_of` for `load_params` that holds each parameter in its tensors' own dtype."""
    found: dict[Path, Any] = {}
    for name, place in table_of(folder)[1].items():
        if name in folder.tensors and not place.optional:
            dtype = DTYPES[folder.tensors[name].dtype]
            found[place.path] = np.promote_types(found.get(place.path, dtype), dtype)
    return found.__getitem__


def load_params(
    folder: HFFolder,
    abstract_state: nnx.State,
    *,
    shardings: nnx.State | None = None,
    dtype_of: Callable[[Path], Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> nnx.State:
    """Reads the folder's weights into arrays, each leaf where `shardings` says.

    Args:
        abstract_state: what to fill, from `nnx.split(nnx.eval_shape(...))`; adapters in it are left out of the result.
        shardings: the same tree with shardings as values; None puts everything on the first device.
        dtype_of: path of a leaf -> dtype to hold it in; default is the abstract leaf's.
        progress: called with (bytes read, bytes in all) after each tensor.

    Returns:
        A state with the same variables (and metadata) that holds arrays.

    Raises:
        ValueError: tensors that are missing, not expected, or of a wrong shape; all of them in one message.
    """
    family, table = table_of(folder)
    variables = variables_of(abstract_state)
    _check_tensors(folder, family, table, variables)
    where = leaves_of(shardings) if shardings is not None else {}
    default = placement.default_sharding()
    arrays: dict[Path, jax.Array] = {}
    wanted = [info for info in folder.tensors.values() if _is_read(table.get(info.name), variables)]
    # Largest first, while most room is left: resharding holds a few copies of one tensor for a moment.
    wanted.sort(key=lambda info: info.start - info.stop)
    total, done = sum(info.stop - info.start for info in wanted), 0
    for info in wanted:
        place = table[info.name]
        leaf, sharding = variables[place.path].get_value(), where.get(place.path, default)
        dtype = dtype_of(place.path) if dtype_of is not None else leaf.dtype

        def read(start: int, stop: int, name: str = info.name) -> np.ndarray:
            return folder.read_rows(name, start, stop)

        held = tuple(leaf.shape[len(place.index) :])
        held = held[::-1] if place.transpose else held
        rows = placement.row_sharded(read, info.shape, DTYPES[info.dtype], sharding, held=held[0] if held else None)
        if not place.index:
            array = placement.put(rows, transpose=place.transpose, dtype=dtype, sharding=sharding)
        else:
            stack = arrays.pop(place.path, None)
            if stack is None:
                stack = placement.empty_stack(leaf.shape, dtype, sharding)
            array = placement.fill(stack, rows, place.index, transpose=place.transpose, sharding=sharding)
        array.block_until_ready()  # or the rows of many tensors would wait in memory together
        del rows
        arrays[place.path] = array
        done += info.stop - info.start
        if progress is not None:
            progress(done, total)
    return nnx.from_flat_state([(path, variable.replace(arrays[path])) for path, variable in variables.items()])


def _is_read(place: Place | None, variables: dict[Path, Any]) -> bool:
    """Whether a tensor is read into one of these variables: not one without a place, a second copy or another's."""
    return place is not None and not place.optional and place.path in variables


def _check_tensors(folder: HFFolder, family: Family, table: dict[str, Place], variables: dict[Path, Any]) -> None:
    """Raises one ValueError that lists every tensor missing, not expected or of a wrong shape."""
    problems = []
    for name, place in table.items():
        if not _is_read(place, variables):
            continue
        info = folder.tensors.get(name)
        expected = leaf_shape(place, variables[place.path])
        if info is None:
            problems.append(f"{name}: missing; expected shape {list(expected)}")
        elif info.shape != expected:
            problems.append(f"{name} in {info.file}: found shape {list(info.shape)}; expected {list(expected)}")
    for name, info in folder.tensors.items():
        if name not in table and not any(fnmatch(name, pattern) for pattern in family.ignored):
            problems.append(f"{name} in {info.file}: not a tensor of a {family.model_type} with this config.json")
    if problems:
        raise ValueError(
            f"{folder.path}: the weights do not fit config.json; {len(problems)} tensor(s) differ. Download the folder "
            "again, or correct config.json:\n  " + "\n  ".join(problems)
        )
