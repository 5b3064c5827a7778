"""The parts of the T5 line's stacks: distances as biases, attention, mlp, dropout.

B batch, T query length, S key length, D model width, F mlp width, N heads, H head size, L layers, U buckets of
distances.
"""

import functools
import math
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxtune import sharding
from jaxtune.models.layers import Dropout, Linear, RMSNorm, draw_normal
from jaxtune.models.mlp import ACTIVATIONS
from jaxtune.models.self_attention import Store
from jaxtune.models.t5_config import T5Config


@functools.cache
def bucket_table(buckets: int, max_distance: int) -> np.ndarray:
    """Returns the bucket of each distance from 0 to `max_distance` in one direction, int32.

    Half of the buckets are single distances, the others grow logarithmically: of 8 buckets up to 16,
    `[0 1 2 3 4 4 5 5 6 6 6 6 7 7 7 7 7]`. It is a table so that no device's logarithm decides on a bucket's edge.
    """
    single = buckets // 2
    distances = np.arange(max_distance + 1)
    far = np.maximum(distances, single).astype(np.float32)  # float32, as the released models were trained
    steps = (
        np.log(far / np.float32(single)) / np.float32(math.log(max_distance / single)) * np.float32(buckets - single)
    )
    grown = np.minimum(single + steps.astype(np.int32), buckets - 1)
    return np.where(distances < single, distances, grown).astype(np.int32)


def relative_buckets(
    q_positions: jax.Array, kv_positions: jax.Array, *, buckets: int, max_distance: int, bidirectional: bool
) -> jax.Array:
    """Returns the bucket, int32 `[B T S]`, of how far each key (positions `[B S]`) is from each query (`[B T]`).

    Bidirectional buckets are half for keys at or before the query, half for those after it; otherwise all are for keys
    before it, and keys after it share bucket 0 with the query itself.
    """
    distance = kv_positions[:, None, :] - q_positions[:, :, None]
    sided = buckets // 2 if bidirectional else buckets
    far = jnp.abs(distance) if bidirectional else jnp.maximum(-distance, 0)
    bucket = jnp.asarray(bucket_table(sided, max_distance))[jnp.minimum(far, max_distance)]
    return bucket + sided * (distance > 0) if bidirectional else bucket


def same_segment(q_segments: jax.Array, kv_segments: jax.Array) -> jax.Array:
    """Returns bool `[B T S]`: whether query and key are of one segment, which is not padding."""
    return (q_segments[:, :, None] == kv_segments[:, None, :]) & (q_segments != 0)[:, :, None]


class Sight(NamedTuple):
    """What queries see in one kind of attention: the same in all layers.

    `visible` bool `[B T S]`; `buckets` int32 `[B T S]`, or None where positions say nothing (encoder to decoder).
    """

    visible: jax.Array
    buckets: jax.Array | None


class Run(NamedTuple):
    """What one run through a stack shares: the kernel, dropout's rate and keys `[B]`."""

    attention: Callable[..., jax.Array]
    rate: float
    keys: jax.Array | None

    def dropout(self, layer: Any) -> Dropout | None:
        """Returns what layer number `layer` draws its noise from; None outside training."""
        return Dropout(self.keys, layer) if self.keys is not None else None

    def drop(self, x: jax.Array, dropout: Dropout | None, *, site: str) -> jax.Array:
        """Zeroes entries of `[B ... T D]` with probability `rate`, the same ones at all T positions, as T5X does.

        Each row draws from its own key, so that no split of the batch changes a row's noise.
        """
        if dropout is None or self.rate == 0:
            return x
        salt = zlib.crc32(site.encode())  # not hash(): it differs between processes

        def keep(key: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(key, dropout.layer), salt)
            return jax.random.bernoulli(key, 1.0 - self.rate, (*x.shape[1:-2], 1, x.shape[-1]))

        return jnp.where(jax.vmap(keep)(dropout.keys), x / (1.0 - self.rate), 0).astype(x.dtype)


def plain(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    visible: jax.Array,
    bias: jax.Array | None,
    drop: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Attends `[B T N H]` to `[B S N H]` with biases `[B N T S]`, in plain jax; the softmax is float32 at least.

    A query that sees nothing gives finite numbers without meaning. `drop` is dropout on the weights `[B N T S]`.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=wide)
    if bias is not None:
        scores = scores + bias
    scores = jnp.where(visible[:, None], scores, jnp.finfo(wide).min)
    weights = drop(jax.nn.softmax(scores, axis=-1)).astype(v.dtype)
    return checkpoint_name(jnp.einsum("BNTS,BSNH->BTNH", weights, v), "attention")


