"""The encoder-decoder of the T5 line (Raffel et al. 2020; T5 1.1, FLAN-T5, UL2, mT5, umT5).

B batch, T decoder length, S encoder (or key) length, D model width, N heads, H head size, V vocabulary, L layers,
U buckets of distances.

Positions enter as a bias on attention's scores, one for each head and bucket of distances; the products themselves are
not scaled by 1 / sqrt(H). Both stacks are scanned, so that compile time does not grow with depth.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune import sharding
from jaxtune.models.decoder import REMAT_POLICIES, Output
from jaxtune.models.layers import Embedding, Head, Linear, head_logits
from jaxtune.models.self_attention import Store
from jaxtune.models.t5_config import T5Config
from jaxtune.models.t5_layers import Run, Sight, Stack, relative_buckets, same_segment


class Cache(NamedTuple):
    """What is kept of an answer under way: of the encoder, and of the decoder's earlier tokens.

    `cross_keys` and `cross_values` `[L B S N H]` are the encoder's, with its `encoder_segment_ids` `[B S]`; `keys` and
    `values` the decoder's, whose slots say their position and segment, and 0 is an empty slot.
    """

    cross_keys: jax.Array
    cross_values: jax.Array
    encoder_segment_ids: jax.Array
    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    length: jax.Array  # int32 scalar: slots written so far


class T5(nnx.Module):
    """Pairs in, the decoder's hidden states out; the head is applied by who computes the loss or draws a token."""

    def __init__(self, config: T5Config, *, key: jax.Array, param_dtype: jax.typing.DTypeLike = jnp.float32):
        """Declares every parameter; under `nnx.eval_shape` nothing is computed.

        Args:
            key: typed jax key of the initial values.
            param_dtype: dtype of every parameter.
        """
        self.config = config
        embed_key, head_key, encoder_key, decoder_key = jax.random.split(key, 4)
        factor = config.init_factor
        self.embed = Embedding(
            embed_key, vocab_size=config.vocab_size, width=config.width, std=factor, param_dtype=param_dtype
        )
        make = partial(Stack, config, param_dtype=param_dtype)
        self.encoder = make(encoder_key, count=config.encoder_layers, crosses=False)
        self.decoder = make(decoder_key, count=config.decoder_layers, crosses=True)
        self.lm_head = nnx.data(
            None
            if config.tie_embeddings
            else Linear(
                "lm_head",
                head_key,
                in_size=config.width,
                out_size=config.vocab_size,
                axes=("embed", "vocab"),
                bias=False,
                std=factor * config.width**-0.5,  # as T5X; transformers draws it with 1, for a loss of 90 nats
                param_dtype=param_dtype,
            )
        )

    def __call__(
        self,
        encoder_tokens: jax.Array,
        encoder_positions: jax.Array,
        encoder_segment_ids: jax.Array,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        *,
        compute_dtype: jax.typing.DTypeLike,
        attention: Callable[..., jax.Array],
        remat: str = "none",
        dropout_keys: jax.Array | None = None,
        dropout_rate: float = 0.0,
    ) -> Output:
        """Maps encoder tokens `[B S]` and decoder tokens `[B T]` to hidden states `[B T D]` after the last norm.

        A token of the encoder attends to its own segment; one of the decoder to its own segment up to itself, and to
        the segment of the same number in the encoder. Segment 0 is padding, whose hidden states mean nothing.

        Args:
            attention: `plain`, or another of its signature.
            remat: a key of `REMAT_POLICIES`.
            dropout_keys: typed keys `[B]`, one per row; None turns every dropout off.
            dropout_rate: of the model's own dropout; adapters have theirs.
        """
        run = Run(attention, dropout_rate, dropout_keys)
        encoded = self._encode(encoder_tokens, encoder_positions, encoder_segment_ids, run, compute_dtype, remat)
        own = self._own_sight(positions, segment_ids, positions, segment_ids)
        cross = Sight(same_segment(segment_ids, encoder_segment_ids), None)
        hidden, _, _ = self._decode(tokens, own, cross, run, compute_dtype, remat, encoded=encoded)
        return Output(hidden, None, None)

    def read(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        *,
        capacity: int,
        compute_dtype: jax.typing.DTypeLike,
        attention: Callable[..., jax.Array],
    ) -> Cache:
        """Runs the encoder over prompts `[B S]` and returns the cache that `answer` goes on from.

        Args:
            capacity: tokens that the decoder may read, the start token included.
        """
        encoded = self._encode(tokens, positions, segment_ids, Run(attention, 0.0, None), compute_dtype, "none")
        graph, states = nnx.split(self.decoder.layers)
        keys, values = jax.vmap(lambda state: nnx.merge(graph, state).cross_attention.keys_and_values(encoded))(states)
        rows, heads = tokens.shape[0], (self.config.num_heads, self.config.head_dim)
        empty = jnp.zeros((self.config.decoder_layers, rows, capacity, *heads), compute_dtype)
        slots = jnp.zeros((rows, capacity), jnp.int32)
        return Cache(keys, values, segment_ids, empty, empty, slots, slots, jnp.zeros((), jnp.int32))

    def answer(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        *,
        cache: Cache,
        compute_dtype: jax.typing.DTypeLike,
        attention: Callable[..., jax.Array],
    ) -> Output:
        """Runs the decoder over its next tokens `[B T]`; the result has the cache with them in it."""
        kv_positions = jax.lax.dynamic_update_slice(cache.positions, positions, (0, cache.length))
        kv_segment_ids = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, cache.length))
        own = self._own_sight(positions, segment_ids, kv_positions, kv_segment_ids)
        cross = Sight(same_segment(segment_ids, cache.encoder_segment_ids), None)
        run = Run(attention, 0.0, None)
        hidden, keys, values = self._decode(tokens, own, cross, run, compute_dtype, "none", cache=cache)
        length = cache.length + tokens.shape[1]
        written = cache._replace(
            keys=keys, values=values, positions=kv_positions, segment_ids=kv_segment_ids, length=length
        )
        return Output(hidden, written, None)

    def head(self) -> Head:
        """Returns how hidden states become logits; the kernel is in its own dtype."""
        kernel = self.embed.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]
        return Head(kernel, self.config.vocab_size, self.config.head_scale, None)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Maps hidden states `[B T D]` to logits `[B T V]`, float32 at least; for generation and tests."""
        return head_logits(hidden, self.head())

    def _own_sight(self, positions: jax.Array, segments: jax.Array, kv_positions: Any, kv_segments: Any) -> Sight:
        """What the decoder sees of itself: its own segment, up to the token itself."""
        visible = same_segment(segments, kv_segments) & (kv_positions[:, None, :] <= positions[:, :, None])
        return Sight(visible, self._buckets(positions, kv_positions, bidirectional=False))

    def _buckets(self, q_positions: jax.Array, kv_positions: jax.Array, *, bidirectional: bool) -> jax.Array:
        config = self.config
        return relative_buckets(
            q_positions,
            kv_positions,
            buckets=config.buckets,
            max_distance=config.max_distance,
            bidirectional=bidirectional,
        )

    def _encode(
        self, tokens: jax.Array, positions: jax.Array, segments: jax.Array, run: Run, dtype: Any, remat: str
    ) -> jax.Array:
        """Maps the encoder's tokens `[B S]` to `[B S D]`."""
        sight = Sight(same_segment(segments, segments), self._buckets(positions, positions, bidirectional=True))
        graph, states = nnx.split(self.encoder.layers)
        table = self.encoder.table()

        def one_layer(x: jax.Array, inputs: tuple[Any, Any]) -> tuple[jax.Array, None]:
            number, state = inputs
            layer, dropout = nnx.merge(graph, state), run.dropout(number)
            x = layer.attend(x, sight, table, run, dropout, None)
            return layer.think(x, run, dropout), None

        x = self._embed(tokens, run, dtype, side="encoder")
        x, _ = jax.lax.scan(_saving(one_layer, remat), x, (jnp.arange(self.encoder.count), states))
        return run.drop(self.encoder.norm(x), run.dropout(0), site="encoder end")

    def _decode(
        self,
        tokens: jax.Array,
        own: Sight,
        cross: Sight,
        run: Run,
        dtype: Any,
        remat: str,
        *,
        encoded: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Any, Any]:
        """Maps the decoder's tokens `[B T]` to `[B T D]`, from the encoder's `[B S D]` or from a cache; the second and
        third results are the cache's keys and values, written, or None."""
        graph, states = nnx.split(self.decoder.layers)
        table = self.decoder.table()
        count = self.decoder.count

        def one_layer(carry: tuple[Any, Any, Any], inputs: tuple[Any, Any, Any]) -> tuple[tuple[Any, Any, Any], None]:
            x, keys, values = carry
            number, state, crossed = inputs
            layer, dropout = nnx.merge(graph, state), run.dropout(self.encoder.count + number)
            store = None
            if cache is not None:
                store = Store(keys, values, layer=number, start=cache.length)
            x = layer.attend(x, own, table, run, dropout, store)
            across = run.dropout(self.encoder.count + count + number)  # q, k, v, o are there twice, under one name each
            if encoded is not None:
                crossed = layer.cross_attention.keys_and_values(encoded, across)
            x = layer.attend_to_encoder(x, crossed, cross, run, across)
            x = layer.think(x, run, dropout)
            return (x, store.keys, store.values) if store is not None else (x, None, None), None

        x = self._embed(tokens, run, dtype, side="decoder")
        start = (x, cache.keys, cache.values) if cache is not None else (x, None, None)
        crossed = (cache.cross_keys, cache.cross_values) if cache is not None else None
        (x, keys, values), _ = jax.lax.scan(_saving(one_layer, remat), start, (jnp.arange(count), states, crossed))
        return run.drop(self.decoder.norm(x), run.dropout(0), site="decoder end"), keys, values

    def _embed(self, tokens: jax.Array, run: Run, dtype: Any, *, side: str) -> jax.Array:
        x = sharding.constrain(self.embed(tokens, dtype=dtype), ("batch", "stream", None))
        return run.drop(x, run.dropout(0), site=f"{side} begin")


def _saving(body: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """Returns the body of a scan with what the backward pass finds saved chosen by `remat`."""
    policy = REMAT_POLICIES[remat]
    return body if policy is None else jax.checkpoint(body, policy=policy, prevent_cse=False)
