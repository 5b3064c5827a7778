"""A Hugging Face model folder as data: its config, and where in which file every tensor lies.

Only the headers of safetensors files are read here; a file is 8 bytes of header length, a JSON header, and the bytes
of the tensors. Damage is found before anything is loaded.
"""

import hashlib
import json
import os
import struct
from dataclasses import dataclass, field
from typing import Any

import fsspec
import ml_dtypes
import numpy as np

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: dict[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes `start` to `stop` of `file`."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class HFFolder:
    """An opened folder: `tensors` by name in file order, `headers` the raw header (length included) of each file."""

    path: str
    config: dict[str, Any]
    tensors: dict[str, TensorInfo] = field(repr=False)
    headers: dict[str, bytes] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """A hash of config.json, every header, and the first rows of some tensors: tells one model from another."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file, raw in sorted(self.headers.items()):
            digest.update(file.encode() + raw)
        names = sorted(self.tensors)
        for name in names[:: max(1, len(names) // 16)]:
            digest.update(np.ascontiguousarray(self.read_rows(name, 0, 1)).tobytes())
        return digest.hexdigest()

    def read_rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns rows of a tensor; a view into the mapped file where it is local, else one range read."""
        info = self.tensors[name]
        dtype = DTYPES[info.dtype]
        shape, offset = info.shape, info.start
        if shape:
            stop = shape[0] if stop is None else stop
            offset += start * ((info.stop - info.start) // max(shape[0], 1))
            shape = (stop - start, *shape[1:])
        size = int(np.prod(shape)) * dtype.itemsize
        if is_local(self.path):
            data: Any = np.memmap(os.path.join(self.path, info.file), np.uint8, mode="r", offset=offset, shape=(size,))
        else:
            fs, root = fsspec.core.url_to_fs(self.path)
            data = np.frombuffer(fs.cat_file(f"{root}/{info.file}", start=offset, end=offset + size), np.uint8)
        return np.asarray(data).view(dtype).reshape(shape)


def is_local(path: str) -> bool:
    """Tells whether a path is an ordinary one, not an fsspec URL."""
    return "://" not in path


def open_folder(path: str | os.PathLike[str], *, needs_weights: bool = True) -> HFFolder:
    """Opens a model folder (a local path or an fsspec URL) and checks that it is whole.

    Args:
        needs_weights: False opens a folder that may hold only config and tokenizer.

    Raises:
        ValueError: no such folder, no config.json, an adapter or a quantised model, only `.bin` weights, a missing,
            truncated or damaged file, or an index that disagrees with the files; each names the file and what to do.
    """
    path = str(path)
    fs, root = fsspec.core.url_to_fs(path)
    if not fs.isdir(root):
        raise ValueError(f"{path}: found no such folder; expected a Hugging Face model folder (config.json inside)")
    names = {os.path.basename(entry.rstrip("/")): entry for entry in fs.ls(root, detail=False)}
    config = _read_config(fs, names, path)
    shards = sorted(name for name in names if name.endswith(".safetensors") and name != "adapter_model.safetensors")
    if INDEX in names:
        weight_map = _read_index(fs, names[INDEX], path)
        shards = sorted(set(weight_map.values()))
    elif SINGLE in names:
        weight_map, shards = None, [SINGLE]
    elif not shards and not needs_weights:
        return HFFolder(path, config, {}, {})
    else:
        raise ValueError(_no_weights(path, names, shards))
    missing = [name for name in shards if name not in names]
    if missing:
        raise ValueError(f"{path}: {INDEX} names {', '.join(missing)}, not found here; download the folder again")
    tensors: dict[str, TensorInfo] = {}
    headers: dict[str, bytes] = {}
    for name in shards:
        headers[name], infos = read_header(fs, names[name], name, path)
        for info in infos:
            if info.name in tensors:
                raise ValueError(f"{path}: tensor {info.name} is in both {tensors[info.name].file} and {name}")
            tensors[info.name] = info
    if weight_map is not None:
        _check_index(path, weight_map, tensors)
    return HFFolder(path, config, tensors, headers)


def read_config(path: str) -> dict[str, Any]:
    """Returns a folder's config.json; nothing else need be there. Raises ValueError as `open_folder` does."""
    fs, root = fsspec.core.url_to_fs(path)
    if not fs.isdir(root):
        raise ValueError(f"{path}: found no such folder; expected a folder with a Hugging Face model's config.json")
    return _read_config(fs, {os.path.basename(entry.rstrip("/")): entry for entry in fs.ls(root, detail=False)}, path)


def _read_config(fs: Any, names: dict[str, str], path: str) -> dict[str, Any]:
    if "config.json" not in names:
        if "adapter_config.json" in names:
            base = _read_json(fs, names["adapter_config.json"], path).get("base_model_name_or_path")
            raise ValueError(
                f"{path}: found a PEFT adapter (adapter_config.json, no config.json); expected a whole model. "
                f"Give its base model as model.path: {base!r}"
            )
        raise ValueError(f"{path}: found no config.json; expected a Hugging Face model folder")
    config = _read_json(fs, names["config.json"], path)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"{path}: config.json has quantization_config ({method}); expected unquantised weights. "
            "Use the original model's folder, of which this one was made"
        )
    return config


def _read_json(fs: Any, entry: str, path: str) -> dict[str, Any]:
    try:
        value = json.loads(fs.cat_file(entry))
    except ValueError as error:
        raise ValueError(f"{path}: {os.path.basename(entry)} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {os.path.basename(entry)} holds a {type(value).__name__}; expected a JSON object")
    return value


def _read_index(fs: Any, entry: str, path: str) -> dict[str, str]:
    weight_map = _read_json(fs, entry, path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: {INDEX} has no weight_map; download it again")
    return weight_map


def _no_weights(path: str, names: dict[str, str], shards: list[str]) -> str:
    bins = sorted(name for name in names if name.endswith((".bin", ".pth", ".pt")))
    if shards:
        return f"{path}: found {', '.join(shards[:3])} but no {INDEX}; download the index with the shards"
    if bins:
        return (
            f"{path}: found only pickled weights ({', '.join(bins[:3])}); only safetensors are read, for a pickle can "
            "run code. Take the repository's safetensors revision, or convert on a machine you trust: "
            "AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(NEW_PATH)"
        )
    return f"{path}: found no weights; expected {SINGLE} or {INDEX} (model.init=random starts without weights)"


def read_header(fs: Any, entry: str, name: str, path: str) -> tuple[bytes, list[TensorInfo]]:
    """Reads a safetensors header: its raw bytes (length included) and its tensors in the order of their bytes."""
    size = fs.size(entry)
    where = f"{path}: {name}"
    again = "the file is truncated or damaged; download it again"
    if size < 8:
        raise ValueError(f"{where} has {size} bytes; {again}")
    (length,) = struct.unpack("<Q", fs.cat_file(entry, start=0, end=8))
    if 8 + length > size:
        raise ValueError(f"{where} has {size} bytes, but its header alone should have {length}; {again}")
    raw = fs.cat_file(entry, start=0, end=8 + length)
    try:
        header = json.loads(raw[8:])
        infos = [
            TensorInfo(
                key, name, item["dtype"], tuple(item["shape"]), *(8 + length + at for at in item["data_offsets"])
            )
            for key, item in header.items()
            if key != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} has an unreadable header ({type(error).__name__}); {again}") from error
    infos.sort(key=lambda info: (info.start, info.stop))
    end = 8 + length
    for info in infos:
        if info.dtype not in DTYPES:
            raise ValueError(f"{where}: tensor {info.name} has dtype {info.dtype}; supported: {', '.join(DTYPES)}")
        expected = int(np.prod(info.shape)) * DTYPES[info.dtype].itemsize
        if info.stop - info.start != expected or info.start != end:
            raise ValueError(f"{where}: tensor {info.name} of shape {list(info.shape)} lies at wrong bytes; {again}")
        if info.stop > size:
            raise ValueError(f"{where} has {size} bytes, but tensor {info.name} ends at byte {info.stop}; {again}")
        end = info.stop
    if end != size:
        raise ValueError(f"{where} has {size} bytes, but its tensors end at byte {end}; {again}")
    return raw, infos


def _check_index(path: str, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    problems = [
        f"{name}: the index says {file}, " + (f"found in {tensors[name].file}" if name in tensors else "found nowhere")
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].file != file
    ]
    problems += [
        f"{name}: in {info.file}, not in the index" for name, info in tensors.items() if name not in weight_map
    ]
    if problems:
        raise ValueError(
            f"{path}: {INDEX} and the files disagree; download the folder again\n  " + "\n  ".join(problems)
        )
