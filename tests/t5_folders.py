"""Tiny folders of the T5 line, every tensor redrawn; what asks transformers and ours for logits of pairs."""

import functools
import io
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
import tiny_runs
import torch
import transformers
from flax import nnx

from jaxtune.convert.folder import open_folder
from jaxtune.convert.hf import load_params
from jaxtune.models.registry import family_of
from jaxtune.models.t5 import T5
from jaxtune.models.t5_config import T5Config
from jaxtune.models.t5_layers import plain

SIZES = {
    "vocab_size": 97,
    "d_model": 32,
    "d_kv": 6,  # times 4 heads is 24, not 32
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "layer_norm_epsilon": 1e-5,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
# kind -> (model_type, keys of config.json that differ from SIZES)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5_1_0": ("t5", {"feed_forward_proj": "relu"}),
    "t5_1_1": ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "ul2": ("t5", {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False}),
    "mt5": ("mt5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "umt5": ("umt5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}
MODELS = {
    "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
    "mt5": (transformers.MT5Config, transformers.MT5ForConditionalGeneration),
    "umt5": (transformers.UMT5Config, transformers.UMT5ForConditionalGeneration),
}


def tiny_model(kind: str, **changes: Any) -> transformers.PreTrainedModel:
    """Returns transformers' model of a kind in float32, every tensor drawn with std 0.2 (norms around 1).

    transformers 5 ties every head of this line, whatever config.json says; untied ones get a tensor of their own here,
    as they have in released checkpoints, and umT5 is told what its config.json says, which 4.57 reads.
    """
    model_type, own = KINDS[kind]
    config_class, model_class = MODELS[model_type]
    keys = {**SIZES, **own, **changes}
    config = config_class(**keys)
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    if keys.get("tie_word_embeddings", True) is False:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
        model.config.tie_word_embeddings = False
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator) * 0.2
            tensor.copy_(1 + noise if "norm" in name else noise)
    return model


def tiny_folder(kind: str, path: pathlib.Path, **options: Any) -> pathlib.Path:
    """Writes the folder of a kind at `path`, its config.json as Google's own has it, and returns it.

    Args:
        options: `dtype` and `max_shard_size` of the weights; everything else is a key of config.json to change.
    """
    dtype, shards = options.pop("dtype", torch.float32), options.pop("max_shard_size", "1GB")
    model = tiny_model(kind, **options).to(dtype)
    model.save_pretrained(path, max_shard_size=shards)
    config = json.loads((path / "config.json").read_text())
    config.pop("scale_decoder_outputs", None)  # what transformers 5 adds
    config.update({**SIZES, **KINDS[kind][1], **options, "transformers_version": "4.23.1"})
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return path


def abstract_model(config: T5Config, **options: Any) -> T5:
    """Returns the model's shapes only."""
    return nnx.eval_shape(lambda: T5(config, key=jax.random.key(0), **options))


def load(path: Any) -> tuple[T5, T5Config]:
    """Opens a folder as our model in float32."""
    folder = open_folder(path)
    config = family_of(folder.config, where=path).read_config(folder.config)
    graph, state = nnx.split(abstract_model(config))
    return nnx.merge(graph, load_params(folder, state)), config


def logits(model: T5, *arrays: Any, attention: Any = plain) -> np.ndarray:
    """Returns `[B T V]` float32 logits; the arrays are those of `T5.__call__`."""
    return np.asarray(_logits(*nnx.split(model), attention, *(jnp.asarray(x, jnp.int32) for x in arrays)))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _logits(graph: Any, state: Any, attention: Any, *arrays: jax.Array) -> jax.Array:
    model = nnx.merge(graph, state)
    return model.logits(model(*arrays, compute_dtype=jnp.float32, attention=attention).hidden)


def jaxpr_of(config: T5Config) -> Any:
    """Returns what is traced for one row of 8 tokens on either side."""
    graph, state = nnx.split(abstract_model(config))
    row = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jax.make_jaxpr(lambda state, *arrays: _logits(graph, state, plain, *arrays))(state, *[row] * 6)


def torch_logits(model: Any, encoder: Any, decoder: Any, mask: Any = None) -> np.ndarray:
    """Returns transformers' logits of encoder tokens `[B S]` and decoder tokens `[B T]`, the start token among them."""
    given = {} if mask is None else {"attention_mask": torch.tensor(np.asarray(mask))}
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(np.asarray(encoder)), decoder_input_ids=torch.tensor(np.asarray(decoder)), **given
        )
    return out.logits.float().numpy()


def whole(tokens: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (tokens, positions, segment ids) of rows that are one segment each."""
    tokens = np.asarray(tokens)
    return tokens, np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape), np.ones_like(tokens)


def write_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    """Writes a SentencePiece model with T5's special tokens and no chat template, as `spiece.model` alone."""
    texts = [text for row in tiny_runs.rows(160) for text in row.values()]
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=pieces,
        vocab_size=200,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(pieces.getvalue())
    told = {"tokenizer_class": "T5Tokenizer", "extra_ids": 10, "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**told, "unk_token": "<unk>"}))
    return folder


def tiny_base(folder: pathlib.Path, kind: str = "t5_1_1") -> pathlib.Path:
    """Writes a small model that can learn, with its tokenizer; returns the folder."""
    return write_tokenizer(tiny_folder(kind, folder, vocab_size=280, relative_attention_max_distance=32))
