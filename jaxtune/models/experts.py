"""The mlp half of a layer where every token takes a few of many experts: router, grouped matmul, expert axis.

n tokens, k experts of each, E experts, D model width, F width of an expert, r adapter rank.

Nothing is dropped and no expert has a capacity: rows are sorted by expert and multiplied group by group
(`models/grouped`). Over the mesh's `expert` axis every device holds some experts. Tokens are gathered along it, each
device computes what its experts have to say about all of them, and the sums are scattered back; or, where that sends
less, rows go to the devices of their experts and come back (`models/exchange`).
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxtune import sharding
from jaxtune.models.decoder_config import DecoderConfig, ExpertsConfig
from jaxtune.models.exchange import exchange, experts_of, routes
from jaxtune.models.grouped import Kernels, Matmul, collect, sort_rows, spread
from jaxtune.models.layers import Dropout, Linear, LoRAParam, draw_normal
from jaxtune.models.mlp import ACTIVATIONS, Mlp


class RouterSums(NamedTuple):
    """What one layer's router did, summed over the tokens that are not padding.

    `selected` [E]: how many tokens chose each expert. `probabilities` [E]: the softmax over all experts. `z`: squared
    log-normalizers. `tokens`: how many there were. All float32; only the middle two carry gradients.
    """

    selected: jax.Array
    probabilities: jax.Array
    z: jax.Array
    tokens: jax.Array


class RouterParam(nnx.Param):
    """A parameter of a router: a kind of its own, so that routers can be frozen."""


class Correction(nnx.Variable):
    """DeepSeek-V3's bias on the choice of experts: a statistic, which no gradient reaches and no optimizer touches."""


class Router(nnx.Module):
    """Scores experts, in float32 at least: a bfloat16 score sends tokens elsewhere."""

    def __init__(self, config: DecoderConfig, experts: ExpertsConfig, key: jax.Array, *, param_dtype: Any):
        kernel = draw_normal(key, (config.width, experts.count), config.init_std, param_dtype)
        self.kernel = RouterParam(kernel, axes=("embed", None))
        if experts.router_bias:
            self.bias = RouterParam(jnp.zeros((experts.count,), param_dtype), axes=(None,))
        if experts.correction_bias:
            self.correction = Correction(jnp.zeros((experts.count,), jnp.float32), axes=(None,))
        self.experts = experts

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Maps `[B T D]` to (weights `[B T k]`, experts int32 `[B T k]`, scores `[B T E]`), float32 at least."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        logits = jnp.einsum("BTD,DE->BTE", x.astype(wide), self.kernel[...].astype(wide))
        if self.experts.router_bias:
            logits += self.bias[...].astype(wide)
        correction = self.correction[...] if self.experts.correction_bias else None
        return (*choose_experts(logits, self.experts, correction), logits)


