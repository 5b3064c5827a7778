"""Writing a model folder that other tools open: shards, config.json and what stands beside them.

On several hosts each tensor is gathered once, by all of them; host j of H writes the files j, j + H, ... to a folder
that all share.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import fsspec
import numpy as np
from flax import nnx

from jaxtune import hosts, placement
from jaxtune.convert import folder as folders
from jaxtune.convert.folder import DTYPE_NAMES, DTYPES, INDEX, SINGLE, HFFolder
from jaxtune.convert.hf import Path, Place, leaf_shape, table_of
from jaxtune.models.family import Family

# What stands beside the weights and is copied byte for byte.
COMPANIONS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
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
    for byte. A base without weights gets one file in the family's order, in the state's dtypes. Every host must call
    this, and holds one tensor at a time. The folder is opened again and checked at the end.

    Args:
        state: all parameters; `LoRAParam`s beside a kernel are merged (float32, cast once).
        out_dir: local path or fsspec URL.
        chat_template: written when the run's template is not the tokenizer's own.
        stop_ids: tokens that end an answer, added to generation_config.json's eos_token_id.

    Raises:
        ValueError, OSError: the folder cannot be written, on all hosts when it is so on one.
    """
    family, table = table_of(base)
    variables = dict(nnx.to_flat_state(state))
    headers = base.headers or {SINGLE: _new_header(table, variables)}
    size = sum(len(raw) for raw in headers.values()) + sum(
        stop - start for raw in headers.values() for _, _, start, stop in _entries(raw)
    )
    leads = hosts.index() == 0
    fs, root = fsspec.core.url_to_fs(out_dir)
    with hosts.together():
        if leads:
            fs.makedirs(root, exist_ok=True)
            check_space(out_dir, size)
    outputs: list[Output] = []
    for number, (file, raw) in enumerate(headers.items()):
        is_mine = number % hosts.count() == hosts.index() and all(output.failure is None for output in outputs)
        outputs.append(Output(fs, f"{root}/{file}" if is_mine else None))
        with outputs[-1] as output:
            output.write(raw)
            for name, dtype, _, _ in _entries(raw):
                array = _export_tensor(base, table, variables, name, dtype, wanted=output.is_open)
                if array is not None:
                    output.write(array.reshape(-1).view(np.uint8).data)
    with hosts.together():
        for output in outputs:
            output.check()
    with hosts.together():
        if leads:
            copy_companions(base, fs, root, with_index=bool(base.headers))
            if chat_template is not None:
                write_chat_template(fs, root, chat_template)
            _write_generation_config(base, fs, root, stop_ids)
            # Last, so that a folder cut off half-way is not taken for a model.
            write_json(fs, f"{root}/config.json", complete_config(base, family, _dtype_name(headers)))
            _verify(out_dir, headers)


class Output:
    """A file of this host, or none; a failure to write is kept, for the other hosts still wait for its tensors."""

    def __init__(self, fs: Any, path: str | None) -> None:
        self.failure: OSError | None = None
        self._stream: Any = None
        if path is not None:
            with self._kept():
                self._stream = fs.open(path, "wb")

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *failure: Any) -> None:
        if self._stream is not None:
            with self._kept():
                self._stream.close()

    @property
    def is_open(self) -> bool:
        """Whether what is written arrives."""
        return self._stream is not None and self.failure is None

    def check(self) -> None:
        """Raises the OSError that was kept, if there was one."""
        if self.failure is not None:
            raise self.failure

    def write(self, data: Any) -> None:
        """Writes bytes, unless there is no file or it has failed before."""
        if self.is_open:
            with self._kept():
                self._stream.write(data)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error


def _entries(raw: bytes) -> Iterator[tuple[str, str, int, int]]:
    """Yields (name, dtype, start, stop) of a raw header's tensors in the order of their bytes."""
    header = json.loads(raw[8:])
    header.pop("__metadata__", None)
    for name, item in sorted(header.items(), key=lambda entry: entry[1]["data_offsets"]):
        yield name, item["dtype"], *item["data_offsets"]


def _export_tensor(
    base: HFFolder, table: dict[str, Place], variables: dict[Path, Any], name: str, dtype: str, *, wanted: bool
) -> np.ndarray | None:
    """Returns one tensor as the checkpoint holds it, None where it is not wanted; all hosts must call it.

    What carries no weights is copied from the base.
    """
    if name not in table:
        return np.ascontiguousarray(base.read_rows(name)) if wanted else None
    place = table[name]
    variable = variables[place.path]
    update = None
    lora_a, lora_b = (variables.get((*place.path[:-1], slot)) for slot in ("lora_a", "lora_b"))
    if place.path[-1] == "kernel" and lora_a is not None and lora_b is not None:
        update = (lora_a.get_value(), lora_b.get_value(), lora_a.get_metadata()["scale"])
    shape = leaf_shape(place, variable)
    if name in base.tensors and shape != base.tensors[name].shape:
        raise ValueError(f"{name}: has shape {list(shape)} here, {list(base.tensors[name].shape)} in the base")
    array = placement.take(
        variable.get_value(), place.index, transpose=place.transpose, dtype=DTYPES[dtype], update=update, wanted=wanted
    )
    # Without the padding of a vocabulary.
    return np.ascontiguousarray(array[: shape[0]]) if array is not None else None


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
