"""What tests of models share: a folder opened as our decoder, and rows of tokens."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.convert.folder import open_folder
from jaxtune.convert.hf import load_params
from jaxtune.models.attention import ATTENTIONS
from jaxtune.models.decoder import Decoder
from jaxtune.models.decoder_config import DecoderConfig
from jaxtune.models.registry import family_of


def abstract_decoder(config: DecoderConfig, **options: Any) -> Decoder:
    """Returns the decoder's shapes only."""
    return nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0), **options))


def load(path: Any) -> tuple[Decoder, DecoderConfig]:
    """Opens a folder as a decoder in float32."""
    folder = open_folder(path)
    config = family_of(folder.config, where=path).read_config(folder.config)
    graph, state = nnx.split(abstract_decoder(config))
    return nnx.merge(graph, load_params(folder, state)), config


# Compiling takes nearly all of the time of tests on tiny models.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


@functools.lru_cache(maxsize=8)
def _logits_function(graph: nnx.GraphDef, attention: str) -> Callable:
    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(state: Any, dropout_keys: jax.Array | None, *arrays: jax.Array) -> jax.Array:
        model = nnx.merge(graph, state)
        kernel = ATTENTIONS[attention]
        output = model(*arrays, compute_dtype=jnp.float32, attention=kernel, dropout_keys=dropout_keys)
        return model.logits(output.hidden)

    return run


def logits(
    decoder: Decoder,
    tokens: Any,
    positions: Any,
    segment_ids: Any,
    *,
    attention: str = "xla",
    dropout_keys: jax.Array | None = None,
) -> np.ndarray:
    """Returns `[B T V]` float32 logits, compiled."""
    graph, state = nnx.split(decoder)
    run = _logits_function(graph, attention)
    return np.asarray(run(state, dropout_keys, *(jnp.asarray(x, jnp.int32) for x in (tokens, positions, segment_ids))))


def jaxpr_of(decoder: Decoder) -> Any:
    """Returns what is traced for one row of 8 tokens."""
    graph, state = nnx.split(decoder)
    row = jax.ShapeDtypeStruct((1, 8), jnp.int32)

    def run(state: Any, *arrays: jax.Array) -> jax.Array:
        model = nnx.merge(graph, state)
        return model(*arrays, compute_dtype=jnp.float32, attention=ATTENTIONS["xla"])

    return jax.make_jaxpr(run)(state, row, row, row)
