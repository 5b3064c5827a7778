"""What `python -m jaxtune.convert` runs: adapters merged, checkpoints exported, and the check for llama.cpp."""

import contextlib
import os
from collections.abc import Callable

import fsspec
import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune import assembly, card, hosts, hub
from jaxtune.config import Config, ExportConfig
from jaxtune.convert.folder import open_folder
from jaxtune.convert.gguf import check, commands
from jaxtune.convert.hf import file_dtypes, load_params
from jaxtune.convert.peft import load_adapter
from jaxtune.convert.writing import export_folder
from jaxtune.data.chat.templates import load_template, load_tokenizer
from jaxtune.decode import from_tree, read_yaml
from jaxtune.exporting import export as write_folders
from jaxtune.faults import leave_if_several
from jaxtune.loop import Outcome
from jaxtune.metrics import Terminal
from jaxtune.models.registry import family_of
from jaxtune.opening import TOKENIZER_FILES, Place, declare, find
from jaxtune.run_folder import open_run_folder
from jaxtune.saving.checkpoint import Checkpoints
from jaxtune.sharding import make_mesh, parameter_shardings

__all__ = ["check", "commands", "export", "leave_if_several", "merge"]


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


def export(run: str, *, step: int | None = None, output: str | None = None) -> None:
    """Writes the folders of a run from one of its checkpoints, as the run's end would have; on several hosts too.

    Args:
        run: OUTPUT of a run that nobody writes at the moment.
        step: of the checkpoint; default the newest that is intact.
        output: where hf/ and adapter/ go; default the run's own folder.

    Raises:
        ValueError: no run, no such checkpoint or a damaged one, a run under way, or folders that are there already.
    """
    hosts.start()
    terminal = Terminal(quiet=hosts.index() > 0)
    file = f"{run}/config.yaml"
    config = from_tree(read_yaml(file))
    config = config.model_copy(update={"export": ExportConfig()})  # what the run was to leave out is what is missing
    target = (output or run).rstrip("/")
    _refuse_to_replace(config, target)
    folder = open_run_folder(run, say=terminal.say)
    try:
        with jax.set_mesh(make_mesh({"fsdp": -1})):
            _export(config, str(folder.path), step, target, terminal)
    finally:
        folder.release()


def _refuse_to_replace(config: Config, target: str) -> None:
    names = {"hf": "config.json"} | ({"adapter": "adapter_config.json"} if config.tuning.method == "lora" else {})
    fs, root = fsspec.core.url_to_fs(target)
    there = [name for name, sign in names.items() if fs.exists(f"{root}/{name}/{sign}")]
    if there:
        raise ValueError(
            f"{target} already holds {' and '.join(f'{name}/' for name in there)}; give another place with --output, "
            "or remove what is there"
        )


def _export(config: Config, run: str, step: int | None, target: str, terminal: Terminal) -> None:
    mesh = jax.sharding.get_mesh()
    with hosts.together():
        path = hub.resolve_folder(config.model.path, config.model.revision)
        base = open_folder(path, needs_weights=config.model.init == "pretrained")
        tokenizer = load_tokenizer(path)
        tuned = config.data.template != "auto" or tokenizer.chat_template
        template = load_template(config.data.template, tokenizer) if tuned else None
    compute, held = assembly.resolve_dtypes(config, mesh.devices.flat[0].platform)
    plan = assembly.plan_model(
        base.config, config.tuning, param_dtype=held or compute, seed=config.seed, where=base.path
    )
    with contextlib.closing(Checkpoints(f"{run}/checkpoints", keep=config.checkpoint.keep)) as checkpoints:
        step = _intact(checkpoints, step, terminal)
        saved = checkpoints.read_run(step)
        if saved["base"] != base.fingerprint:
            raise ValueError(f"{base.path} is not the model that {run} began with: its files have changed since")
        keeps = config.model.param_dtype == "file"
        specs = assembly.trainable_specs(plan, base, keep_file_dtypes=keeps)
        placed = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            specs,
            parameter_shardings(specs, mesh),
        )
        with terminal.working(f"reading step {step}"):
            trainable = checkpoints.restore(step, {"trainable": placed}).state["trainable"]
    with terminal.counting("loading the model", unit="bytes") as progress:
        frozen = assembly.load_frozen(
            plan, base, mesh=mesh, init=config.model.init, keep_file_dtypes=keeps, progress=progress
        )
    outcome = Outcome(step, loss=None, eval_loss=saved["eval_loss"], exit_code=0)
    text = card.model_card(config, base, None, outcome)
    for written in write_folders(config, base, template, trainable, frozen, target, readme=text, terminal=terminal):
        if written is not None:
            terminal.say(f"wrote {written} from step {step}")


def _intact(checkpoints: Checkpoints, step: int | None, terminal: Terminal) -> int:
    """Returns the step asked for, or the newest, if its files are what was written."""
    found = checkpoints.newest_usable(terminal.warn, before=None if step is None else step + 1)
    if found is None or (step is not None and found != step):
        there = ", ".join(map(str, checkpoints.finished())) or "none"
        wanted = f"--step: found {step}, " if step is not None else ""
        raise ValueError(f"{wanted}of which {checkpoints.folder} holds no intact checkpoint; intact are: {there}")
    return found


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
