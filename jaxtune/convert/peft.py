"""PEFT adapter folders, written and read: adapter_config.json and adapter_model.safetensors."""

import json
import math
from dataclasses import dataclass
from typing import Any

import fsspec
import jax
import numpy as np
from flax import nnx

from jaxtune import hosts, placement
from jaxtune.convert import folder as folders
from jaxtune.convert import hf, writing
from jaxtune.convert.folder import DTYPES, HFFolder, TensorInfo
from jaxtune.convert.hf import Path, Place
from jaxtune.models.layers import LoRAParam
from jaxtune.models.registry import family_of

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
SLOTS = {"lora_a": "lora_A", "lora_b": "lora_B"}

# What PEFT can say and we cannot: key -> values that mean "not used". Anything else is refused by its name.
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "modules_to_save": (None, [], ()),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
}


def export_adapter(
    base: HFFolder,
    state: nnx.State,
    out_dir: str,
    *,
    base_name: str,
    revision: str | None,
    chat_template: str | None = None,
    readme: str | None = None,
) -> None:
    """Writes the state's adapters as a PEFT folder in float32, with the base's tokenizer files.

    Every host must call this; host 0 writes. The folder is opened again and checked at the end.

    Args:
        state: at least the `LoRAParam`s.
        base_name, revision: hub id and commit of the base model (readers look the base up by it).
        chat_template: written when the run's template is not the tokenizer's own.
        readme: text of README.md; default is the two facts that the hub needs.
    """
    variables = {path: v for path, v in nnx.to_flat_state(state) if isinstance(v, LoRAParam)}
    if not variables:
        raise ValueError(f"{out_dir}: the model has no adapter to write; tuning.method=full writes a model folder only")
    places = _adapter_places(base, variables)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for key, (path, place) in places.items():
        shape = tuple(variables[path].shape)[len(place.index) :][::-1]
        stop = at + 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    raw = writing.pack_header(header)
    fs, root = fsspec.core.url_to_fs(out_dir)
    leads = hosts.index() == 0
    with hosts.together():
        if leads:
            fs.makedirs(root, exist_ok=True)
            writing.check_space(out_dir, len(raw) + at)
    with writing.Output(fs, f"{root}/{WEIGHTS}" if leads else None) as output:
        output.write(raw)
        for path, place in places.values():
            leaf = variables[path].get_value()
            array = placement.take(leaf, place.index, transpose=True, dtype=np.float32, wanted=output.is_open)
            if array is not None:
                output.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    with hosts.together():
        output.check()
        if leads:
            writing.copy_companions(base, fs, root)
            if chat_template is not None:
                writing.write_chat_template(fs, root, chat_template)
            card = readme or f"---\nbase_model: {base_name}\nlibrary_name: peft\n---\n"
            with fs.open(f"{root}/README.md", "wb") as file:
                file.write(card.encode())
            # Last, so that a folder cut off half-way is not taken for an adapter.
            writing.write_json(fs, f"{root}/{CONFIG}", _adapter_config(base, variables, places, base_name, revision))
            if open_adapter(out_dir).folder.headers[WEIGHTS] != raw:
                raise ValueError(f"{out_dir}: {WEIGHTS} read back differs from what was written; check the disk")


def _adapter_places(base: HFFolder, variables: dict[Path, Any]) -> dict[str, tuple[Path, Place]]:
    """Returns PEFT's tensor key -> (path of the adapter's leaf, place of its kernel), in the family's order."""
    family = family_of(base.config, where=base.path)
    places: dict[str, tuple[Path, Place]] = {}
    for place in hf.name_table(family, family.read_config(base.config)).values():
        for slot, theirs in SLOTS.items():
            path = (*place.path[:-1], slot)
            if place.path[-1] == "kernel" and path in variables:
                places[f"{PREFIX}{place.name.removesuffix('.weight')}.{theirs}.weight"] = (path, place)
    return places


def _adapter_config(
    base: HFFolder,
    variables: dict[Path, Any],
    places: dict[str, tuple[Path, Place]],
    base_name: str,
    revision: str | None,
) -> dict[str, Any]:
    """Returns adapter_config.json: the keys that every PEFT since 0.5 reads and no more (unknown ones warn)."""
    lora_a = next(variable for path, variable in variables.items() if path[-1] == "lora_a")
    options = lora_a.get_metadata()
    rank = lora_a.shape[-1]
    alpha = options["scale"] * rank
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": options["dropout"],
        "target_modules": sorted({key.split(".")[-3] for key in places}),
        "task_type": family_of(base.config, where=base.path).task_type,
        "fan_in_fan_out": any(not place.transpose for _, place in places.values()),  # GPT-2's matrices are [in out]
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "layers_to_transform": None,
    }


