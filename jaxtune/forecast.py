"""Memory and time of an update from its trace alone, in seconds and without a compiler: for GPUs, and to choose by.

The trace says exactly which matrix products are computed, those of the backward pass and those computed again among
them, and what is kept between the passes. Memory and links follow from the sharding rules; the rest are constants,
named below with where they come from. The compiler's word, where there is one, is better.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh

from jaxtune import assembly
from jaxtune.batch import AnyBatch, Batch, PairBatch
from jaxtune.blueprint import lengths
from jaxtune.config import Config
from jaxtune.cost_model.chips import Chip
from jaxtune.cost_model.links import SLICE, Network
from jaxtune.cost_model.traced import matmul_flops, residual_bytes
from jaxtune.optimizer import make_optimizer
from jaxtune.sharding import BATCH_AXES, parameter_spec
from jaxtune.step import make_loss

# Share of the peak at which matrix products run, everything around them included. TPU: an 8B step of full tuning as the
# compiler estimates it. GPU: torchtitan's published Llama-3.1-8B runs on H100 (about 40 % of the peak with 8N FLOPs).
EFFICIENCY = {"tpu": 0.78, "gpu": 0.5, "cpu": 0.5}
SLACK = 0.06  # of the memory, that fragmentation and what is not foreseen take

HIDDEN = ("fsdp", "data")  # axes whose traffic runs beside the work, as far as the work lasts
LEAK = 0.1  # share of it that nothing hides all the same
CHUNK = 1024  # tokens that pass the head at once

OFFLOAD = "offload"  # the kind of rematerialization that keeps in the memory of the host
ROWS = 1  # that are traced; all that is counted is proportional to them


class Traced(NamedTuple):
    """Of one row: `flops` of matrix products in both passes; `kept` bytes between the passes, and `away` those kept in
    the memory of the host; `loose` bytes that the backward pass of one layer has at hand besides. `recomputed`: whether
    whole halves of layers run again."""

    flops: float
    kept: float
    away: float
    loose: float
    recomputed: bool


def trace(config: Config, model: assembly.ModelPlan, platform: str, remat: str) -> Traced:
    """Traces the loss and its gradient on one row, with one kind of rematerialization; nothing is compiled."""
    kept, away = _kept(config, model, platform, remat), 0.0
    if remat == OFFLOAD:
        stays = _kept(config, model, platform, "full")
        kept, away = stays, kept - stays
    layers = layers_of(model)
    everything = kept if remat == "none" else _kept(config, model, platform, "none")
    loss = _loss(config, model, platform, remat)
    traced = jax.make_jaxpr(jax.grad(lambda *trees: loss(*trees, None)[0]))(
        model.trainable, model.frozen, _rows(config)
    )
    return Traced(matmul_flops(traced), kept, away, everything / layers, remat in ("mid", "full"))


def _kept(config: Config, model: assembly.ModelPlan, platform: str, remat: str) -> float:
    loss = _loss(config, model, platform, remat)
    return residual_bytes(lambda *trees: loss(*trees, None)[0], model.trainable, model.frozen, _rows(config))


def _loss(config: Config, model: assembly.ModelPlan, platform: str, remat: str) -> Callable[..., Any]:
    compute, _ = assembly.resolve_compute(config.model_copy(update={"model": _plain(config, remat)}), model, "cpu")
    attention = compute.attention if model.config.is_encoder_decoder else _like_a_kernel
    dtype = assembly.resolve_dtypes(config, platform)[0]
    compute = compute._replace(attention=attention, dtype=dtype, remat=remat, dropout_seed=None, dropout_rate=0.0)
    return make_loss(model.graph, compute)


def _plain(config: Config, remat: str) -> Any:
    return config.model.model_copy(update={"attention": "xla", "remat": remat})


def _like_a_kernel(q: jax.Array, k: jax.Array, v: jax.Array, *, window: int | None, **_: Any) -> jax.Array:
    """Stands for a fused causal attention: as many FLOPs, its inputs and its output kept, nothing of size T x T.

    A query sees half of the keys on average, or the window: here the first so many. The backward pass computes six
    products; kernels compute five to seven.
    """
    seen = max(1, min(k.shape[1] // 2, window or k.shape[1]))

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        B, T, N, H = q.shape
        grouped = q.reshape(B, T, k.shape[2], N // k.shape[2], H)
        weights = jax.nn.softmax(jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k[:, :seen]))
        return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v[:, :seen]).reshape(B, T, N, v.shape[-1])

    return checkpoint_name(attend(q, k, v), "attention")


def _rows(config: Config) -> AnyBatch:
    length, read = config.data.max_length, config.data.encoder_length
    own = jax.ShapeDtypeStruct((ROWS, length), np.int32)
    decoder = Batch(own, own, own, own, jax.ShapeDtypeStruct(own.shape, np.float32), own)
    if read is None:
        return decoder
    encoder = jax.ShapeDtypeStruct((ROWS, read), np.int32)
    return PairBatch(encoder, encoder, encoder, *decoder)


class Forecast(NamedTuple):
    """An update on one device: bytes by kind, matmul FLOPs, seconds in all, and of links by mesh axis.

    `computing`: seconds without waiting for links. `links`: seconds that each axis's traffic takes, hidden or not.
    """

    weights: float
    optimizer: float
    gradients: float
    activations: float
    temporaries: float
    flops: float
    computing: float
    links: dict[str, float]
    seconds: float

    @property
    def memory(self) -> float:
        """Bytes in all."""
        return self.weights + self.optimizer + self.gradients + self.activations + self.temporaries


class Forecaster:
    """Forecasts updates of one configuration on one model, whatever the mesh, the rows at once and the remat."""

    def __init__(self, config: Config, model: assembly.ModelPlan, chip: Chip, platform: str) -> None:
        """Traces nothing yet.

        Args:
            config: with lengths filled in.
            chip: what one device can do.
            platform: tpu, gpu or cpu.
        """
        self.config, self.model, self.chip, self.platform = config, model, chip, platform
        state = jax.eval_shape(make_optimizer(config, 1, model.trainable).init, model.trainable)
        self._moments = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        self._traced: dict[str, Traced] = {}

    def traced(self, remat: str) -> Traced:
        """Returns what one row computes and keeps."""
        if remat not in self._traced:
            self._traced[remat] = trace(self.config, self.model, self.platform, remat)
        return self._traced[remat]

    def forecast(self, sizes: Mapping[str, int], *, rows: int, remat: str) -> Forecast:
        """Returns what an update costs on one device.

        Args:
            sizes: devices along each mesh axis, -1 nowhere.
            rows: computed at once, of all devices together.
            remat: a policy of the decoder.
        """
        config, model, chip, traced = self.config, self.model, self.chip, self.traced(remat)
        ways = math.prod(sizes[axis] for axis in BATCH_AXES) * sizes["context"]
        split = ways * sizes["tensor"]  # of what is proportional to tokens
        times = config.train.batch_rows // rows
        weights = _weights(config, model, sizes, self.platform)
        flops = traced.flops * config.train.batch_rows / split
        moved = 2 * traced.kept * config.train.batch_rows / split  # written, and read again
        sent = 2 * traced.away * config.train.batch_rows / split
        read = times * 3 * weights.gathered  # every pass reads all that a device computes with
        products = flops / (chip.peak * EFFICIENCY[self.platform])
        added = (times - 1) * 3 * weights.gradients  # a sum of gradients, read and written, and what is added
        computing = max(products, read / chip.bandwidth) + (moved + added) / chip.bandwidth
        tokens = sum(lengths(config).values()) * rows / ways
        links = _links(config, model, sizes, weights, chip, tokens=tokens, times=times, recomputed=traced.recomputed)
        hidden = sum(links.get(axis, 0.0) for axis in HIDDEN)
        waiting = sum(links.values()) - hidden + max(LEAK * hidden, hidden - computing)
        waiting += max(LEAK * sent / chip.host, sent / chip.host - computing)
        return Forecast(
            weights=weights.held,
            optimizer=self._moments * weights.share,
            gradients=weights.gradients * (2 if times > 1 else 1),
            activations=traced.kept * rows / split,
            temporaries=traced.loose * rows / split + 2 * weights.layer + _head(config, model, sizes),
            flops=flops,
            computing=computing,
            links=links,
            seconds=computing + waiting,
        )


class _Weights(NamedTuple):
    """Bytes of a model's weights on one device. `held`: all of them as they lie; `trained`: those that are trained,
    `share` of all trained there are; `gradients`; `gathered`: all that the device computes with once fsdp has brought
    it together, in the computation's dtype, `layer` of it in the largest layer; `reduced`: gradients before fsdp has
    scattered them."""

    held: float
    share: float
    gradients: float
    gathered: float
    layer: float
    reduced: float


def _weights(config: Config, model: assembly.ModelPlan, sizes: Mapping[str, int], platform: str) -> _Weights:
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    compute = np.dtype(assembly.resolve_dtypes(config, platform)[0]).itemsize
    held = trained = whole = gradients = gathered = reduced = layer = 0.0
    for tree, is_trained in ((model.trainable, True), (model.frozen, False)):
        for variable in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.Variable)):
            value = variable.get_value()
            axes = variable.get_metadata().get("axes") or (None,) * value.ndim
            split = [sizes[axis] for axis in parameter_spec(axes, value.shape, mesh) if axis is not None]
            by_fsdp = sizes["fsdp"] if "fsdp" in parameter_spec(axes, value.shape, mesh) else 1
            size, itemsize = value.size / math.prod(split), value.dtype.itemsize
            held += size * itemsize
            gathered += size * by_fsdp * compute
            if axes[0] == "layers":
                layer += size * by_fsdp * compute / value.shape[0]
            if is_trained:
                trained, whole, gradients = trained + size, whole + value.size, gradients + size * itemsize
                reduced += size * by_fsdp * itemsize
    return _Weights(held, trained / max(whole, 1), gradients, gathered, layer, reduced)


def _links(
    config: Config,
    model: assembly.ModelPlan,
    sizes: Mapping[str, int],
    weights: _Weights,
    chip: Chip,
    *,
    tokens: float,
    times: int,
    recomputed: bool,
) -> dict[str, float]:
    """Seconds of every axis's traffic in an update: a ring sends both ways, slices and nodes by their network.

    fsdp gathers weights in both passes and scatters gradients; data and slice add gradients up; tensor gathers and
    scatters the stream at both halves of a layer (Korthikanti et al. 2022, section 4.2.2), context gathers keys and
    values, expert sends every token to its experts and back; each of these once more in the backward pass, and where
    layers run again.

    Args:
        tokens: of a microbatch on one device, its share of the sequence by tensor not minded.
    """

    def part(axis: str) -> float:
        return (sizes[axis] - 1) / sizes[axis]

    compute = np.dtype(assembly.resolve_dtypes(config, "tpu")[0]).itemsize
    layers, width = layers_of(model), model.config.width
    passes = 3 if recomputed else 2
    stream = layers * tokens * width * compute
    experts = getattr(model.config, "experts", None)
    keys = 2 * getattr(model.config, "num_kv_heads", 0) * model.config.head_dim / width
    sent = {
        "slice": 2 * part("slice") * weights.gradients,
        "fsdp": times * part("fsdp") * (2 * weights.gathered + weights.reduced),
        "data": 2 * part("data") * weights.gradients,
        "tensor": times * part("tensor") * passes * 4 * stream,
        "context": times * sizes["context"] * part("context") * (passes + 1) * stream * keys,
        "expert": times * part("expert") * passes * 2 * stream * (experts.per_token if experts else 0),
    }
    network = Network(chip, sizes, _directions(sizes, chip))
    return {axis: size / network.bandwidth((axis,)) for axis, size in sent.items() if size}


def _directions(sizes: Mapping[str, int], chip: Chip) -> dict[str, float]:
    """Links of a chip that each axis uses, before anybody has laid the devices out: its share of the torus, by size.

    Where the torus is large enough to be closed, every dimension has two.
    """
    devices = math.prod(size for axis, size in sizes.items() if axis != SLICE)
    if not chip.dimensions or devices == 1:
        return {}
    dimensions = min(chip.dimensions, int(math.log2(devices)))
    each = 2 if devices >= chip.ring**chip.dimensions else 1
    share = {axis: math.log(size) / math.log(devices) for axis, size in sizes.items() if axis != SLICE and size > 1}
    return {axis: each * max(1.0, round(dimensions * part)) for axis, part in share.items()}


def _head(config: Config, model: assembly.ModelPlan, sizes: Mapping[str, int]) -> float:
    """Bytes at hand around the head: a chunk's logits and their gradient, the two tables gathered, and gradients."""
    vocab, width = model.config.vocab_size / sizes["tensor"], model.config.width
    table = vocab * width * (2 + 4 * (config.tuning.method == "full"))
    return 2 * 4 * CHUNK * vocab + table * (1 if model.config.tie_embeddings else 2)


def layers_of(model: assembly.ModelPlan) -> int:
    """Returns how many layers a model has; both stacks of an encoder-decoder."""
    if model.config.is_encoder_decoder:
        return int(model.config.encoder_layers + model.config.decoder_layers)
    return sum(len(group.pattern) * group.count for group in model.config.groups)