def choose_experts(
    logits: jax.Array, experts: ExpertsConfig, correction: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns (weights, experts) `[... k]` of tokens with these scores `[... E]`."""
    if experts.score == "top_softmax":
        chosen = jax.lax.top_k(jax.lax.stop_gradient(logits), experts.per_token)[1]
        return jax.nn.softmax(_pick(logits, chosen), axis=-1), chosen
    scores = jax.nn.softmax(logits, axis=-1) if experts.score == "softmax" else jax.nn.sigmoid(logits)
    choice = jax.lax.stop_gradient(scores if correction is None else scores + correction)
    if experts.groups > 1:
        choice = _in_best_groups(choice, experts)
    chosen = jax.lax.top_k(choice, experts.per_token)[1]
    weights = _pick(scores, chosen)
    if experts.normalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return weights * experts.scale, chosen


def _pick(scores: jax.Array, chosen: jax.Array) -> jax.Array:
    """Returns the scores `[... k]` of the chosen experts; an index would have a scatter for its gradient."""
    is_chosen = chosen[..., None] == jnp.arange(scores.shape[-1])
    return jnp.sum(jnp.where(is_chosen, scores[..., None, :], 0), axis=-1)


def _in_best_groups(choice: jax.Array, experts: ExpertsConfig) -> jax.Array:
    """Puts the scores of experts outside a token's best groups to -inf (DeepSeek-V2, 2.2.2; V3, 2.1.2)."""
    grouped = choice.reshape(*choice.shape[:-1], experts.groups, -1)
    best = jax.lax.top_k(grouped, {"max": 1, "top2": 2}[experts.group_score])[0].sum(axis=-1)
    kept = jax.lax.top_k(best, experts.groups_kept)[1]
    is_kept = jax.nn.one_hot(kept, experts.groups, dtype=bool).any(axis=-2)
    return jnp.where(is_kept[..., None], grouped, -jnp.inf).reshape(choice.shape)


class ExpertLinear(nnx.Module):
    """A linear layer of every expert: kernel `[E in out]`, bias `[E out]`, adapter `[E in r]`, `[E r out]`."""

    def __init__(
        self,
        name: str,
        key: jax.Array,
        *,
        count: int,
        in_size: int,
        out_size: int,
        axes: tuple[str, str],
        bias: bool,
        adaptable: bool,
        std: float,
        param_dtype: jax.typing.DTypeLike,
    ):
        kernel = draw_normal(key, (count, in_size, out_size), std, param_dtype)
        self.name, self.adaptable = name, adaptable
        self.kernel = nnx.Param(kernel, axes=("experts", *axes))
        zeros = jnp.zeros((count, out_size), param_dtype)
        self.bias = nnx.Param(zeros, axes=("experts", axes[1])) if bias else None
        self.lora_a: LoRAParam | None = nnx.data(None)
        self.lora_b: LoRAParam | None = nnx.data(None)

    def arrays(self) -> "ExpertArrays":
        """Returns the layer's arrays, the adapter's scale multiplied in."""
        lora_b = self.lora_b[...] * self.lora_a.get_metadata()["scale"] if self.lora_a and self.lora_b else None
        kernel, bias, lora_a = (p[...] if p is not None else None for p in (self.kernel, self.bias, self.lora_a))
        return ExpertArrays(kernel, bias, lora_a, lora_b)

    def specs(self, mesh: Any) -> "ExpertArrays":
        """Returns how each of `arrays` lies on the mesh."""

        def spec(p: nnx.Variable | None) -> PartitionSpec | None:
            if p is None:
                return None
            shape = p[...].shape
            return sharding.parameter_spec(p.get_metadata()["axes"][-len(shape) :], shape, mesh)

        return ExpertArrays(*map(spec, (self.kernel, self.bias, self.lora_a, self.lora_b)))


class ExpertArrays(NamedTuple):
    """What `ExpertLinear` holds, as plain arrays; `lora_b` is already scaled."""

    kernel: Any
    bias: Any
    lora_a: Any
    lora_b: Any


def _apply(
    arrays: ExpertArrays, rows: jax.Array, sizes: jax.Array, expert: jax.Array, *, matmul: Matmul, share: float
) -> jax.Array:
    """Multiplies rows `[m in]`, sorted by expert, each by its own; `share` of the bias is added.

    Args:
        sizes: as of `grouped.ragged_dot`; rows of no expert give 0.
        expert: of each row, int32 `[m]`; E for no expert.
    """
    y = matmul(rows, arrays.kernel.astype(rows.dtype), sizes)
    if arrays.bias is not None:  # by a product: an index would have a scatter for its gradient
        is_own = jax.nn.one_hot(expert, arrays.bias.shape[0], dtype=rows.dtype)
        y += jnp.dot(is_own, (arrays.bias * share).astype(rows.dtype), precision=jax.lax.Precision.HIGHEST)
    if arrays.lora_a is not None:
        y += low_rank_rows(arrays, rows, sizes, matmul)
    return y


def low_rank_rows(arrays: ExpertArrays, rows: jax.Array, sizes: jax.Array, matmul: Matmul) -> jax.Array:
    """Multiplies rows as `layers.low_rank` does, each by the adapter of its own expert."""
    low = matmul(rows, arrays.lora_a.astype(rows.dtype), sizes)
    return matmul(low, arrays.lora_b.astype(rows.dtype), sizes)


class SparseMlp(nnx.Module):
    """Router, experts, and the shared mlp where there is one."""

    def __init__(
        self, config: DecoderConfig, experts: ExpertsConfig, key: jax.Array, *, param_dtype: jax.typing.DTypeLike
    ):
        keys = jax.random.split(key, 5)
        make = partial(
            ExpertLinear,
            count=experts.count,
            bias=experts.bias,
            adaptable=not experts.fused,
            std=config.init_std,
            param_dtype=param_dtype,
        )
        wide = partial(make, in_size=config.width, axes=("embed", "mlp"))
        self.router = Router(config, experts, keys[0], param_dtype=param_dtype)
        if experts.fused:
            self.gate_up_proj = wide(config.expert_name("gate_up_proj"), keys[1], out_size=2 * experts.width)
        else:
            self.gate_proj = wide(config.expert_name("gate_proj"), keys[1], out_size=experts.width)
            self.up_proj = wide(config.expert_name("up_proj"), keys[2], out_size=experts.width)
        self.down_proj = make(
            config.expert_name("down_proj"),
            keys[3],
            in_size=experts.width,
            out_size=config.width,
            axes=("mlp", "embed"),
        )
        if experts.shared_width:
            self.shared = Mlp(config, keys[4], param_dtype=param_dtype, width=experts.shared_width)
        if experts.shared_gate:
            self.shared_gate = Linear(
                "shared_expert_gate",
                keys[4],
                in_size=config.width,
                out_size=1,
                axes=("embed", None),
                bias=False,
                std=config.init_std,
                param_dtype=param_dtype,
            )
        self.config, self.experts = config, experts

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array, *, kernels: Kernels, dropout: Dropout | None
    ) -> tuple[jax.Array, RouterSums]:
        """Maps `[B T D]` to `[B T D]`, and says what the router did; segment 0 is padding."""
        weights, chosen, logits = self.router(x)
        real = (segment_ids != 0).astype(logits.dtype)
        sums = RouterSums(
            selected=jnp.sum(jax.nn.one_hot(chosen, self.experts.count) * real[..., None, None], axis=(0, 1, 2)),
            probabilities=jnp.sum(jax.nn.softmax(logits, axis=-1) * real[..., None], axis=(0, 1)),
            z=jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)) * real),
            tokens=jnp.sum(real),
        )
        y = self._experts(x, weights.astype(x.dtype), chosen, kernels)
        if self.experts.shared_width:
            shared = self.shared(x, dropout=dropout)
            if self.experts.shared_gate:
                shared *= jax.nn.sigmoid(self.shared_gate(x, dropout))
            y += shared
        return sharding.constrain(y, ("batch", "stream", None)), sums

    def _experts(self, x: jax.Array, weights: jax.Array, chosen: jax.Array, kernels: Kernels) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        layers = [self.gate_up_proj] if self.experts.fused else [self.gate_proj, self.up_proj]
        layers.append(self.down_proj)
        arrays = [layer.arrays() for layer in layers]
        if mesh.empty or math.prod(mesh.shape.values()) == 1:
            return self._of_tokens(x, weights, chosen, arrays, kernels.matmul, first=None, share=1.0)
        specs = tuple(layer.specs(mesh) for layer in layers)
        tokens = sharding.activation_spec(("batch", "seq", None), x.shape, mesh)

        def on_device(x: jax.Array, weights: jax.Array, chosen: jax.Array, *arrays: ExpertArrays) -> jax.Array:
            return self._on_device(x, weights, chosen, arrays, kernels, specs, mesh)

        run = jax.shard_map(on_device, in_specs=(tokens, tokens, tokens, *specs), out_specs=tokens, check_vma=False)
        return run(x, weights, chosen, *arrays)

    def _on_device(
        self, x: Any, weights: Any, chosen: Any, arrays: Any, kernels: Kernels, specs: Any, mesh: Any
    ) -> jax.Array:
        """Computes one device's part of its expert group's tokens.

        Of P devices with some experts each, all see all tokens, or each sees the rows of its own experts: what sends
        less, (P - 1) tokens or k (P - 1) / P rows for one token.
        """
        arrays = [
            ExpertArrays(*(_whole(a, s, "fsdp") for a, s in zip(layer, spec, strict=True)))
            for layer, spec in zip(arrays, specs, strict=True)
        ]
        count = arrays[-1].kernel.shape[0]
        over_tensor = specs[-1].kernel[1] == "tensor"
        share = 1.0 / mesh.shape["tensor"] if over_tensor else 1.0
        if count == self.experts.count:
            y = self._of_tokens(x, weights, chosen, arrays, kernels.matmul, first=None, share=share)
        elif chosen.shape[-1] < mesh.shape["expert"]:
            y = self._by_exchange(x, weights, chosen, arrays, kernels, share=share)
        else:
            x, weights, chosen = (jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x, weights, chosen))
            first = jax.lax.axis_index("expert") * count
            y = self._of_tokens(x, weights, chosen, arrays, kernels.matmul, first=first, share=share)
            y = jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
        return jax.lax.psum(y, "tensor") if over_tensor else y

    def _by_exchange(
        self, x: Any, weights: Any, chosen: Any, arrays: Any, kernels: Kernels, *, share: float
    ) -> jax.Array:
        """Returns `[B T D]` of this device's tokens: their rows go to the devices of their experts and come back."""
        k, count, total = chosen.shape[-1], arrays[-1].kernel.shape[0], self.experts.count
        devices = total // count
        order, place, _, sizes = sort_rows(chosen.reshape(-1), count=total)
        rows = spread(x.reshape(-1, x.shape[-1]), order, place, k)
        there, back, counts = routes(sizes[:total], devices)
        room = devices * x.shape[0] * x.shape[1] * min(k, count)  # a token has at most so many experts here
        came = exchange(rows, there, back, room, kernels.collective)
        here = sort_rows(experts_of(counts, room), count=count)
        came = spread(came, here.order, here.place, 1)
        y = self._of_rows(came, here.sizes, here.group, arrays, kernels.matmul, share=share)
        y = exchange(collect(y, here.order, here.place, 1), back, there, rows.shape[0], kernels.collective)
        return collect(y * spread(weights.reshape(-1, 1), order, place, 1), order, place, k).reshape(x.shape)

    def _of_tokens(
        self, x: Any, weights: Any, chosen: Any, arrays: Any, matmul: Matmul, *, first: Any, share: float
    ) -> jax.Array:
        """Returns `[B T D]`, the weighted sum of what the experts of `arrays` say of each token.

        Args:
            first: the number of the first of them, or None where they are all.
        """
        k, count = chosen.shape[-1], arrays[-1].kernel.shape[0]
        local = chosen.reshape(-1)
        if first is not None:
            local = local - first
            local = jnp.where((local >= 0) & (local < count), local, count)
        order, place, expert, sizes = sort_rows(local, count=count)
        rows = spread(x.reshape(-1, x.shape[-1]), order, place, k)
        sizes = sizes[:count] if first is None else sizes
        y = self._of_rows(rows, sizes, expert, arrays, matmul, share=share)
        return collect(y * spread(weights.reshape(-1, 1), order, place, 1), order, place, k).reshape(x.shape)

    def _of_rows(
        self, rows: jax.Array, sizes: jax.Array, expert: jax.Array, arrays: Any, matmul: Matmul, *, share: float
    ) -> jax.Array:
        """Returns `[m D]`, what each row's own expert says of it; see `_apply`."""
        apply = partial(_apply, sizes=sizes, expert=expert, matmul=matmul)
        hidden = self._unit([apply(layer, rows, share=1.0) for layer in arrays[:-1]])
        return apply(arrays[-1], hidden, share=share)

    def _unit(self, parts: list[jax.Array]) -> jax.Array:
        """Joins gate and up, `[m F]` each or alternating in one `[m 2F]`."""
        gate, up = (parts[0][:, ::2], parts[0][:, 1::2]) if self.experts.fused else parts
        limit = self.experts.swiglu_limit
        if limit is None:
            return ACTIVATIONS[self.config.activation](gate) * up
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return (up + 1) * gate * jax.nn.sigmoid(gate * self.experts.swiglu_alpha)


def _whole(array: Any, spec: Any, axis: str) -> Any:
    """Gathers an array's part along the dimension that is split over a mesh axis, if one is."""
    if array is None or axis not in spec:
        return array
    return jax.lax.all_gather(array, axis, axis=spec.index(axis), tiled=True)
