"""The one decoder: what a family does is data (`DecoderConfig`), and no family is named here.

B batch, T query length, S key length, D model width, F mlp width, N query heads, K kv heads, H head size,
V vocabulary, L layers.

Layers are stacked on L and scanned, so that compile time does not grow with depth. A decoder is a list of groups; a
group repeats its pattern of layer kinds `count` times, which also says models whose layers are not all alike.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxtune import sharding
from jaxtune.models.decoder_config import DecoderConfig, LayerGroup, LayerKind
from jaxtune.models.experts import RouterSums, SparseMlp
from jaxtune.models.grouped import REFERENCE, Kernels
from jaxtune.models.layers import Dropout, Embedding, Head, LayerNorm, Linear, RMSNorm, head_logits
from jaxtune.models.mlp import Mlp
from jaxtune.models.rope import rope_tables
from jaxtune.models.self_attention import Attention, LatentAttention, Pass, Store


class Output(NamedTuple):
    """What a run through the decoder gives.

    `hidden` is `[B T D]` after the last norm; `cache` the written one, or None; `router` the sums of every sparse layer
    stacked (`[layers ...]`), in the order of the layers' stacks, or None where no layer is sparse.
    """

    hidden: jax.Array
    cache: Any
    router: RouterSums | None


class Cache(NamedTuple):
    """Keys and values of earlier tokens; every slot says its position and segment, and 0 is an empty slot.

    `keys` and `values` hold one array `[count B S K H]` per place of each group's pattern, in the order of the groups;
    of latent attention they hold latents and turned keys.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    positions: jax.Array  # int32 [B S]
    segment_ids: jax.Array  # int32 [B S]
    length: jax.Array  # int32 scalar: slots written so far


def init_cache(config: DecoderConfig, *, batch: int, capacity: int, dtype: jax.typing.DTypeLike) -> Cache:
    """Returns an empty cache for `capacity` tokens per row, padding included."""
    counts = [group.count for group in config.groups for _ in group.pattern]
    keys, values = (
        tuple(jnp.zeros((count, batch, capacity, *size), dtype) for count in counts) for size in config.cache_sizes
    )
    return Cache(
        keys=keys,
        values=values,
        positions=jnp.zeros((batch, capacity), jnp.int32),
        segment_ids=jnp.zeros((batch, capacity), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def make_norm(config: DecoderConfig, *, param_dtype: jax.typing.DTypeLike) -> RMSNorm | LayerNorm:
    """Returns the norm over the model's width that the config asks for."""
    if config.norm == "layer":
        return LayerNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype)
    return RMSNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype, offset=config.norm_offset)


class Layer(nnx.Module):
    """One layer: attention and mlp, each with its norms and the residual around."""

    def __init__(self, config: DecoderConfig, kind: LayerKind, key: jax.Array, *, param_dtype: jax.typing.DTypeLike):
        attention_key, mlp_key = jax.random.split(key)
        norm = partial(make_norm, config, param_dtype=param_dtype)
        if config.pre_norm:
            self.attention_norm, self.mlp_norm = norm(), norm()
        if config.post_norm:
            self.attention_post_norm, self.mlp_post_norm = norm(), norm()
        self.attention: Attention | LatentAttention
        if config.latent:
            self.attention = LatentAttention(config, config.latent, attention_key, param_dtype=param_dtype)
        else:
            self.attention = Attention(config, attention_key, param_dtype=param_dtype)
        self.mlp: Mlp | SparseMlp
        if kind.sparse:
            assert config.experts is not None
            self.mlp = SparseMlp(config, config.experts, mlp_key, param_dtype=param_dtype)
        else:
            self.mlp = Mlp(config, mlp_key, param_dtype=param_dtype)
        self.config = config

    def __call__(
        self, x: jax.Array, run: Pass, *, kind: LayerKind, dropout: Dropout | None, store: Store | None
    ) -> tuple[jax.Array, RouterSums | None]:
        """Maps `[B T D]` to `[B T D]`, and says what the router did in a sparse layer."""
        config, sums = self.config, None
        attended = self.attention_norm(x) if config.pre_norm else x
        attended = self.attention(attended, run, kind=kind, dropout=dropout, store=store)
        if config.post_norm:
            attended = self.attention_post_norm(attended)
        middle = _add(x, attended, config.residual_scale)
        middle = checkpoint_name(sharding.constrain(middle, ("batch", "stream", None)), "mid")
        y = x if config.parallel else middle
        y = self.mlp_norm(y) if config.pre_norm else y
        if isinstance(self.mlp, SparseMlp):
            y, sums = self.mlp(y, run.q_segment_ids, kernels=run.expert_kernels, dropout=dropout)
        else:
            y = self.mlp(y, dropout=dropout)
        if config.post_norm:
            y = self.mlp_post_norm(y)
        return sharding.constrain(_add(middle, y, config.residual_scale), ("batch", "stream", None)), sums


