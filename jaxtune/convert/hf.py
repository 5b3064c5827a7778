"""Hugging Face folder to parameters and back, one tensor at a time, by the family's one table of names."""

import json
import os
import shutil
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import fsspec
import jax
import numpy as np
from flax import nnx

from jaxtune import placement
from jaxtune.convert import folder as folders
from jaxtune.convert.folder import DTYPE_NAMES, DTYPES, INDEX, SINGLE, HFFolder
from jaxtune.models.decoder_config import StackedLayer
from jaxtune.models.family import Family, Weight
from jaxtune.models.layers import LoRAParam
from jaxtune.models.registry import family_of
from jaxtune.sharding import own_shape

Path = tuple[Any, ...]

# What stands beside the weights and is copied byte for byte.
COMPANIONS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)


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


def export_folder(
    base: HFFolder,
    state: nnx.State,
    out_dir: str,
    *,
    chat_template: str | None = None,
    stop_ids: tuple[int, ...] | None = None,
) -> None:
    """Writes a model folder that other tools open: the base's files with this state's weights, adapters merged in.

    Shards, their order and each tensor's dtype are the base's, so that with unchanged weights the files are equal byte
    for byte. A base without weights gets one file in the family's order, in the state's dtypes. Every process must
    call this; process 0 writes. The folder is opened again and checked at the end.

    Args:
        state: all parameters; `LoRAParam`s beside a kernel are merged (float32, cast once).
        out_dir: local path or fsspec URL.
        chat_template: written when the run's template is not the tokenizer's own.
        stop_ids: tokens that end an answer, added to generation_config.json's eos_token_id.
    """
    family, table = table_of(base)
    variables = dict(nnx.to_flat_state(state))
    headers = base.headers or {SINGLE: _new_header(table, variables)}
    size = sum(len(raw) for raw in headers.values()) + sum(
        stop - start for raw in headers.values() for _, _, start, stop in _entries(raw)
    )
    writes = jax.process_index() == 0
    fs, root = fsspec.core.url_to_fs(out_dir)
    if writes:
        fs.makedirs(root, exist_ok=True)
        check_space(out_dir, size)
    for file, raw in headers.items():
        stream = fs.open(f"{root}/{file}", "wb") if writes else None
        try:
            if stream:
                stream.write(raw)
            for name, dtype, _, _ in _entries(raw):
                array = _export_tensor(base, table, variables, name, dtype)
                if stream:
                    stream.write(array.reshape(-1).view(np.uint8).data)
        finally:
            if stream:
                stream.close()
    if writes:
        copy_companions(base, fs, root, with_index=bool(base.headers))
        if chat_template is not None:
            write_chat_template(fs, root, chat_template)
        _write_generation_config(base, fs, root, stop_ids)
        # Last, so that a folder cut off half-way is not taken for a model.
        write_json(fs, f"{root}/config.json", complete_config(base, family, _dtype_name(headers)))
        _verify(out_dir, headers)


def _entries(raw: bytes) -> Iterator[tuple[str, str, int, int]]:
    """Yields (name, dtype, start, stop) of a raw header's tensors in the order of their bytes."""
    header = json.loads(raw[8:])
    header.pop("__metadata__", None)
    for name, item in sorted(header.items(), key=lambda entry: entry[1]["data_offsets"]):
        yield name, item["dtype"], *item["data_offsets"]


def _export_tensor(
    base: HFFolder, table: dict[str, Place], variables: dict[Path, Any], name: str, dtype: str
) -> np.ndarray:
    """Returns one tensor as the checkpoint holds it; what carries no weights is copied from the base."""
    if name not in table:
        return np.ascontiguousarray(base.read_rows(name))
    place = table[name]
    variable = variables[place.path]
    update = None
    lora_a, lora_b = (variables.get((*place.path[:-1], slot)) for slot in ("lora_a", "lora_b"))
    if place.path[-1] == "kernel" and lora_a is not None and lora_b is not None:
        update = (lora_a.get_value(), lora_b.get_value(), lora_a.get_metadata()["scale"])
    array = placement.take(
        variable.get_value(), place.index, transpose=place.transpose, dtype=DTYPES[dtype], update=update
    )
    array = array[: leaf_shape(place, variable)[0]]  # without the padding of a vocabulary
    if name in base.tensors and array.shape != base.tensors[name].shape:
        raise ValueError(f"{name}: has shape {list(array.shape)} here, {list(base.tensors[name].shape)} in the base")
    return np.ascontiguousarray(array)


