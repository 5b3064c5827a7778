"""Tiny whole runs: a model folder with a tokenizer, rows, and the words of a command line."""

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import tokenizers
import transformers
from safetensors.numpy import load_file

from jaxtune.config import Config
from jaxtune.decode import decode

COLOURS = ("red", "green", "blue", "white", "black", "grey", "pink", "brown")
# Turns end with EOS; the first token is BOS, as in Llama's own templates.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def write_tokenizer(folder: pathlib.Path, *, chat_template: str | None = TEMPLATE) -> pathlib.Path:
    """Writes a byte-level BPE tokenizer of 280 pieces and returns the folder."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=alphabet, special_tokens=["<unk>", "<s>", "</s>"]
    )
    model.train_from_iterator(["user: name the assistant: colour of it is " + " ".join(COLOURS)] * 9, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return folder


def write_model(folder: pathlib.Path, kind: str = "llama32", **changes: Any) -> pathlib.Path:
    """Writes a two-layer model of a kind, 256 positions, with its tokenizer; returns the folder."""
    import hf_folders  # only now: it needs torch, which an environment that prepares data lacks

    sizes = {"vocab_size": 280, "num_hidden_layers": 2, "max_position_embeddings": 256}
    hf_folders.tiny_folder(kind, folder, **{**sizes, **changes})
    return write_tokenizer(folder)


def rows(count: int, *, start: int = 0) -> list[dict[str, str]]:
    """Returns rows of alpaca form with something to learn: the colour follows from the number."""
    numbers = range(start, start + count)
    return [{"instruction": f"name the colour of {i}", "output": f"it is {COLOURS[i % 8]}"} for i in numbers]


def write_rows(file: pathlib.Path, these: list[Any]) -> pathlib.Path:
    """Writes JSON lines; a row that is text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in these]
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return file


def words(base: pathlib.Path, data: pathlib.Path, output: pathlib.Path, *more: str) -> list[str]:
    """Returns the command line of a small run: 6 updates of 8 rows x 64 tokens, everything logged."""
    small = ("data.max_length=64", "train.batch_rows=8", "train.steps=6", "log.every_steps=1", "data.window=16")
    quiet = ("log.tensorboard=false", "optimizer.schedule=constant", "optimizer.learning_rate=0.01")
    return [f"model.path={base}", f"data.train.0.path={data}", f"output={output}", *small, *quiet, *more]


def config(base: pathlib.Path, data: pathlib.Path, output: pathlib.Path, *more: str) -> Config:
    """Returns the configuration of such a run."""
    return decode(words(base, data, output, *more))


def records(output: pathlib.Path) -> list[dict[str, Any]]:
    """Returns what metrics.jsonl holds."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: pathlib.Path) -> dict[int, tuple[float, float]]:
    """Returns (loss, gradient norm) of every update that was logged."""
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in records(output) if "loss" in r}


def weights(output: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns every tensor that a run exported, adapter and model."""
    files = [*output.glob("adapter/*.safetensors"), *output.glob("hf/*.safetensors")]
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Asserts that two sets of tensors are equal, bit for bit."""
    assert one.keys() == other.keys() and one
    differ = [name for name in one if one[name].tobytes() != other[name].tobytes()]
    assert not differ, differ


def copied(folder: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
    """Returns a copy of a folder, to be damaged."""
    shutil.copytree(folder, to)
    return to


def flip_a_bit(file: pathlib.Path) -> None:
    """Changes one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