def _bias_table(config: T5Config, key: jax.Array, param_dtype: jax.typing.DTypeLike) -> nnx.Param:
    """Declares the biases `[U N]`."""
    std = config.init_factor * config.width**-0.5
    return nnx.Param(draw_normal(key, (config.buckets, config.num_heads), std, param_dtype), axes=(None, "heads"))


class Norm(RMSNorm):
    """`RMSNorm` rounded once before its weight, as transformers does.

    Scores that are not scaled down carry every rounding on: with bfloat16 products, as decoders have them, logits of a
    random model differ from float32 by 12 % instead of 9 % (transformers' bfloat16: 10 %).
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.weight[...].astype(x.dtype)


class Attention(nnx.Module):
    """Attention of a layer to its own stack, or of the decoder to the encoder."""

    def __init__(self, config: T5Config, key: jax.Array, *, has_bias: bool, param_dtype: jax.typing.DTypeLike):
        heads, factor = config.num_heads * config.head_dim, config.init_factor
        keys = jax.random.split(key, 5)
        make = partial(Linear, bias=False, param_dtype=param_dtype)
        inputs = partial(make, in_size=config.width, out_size=heads, axes=("embed", "heads"))
        # The usual 1 / sqrt(H) of the scores stands in q's initial values instead (Mesh TensorFlow).
        self.q = inputs("q", keys[0], std=factor * (config.width * config.head_dim) ** -0.5)
        self.k = inputs("k", keys[1], std=factor * config.width**-0.5)
        self.v = inputs("v", keys[2], std=factor * config.width**-0.5)
        self.o = make(
            "o", keys[3], in_size=heads, out_size=config.width, axes=("heads", "embed"), std=factor * heads**-0.5
        )
        self.position_bias = nnx.data(_bias_table(config, keys[4], param_dtype) if has_bias else None)
        self.head_dim = config.head_dim

    def keys_and_values(self, x: jax.Array, dropout: Dropout | None = None) -> tuple[jax.Array, jax.Array]:
        """Maps what is attended to, `[B S D]`, to `[B S N H]` twice."""
        k, v = (made(x, dropout).reshape(*x.shape[:2], -1, self.head_dim) for made in (self.k, self.v))
        axes = ("batch", "seq", "heads", None)
        return checkpoint_name(sharding.constrain(k, axes), "k"), checkpoint_name(sharding.constrain(v, axes), "v")

    def __call__(
        self,
        x: jax.Array,
        keys_and_values: tuple[jax.Array, jax.Array],
        sight: Sight,
        table: jax.Array | None,
        run: Run,
        dropout: Dropout | None,
        *,
        site: str,
    ) -> jax.Array:
        """Maps `[B T D]` to `[B T D]`; `table` `[U N]` is the stack's, used where the layer has none of its own."""
        q = self.q(x, dropout).reshape(*x.shape[:2], -1, self.head_dim)
        q = checkpoint_name(sharding.constrain(q, ("batch", "seq", "heads", None)), "q")
        bias = None
        if sight.buckets is not None:
            table = self.position_bias[...] if self.position_bias is not None else table
            assert table is not None
            wide = table.astype(jnp.promote_types(x.dtype, jnp.float32))
            bias = jnp.moveaxis(jnp.take(wide, sight.buckets, axis=0), -1, 1)
            bias = sharding.constrain(bias, ("batch", "heads", "seq", None))
        drop = partial(run.drop, dropout=dropout, site=f"{site} weights")
        out = run.attention(q, *keys_and_values, visible=sight.visible, bias=bias, drop=drop)
        out = sharding.constrain(out, ("batch", "seq", "heads", None))
        return self.o(out.reshape(*x.shape[:2], -1), dropout)


