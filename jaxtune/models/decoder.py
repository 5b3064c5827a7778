"""The one decoder: what a family does is data (`DecoderConfig`), and no family is named here.

B batch, T query length, S key length, D model width, F mlp width, N query heads, K kv heads, H head size,
V vocabulary, L layers.

Layers are stacked on L and scanned, so that compile time does not grow with depth. A decoder is a list of groups; a
group repeats its pattern of layer kinds `count` times, which also says models whose layers are not all alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxtune import sharding
from jaxtune.models import layers
from jaxtune.models.layers import Dropout, Embedding, Linear, RMSNorm, Rope

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@dataclass(frozen=True)
class LayerKind:
    """What may differ from layer to layer: the sliding window (None: all earlier positions) and the rope."""

    window: int | None
    rope: Rope


@dataclass(frozen=True)
class LayerGroup:
    """`count` repetitions of a pattern of layers, scanned."""

    pattern: tuple[LayerKind, ...]
    count: int


@dataclass(frozen=True)
class DecoderConfig:
    """What a family does, as numbers; hashable, so that it can key a compiled function."""

    vocab_size: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    groups: tuple[LayerGroup, ...]
    norm_eps: float
    max_positions: int
    activation: str
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tie_embeddings: bool
    init_std: float

    @property
    def num_layers(self) -> int:
        return sum(len(group.pattern) * group.count for group in self.groups)

    def layer_kinds(self) -> list[LayerKind]:
        """Returns the kind of every layer, first to last."""
        return [kind for group in self.groups for _ in range(group.count) for kind in group.pattern]

    def layer_place(self, layer: int) -> tuple[int, int, int]:
        """Returns (group, place in the pattern, repetition) of a layer: where its parameters are stacked."""
        for number, group in enumerate(self.groups):
            size = len(group.pattern) * group.count
            if layer < size:
                return number, layer % len(group.pattern), layer // len(group.pattern)
            layer -= size
        raise IndexError(layer)


def group_layers(kinds: list[LayerKind]) -> tuple[LayerGroup, ...]:
    """Returns runs of equal layers as groups, e.g. 28 full and then 4 windowed layers as two."""
    groups: list[LayerGroup] = []
    for kind in kinds:
        if groups and groups[-1].pattern == (kind,):
            groups[-1] = LayerGroup((kind,), groups[-1].count + 1)
        else:
            groups.append(LayerGroup((kind,), 1))
    return tuple(groups)


class Cache(NamedTuple):
    """Keys and values of earlier tokens; every slot says its position and segment, and 0 is an empty slot.

    `keys` and `values` hold one array `[count B S K H]` per place of each group's pattern, in the order of the groups.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    positions: jax.Array  # int32 [B S]
    segment_ids: jax.Array  # int32 [B S]
    length: jax.Array  # int32 scalar: slots written so far