@dataclass(frozen=True)
class Adapter:
    """An opened adapter folder: its config, and where its tensors lie."""

    folder: HFFolder

    @property
    def base_name(self) -> str | None:
        """Hub id or path of the model that it adapts."""
        return self.folder.config.get("base_model_name_or_path")

    @property
    def revision(self) -> str | None:
        return self.folder.config.get("revision")

    def attach_options(self) -> dict[str, Any]:
        """Returns rank, alpha, dropout and targets for `adapters.attach`; alpha is such that alpha / rank is PEFT's
        scale, also where that divides by the square root (rsLoRA)."""
        config = self.folder.config
        rank, alpha = int(config["r"]), float(config.get("lora_alpha", 8))
        if config.get("use_rslora"):
            alpha *= math.sqrt(rank)
        targets = tuple(sorted({_target(name) for name in self.folder.tensors}))
        return {"rank": rank, "alpha": alpha, "dropout": float(config.get("lora_dropout", 0.0)), "targets": targets}


def _target(key: str) -> str:
    """Returns what `tuning.targets` calls the layer that an adapter's tensor belongs to."""
    parts = key.split(".")
    return ("experts." if "experts" in parts else "") + parts[-3]


def open_adapter(path: str) -> Adapter:
    """Opens a PEFT folder (local path or fsspec URL).

    Raises:
        ValueError: no adapter here, only pickled weights, a damaged file, or an option that cannot be expressed,
            by its name and value.
    """
    path = str(path)
    fs, root = fsspec.core.url_to_fs(path)
    if not fs.exists(f"{root}/{CONFIG}"):
        raise ValueError(f"{path}: found no {CONFIG}; expected a PEFT adapter folder")
    try:
        config = json.loads(fs.cat_file(f"{root}/{CONFIG}"))
    except ValueError as error:
        raise ValueError(f"{path}: {CONFIG} is not valid JSON ({error})") from error
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: {CONFIG} says peft_type = {config.get('peft_type')!r}; supported: 'LORA'")
    used = {key: config[key] for key, unused in NOT_SUPPORTED.items() if key in config and config[key] not in unused}
    if used:
        found = ", ".join(f"{key} = {value!r}" for key, value in used.items())
        raise ValueError(
            f"{path}: {CONFIG} has {found}; supported: plain LoRA and rsLoRA. Merge the adapter into its base with "
            "PEFT (merge_and_unload) and give the merged folder"
        )
    if "r" not in config:
        raise ValueError(f"{path}: {CONFIG} has no 'r' (the rank)")
    if not fs.exists(f"{root}/{WEIGHTS}"):
        raise ValueError(f"{path}: found no {WEIGHTS}; only safetensors are read (save with safe_serialization=True)")
    raw, infos = folders.read_header(fs, f"{root}/{WEIGHTS}", WEIGHTS, path)
    return Adapter(HFFolder(path, config, {info.name: info for info in infos}, {WEIGHTS: raw}))


def load_adapter(
    adapter: Adapter, base: HFFolder, abstract_state: nnx.State, *, shardings: nnx.State | None = None
) -> nnx.State:
    """Reads an adapter's tensors into float32 arrays, in a state that holds only the `LoRAParam`s.

    Args:
        base: the model that it adapts.
        abstract_state: of the model after `adapters.attach` with `adapter.attach_options()`.
        shardings: the same tree with shardings as values; None puts everything on the first device.

    Raises:
        ValueError: tensors that are missing, not expected, or of a wrong shape; all of them in one message.
    """
    variables = {path: v for path, v in nnx.to_flat_state(abstract_state) if isinstance(v, LoRAParam)}
    places = _adapter_places(base, variables)
    _check(adapter.folder, places, variables)
    where = dict(nnx.to_flat_state(shardings)) if shardings is not None else {}
    arrays: dict[Path, jax.Array] = {}
    for key, (path, place) in places.items():
        info: TensorInfo = adapter.folder.tensors[key]
        sharding = where[path].get_value() if path in where else placement.default_sharding()

        def read(start: int, stop: int, key: str = key) -> np.ndarray:
            return adapter.folder.read_rows(key, start, stop)

        rows = placement.row_sharded(read, info.shape, DTYPES[info.dtype], sharding)
        if not place.index:
            arrays[path] = placement.put(rows, transpose=True, dtype=np.float32, sharding=sharding)
            continue
        stack = arrays.pop(path, None)
        if stack is None:
            stack = placement.empty_stack(variables[path].shape, np.float32, sharding)
        arrays[path] = placement.fill(stack, rows, place.index, transpose=True, sharding=sharding)
    return nnx.from_flat_state([(path, variable.replace(arrays[path])) for path, variable in variables.items()])


def _check(folder: HFFolder, places: dict[str, tuple[Path, Place]], variables: dict[Path, Any]) -> None:
    problems = [f"{key}: not expected by this model" for key in folder.tensors if key not in places]
    for key, (path, place) in places.items():
        expected = tuple(variables[path].shape)[len(place.index) :][::-1]
        if key not in folder.tensors:
            problems.append(f"{key}: missing; expected shape {list(expected)}")
        elif folder.tensors[key].shape != expected:
            problems.append(f"{key}: found shape {list(folder.tensors[key].shape)}; expected {list(expected)}")
    if problems:
        raise ValueError(
            f"{folder.path}: {WEIGHTS} does not fit the base model; {len(problems)} tensor(s) differ:\n  "
            + "\n  ".join(problems)
        )
