"""Tiny model folders that can be asked: random weights, a byte-level tokenizer, a chat template."""

import json
import pathlib
from typing import Any

import hf_folders
import jax
import numpy as np
import tokenizers
import torch
import transformers
from flax import nnx

from jaxtune import adapters
from jaxtune.answering import Answerer
from jaxtune.convert.folder import open_folder
from jaxtune.convert.peft import export_adapter
from jaxtune.models.layers import LoRAParam
from jaxtune.opening import open_model

CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def tokenizer(*, chat_template: str | None = CHAT) -> Any:
    """Returns a byte-level BPE tokenizer of 280 tokens whose answers end with `<end>`."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=275, initial_alphabet=alphabet, special_tokens=["<eos>"])
    model.train_from_iterator(["the rain in Spain stays mainly in the plain"] * 20, trainer)
    model.add_special_tokens(["<|user|>", "<|assistant|>", "<|system|>", "<end>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>")
    fast.chat_template = chat_template
    return fast


def folder(path: pathlib.Path, kind: str = "llama32", *, chat_template: str | None = CHAT, **changes: Any) -> str:
    """Writes a random model with tokenizer at `path`; 128 positions."""
    words = tokenizer(chat_template=chat_template)
    sizes = {"vocab_size": len(words), "eos_token_id": words.eos_token_id, "max_position_embeddings": 128}
    hf_folders.tiny_folder(kind, path, **{**sizes, **changes})
    words.save_pretrained(path)
    return str(path)


def adapter(base: str, path: pathlib.Path) -> str:
    """Writes an adapter on a folder that changes its answers; returns the adapter's path."""
    opened = open_model(base, devices=jax.devices()[:1])
    decoder = nnx.merge(opened.graph, opened.state)
    adapters.attach(decoder, rank=4, alpha=8.0, dropout=0.0, targets="all-linear", key=jax.random.key(0))
    for number, (site, variable) in enumerate(nnx.to_flat_state(nnx.state(decoder, LoRAParam))):
        if site[-1] == "lora_b":
            variable.set_value(0.3 * jax.random.normal(jax.random.key(number), variable.shape))
    export_adapter(open_folder(base), nnx.state(decoder), str(path), base_name=base, revision=None)
    return str(path)


def answerer(path: str, *, batch: int | None = None, **options: Any) -> Answerer:
    """Opens a folder on one device."""
    return Answerer(open_model(path, devices=jax.devices()[:1], **options), batch=batch)


def random_prompts(count: int, *, longest: int = 30) -> list[list[int]]:
    """Returns prompts of unequal lengths."""
    generator = np.random.default_rng(3)
    return [generator.integers(5, 270, generator.integers(1, longest)).tolist() for _ in range(count)]


def greedy_of_transformers(
    path: str, prompt: list[int], count: int, *, stop_ids: tuple[int, ...]
) -> list[tuple[int, float]]:
    """Returns transformers' greedy tokens with, for each, how far its logit stands above the next one's."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            eos_token_id=list(stop_ids),
            pad_token_id=0,
        )
    best = [torch.topk(logits[0], 2).values for logits in out.logits]
    tokens = out.sequences[0, len(prompt) :].tolist()
    return [(token, float(pair[0] - pair[1])) for token, pair in zip(tokens, best, strict=True)]


def agreeing(ours: tuple[int, ...], theirs: list[tuple[int, float]]) -> int:
    """Returns how many tokens are equal; asserts that nothing differs before a gap below 1e-4."""
    for number, (token, gap) in enumerate(theirs):
        if gap < 1e-4:
            return number
        assert ours[number] == token, f"token {number}: {ours[number]} here, {token} in transformers, gap {gap}"
    assert len(ours) == len(theirs)
    return len(theirs)


def write_jsonl(path: pathlib.Path, rows: list[Any]) -> str:
    """Writes rows as JSON lines and returns the path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)
