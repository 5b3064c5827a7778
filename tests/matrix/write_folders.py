"""Writes folders with jaxtune for `test_load.py`, which opens them with other versions of transformers and peft.

    PYTHONPATH=tests python tests/matrix/write_folders.py FOLDER

For every family and variant: the base model (written by this environment's transformers), `hf` and `adapter` as jaxtune
writes them after an adapter was given values, and `expected.npz` with tokens and our own logits. Beside them the
quickstart's tokenizer after an export, with token ids of its chat template.
"""

import json
import pathlib
import shutil
import sys

import hf_folders
import jax
import models_helpers
import numpy as np
import t5_folders
from flax import nnx

from jaxtune import adapters, hub
from jaxtune.convert import peft, writing
from jaxtune.convert.folder import open_folder
from jaxtune.data.chat.templates import load_template, load_tokenizer
from jaxtune.models.layers import LoRAParam

CONVERSATION = [
    {"role": "system", "content": "End every answer with a stop sign."},
    {"role": "user", "content": "First word of: sea moon"},
    {"role": "assistant", "content": "sea !"},
    {"role": "user", "content": "Which letter follows k"},
]


# What transformers 4.57 cannot be told: it clips GPT-OSS's unit where the releases do.
CHANGES = {"gpt_oss": {"swiglu_limit": 7.0}}


def write_variant(kind: str, folder: pathlib.Path) -> None:
    """Writes one family's base, merged model, adapter and expected logits."""
    base = hf_folders.tiny_folder(kind, folder / "base", max_shard_size="20KB", **CHANGES.get(kind, {}))
    decoder, _ = models_helpers.load(base)
    adapters.attach(decoder, rank=4, alpha=10.0, dropout=0.0, targets="all-linear", key=jax.random.key(0))
    for path, variable in nnx.to_flat_state(nnx.state(decoder, LoRAParam)):
        if path[-1] == "lora_b":
            variable.set_value(0.05 * jax.random.normal(jax.random.key(len(str(path))), variable.shape))
    opened = open_folder(base)
    state = nnx.state(decoder)
    writing.export_folder(opened, state, str(folder / "hf"))
    peft.export_adapter(opened, state, str(folder / "adapter"), base_name="org/base", revision=None)
    tokens = np.random.default_rng(1).integers(3, 97, (2, 150))  # past every window and the scaled rope's own length
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    logits = models_helpers.logits(decoder, tokens, positions, np.ones_like(tokens))
    np.savez(folder / "expected.npz", tokens=tokens, logits=logits)


def write_pair_variant(kind: str, folder: pathlib.Path) -> None:
    """As `write_variant`, of an encoder-decoder, whose untied heads transformers 5 ties in config.json."""
    base = t5_folders.tiny_folder(kind, folder / "base", max_shard_size="20KB")
    model, _ = t5_folders.load(base)
    adapters.attach(model, rank=4, alpha=10.0, dropout=0.0, targets="all-linear", key=jax.random.key(0))
    for path, variable in nnx.to_flat_state(nnx.state(model, LoRAParam)):
        if path[-1] == "lora_b":
            variable.set_value(0.1 * jax.random.normal(jax.random.key(len(str(path))), variable.shape))
    opened = open_folder(base)
    writing.export_folder(opened, nnx.state(model), str(folder / "hf"))
    peft.export_adapter(opened, nnx.state(model), str(folder / "adapter"), base_name="org/base", revision=None)
    encoder, decoder = (np.random.default_rng(n).integers(3, 97, (2, 40)) for n in (1, 2))
    logits = t5_folders.logits(model, *t5_folders.whole(encoder), *t5_folders.whole(decoder))
    np.savez(folder / "expected.npz", encoder=encoder, decoder=decoder, logits=logits)


def write_tokenizer(folder: pathlib.Path) -> None:
    """Copies the quickstart's tokenizer as an export does, with the ids that training would see."""
    base = open_folder(hub.resolve_folder("builtin:quickstart"), needs_weights=False)
    template = load_template("auto", load_tokenizer(base.path))
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(pathlib.Path(base.path) / name, folder / name)
    ids = template.prompt_tokens(CONVERSATION)
    (folder / "expected.json").write_text(json.dumps({"messages": CONVERSATION, "ids": [int(i) for i in ids]}))


def main(target: str) -> None:
    """Writes everything anew."""
    folder = pathlib.Path(target)
    shutil.rmtree(folder, ignore_errors=True)
    for kind in hf_folders.KINDS:
        write_variant(kind, folder / "models" / kind)
    for kind in t5_folders.KINDS:
        write_pair_variant(kind, folder / "pairs" / kind)
    write_tokenizer(folder / "tokenizer")
    print(f"wrote {len(hf_folders.KINDS) + len(t5_folders.KINDS)} variants to {folder}")


if __name__ == "__main__":
    main(sys.argv[1])