def init_cache(config: DecoderConfig, *, batch: int, capacity: int, dtype: jax.typing.DTypeLike) -> Cache:
    """Returns an empty cache for `capacity` tokens per row, padding included."""
    shapes = [
        (group.count, batch, capacity, config.num_kv_heads, config.head_dim)
        for group in config.groups
        for _ in group.pattern
    ]
    return Cache(
        keys=tuple(jnp.zeros(shape, dtype) for shape in shapes),
        values=tuple(jnp.zeros(shape, dtype) for shape in shapes),
        positions=jnp.zeros((batch, capacity), jnp.int32),
        segment_ids=jnp.zeros((batch, capacity), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


class Pass(NamedTuple):
    """What one run through the layers shares: indices of both sides, rope tables, kernels."""

    attention: Callable[..., jax.Array]
    tables: dict[Rope, tuple[jax.Array, jax.Array]]
    q_positions: jax.Array  # [B T]
    q_segment_ids: jax.Array
    kv_positions: jax.Array  # [B S]
    kv_segment_ids: jax.Array
    start: jax.Array | None  # first cache slot to write; None without a cache
    dropout_keys: jax.Array | None  # [B]


class Attention(nnx.Module):
    """Causal attention with grouped kv heads; kv heads are never repeated in memory."""

    def __init__(self, config: DecoderConfig, key: jax.Array, *, param_dtype: jax.typing.DTypeLike):
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        keys = jax.random.split(key, 4)
        make = partial(Linear, std=config.init_std, param_dtype=param_dtype)
        inputs = partial(make, in_size=config.width, bias=config.qkv_bias)
        self.q_proj = inputs("q_proj", keys[0], out_size=heads, axes=("embed", "heads"))
        self.k_proj = inputs("k_proj", keys[1], out_size=kv_heads, axes=("embed", "kv_heads"))
        self.v_proj = inputs("v_proj", keys[2], out_size=kv_heads, axes=("embed", "kv_heads"))
        self.o_proj = make(
            "o_proj", keys[3], in_size=heads, out_size=config.width, axes=("heads", "embed"), bias=config.o_bias
        )
        self.head_dim = config.head_dim

    def __call__(
        self, x: jax.Array, run: Pass, *, kind: LayerKind, dropout: Dropout | None, store: "Store | None"
    ) -> jax.Array:
        """Maps `[B T D]` to `[B T D]`; with a `store`, keys and values go through the cache."""
        B, T, _ = x.shape
        q = self.q_proj(x, dropout).reshape(B, T, -1, self.head_dim)
        k = self.k_proj(x, dropout).reshape(B, T, -1, self.head_dim)
        v = self.v_proj(x, dropout).reshape(B, T, -1, self.head_dim)
        tables = run.tables[kind.rope]
        q = checkpoint_name(sharding.constrain(layers.apply_rope(q, tables), ("batch", "seq", "heads", None)), "q")
        k = checkpoint_name(sharding.constrain(layers.apply_rope(k, tables), ("batch", "seq", "kv_heads", None)), "k")
        v = checkpoint_name(sharding.constrain(v, ("batch", "seq", "kv_heads", None)), "v")
        if store is not None:
            k, v = store.write_and_read(k, v)
        out = run.attention(
            q,
            k,
            v,
            q_positions=run.q_positions,
            kv_positions=run.kv_positions,
            q_segment_ids=run.q_segment_ids,
            kv_segment_ids=run.kv_segment_ids,
            window=kind.window,
            scale=self.head_dim**-0.5,
        )
        out = sharding.constrain(out, ("batch", "seq", "heads", None))
        return self.o_proj(out.reshape(B, T, -1), dropout)


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


class Mlp(nnx.Module):
    """The gated mlp: `down(activation(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig, key: jax.Array, *, param_dtype: jax.typing.DTypeLike):
        keys = jax.random.split(key, 3)
        make = partial(Linear, bias=config.mlp_bias, std=config.init_std, param_dtype=param_dtype)
        wide = partial(make, in_size=config.width, out_size=config.mlp_width, axes=("embed", "mlp"))
        self.gate_proj = wide("gate_proj", keys[0])
        self.up_proj = wide("up_proj", keys[1])
        self.down_proj = make(
            "down_proj", keys[2], in_size=config.mlp_width, out_size=config.width, axes=("mlp", "embed")
        )
        self.activation = config.activation

    def __call__(self, x: jax.Array, *, dropout: Dropout | None) -> jax.Array:
        gate = checkpoint_name(sharding.constrain(self.gate_proj(x, dropout), ("batch", "seq", "mlp")), "gate")
        up = checkpoint_name(sharding.constrain(self.up_proj(x, dropout), ("batch", "seq", "mlp")), "up")
        return self.down_proj(ACTIVATIONS[self.activation](gate) * up, dropout)


class Layer(nnx.Module):
    """One layer, both halves with their norm before and the residual around."""

    def __init__(self, config: DecoderConfig, key: jax.Array, *, param_dtype: jax.typing.DTypeLike):
        attention_key, mlp_key = jax.random.split(key)
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype)
        self.attention = Attention(config, attention_key, param_dtype=param_dtype)
        self.mlp_norm = RMSNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype)
        self.mlp = Mlp(config, mlp_key, param_dtype=param_dtype)

    def __call__(
        self, x: jax.Array, run: Pass, *, kind: LayerKind, dropout: Dropout | None, store: Store | None
    ) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), run, kind=kind, dropout=dropout, store=store)
        x = checkpoint_name(sharding.constrain(x, ("batch", "seq", None)), "mid")
        x = x + self.mlp(self.mlp_norm(x), dropout=dropout)
        return sharding.constrain(x, ("batch", "seq", None))


# What the backward pass finds saved, by name; everything else of a layer is computed again. `attention` is the output
# and log-sum-exp inside the attention kernel, so that the kernel does not run a third time.
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "minimal": jax.checkpoint_policies.save_only_these_names("q", "k", "v", "attention", "mid", "gate", "up"),
    "mid": jax.checkpoint_policies.save_only_these_names("q", "k", "v", "attention", "mid"),
    "full": jax.checkpoint_policies.nothing_saveable,
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
        self.embed = Embedding(
            embed_key, vocab_size=config.vocab_size, width=config.width, std=config.init_std, param_dtype=param_dtype
        )
        stack = nnx.vmap(
            lambda layer_key: Layer(config, layer_key, param_dtype=param_dtype),
            transform_metadata={nnx.PARTITION_NAME: "layers", "axes": "layers"},
        )
        self.groups = nnx.List(
            nnx.List(
                stack(jax.random.split(jax.random.fold_in(layers_key, 1000 * number + place), group.count))
                for place in range(len(group.pattern))
            )
            for number, group in enumerate(config.groups)
        )
        self.norm = RMSNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype)
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
        remat: str = "none",
        dropout_keys: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Maps tokens `[B T]` to hidden states `[B T D]` after the last norm.

        A token attends to its own segment only, to positions not after its own and inside the layer's window. Segment
        0 is padding: nothing attends to it, and its hidden states mean nothing.

        Args:
            positions, segment_ids: int32 `[B T]`.
            attention: a function of `attention.ATTENTIONS`; with a cache it must be the `xla` one.
            remat: a key of `REMAT_POLICIES`.
            dropout_keys: typed keys `[B]`, one per row; None turns dropout off.
            cache: written at its `length`; then the result is (hidden, cache).
        """
        x = sharding.constrain(self.embed(tokens, dtype=compute_dtype), ("batch", "seq", None))
        kv_positions, kv_segment_ids = positions, segment_ids
        if cache is not None:
            kv_positions = jax.lax.dynamic_update_slice(cache.positions, positions, (0, cache.length))
            kv_segment_ids = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, cache.length))
        ropes = {kind.rope for group in self.config.groups for kind in group.pattern}
        run = Pass(
            attention=attention,
            tables={
                rope: layers.rope_tables(rope, self.config.head_dim, positions, dtype=compute_dtype) for rope in ropes
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
        first_layer = 0
        for group, modules in zip(self.config.groups, self.groups, strict=True):
            size = len(group.pattern)
            held = slice(len(new_keys), len(new_keys) + size) if cache is not None else slice(0, 0)
            x, group_keys, group_values = _scan_group(
                group, list(modules), x, run, first_layer, keys[held], values[held], remat=remat
            )
            new_keys += group_keys
            new_values += group_values
            first_layer += size * group.count
        hidden = self.norm(x)
        if cache is None:
            return hidden
        length = cache.length + tokens.shape[1]
        return hidden, Cache(tuple(new_keys), tuple(new_values), kv_positions, kv_segment_ids, length)

    def unembedding(self) -> jax.Array:
        """Returns the head's kernel `[D V]`, the transposed embedding where they are tied, in its own dtype."""
        if self.lm_head is None:
            return self.embed.embedding[...].T
        return self.lm_head.kernel[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Maps hidden states `[B T D]` to logits `[B T V]`, float32 at least; for generation and tests."""
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        kernel = self.unembedding().astype(hidden.dtype)
        return jnp.einsum("BTD,DV->BTV", hidden, kernel, preferred_element_type=wide)


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
) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Runs the group's layers one repetition at a time; the cache travels whole, so that it is written in place."""
    graphdefs, states = zip(*(nnx.split(module) for module in modules), strict=True)

    def repetition(carry: tuple[Any, ...], inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], None]:
        x, keys, values = carry
        index, layer_states = inputs
        keys, values = list(keys), list(values)
        for place, kind in enumerate(group.pattern):
            layer = nnx.merge(graphdefs[place], layer_states[place])
            number = first_layer + index * len(group.pattern) + place
            dropout = Dropout(run.dropout_keys, number) if run.dropout_keys is not None else None
            store = None
            if run.start is not None:
                store = Store(keys[place], values[place], layer=index, start=run.start)
            x = layer(x, run, kind=kind, dropout=dropout, store=store)
            if store is not None:
                keys[place], values[place] = store.keys, store.values
        return (x, tuple(keys), tuple(values)), None

    policy = REMAT_POLICIES[remat]
    if policy is not None:
        repetition = jax.checkpoint(repetition, policy=policy, prevent_cse=False)
    (x, keys, values), _ = jax.lax.scan(repetition, (x, keys, values), (jnp.arange(group.count), states))
    return x, keys, values
