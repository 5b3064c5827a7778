"""Rotary positions: every published way of slowing the rotation down, behind one description.

B batch, T query length, N query heads, H head size, R rotated part of the head (all of it, or its beginning).

The formulas are those of the models' own releases as transformers reads them (`modeling_rope_utils`): linear (position
interpolation, Chen et al. 2023), dynamic (NTK-aware, by length), yarn (Peng et al. 2023), llama3 (Llama 3.1),
longrope (Ding et al. 2024).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Rope:
    """How positions turn queries and keys.

    Attributes:
        theta: base of the speeds.
        kind: a key of `ROPE_KINDS`.
        rotary_dim: R, the first entries of a head that are turned; None is all of them.
        interleaved: entries 2i and 2i + 1 are a pair; else i and R/2 + i are.
        amplitude: what cosine and sine are multiplied by (yarn, longrope).
        factor: of linear, dynamic, yarn and llama3.
        low_freq_factor, high_freq_factor: of llama3.
        original_positions: length of the first training (llama3, yarn, longrope), or from which dynamic grows.
        beta_fast, beta_slow, truncate: yarn's bounds in rotations, and whether they are rounded to whole dimensions.
        short_factors, long_factors: longrope's, one for each of the R/2 speeds; long ones hold in segments that are
            longer than `original_positions`.
    """

    theta: float
    kind: str = "default"
    rotary_dim: int | None = None
    interleaved: bool = False
    amplitude: float = 1.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @property
    def by_length(self) -> bool:
        """Whether the speeds depend on how long a token's segment is."""
        return self.kind in ("dynamic", "longrope")


def frequencies(rope: Rope, rotary_dim: int) -> np.ndarray:
    """Returns the turning speeds `[R/2]`, float32; of kinds that go by length, those of short segments.

    Positions times speed is large, so a last bit here is 1e-3 in a cosine at position 9,000: the power is taken in
    float64 and rounded, which is what torch's float32 power gives.
    """
    exponents = (np.arange(0, rotary_dim, 2).astype(np.float32) / np.float32(rotary_dim)).astype(np.float64)
    powers = (np.float64(rope.theta) ** exponents).astype(np.float32)
    return ROPE_KINDS[rope.kind](powers, rope)


def _linear(powers: np.ndarray, rope: Rope) -> np.ndarray:
    return (np.float32(1.0) / powers / np.float32(rope.factor)).astype(np.float32)


def _llama3(powers: np.ndarray, rope: Rope) -> np.ndarray:
    """Slows long wavelengths by `factor`, leaves short ones, and blends between (Llama 3.1's release)."""
    speeds = np.float32(1.0) / powers
    wavelengths = np.float32(2 * math.pi) / speeds
    longest = rope.original_positions / rope.low_freq_factor
    shortest = rope.original_positions / rope.high_freq_factor
    blend = (np.float32(rope.original_positions) / wavelengths - np.float32(rope.low_freq_factor)) / np.float32(
        rope.high_freq_factor - rope.low_freq_factor
    )
    slow = speeds / np.float32(rope.factor)
    blended = (1 - blend) * slow + blend * speeds
    return np.where(wavelengths > longest, slow, np.where(wavelengths < shortest, speeds, blended)).astype(np.float32)


def _yarn(powers: np.ndarray, rope: Rope) -> np.ndarray:
    """Slows dimensions that turn less than `beta_slow` times in the first training, leaves those over `beta_fast`."""
    size = 2 * len(powers)

    def dimension(rotations: float) -> float:
        return size * math.log(rope.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 if low == high else 0
    ramp = np.clip((np.arange(len(powers), dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    slow = np.float32(1.0) / (np.float32(rope.factor) * powers)
    fast = np.float32(1.0) / powers
    kept = np.float32(1.0) - ramp
    return (slow * (np.float32(1.0) - kept) + fast * kept).astype(np.float32)


def _longrope(powers: np.ndarray, rope: Rope) -> np.ndarray:
    return (np.float32(1.0) / (np.asarray(rope.short_factors, np.float32) * powers)).astype(np.float32)


def _plain(powers: np.ndarray, rope: Rope) -> np.ndarray:
    return np.float32(1.0) / powers


ROPE_KINDS: dict[str, Callable[[np.ndarray, Rope], np.ndarray]] = {
    "default": _plain,
    "linear": _linear,
    "dynamic": _plain,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}


def _speeds_by_length(rope: Rope, rotary_dim: int, lengths: jax.Array) -> jax.Array:
    """Returns the speeds `[B T R/2]` of tokens in segments of these lengths `[B T]`."""
    short = frequencies(rope, rotary_dim)
    lengths = lengths[:, :, None]
    if rope.kind == "longrope":
        powers = short * np.asarray(rope.short_factors, np.float32)  # 1 / powers
        return jnp.where(lengths > rope.original_positions, powers / np.asarray(rope.long_factors, np.float32), short)
    longer = jnp.maximum(lengths, rope.original_positions).astype(jnp.float32) / rope.original_positions
    growth = rope.factor * longer - (rope.factor - 1)
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim - 2)
    return jnp.asarray(short) * growth ** (-exponents)


def segment_lengths(positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Returns one more than the largest position in each token's segment, int32 `[B T]`."""

    def of_row(positions: jax.Array, segments: jax.Array) -> jax.Array:
        return jax.ops.segment_max(positions, segments, num_segments=positions.shape[0] + 1)[segments] + 1

    return jax.vmap(of_row)(positions, segment_ids)


Tables = tuple[jax.Array, jax.Array]


def rope_tables(
    rope: Rope, head_dim: int, positions: jax.Array, segment_ids: jax.Array, *, dtype: jax.typing.DTypeLike
) -> Tables:
    """Returns cosine and sine `[B T 1 R/2]` of positions `[B T]`; angles are float32 at least."""
    rotary_dim = rope.rotary_dim or head_dim
    wide = jnp.promote_types(dtype, jnp.float32)
    if rope.by_length:
        speeds = _speeds_by_length(rope, rotary_dim, segment_lengths(positions, segment_ids))[:, :, None]
    else:
        speeds = jnp.asarray(frequencies(rope, rotary_dim))
    angles = positions.astype(wide)[:, :, None, None] * speeds.astype(wide)
    return (jnp.cos(angles) * rope.amplitude).astype(dtype), (jnp.sin(angles) * rope.amplitude).astype(dtype)


def apply_rope(x: jax.Array, tables: Tables, *, interleaved: bool = False) -> jax.Array:
    """Turns the first R entries of `[B T N H]` by their positions; the rest stays.

    Interleaved pairs come out with all first members before all second ones, as DeepSeek's release leaves them:
    queries and keys are permuted alike, so their products are the same.
    """
    cos, sin = tables
    size = 2 * cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else jnp.split(turned, 2, axis=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*parts, rest] if rest.shape[-1] else parts, axis=-1)
