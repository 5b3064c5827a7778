"""The attention half of a layer: projections, norms of queries and keys, rope, cache, kernel.

B batch, T query length, S key length, D model width, N query heads, K kv heads, H head size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxtune import sharding
from jaxtune.models.decoder_config import DecoderConfig, LatentConfig, LayerKind
from jaxtune.models.grouped import Kernels
from jaxtune.models.layers import Dropout, Linear, RMSNorm
from jaxtune.models.rope import Rope, Tables, apply_rope


class Pass(NamedTuple):
    """What one run through the layers shares: indices of both sides, rope tables, kernels."""

    attention: Callable[..., jax.Array]
    expert_kernels: Kernels
    tables: dict[Rope, Tables]
    q_positions: jax.Array  # [B T]
    q_segment_ids: jax.Array
    kv_positions: jax.Array  # [B S]
    kv_segment_ids: jax.Array
    start: jax.Array | None  # first cache slot to write; None without a cache
    dropout_keys: jax.Array | None  # [B]


class Store:
    """One layer's view of the stacked cache; the arrays are replaced as the layer writes them."""

    def __init__(self, keys: jax.Array, values: jax.Array, *, layer: jax.Array, start: jax.Array):
        self.keys, self.values, self.layer, self.start = keys, values, layer, start

    def write_and_read(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Writes `[B T K H]` at `start` and returns all `[B S K H]` of this layer."""
        at = (self.layer, 0, self.start, 0, 0)
        self.keys = jax.lax.dynamic_update_slice(self.keys, k[None].astype(self.keys.dtype), at)
        self.values = jax.lax.dynamic_update_slice(self.values, v[None].astype(self.values.dtype), at)
        return self.keys[self.layer].astype(k.dtype), self.values[self.layer].astype(v.dtype)


def _attend(
    run: Pass, q: jax.Array, k: jax.Array, v: jax.Array, *, config: DecoderConfig, window: int | None, sinks: Any
) -> jax.Array:
    """Runs the kernel on `[B T N H]`, `[B S K H]`, `[B S K H']`, and returns `[B T N*H']`."""
    scale = config.query_scale if config.query_scale is not None else q.shape[-1] ** -0.5
    out = run.attention(
        q,
        k,
        v,
        q_positions=run.q_positions,
        kv_positions=run.kv_positions,
        q_segment_ids=run.q_segment_ids,
        kv_segment_ids=run.kv_segment_ids,
        window=window,
        scale=scale,
        softcap=config.softcap,
        sinks=sinks,
    )
    out = sharding.constrain(out, ("batch", "seq", "heads", None))
    return out.reshape(*out.shape[:2], -1)


class Attention(nnx.Module):
    """Causal attention with grouped kv heads; kv heads are never repeated in memory."""

    def __init__(self, config: DecoderConfig, key: jax.Array, *, param_dtype: jax.typing.DTypeLike):
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        keys = jax.random.split(key, 4)
        make = partial(Linear, std=config.init_std, param_dtype=param_dtype)
        inputs = partial(make, in_size=config.width, bias=config.qkv_bias)
        if config.fused_qkv:
            name = config.linear_name("qkv_proj")
            self.qkv_proj = inputs(name, keys[0], out_size=heads + 2 * kv_heads, axes=("embed", "heads"))
        else:
            self.q_proj = inputs("q_proj", keys[0], out_size=heads, axes=("embed", "heads"))
            self.k_proj = inputs("k_proj", keys[1], out_size=kv_heads, axes=("embed", "kv_heads"))
            self.v_proj = inputs("v_proj", keys[2], out_size=kv_heads, axes=("embed", "kv_heads"))
        self.o_proj = make(
            config.linear_name("o_proj"),
            keys[3],
            in_size=heads,
            out_size=config.width,
            axes=("heads", "embed"),
            bias=config.o_bias,
        )
        if config.qk_norm:
            norm = partial(RMSNorm, eps=config.norm_eps, param_dtype=param_dtype, offset=config.norm_offset)
            whole = config.qk_norm == "width"
            self.q_norm = norm(heads if whole else config.head_dim)
            self.k_norm = norm(kv_heads if whole else config.head_dim)
        if config.sinks:
            self.sinks = nnx.Param(jnp.zeros((config.num_heads,), param_dtype), axes=("heads",))
        self.config = config

    def __call__(
        self, x: jax.Array, run: Pass, *, kind: LayerKind, dropout: Dropout | None, store: Store | None
    ) -> jax.Array:
        """Maps `[B T D]` to `[B T D]`; with a `store`, keys and values go through the cache."""
        config = self.config
        q, k, v = self._project(x, dropout)
        if kind.rope is not None:
            turn = partial(apply_rope, tables=run.tables[kind.rope], interleaved=kind.rope.interleaved)
            q, k = turn(q), turn(k)
        q = checkpoint_name(sharding.constrain(q, ("batch", "seq", "heads", None)), "q")
        k = checkpoint_name(sharding.constrain(k, ("batch", "seq", "kv_heads", None)), "k")
        v = checkpoint_name(sharding.constrain(v, ("batch", "seq", "kv_heads", None)), "v")
        if store is not None:
            k, v = store.write_and_read(k, v)
        sinks = self.sinks[...] if config.sinks else None
        return self.o_proj(_attend(run, q, k, v, config=config, window=kind.window, sinks=sinks), dropout)

    def _project(self, x: jax.Array, dropout: Dropout | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries `[B T N H]`, keys and values `[B T K H]`, normed but not turned."""
        config = self.config
        N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
        if config.fused_qkv == "heads":
            joined = self.qkv_proj(x, dropout).reshape(*x.shape[:2], N, 3 * H)
            q, k, v = jnp.split(joined, 3, axis=-1)
        elif config.fused_qkv == "blocks":
            q, k, v = jnp.split(self.qkv_proj(x, dropout), [N * H, (N + K) * H], axis=-1)
        else:
            q, k, v = self.q_proj(x, dropout), self.k_proj(x, dropout), self.v_proj(x, dropout)
        if config.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(*x.shape[:2], -1, H) for y in (q, k, v))
        if config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


