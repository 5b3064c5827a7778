"""Prefill and decode with a KV cache: what is compiled when a model answers.

B rows, T padded prompt length, M most new tokens, V vocabulary. Prompts are padded on the right; a row's new tokens are
written behind the padding, and positions and segments say what belongs together:

    prompts    [[5 9 13 0]      lengths [3 4]     cache slots   5 9 13 . | a b
                [7 7 20 31]]                                     7 7 20 31| c d

An encoder-decoder (`PairDecoding`) reads the prompts with its encoder, and the cache's slots are those of the answer.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune import sharding
from jaxtune.models.attention import xla
from jaxtune.models.decoder import init_cache
from jaxtune.models.t5_layers import plain

CACHE_AXES = (None, "batch", None, "kv_heads", None)  # of keys and values, [count B S K H]


class Rows(NamedTuple):
    """What is asked of each row.

    `lengths` int32 [B]: tokens of its prompt, 0 for a row that is only filling. `limits` int32 [B]: new tokens at most.
    `keys` typed [B]: of its draws. `temperature` and `top_p` are float32 scalars.
    """

    lengths: Any
    limits: Any
    keys: Any
    temperature: Any
    top_p: Any


class Progress(NamedTuple):
    """Rows on their way: `tokens` int32 [B M] chosen so far, `counts` [B] of them, `done` [B], `step` of all rows."""

    cache: Any  # of `models.decoder` or `models.t5`
    logits: jax.Array  # [B V], from which the next token is chosen
    tokens: jax.Array
    counts: jax.Array
    done: jax.Array
    step: jax.Array


class Decoding:
    """The compiled functions of one model: `batch` answers rows on the device, `begin` and `advance` step by step."""

    def __init__(self, graph: nnx.GraphDef, config: Any, *, stop_ids: Sequence[int], dtype: Any) -> None:
        """Compiles nothing yet; each new shape of prompts is compiled when it is first met."""
        self.config, self.dtype = config, dtype
        self._graph, self._stop_ids = graph, tuple(stop_ids)
        self.batch = jax.jit(self._batch, static_argnames=("new_tokens", "draw"))
        self.begin = jax.jit(self._begin, static_argnames="new_tokens")
        self.advance = jax.jit(self._advance, static_argnames="draw", donate_argnames="progress")

    def _batch(
        self, state: nnx.State, prompts: jax.Array, rows: Rows, *, new_tokens: int, draw: str
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (tokens int32 `[B M]`, counts `[B]`); a row ends with its stop token or at its limit."""
        start = self._begin(state, prompts, rows, new_tokens=new_tokens)
        end = jax.lax.while_loop(
            lambda progress: ~jnp.all(progress.done), lambda progress: self._advance(state, progress, rows, draw), start
        )
        return end.tokens, end.counts

    def _begin(self, state: nnx.State, prompts: jax.Array, rows: Rows, *, new_tokens: int) -> Progress:
        """Reads the prompts `[B T]` into a new cache."""
        B, T = prompts.shape
        index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        inside = index < rows.lengths[:, None]
        logits, cache = self._read(
            state, prompts, jnp.where(inside, index, 0), inside.astype(jnp.int32), rows.lengths, new_tokens
        )
        return Progress(
            cache=cache,
            logits=logits,
            tokens=jnp.zeros((B, new_tokens), jnp.int32),
            counts=jnp.zeros((B,), jnp.int32),
            done=(rows.lengths == 0) | (rows.limits == 0),
            step=jnp.zeros((), jnp.int32),
        )

    def _advance(self, state: nnx.State, progress: Progress, rows: Rows, draw: str) -> Progress:
        """Chooses one token for every row that is not done, and runs the model over these tokens."""
        chosen = CHOICES[draw](progress.logits, rows, progress.step)
        live = ~progress.done
        chosen = jnp.where(live, chosen, 0)
        tokens = jax.lax.dynamic_update_slice(progress.tokens, chosen[:, None], (0, progress.step))
        counts = progress.counts + live
        done = progress.done | jnp.isin(chosen, jnp.array(self._stop_ids, jnp.int32)) | (counts >= rows.limits)
        logits, cache = self._forward(
            state,
            progress.cache,
            chosen[:, None],
            self._positions(rows, progress.step)[:, None],
            jnp.ones_like(chosen)[:, None],
            last=jnp.zeros_like(counts),
        )
        return Progress(cache, logits, tokens, counts, done, progress.step + 1)

    def _read(
        self,
        state: nnx.State,
        prompts: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        lengths: jax.Array,
        new_tokens: int,
    ) -> tuple[jax.Array, Any]:
        """Returns the logits `[B V]` of each answer's first token, and the cache with the prompts in it."""
        B, T = prompts.shape
        cache = init_cache(self.config, batch=B, capacity=T + new_tokens, dtype=self.dtype)
        return self._forward(state, cache, prompts, positions, segment_ids, last=jnp.maximum(lengths - 1, 0))

    def _positions(self, rows: Rows, step: jax.Array) -> jax.Array:
        """Returns the positions `[B]` of the answers' token number `step`."""
        return rows.lengths + step

    def _run(self, model: Any, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, cache: Any) -> Any:
        # xla: the library kernels take no cache
        return model(tokens, positions, segment_ids, compute_dtype=self.dtype, attention=xla, cache=cache)

    def _forward(
        self,
        state: nnx.State,
        cache: Any,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        *,
        last: jax.Array,
    ) -> tuple[jax.Array, Any]:
        """Returns the logits `[B V]` of each row's token number `last`, and the cache with the tokens in it."""
        model = nnx.merge(self._graph, state)
        output = self._run(model, tokens, positions, segment_ids, _placed(cache))
        hidden = jnp.take_along_axis(output.hidden, last[:, None, None], axis=1)
        return model.logits(hidden)[:, 0], _placed(output.cache)


