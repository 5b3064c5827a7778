"""The parts that a layer is made of: linear, norm, embedding, rotary positions.

B batch, T query length, D model width, N query heads, H head size, V vocabulary, r adapter rank.

Every parameter is declared once, here or where its module is made: shape, dtype, logical axes (`axes`) and initial
values stand together, and sharding, restore and conversion read them from the parameter.
"""

import math
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Axes = tuple[str | None, ...]


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
        self.kernel = nnx.Param(_normal(key, (in_size, out_size), std, param_dtype), axes=axes)
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
            low = x @ self.lora_a[...].astype(x.dtype)
            y = y + (low * options["scale"]) @ self.lora_b[...].astype(x.dtype)
        return y


def drop_rows(x: jax.Array, dropout: Dropout, *, site: str, rate: float) -> jax.Array:
    """Zeroes entries of `[B T D]` with probability `rate` and scales up the rest, each row by its own key."""
    salt = zlib.crc32(site.encode())  # not hash(): it differs between processes

    def keep(key: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key, dropout.layer), salt)
        return jax.random.bernoulli(key, 1.0 - rate, x.shape[1:])

    return jnp.where(jax.vmap(keep)(dropout.keys), x / (1.0 - rate), 0).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm: statistics in float32 at least, products in the dtype of x (float32 ones cost 2 %)."""

    def __init__(self, size: int, *, eps: float, param_dtype: jax.typing.DTypeLike):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((size,), param_dtype), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return x * inverse.astype(x.dtype) * self.weight[...].astype(x.dtype)


class Embedding(nnx.Module):
    """The table `[V D]` from token to vector."""

    def __init__(self, key: jax.Array, *, vocab_size: int, width: int, std: float, param_dtype: jax.typing.DTypeLike):
        self.embedding = nnx.Param(_normal(key, (vocab_size, width), std, param_dtype), axes=("vocab", "embed"))

    def __call__(self, tokens: jax.Array, *, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Maps tokens `[B T]` to `[B T D]`."""
        return jnp.take(self.embedding[...], tokens, axis=0).astype(dtype)


def _normal(key: jax.Array, shape: tuple[int, ...], std: float, dtype: jax.typing.DTypeLike) -> jax.Array:
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


@dataclass(frozen=True)
class Rope:
    """How positions turn queries and keys; `kind` is a key of `ROPE_KINDS`.

    `factor` belongs to linear and llama3; the last three to llama3.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_positions: int = 0


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Returns the turning speeds `[H/2]`, float32.

    Positions times speed is large, so a last bit here is 1e-3 in a cosine at position 9,000: the power is taken in
    float64 and rounded, which is what torch's float32 power gives.
    """
    exponents = (np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)).astype(np.float64)
    powers = (np.float64(rope.theta) ** exponents).astype(np.float32)
    return ROPE_KINDS[rope.kind](np.float32(1.0) / powers, rope)


def _llama3_frequencies(speeds: np.ndarray, rope: Rope) -> np.ndarray:
    """Slows long wavelengths by `factor`, leaves short ones, and blends between (Llama 3.1's release)."""
    speeds = speeds.astype(np.float32)
    wavelengths = np.float32(2 * math.pi) / speeds
    longest = rope.original_positions / rope.low_freq_factor
    shortest = rope.original_positions / rope.high_freq_factor
    blend = (np.float32(rope.original_positions) / wavelengths - np.float32(rope.low_freq_factor)) / np.float32(
        rope.high_freq_factor - rope.low_freq_factor
    )
    slow = speeds / np.float32(rope.factor)
    blended = (1 - blend) * slow + blend * speeds
    return np.where(wavelengths > longest, slow, np.where(wavelengths < shortest, speeds, blended)).astype(np.float32)


ROPE_KINDS = {
    "default": lambda speeds, rope: speeds,
    "linear": lambda speeds, rope: (speeds / np.float32(rope.factor)).astype(np.float32),
    "llama3": _llama3_frequencies,
}


def rope_tables(
    rope: Rope, head_dim: int, positions: jax.Array, *, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine `[B T 1 H/2]` of positions `[B T]`; angles are float32 at least."""
    wide = jnp.promote_types(dtype, jnp.float32)
    angles = positions.astype(wide)[:, :, None, None] * rope_frequencies(rope, head_dim).astype(wide)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def apply_rope(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns `[B T N H]` by its positions, the first half of H paired with the second (HF's layout)."""
    cos, sin = tables
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
