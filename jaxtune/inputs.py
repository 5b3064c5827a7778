"""What a run starts from: the base model's folder, the chat template, the streams, and how many updates they make."""

import dataclasses
from typing import Any, NamedTuple

from jaxtune import assembly, blueprint, hosts, hub
from jaxtune.config import Config
from jaxtune.convert.folder import HFFolder, open_folder
from jaxtune.data.chat.templates import ChatTemplate, load_template, load_tokenizer
from jaxtune.data.lengths import ReadAll
from jaxtune.data.loader import open_eval_stream, open_stream, write_plan
from jaxtune.data.stream import Stream
from jaxtune.metrics import Terminal


class Inputs(NamedTuple):
    """What a run starts from: the base model's folder, the chat template, and the streams.

    `template` is None only for an import without data of a tokenizer without a template.
    """

    base: HFFolder
    template: ChatTemplate | None
    stream: Stream | None
    eval_stream: Stream | None


class Reading(NamedTuple):
    """What reads the data of a run: the base model's folder and tokenizer, and what `open_stream` takes of them."""

    base: HFFolder
    tokenizer: Any
    options: dict[str, Any]


def open_reading(config: Config, *, needs_weights: bool) -> tuple[Reading, Config]:
    """Opens model folder and tokenizer; returns them with the configuration's open values filled in."""
    path = hub.resolve_folder(config.model.path, config.model.revision)
    base = open_folder(path, needs_weights=needs_weights)
    tokenizer = load_tokenizer(path)
    model = assembly.model_config(base)
    _check_vocabulary(tokenizer, model.vocab_size, base.path)
    config = _filled_in(config, model, tokenizer, base.path)
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_length": config.data.max_length}
    if model.is_encoder_decoder:
        options |= {"encoder_length": config.data.encoder_length, "start_token": model.start_token}
    return Reading(base, tokenizer, options), config


def open_inputs(config: Config, output: str, terminal: Terminal) -> tuple[Inputs, Config]:
    """Opens model folder, tokenizer and data; returns them with the configuration's open values filled in.

    Every host opens them by itself, and host 0 writes what `output` gets of it.
    """
    (base, tokenizer, options), config = open_reading(config, needs_weights=config.model.init == "pretrained")
    if not config.data.train:
        own = config.data.template == "auto" and not tokenizer.chat_template
        template = None if own else load_template(config.data.template, tokenizer)
        return Inputs(base, template, None, None), config
    options["output_dir"] = output if hosts.index() == 0 else None
    with terminal.counting("reading the training data") as progress:
        stream = open_stream(config, **options, progress=progress)
    with terminal.counting("reading the evaluation data") as progress:
        eval_stream = open_eval_stream(config, **options, progress=progress)
    if hosts.index() == 0:
        write_plan(stream, output)
    stream = dataclasses.replace(stream, output_dir=output)  # bad rows met later are told by the host that meets them
    terminal.say(stream.describe())
    if eval_stream is not None:
        terminal.say(f"held out: {eval_stream.funnel.total('examples'):,} examples\n{eval_stream.funnel.table()}")
    template = load_template(config.data.template, tokenizer)
    return Inputs(base, template, stream, eval_stream), config


def open_training_data(config: Config, terminal: Terminal, read_all: ReadAll) -> tuple[Stream, Config]:
    """Opens the training stream as a run would, rows by `read_all`, without weights and without writing of a run."""
    reading, config = open_reading(config, needs_weights=False)
    with terminal.counting("reading the training data") as progress:
        return open_stream(config, **reading.options, progress=progress, read_all=read_all), config


def _filled_in(config: Config, model: Any, tokenizer: Any, where: str) -> Config:
    """Returns the configuration with what the model decides: lengths of rows, and an encoder-decoder's template."""
    config = blueprint.fill_lengths(config, model, where)
    if model.is_encoder_decoder and config.data.template == "auto" and not tokenizer.chat_template:
        plain = config.data.model_copy(update={"template": "plain"})  # these models read and write bare text
        return config.model_copy(update={"data": plain})
    return config


def _check_vocabulary(tokenizer: Any, vocab_size: int, where: str) -> None:
    """Raises ValueError when texts can become tokens that have no embedding: their loss would be NaN.

    A pad token beyond the embedding, as many folders have, is let be: nothing here uses it.
    """
    beyond = [token for token, index in tokenizer.get_vocab().items() if index >= vocab_size]
    beyond = [token for token in beyond if token != tokenizer.pad_token or token == tokenizer.eos_token]
    if beyond:
        raise ValueError(
            f"{where}: the tokenizer has {len(tokenizer)} tokens, but the model's embedding has {vocab_size} "
            f"(vocab_size in config.json), so {', '.join(map(repr, beyond[:3]))} would have no row there; expected the "
            "model's own tokenizer, or a model enlarged with transformers' resize_token_embeddings"
        )


def count_steps(config: Config, stream: Stream | None, saved: dict[str, Any] | None) -> int:
    """Returns the number of updates: as asked for, or as many as the epochs' packed rows make.

    A run that goes on with more epochs than before counts from where it is: lanes that had ended go on as well.
    """
    if config.train.steps is not None:
        return config.train.steps
    if stream is not None and saved is not None and (left := stream.steps_left(saved["data"])) is not None:
        return saved["step"] + left
    if stream is None or stream.steps_per_run is None:
        raise ValueError(
            "train.steps: found none, and the data is too large to count its packed rows before the run; "
            "expected the number of updates, e.g. train.steps=10000, or windows made beforehand, which are counted: "
            "python -m jaxtune.prepare with the same words"
        )
    return stream.steps_per_run