class Mlp(nnx.Module):
    """`wo(activation(wi_0(x)) * wi_1(x))`, or `wo(activation(wi(x)))` where the config has no gate."""

    def __init__(self, config: T5Config, key: jax.Array, *, param_dtype: jax.typing.DTypeLike):
        keys, factor = jax.random.split(key, 3), config.init_factor
        make = partial(Linear, bias=False, param_dtype=param_dtype)
        wide = partial(
            make,
            in_size=config.width,
            out_size=config.mlp_width,
            axes=("embed", "mlp"),
            std=factor * config.width**-0.5,
        )
        if config.gated:
            self.wi_0, self.wi_1 = wide("wi_0", keys[0]), wide("wi_1", keys[1])
        else:
            self.wi = wide("wi", keys[0])
        self.wo = make(
            "wo",
            keys[2],
            in_size=config.mlp_width,
            out_size=config.width,
            axes=("mlp", "embed"),
            std=factor * config.mlp_width**-0.5,
        )
        self.gated, self.activation = config.gated, config.activation

    def __call__(self, x: jax.Array, run: Run, dropout: Dropout | None) -> jax.Array:
        """Maps `[B T D]` to `[B T D]`."""
        activation, axes = ACTIVATIONS[self.activation], ("batch", "seq", "mlp")
        first = self.wi_0 if self.gated else self.wi
        y = activation(checkpoint_name(sharding.constrain(first(x, dropout), axes), "gate"))
        if self.gated:
            y = y * checkpoint_name(sharding.constrain(self.wi_1(x, dropout), axes), "up")
        return self.wo(run.drop(y, dropout, site="mlp inside"), dropout)


class Layer(nnx.Module):
    """One layer of either stack: attention, in the decoder attention to the encoder too, and mlp, each with its norm
    before and the residual around."""

    def __init__(self, config: T5Config, key: jax.Array, *, crosses: bool, param_dtype: jax.typing.DTypeLike):
        attention_key, cross_key, mlp_key = jax.random.split(key, 3)
        norm = partial(Norm, config.width, eps=config.norm_eps, param_dtype=param_dtype)
        self.attention_norm = norm()
        self.attention = Attention(config, attention_key, has_bias=config.bias_in_every_layer, param_dtype=param_dtype)
        if crosses:
            self.cross_norm = norm()
            self.cross_attention = Attention(config, cross_key, has_bias=False, param_dtype=param_dtype)
        self.mlp_norm = norm()
        self.mlp = Mlp(config, mlp_key, param_dtype=param_dtype)

    def attend(
        self, x: jax.Array, sight: Sight, table: Any, run: Run, dropout: Dropout | None, store: Store | None
    ) -> jax.Array:
        """Adds attention to the layer's own stack; with a `store`, keys and values go through the cache."""
        normed = self.attention_norm(x)
        keys_and_values = self.attention.keys_and_values(normed, dropout)
        if store is not None:
            keys_and_values = store.write_and_read(*keys_and_values)
        y = self.attention(normed, keys_and_values, sight, table, run, dropout, site="attention")
        return self._add(x, run.drop(y, dropout, site="attention"))

    def attend_to_encoder(
        self, x: jax.Array, keys_and_values: Any, sight: Sight, run: Run, dropout: Dropout | None
    ) -> jax.Array:
        """Adds attention to the encoder's keys and values `[B S N H]`."""
        y = self.cross_attention(self.cross_norm(x), keys_and_values, sight, None, run, dropout, site="cross")
        return self._add(x, run.drop(y, dropout, site="cross"))

    def think(self, x: jax.Array, run: Run, dropout: Dropout | None) -> jax.Array:
        """Adds the mlp."""
        y = self.mlp(self.mlp_norm(x), run, dropout)
        x = x + run.drop(y, dropout, site="mlp")
        return sharding.constrain(x, ("batch", "stream", None))

    def _add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return checkpoint_name(sharding.constrain(x + y, ("batch", "stream", None)), "mid")


class Stack(nnx.Module):
    """The layers of one side, stacked on L, with the norm after them and the biases that they share."""

    def __init__(
        self, config: T5Config, key: jax.Array, *, count: int, crosses: bool, param_dtype: jax.typing.DTypeLike
    ):
        layers_key, bias_key = jax.random.split(key)
        stack = nnx.vmap(
            lambda layer_key: Layer(config, layer_key, crosses=crosses, param_dtype=param_dtype),
            transform_metadata={nnx.PARTITION_NAME: "layers", "axes": "layers"},
        )
        self.layers = stack(jax.random.split(layers_key, count))
        self.position_bias = nnx.data(
            None if config.bias_in_every_layer else _bias_table(config, bias_key, param_dtype)
        )
        self.norm = Norm(config.width, eps=config.norm_eps, param_dtype=param_dtype)
        self.count = count

    def table(self) -> jax.Array | None:
        """Returns the shared biases `[U N]`."""
        return self.position_bias[...] if self.position_bias is not None else None
