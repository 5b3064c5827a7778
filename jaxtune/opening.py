"""Opens what can be asked: a run, a Hugging Face folder, a hub id, an adapter; the same for every command that asks."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import fsspec
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxtune import adapters, hub
from jaxtune.convert.folder import HFFolder, open_folder
from jaxtune.convert.hf import load_params
from jaxtune.convert.peft import Adapter, load_adapter, open_adapter
from jaxtune.data.chat.templates import ChatTemplate, load_template, load_tokenizer
from jaxtune.decode import ConfigError, decode
from jaxtune.models.family import Family
from jaxtune.models.registry import family_of
from jaxtune.sharding import make_mesh, parameter_shardings

DTYPES: dict[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


class Place(NamedTuple):
    """What a path turned out to mean: the whole model's folder, and the adapter on it if there is one."""

    base: str
    adapter: Adapter | None


class Opened(NamedTuple):
    """A model with all that asking it needs; `state` lies on `mesh`.

    `stop_ids` are all tokens that end an answer; `dtype` is that of the computation; `name` says what was opened.
    """

    name: str
    config: Any
    graph: nnx.GraphDef
    state: nnx.State
    mesh: Mesh
    template: ChatTemplate
    stop_ids: tuple[int, ...]
    dtype: Any


def open_model(
    path: str,
    *,
    template: str = "auto",
    base: str | None = None,
    dtype: str = "auto",
    devices: Sequence[Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Opened:
    """Opens a run's folder, a Hugging Face folder, a hub id or a PEFT adapter, and puts its weights on the devices.

    Args:
        path: of a run, `OUTPUT/hf` is taken, else its base with `OUTPUT/adapter`; an adapter brings its base.
        template: auto (the folder's own), a built-in or a Jinja file, as `data.template`.
        base: where the base of an adapter is, if not where the adapter says.
        dtype: auto, float32 or bfloat16; auto is float32 on CPU and bfloat16 elsewhere.
        devices: default all.
        progress: called with (bytes read, bytes in all).

    Raises:
        ValueError: nothing there, a run that has written no model yet, no chat template, or what the folder's own
            readers refuse.
    """
    place = find(path, base=base)
    folder = open_folder(place.base)
    family = family_of(folder.config, where=place.base)
    config = family.read_config(folder.config)
    chat = open_template(place, template, otherwise="plain" if config.is_encoder_decoder else None)
    mesh = asking_mesh(config.num_kv_heads, devices)
    if dtype == "auto":
        compute = jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16
    else:
        compute = DTYPES[dtype]
    graph, abstract = nnx.split(nnx.eval_shape(lambda: declare(family, config, place.adapter, compute)))
    shardings = parameter_shardings(abstract, mesh)
    state = load_params(folder, abstract, shardings=shardings, progress=progress)
    name = place.base
    if place.adapter is not None:
        state = nnx.merge_state(state, load_adapter(place.adapter, folder, abstract, shardings=shardings))
        name = f"{place.adapter.folder.path} on {place.base}"
    stop_ids = tuple(dict.fromkeys((*chat.stop_ids, *_folder_stop_ids(folder))))
    return Opened(name, config, graph, state, mesh, chat, stop_ids, compute)


def find(path: str, *, base: str | None = None) -> Place:
    """Returns the folders that a path means, nothing loaded; see `open_model`."""
    resolved = hub.resolve_folder(path)
    if _has(resolved, "config.json"):
        return Place(resolved, None)
    if _has(resolved, "adapter_config.json"):
        adapter = open_adapter(resolved)
        return Place(_base_of(adapter, base), adapter)
    if _has(resolved, "config.yaml"):
        return _find_in_run(resolved, base)
    raise ValueError(
        f"{path}: found a folder that is neither a model (config.json) nor an adapter (adapter_config.json) nor a run "
        "(config.yaml); expected the output= folder of a run, a Hugging Face folder or hub id, or a PEFT folder"
    )


def _find_in_run(run: str, base: str | None) -> Place:
    if _has(f"{run}/hf", "config.json"):
        return Place(f"{run}/hf", None)
    if not _has(f"{run}/adapter", "adapter_config.json"):
        raise ValueError(
            f"{run}: found a run that has not written a model yet (no hf/ and no adapter/ in it): it is not finished, "
            f"or export.hf and export.adapter were off; go on with `python -m jaxtune.train {run}/config.yaml`"
        )
    if base is None:
        try:  # the run knows the very folder that it started from; the adapter may only know its hub id
            model = decode([f"{run}/config.yaml"]).model
        except ConfigError as error:
            raise ValueError(f"{run}/config.yaml: {error}") from error
        base = hub.resolve_folder(model.path, model.revision)
    return Place(hub.resolve_folder(base), open_adapter(f"{run}/adapter"))


def _base_of(adapter: Adapter, base: str | None) -> str:
    name = base or adapter.base_name
    if not name:
        raise ValueError(
            f"{adapter.folder.path}: adapter_config.json has no base_model_name_or_path; give the base with --base PATH"
        )
    try:
        return hub.resolve_folder(name, None if base else adapter.revision)
    except ValueError as error:
        told = "--base" if base else f"{adapter.folder.path} is an adapter of {name!r}, which cannot be opened"
        raise ValueError(f"{told}: {error}" + ("" if base else "; or give its folder with --base PATH")) from error


def open_template(place: Place, name: str, *, otherwise: str | None = None) -> ChatTemplate:
    """Returns the chat template called `name` on the tokenizer of the adapter, or of the base where it has none.

    Args:
        otherwise: what auto means where the tokenizer has no chat template.
    """
    where = place.base
    if place.adapter is not None and any(_has(place.adapter.folder.path, file) for file in TOKENIZER_FILES):
        where = place.adapter.folder.path
    tokenizer = load_tokenizer(where)
    if name == "auto" and not tokenizer.chat_template and otherwise is not None:
        name = otherwise
    if name == "auto" and not tokenizer.chat_template:
        raise ValueError(
            f"{where}: its tokenizer has no chat template; name the one that the model was tuned with: `--template "
            "alpaca` or `--template vicuna` work with any tokenizer, `--template plain` gives the bare text"
        )
    try:
        return load_template(name, tokenizer)
    except ValueError as error:
        told = str(error).replace("data.template=", "--template ").replace("data.template", "--template")
        raise ValueError(told) from error


def asking_mesh(kv_heads: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh that splits heads over as many devices as divide the kv heads, and rows over the others."""
    devices = list(jax.devices() if devices is None else devices)
    ways = max(n for n in range(1, len(devices) + 1) if len(devices) % n == 0 and kv_heads % n == 0)
    return make_mesh({"tensor": ways, "data": len(devices) // ways}, devices)


def declare(family: Family, config: Any, adapter: Adapter | None, dtype: Any) -> nnx.Module:
    """Returns the model with the adapter's matrices attached; call it under `nnx.eval_shape`."""
    model = family.build(config, key=jax.random.key(0), param_dtype=dtype)
    if adapter is not None:
        adapters.attach(model, **adapter.attach_options(), key=jax.random.key(0))
    return model


def _folder_stop_ids(folder: HFFolder) -> tuple[int, ...]:
    """End tokens that the folder itself names: generation_config.json's, else config.json's."""
    fs, root = fsspec.core.url_to_fs(folder.path)
    entry = f"{root}/generation_config.json"
    try:
        generation = json.loads(fs.cat_file(entry)) if fs.exists(entry) else {}
    except ValueError as error:
        raise ValueError(f"{folder.path}: generation_config.json is not valid JSON ({error})") from error
    found = generation.get("eos_token_id", folder.config.get("eos_token_id"))
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)


def _has(folder: str, name: str) -> bool:
    fs, root = fsspec.core.url_to_fs(folder)
    return fs.exists(f"{root}/{name}")