def _add(x: jax.Array, y: jax.Array, scale: float) -> jax.Array:
    return x + (y if scale == 1 else y * scale)


# What the backward pass finds saved, by name; everything else of a layer is computed again. `attention` is the output
# and log-sum-exp inside the attention kernel, so that the kernel does not run a third time. `offload` saves what
# `minimal` does, but in the memory of the host, from where it comes back in time: slow links, a lot of room.
_SAVED = ("q", "k", "v", "attention", "mid", "gate", "up")
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "minimal": jax.checkpoint_policies.save_only_these_names(*_SAVED),
    "mid": jax.checkpoint_policies.save_only_these_names("q", "k", "v", "attention", "mid"),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(_SAVED),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Decoder(nnx.Module):
    """Tokens in, hidden states out; the head is applied by who computes the loss or draws a token."""

    def __init__(self, config: DecoderConfig, *, key: jax.Array, param_dtype: jax.typing.DTypeLike = jnp.float32):
        """Declares every parameter; under `nnx.eval_shape` nothing is computed.

        Args:
            key: typed jax key of the initial values.
            param_dtype: dtype of every parameter.
        """
        self.config = config
        embed_key, head_key, layers_key = jax.random.split(key, 3)
        embedding = partial(Embedding, width=config.width, std=config.init_std, param_dtype=param_dtype)
        self.embed = embedding(embed_key, vocab_size=config.vocab_size)
        if config.learned_positions:
            self.embed_positions = embedding(
                jax.random.fold_in(embed_key, 1), vocab_size=config.max_positions, axes=(None, "embed")
            )

        def stack(kind: LayerKind, keys: jax.Array) -> Layer:
            return nnx.vmap(
                lambda layer_key: Layer(config, kind, layer_key, param_dtype=param_dtype),
                transform_metadata={nnx.PARTITION_NAME: "layers", "axes": "layers"},
            )(keys)

        self.groups = nnx.List(
            nnx.List(
                stack(kind, jax.random.split(jax.random.fold_in(layers_key, 1000 * number + place), group.count))
                for place, kind in enumerate(group.pattern)
            )
            for number, group in enumerate(config.groups)
        )
        self.norm = make_norm(config, param_dtype=param_dtype)
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
                std=config.init_std,
                param_dtype=param_dtype,
            )
        )

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        *,
        compute_dtype: jax.typing.DTypeLike,
        attention: Callable[..., jax.Array],
        expert_kernels: Kernels = REFERENCE,
        remat: str = "none",
        dropout_keys: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Output:
        """Maps tokens `[B T]` to hidden states `[B T D]`.

        A token attends to its own segment only, to positions not after its own and inside the layer's window. Segment
        0 is padding: nothing attends to it, and its hidden states mean nothing.

        Args:
            positions, segment_ids: int32 `[B T]`.
            attention: a function of `attention.ATTENTIONS`; with a cache it must be the `xla` one.
            expert_kernels: how experts are computed, as `models.grouped.resolve` says.
            remat: a key of `REMAT_POLICIES`.
            dropout_keys: typed keys `[B]`, one per row; None turns dropout off.
            cache: written at its `length`.
        """
        x = self.embed(tokens, dtype=compute_dtype)
        if self.config.embed_scale != 1:
            x *= jnp.asarray(self.config.embed_scale, compute_dtype)
        if self.config.learned_positions:
            x += self.embed_positions(positions, dtype=compute_dtype)
        x = sharding.constrain(x, ("batch", "stream", None))
        kv_positions, kv_segment_ids = positions, segment_ids
        if cache is not None:
            kv_positions = jax.lax.dynamic_update_slice(cache.positions, positions, (0, cache.length))
            kv_segment_ids = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, cache.length))
        ropes = {kind.rope for group in self.config.groups for kind in group.pattern if kind.rope is not None}
        run = Pass(
            attention=attention,
            expert_kernels=expert_kernels,
            tables={
                rope: rope_tables(rope, self.config.rope_dim, positions, segment_ids, dtype=compute_dtype)
                for rope in ropes
            },
            q_positions=positions,
            q_segment_ids=segment_ids,
            kv_positions=kv_positions,
            kv_segment_ids=kv_segment_ids,
            start=cache.length if cache is not None else None,
            dropout_keys=dropout_keys,
        )
        keys: tuple[jax.Array, ...] = cache.keys if cache is not None else ()
        values: tuple[jax.Array, ...] = cache.values if cache is not None else ()
        new_keys: list[jax.Array] = []
        new_values: list[jax.Array] = []
        router: list[RouterSums] = []
        first_layer = 0
        for group, modules in zip(self.config.groups, self.groups, strict=True):
            size = len(group.pattern)
            held = slice(len(new_keys), len(new_keys) + size) if cache is not None else slice(0, 0)
            x, group_keys, group_values, sums = _scan_group(
                group, list(modules), x, run, first_layer, keys[held], values[held], remat=remat
            )
            new_keys += group_keys
            new_values += group_values
            router += sums
            first_layer += size * group.count
        told = jax.tree.map(lambda *sums: jnp.concatenate(sums), *router) if router else None
        if cache is not None:
            length = cache.length + tokens.shape[1]
            cache = Cache(tuple(new_keys), tuple(new_values), kv_positions, kv_segment_ids, length)
        return Output(self.norm(x), cache, told)

    def head(self) -> Head:
        """Returns the head, its kernel the transposed embedding where they are tied, in its own dtype."""
        kernel = self.embed.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]
        return Head(kernel, self.config.vocab_size, self.config.logit_scale, self.config.final_softcap)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Maps hidden states `[B T D]` to logits `[B T V]`, float32 at least; for generation and tests."""
        return head_logits(hidden, self.head())


def _scan_group(
    group: LayerGroup,
    modules: list[Layer],
    x: jax.Array,
    run: Pass,
    first_layer: int,
    keys: tuple[jax.Array, ...],
    values: tuple[jax.Array, ...],
    *,
    remat: str,
) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...], list[RouterSums]]:
    """Runs the group's layers one repetition at a time; the cache travels whole, so that it is written in place."""
    graphdefs, states = zip(*(nnx.split(module) for module in modules), strict=True)

    def repetition(carry: tuple[Any, ...], inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[RouterSums]]:
        x, keys, values = carry
        index, layer_states = inputs
        keys, values = list(keys), list(values)
        router: list[RouterSums] = []
        for place, kind in enumerate(group.pattern):
            layer = nnx.merge(graphdefs[place], layer_states[place])
            number = first_layer + index * len(group.pattern) + place
            dropout = Dropout(run.dropout_keys, number) if run.dropout_keys is not None else None
            store = None
            if run.start is not None:
                store = Store(keys[place], values[place], layer=index, start=run.start)
            x, sums = layer(x, run, kind=kind, dropout=dropout, store=store)
            router += [] if sums is None else [sums]
            if store is not None:
                keys[place], values[place] = store.keys, store.values
        return (x, tuple(keys), tuple(values)), router

    policy = REMAT_POLICIES[remat]
    if policy is not None:
        repetition = jax.checkpoint(repetition, policy=policy, prevent_cse=False)
    (x, keys, values), router = jax.lax.scan(repetition, (x, keys, values), (jnp.arange(group.count), states))
    return x, keys, values, router