def _new_header(table: dict[str, Place], variables: dict[Path, Any]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, place in table.items():
        if place.optional:
            continue
        variable = variables[place.path]
        dtype, shape = np.dtype(variable.get_value().dtype), leaf_shape(place, variable)
        stop = at + int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    return pack_header(header)


def pack_header(header: dict[str, Any]) -> bytes:
    """Returns a safetensors header with its length before it, padded with spaces to 8 bytes."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def check_space(out_dir: str, size: int) -> None:
    """Raises ValueError when a local disk cannot hold `size` more bytes."""
    if folders.is_local(out_dir):
        free = shutil.disk_usage(out_dir).free
        if free < size:
            raise ValueError(
                f"{out_dir}: {size / 2**30:.1f} GiB are to be written, but only {free / 2**30:.1f} GiB are free; "
                "make room or choose another output"
            )


def complete_config(base: HFFolder, family: Family, dtype: str) -> dict[str, Any]:
    """Returns config.json with the keys that readers of transformers 4 and of 5 look for; nothing is changed or lost.

    A file with only the keys of 5 is read by 4 with rope base 10000 and without scaling, and without a warning.
    """
    config = dict(base.config)
    config.setdefault("architectures", [family.architecture])
    family.complete(config)
    known = config.get("dtype") or config.get("torch_dtype") or dtype
    config.setdefault("dtype", known)
    config.setdefault("torch_dtype", known)
    return config


def _dtype_name(headers: dict[str, bytes]) -> str:
    """Returns torch's name of the dtype that most bytes are in."""
    sizes: dict[str, int] = {}
    for raw in headers.values():
        for _, dtype, start, stop in _entries(raw):
            sizes[dtype] = sizes.get(dtype, 0) + stop - start
    return DTYPES[max(sizes, key=lambda dtype: sizes[dtype])].name


def copy_companions(base: HFFolder, fs: Any, root: str, *, with_index: bool = False) -> None:
    """Copies tokenizer and licence files byte for byte, and the weights' index where asked."""
    base_fs, base_root = fsspec.core.url_to_fs(base.path)
    for entry in sorted(base_fs.ls(base_root, detail=False)):
        name = os.path.basename(entry.rstrip("/"))
        if (name == INDEX and with_index) or any(fnmatch(name, pattern) for pattern in COMPANIONS):
            with fs.open(f"{root}/{name}", "wb") as stream:
                stream.write(base_fs.cat_file(entry))


def write_chat_template(fs: Any, root: str, template: str) -> None:
    """Writes a chat template where readers new (chat_template.jinja) and old (tokenizer_config.json) look for it."""
    with fs.open(f"{root}/chat_template.jinja", "wb") as stream:
        stream.write(template.encode())
    entry = f"{root}/tokenizer_config.json"
    config = json.loads(fs.cat_file(entry)) if fs.exists(entry) else {}
    write_json(fs, entry, {**config, "chat_template": template})


def _write_generation_config(base: HFFolder, fs: Any, root: str, stop_ids: tuple[int, ...] | None) -> None:
    """Copies generation_config.json; stop tokens that it lacks are added, the padding token never."""
    base_fs, base_root = fsspec.core.url_to_fs(base.path)
    entry = f"{base_root}/generation_config.json"
    raw = base_fs.cat_file(entry) if base_fs.exists(entry) else None
    config = json.loads(raw) if raw is not None else {}
    found = config.get("eos_token_id", base.config.get("eos_token_id"))
    eos = [] if found is None else [found] if isinstance(found, int) else list(found)
    pad = config.get("pad_token_id", base.config.get("pad_token_id"))
    added = [token for token in dict.fromkeys(stop_ids or ()) if token not in eos and token != pad]
    if raw is not None and not added:
        with fs.open(f"{root}/generation_config.json", "wb") as stream:
            stream.write(raw)
        return
    if raw is None:
        copied = ("bos_token_id", "pad_token_id", "decoder_start_token_id")
        config = {key: base.config[key] for key in copied if base.config.get(key) is not None}
    eos += added
    if eos:
        config["eos_token_id"] = eos[0] if len(eos) == 1 else eos
    write_json(fs, f"{root}/generation_config.json", config)


def write_json(fs: Any, entry: str, value: Any) -> None:
    """Writes JSON as transformers lays it out."""
    with fs.open(entry, "wb") as stream:
        stream.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _verify(out_dir: str, headers: dict[str, bytes]) -> None:
    """Opens what was written and compares it with what should be there."""
    written = folders.open_folder(out_dir)
    if written.headers != headers:
        raise ValueError(f"{out_dir}: the files read back differ from what was written; check the disk")