class LatentAttention(nnx.Module):
    """Multi-head latent attention; the cache holds the latent, from which keys and values are made anew."""

    def __init__(
        self, config: DecoderConfig, latent: LatentConfig, key: jax.Array, *, param_dtype: jax.typing.DTypeLike
    ):
        keys = jax.random.split(key, 5)
        make = partial(Linear, std=config.init_std, param_dtype=param_dtype)
        norm = partial(RMSNorm, eps=latent.norm_eps, param_dtype=param_dtype)
        heads = config.num_heads * (latent.nope_dim + latent.rope_dim)
        if latent.q_rank is None:
            self.q_proj = make(
                "q_proj", keys[0], in_size=config.width, out_size=heads, axes=("embed", "heads"), bias=False
            )
        else:
            self.q_a_proj = make(
                "q_a_proj",
                keys[0],
                in_size=config.width,
                out_size=latent.q_rank,
                axes=("embed", None),
                bias=config.qkv_bias,
            )
            self.q_a_norm = norm(latent.q_rank)
            self.q_b_proj = make(
                "q_b_proj", keys[1], in_size=latent.q_rank, out_size=heads, axes=(None, "heads"), bias=False
            )
        self.kv_a_proj = make(
            config.linear_name("kv_a_proj"),
            keys[2],
            in_size=config.width,
            out_size=latent.kv_rank + latent.rope_dim,
            axes=("embed", None),
            bias=config.qkv_bias,
        )
        self.kv_a_norm = norm(latent.kv_rank)
        self.kv_b_proj = make(
            "kv_b_proj",
            keys[3],
            in_size=latent.kv_rank,
            out_size=config.num_heads * (latent.nope_dim + latent.v_dim),
            axes=(None, "heads"),
            bias=False,
        )
        self.o_proj = make(
            "o_proj",
            keys[4],
            in_size=config.num_heads * latent.v_dim,
            out_size=config.width,
            axes=("heads", "embed"),
            bias=config.o_bias,
        )
        self.config, self.latent = config, latent

    def __call__(
        self, x: jax.Array, run: Pass, *, kind: LayerKind, dropout: Dropout | None, store: Store | None
    ) -> jax.Array:
        """Maps `[B T D]` to `[B T D]`; with a `store`, the latent and the turned key go through the cache."""
        latent, N = self.latent, self.config.num_heads
        assert kind.rope is not None
        turn = partial(apply_rope, tables=run.tables[kind.rope], interleaved=kind.rope.interleaved)
        if latent.q_rank is None:
            q = self.q_proj(x, dropout)
        else:
            q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x, dropout)), dropout)
        q = q.reshape(*x.shape[:2], N, -1)
        q = jnp.concatenate([q[..., : latent.nope_dim], turn(q[..., latent.nope_dim :])], axis=-1)
        q = checkpoint_name(sharding.constrain(q, ("batch", "seq", "heads", None)), "q")
        low, turned = jnp.split(self.kv_a_proj(x, dropout), [latent.kv_rank], axis=-1)
        low, turned = self.kv_a_norm(low)[:, :, None], turn(turned[:, :, None])
        if store is not None:
            low, turned = store.write_and_read(low, turned)
        expanded = self.kv_b_proj(low[:, :, 0], dropout).reshape(*low.shape[:2], N, -1)
        k, v = jnp.split(expanded, [latent.nope_dim], axis=-1)
        k = jnp.concatenate([k, jnp.broadcast_to(turned, (*k.shape[:3], latent.rope_dim))], axis=-1)
        k = checkpoint_name(sharding.constrain(k, ("batch", "seq", "heads", None)), "k")
        v = checkpoint_name(sharding.constrain(v, ("batch", "seq", "heads", None)), "v")
        return self.o_proj(_attend(run, q, k, v, config=self.config, window=kind.window, sinks=None), dropout)
