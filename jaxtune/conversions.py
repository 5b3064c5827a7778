"""What `python -m jaxtune.convert` runs: an adapter merged into its base, and the check for llama.cpp."""

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.convert.folder import open_folder
from jaxtune.convert.gguf import check, commands
from jaxtune.convert.hf import file_dtypes, load_params
from jaxtune.convert.peft import load_adapter
from jaxtune.convert.writing import export_folder
from jaxtune.data.chat.templates import load_template, load_tokenizer
from jaxtune.models.registry import family_of
from jaxtune.opening import TOKENIZER_FILES, Place, declare, find
from jaxtune.sharding import make_mesh, parameter_shardings

__all__ = ["check", "commands", "merge"]


def merge(path: str, output: str, *, base: str | None = None, say: Callable[[str], None] = print) -> None:
    """Writes the base of an adapter with the adapter in its weights: added in float32, cast once to the base's dtypes.

    Args:
        path: PEFT folder, or hub id of one.
        output: a new folder.
        base: where the base is, if not where the adapter says.

    Raises:
        ValueError: no adapter there, a base that cannot be opened, or an output that already holds a model.
    """
    place = find(path, base=base)
    if place.adapter is None:
        raise ValueError(
            f"{path}: found a whole model at {place.base}, which needs no merging; expected a PEFT adapter folder"
        )
    if os.path.exists(os.path.join(output, "config.json")):
        raise ValueError(f"--output: {output} already holds a model; expected a new folder")
    folder = open_folder(place.base)
    family = family_of(folder.config, where=place.base)
    config = family.read_config(folder.config)
    _, abstract = nnx.split(nnx.eval_shape(lambda: declare(family, config, place.adapter, jnp.float32)))
    shardings = parameter_shardings(abstract, make_mesh({"fsdp": -1}, jax.devices()))
    say(f"merging {place.adapter.folder.path} into {place.base}")
    params = load_params(folder, abstract, shardings=shardings, dtype_of=file_dtypes(folder))
    state = nnx.merge_state(params, load_adapter(place.adapter, folder, abstract, shardings=shardings))
    template, stop_ids = _adapter_template(place)
    export_folder(folder, state, output, chat_template=template, stop_ids=stop_ids)
    say(f"wrote {output}")


def _adapter_template(place: Place) -> tuple[str | None, tuple[int, ...]]:
    """Returns the chat template that the adapter brings and its base lacks, and the tokens that end its answers."""
    assert place.adapter is not None
    own = place.adapter.folder.path
    if not any(os.path.exists(os.path.join(own, name)) for name in TOKENIZER_FILES):
        return None, ()
    tokenizer = load_tokenizer(own)
    if not tokenizer.chat_template:
        return None, ()
    template = load_template("auto", tokenizer)
    theirs = load_tokenizer(place.base).chat_template
    return (None if theirs == template.text else template.template_text), template.stop_ids
