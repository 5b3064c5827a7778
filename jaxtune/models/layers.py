"""The parts that a layer is made of: linear, norm, embedding.

B batch, T query length, D model width, N query heads, H head size, V vocabulary, r adapter rank.

Every parameter is declared once, here or where its module is made: shape, dtype, logical axes (`axes`) and initial
values stand together, and sharding, restore and conversion read them from the parameter.
"""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune import sharding

Axes = tuple[str | None, ...]


def parameter(value: jax.Array, axes: Axes) -> nnx.Param:
    """Declares a parameter; along `vocab` it is held with zeros behind its own rows, and says how many are its own."""
    if "vocab" not in axes:
        return nnx.Param(value, axes=axes)
    size = value.shape[axes.index("vocab")]
    pads = [(0, -size % sharding.VOCAB_MULTIPLE if axis == "vocab" else 0) for axis in axes]
    return nnx.Param(jnp.pad(value, pads), axes=axes, vocab_size=size)


class LoRAParam(nnx.Param):
    """A trainable matrix of an adapter; `lora_a` carries `scale` and `dropout` as metadata."""


class Dropout(NamedTuple):
    """What an adapter needs to draw its dropout: one key per row, so that splitting a batch changes nothing."""

    keys: jax.Array  # [B] typed keys, already folded with step and global row
    layer: jax.Array  # int32 scalar: the layer's number in the model


class Linear(nnx.Module):
    """`x @ kernel + bias`, and the adapter's `scale * (x @ lora_a) @ lora_b` where one is attached.

    The kernel is `[in out]`: heads stay flat in `out`, since a head size below 128 would be padded to 128 lanes on a
    TPU if it were an axis of its own.
    """

    def __init__(
        self,
        name: str,
        key: jax.Array,
        *,
        in_size: int,
        out_size: int,
        axes: Axes,
        bias: bool,
        std: float,
        param_dtype: jax.typing.DTypeLike,
    ):
        self.name = name  # what targets of an adapter call it
        self.kernel = parameter(draw_normal(key, (in_size, out_size), std, param_dtype), axes)
        self.bias = nnx.Param(jnp.zeros((out_size,), param_dtype), axes=(axes[1],)) if bias else None
        self.lora_a: LoRAParam | None = nnx.data(None)
        self.lora_b: LoRAParam | None = nnx.data(None)

    def __call__(self, x: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        """Maps `[B T in]` to `[B T out]` in the dtype of x."""
        y = x @ self.kernel[...].astype(x.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        if self.lora_a is not None and self.lora_b is not None:
            options = self.lora_a.get_metadata()
            if dropout is not None and options["dropout"] > 0:
                x = drop_rows(x, dropout, site=self.name, rate=options["dropout"])
            y = y + low_rank(x, self.lora_a[...], self.lora_b[...], scale=options["scale"])
        return y


def low_rank(x: jax.Array, lora_a: jax.Array, lora_b: jax.Array, *, scale: float) -> jax.Array:
    """Maps `[... in]` to `[... out]` by an adapter; estimates know its work by this function's name."""
    low = x @ lora_a.astype(x.dtype)
    return (low * scale) @ lora_b.astype(x.dtype)


def drop_rows(x: jax.Array, dropout: Dropout, *, site: str, rate: float) -> jax.Array:
    """Zeroes entries of `[B T D]` with probability `rate` and scales up the rest, each row by its own key."""
    salt = zlib.crc32(site.encode())  # not hash(): it differs between processes

    def keep(key: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key, dropout.layer), salt)
        return jax.random.bernoulli(key, 1.0 - rate, x.shape[1:])

    return jnp.where(jax.vmap(keep)(dropout.keys), x / (1.0 - rate), 0).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm: statistics in float32 at least, products in the dtype of x (float32 ones cost 2 %).

    With an `offset` the weight is what is added to it (Gemma: 1), and the products are wide too, as 1 + weight would
    lose the weight's last bits.
    """

    def __init__(self, size: int, *, eps: float, param_dtype: jax.typing.DTypeLike, offset: float = 0.0):
        self.eps, self.offset = eps, offset
        self.weight = nnx.Param(jnp.full((size,), 1 - offset, param_dtype), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        if self.offset:
            return (wide * inverse * (self.weight[...].astype(wide.dtype) + self.offset)).astype(x.dtype)
        return x * inverse.astype(x.dtype) * self.weight[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Mean and variance norm with a bias, in float32 at least."""

    def __init__(self, size: int, *, eps: float, param_dtype: jax.typing.DTypeLike):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((size,), param_dtype), axes=(None,))
        self.bias = nnx.Param(jnp.zeros((size,), param_dtype), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        return (normed * self.weight[...].astype(wide.dtype) + self.bias[...].astype(wide.dtype)).astype(x.dtype)


class Embedding(nnx.Module):
    """The table `[V D]` from token (or position) to vector."""

    def __init__(
        self,
        key: jax.Array,
        *,
        vocab_size: int,
        width: int,
        std: float,
        param_dtype: jax.typing.DTypeLike,
        axes: Axes = ("vocab", "embed"),
    ):
        self.embedding = parameter(draw_normal(key, (vocab_size, width), std, param_dtype), axes)

    def __call__(self, tokens: jax.Array, *, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Maps tokens `[B T]` to `[B T D]`."""
        return jnp.take(self.embedding[...], tokens, axis=0).astype(dtype)


class Head(NamedTuple):
    """How hidden states become logits: `scale * hidden @ kernel`, then cut off softly at `softcap`.

    The kernel is `[D P]`: its first V = `vocab_size` columns are the vocabulary, those behind it padding.
    """

    kernel: jax.Array
    vocab_size: int
    scale: float
    softcap: float | None


def head_logits(hidden: jax.Array, head: Head) -> jax.Array:
    """Maps `[... D]` to logits `[... V]`, float32 at least."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum("...D,DV->...V", hidden, head.kernel.astype(hidden.dtype), preferred_element_type=wide)
    logits = logits[..., : head.vocab_size]
    logits = logits if head.scale == 1 else logits * head.scale
    return logits if head.softcap is None else head.softcap * jnp.tanh(logits / head.softcap)


def draw_normal(key: jax.Array, shape: tuple[int, ...], std: float, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns initial values: drawn in float32, then cast."""
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