class PairDecoding(Decoding):
    """As `Decoding`, for an encoder-decoder: its answers begin behind a start token of their own, at position 0."""

    def _read(
        self,
        state: nnx.State,
        prompts: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        lengths: jax.Array,
        new_tokens: int,
    ) -> tuple[jax.Array, Any]:
        model = nnx.merge(self._graph, state)
        cache = model.read(
            prompts, positions, segment_ids, capacity=1 + new_tokens, compute_dtype=self.dtype, attention=plain
        )
        zeros = jnp.zeros((len(prompts), 1), jnp.int32)
        return self._forward(state, cache, zeros + self.config.start_token, zeros, zeros + 1, last=zeros[:, 0])

    def _positions(self, rows: Rows, step: jax.Array) -> jax.Array:
        return jnp.zeros_like(rows.lengths) + step + 1

    def _run(self, model: Any, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, cache: Any) -> Any:
        return model.answer(tokens, positions, segment_ids, cache=cache, compute_dtype=self.dtype, attention=plain)


def make_decoding(graph: nnx.GraphDef, config: Any, *, stop_ids: Sequence[int], dtype: Any) -> Decoding:
    """Returns what decodes for a model of this kind."""
    kind = PairDecoding if config.is_encoder_decoder else Decoding
    return kind(graph, config, stop_ids=stop_ids, dtype=dtype)


def _placed(cache: Any) -> Any:
    """Lays the cache's keys and values out over rows and heads."""
    place = partial(sharding.constrain, axes=CACHE_AXES)
    return cache._replace(keys=jax.tree.map(place, cache.keys), values=jax.tree.map(place, cache.values))


def _likeliest(logits: jax.Array, rows: Rows, step: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _drawn(logits: jax.Array, rows: Rows, step: jax.Array) -> jax.Array:
    return _draw(logits / rows.temperature, rows.keys, step)


def _drawn_from_nucleus(logits: jax.Array, rows: Rows, step: jax.Array) -> jax.Array:
    return _draw(nucleus(logits / rows.temperature, rows.top_p), rows.keys, step)


def _draw(logits: jax.Array, keys: jax.Array, step: jax.Array) -> jax.Array:
    """Draws a token per row, each from its own key: neither the batch nor its padding changes a row's answer."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Keeps the likeliest tokens of `[B V]` up to the first that makes their probability reach `top_p`.

    With probabilities 0.5 0.3 0.2 and top_p 0.6 the first two stay; the others become -inf.
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    lowest = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)


CHOICES = {"likeliest": _likeliest, "drawn": _drawn, "nucleus": _drawn_from_nucleus}


def bucket(size: int, smallest: int = 32) -> int:
    """Returns the power of two that a length is padded to, so that few shapes are compiled."""
    return max(smallest, 1 << (size - 1).bit_length())


def cache_bytes(config: Any, *, capacity: int, dtype: Any) -> int:
    """Returns the bytes of one row's cache, for `capacity` tokens of prompt and answer together."""
    if config.is_encoder_decoder:  # a token of either side has a key and a value in every layer of the decoder
        return 2 * capacity * config.decoder_layers * config.num_heads * config.head_dim * jnp.dtype(dtype).itemsize
    cache = jax.eval_shape(lambda: init_cache(config, batch=1, capacity=capacity, dtype=dtype))
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in (*cache.keys, *cache.values))
