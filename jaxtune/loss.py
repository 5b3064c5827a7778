"""Cross-entropy as a sum, computed in chunks whose gradient is taken in the same pass.

The logits of a whole batch are the largest array of a training step (B T V), so they never exist here: a chunk of
tokens goes through the head, gives its losses and, when gradients are wanted, its contribution to the gradients of
`hidden` and of the head at once. Nothing is recomputed and nothing of size V outlives a chunk. (The idea of fusing
head and loss this way: Liger Kernel and Cut Cross-Entropy, Wijmans et al. 2024, section 4.)
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtune.sharding import BATCH_AXES

TOKEN_AXES = (*BATCH_AXES, "context")  # mesh axes that tokens are split over


class TokenLosses(NamedTuple):
    """What a batch cost.

    `total`: scalar, the sum over tokens of weight x negative log likelihood; the only differentiable field.
    `nll`: `[B T]`, each token's negative log likelihood in nats, unweighted; 0 where the weight is 0.
    `correct`: `[B T]` bool, whether the most likely token was the target; False where the weight is 0.
    """

    total: jax.Array
    nll: jax.Array
    correct: jax.Array


class _Plan(NamedTuple):
    """How one device computes its tokens' losses: what is known when the step is compiled.

    `vocab_size`: columns that are the vocabulary, or None for all. `token_axes`: mesh axes that sums run over.
    `vocab_axis`, `width_axis`: axes that the head is split over, or None.
    """

    chunk: int
    train_head: bool
    vocab_size: int | None
    logit_scale: float
    softcap: float | None
    token_axes: tuple[str, ...] = ()
    vocab_axis: str | None = None
    width_axis: str | None = None


def token_losses(
    hidden: jax.Array,
    head: jax.Array,
    *,
    targets: jax.Array,
    weights: jax.Array,
    train_head: bool,
    vocab_size: int,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk: int = 1024,
) -> TokenLosses:
    """Returns the weighted cross-entropy of a batch.

    Tokens of weight 0 are set aside before the head, so a batch of which half is trained costs half a head. Under an
    ambient mesh each device computes its own tokens (`shard_map`); a vocabulary split over `tensor` is summed there.

    Args:
        hidden: `[B T D]`, the decoder's output.
        head: `[D V]`; logits are `hidden @ head`, accumulated in float32 (float64 for float64 input), times
            `logit_scale`, and then cut off softly at `softcap` where one is given.
        targets: int32 `[B T]`, the next token at each position.
        weights: float32 `[B T]`, >= 0.
        vocab_size: columns of the head that are the vocabulary; those behind it are padding, and nothing predicts them.
        train_head: whether the gradient of `head` is wanted; without it that gradient is zero and costs nothing.
        chunk: tokens per device that pass the head at once.
    """
    plan = _Plan(chunk, train_head, vocab_size if vocab_size < head.shape[1] else None, logit_scale, softcap)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return TokenLosses(*_fused(hidden, head, targets, weights, plan))
    batch_ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if hidden.shape[0] % batch_ways or hidden.shape[1] % mesh.shape["context"]:
        raise ValueError(f"a batch of shape {hidden.shape[:2]} does not divide over the mesh {dict(mesh.shape)}")
    vocab_axis = "tensor" if mesh.shape["tensor"] > 1 and head.shape[1] % mesh.shape["tensor"] == 0 else None
    width_axis = "fsdp" if mesh.shape["fsdp"] > 1 and head.shape[0] % mesh.shape["fsdp"] == 0 else None
    plan = plan._replace(token_axes=TOKEN_AXES, vocab_axis=vocab_axis, width_axis=width_axis)
    tokens = PartitionSpec(BATCH_AXES, "context")
    head_spec = PartitionSpec(width_axis, vocab_axis)

    def on_device(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple:
        return _fused(hidden, head, targets, weights, plan)

    return TokenLosses(
        *jax.shard_map(
            on_device,
            in_specs=(PartitionSpec(BATCH_AXES, "context", None), head_spec, tokens, tokens),
            out_specs=(PartitionSpec(), tokens, tokens),
            check_vma=False,
        )(hidden, head, targets, weights)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fused(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, plan: _Plan
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (total, nll `[B T]`, correct `[B T]`) of one device's tokens; `total` is summed over all devices."""
    outputs, _ = _pass(hidden, head, targets, weights, plan._replace(train_head=False), with_gradient=False)
    return outputs


def _fused_forward(hidden, head, targets, weights, plan):  # type: ignore[no-untyped-def]
    return _pass(hidden, head, targets, weights, plan, with_gradient=True)


def _fused_backward(plan, gradients, cotangents):  # type: ignore[no-untyped-def]
    hidden_gradient, head_gradient = gradients
    # With the replication check off, shard_map hands each of `ways` devices 1/ways of a replicated output's cotangent.
    axes = plan.token_axes
    scale = jax.lax.psum(cotangents[0], (*axes, "tensor")) if axes else cotangents[0]
    return (
        hidden_gradient * scale.astype(hidden_gradient.dtype),
        head_gradient * scale.astype(head_gradient.dtype),
        None,
        None,
    )


_fused.defvjp(_fused_forward, _fused_backward)


def _pass(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    plan: _Plan,
    *,
    with_gradient: bool,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Any]:
    """One pass over this device's tokens: losses, and with them the gradients of `hidden` and `head`."""
    B, T, D = hidden.shape
    chunk, train_head, token_axes = plan.chunk, plan.train_head, plan.token_axes
    vocab_axis, width_axis = plan.vocab_axis, plan.width_axis
    full_head = jax.lax.all_gather(head, width_axis, axis=0, tiled=True) if width_axis else head
    exact = jnp.promote_types(hidden.dtype, jnp.float32)
    count = B * T
    chunk = min(chunk, count)
    padded = -(-count // chunk) * chunk

    # Trained tokens first, so that the chunks after the last of them have nothing to do.
    flat_weights = weights.reshape(count)
    order = jnp.pad(jnp.argsort(flat_weights == 0, stable=True), (0, padded - count), constant_values=count)
    trained = jnp.sum(flat_weights != 0)
    chunks = order.reshape(-1, chunk)
    flat_hidden, flat_targets = hidden.reshape(count, D), targets.reshape(count)

    def one_chunk(head_gradient: jax.Array, index: jax.Array) -> tuple[jax.Array, tuple]:
        x = flat_hidden.at[index].get(mode="fill", fill_value=0)
        w = flat_weights.at[index].get(mode="fill", fill_value=0).astype(exact)
        y = flat_targets.at[index].get(mode="fill", fill_value=0)
        logits, slope = _soften(
            jnp.einsum("tD,DV->tV", x, full_head.astype(x.dtype), preferred_element_type=exact), plan
        )
        nll, correct, log_normalizer, is_target = _softmax_statistics(logits, y, vocab_axis)
        if not with_gradient:
            return head_gradient, (nll, correct, jnp.zeros((), hidden.dtype))
        dlogits = (jnp.exp(logits - log_normalizer[:, None]) - is_target) * w[:, None]
        dlogits = (dlogits if slope is None else dlogits * slope).astype(hidden.dtype)
        dx = jnp.einsum("tV,DV->tD", dlogits, full_head.astype(x.dtype), preferred_element_type=exact)
        if train_head:
            head_gradient += jnp.einsum("tD,tV->DV", x, dlogits, preferred_element_type=exact)
        return head_gradient, (nll, correct, dx.astype(hidden.dtype))

    def nothing(head_gradient: jax.Array, index: jax.Array) -> tuple[jax.Array, tuple]:
        dx = jnp.zeros((chunk, D), hidden.dtype) if with_gradient else jnp.zeros((), hidden.dtype)
        return head_gradient, (jnp.zeros(chunk, exact), jnp.zeros(chunk, bool), dx)

    def body(head_gradient: jax.Array, at: jax.Array) -> tuple[jax.Array, tuple]:
        # Inside a vocabulary-split group all devices hold the same tokens and take the same branch.
        return jax.lax.cond(at * chunk < trained, one_chunk, nothing, head_gradient, chunks[at])

    accumulator = jnp.zeros(full_head.shape if train_head and with_gradient else (), exact)
    head_gradient, (nll, correct, dx) = jax.lax.scan(body, accumulator, jnp.arange(len(chunks)))
    live = flat_weights != 0
    nll = jnp.where(live, _unsort(nll.reshape(-1), order, count), 0)
    correct = live & _unsort(correct.reshape(-1), order, count)
    total = jnp.sum(nll * flat_weights.astype(exact))
    if token_axes:
        total = jax.lax.psum(total, token_axes)
    outputs = (total, nll.reshape(B, T), correct.reshape(B, T))
    if not with_gradient:
        return outputs, None
    # shard_map sums an input's gradient over the axes that the input is not split over, so what leaves here are
    # this device's own parts; devices that did the same work (an unsplit vocabulary) each give their share of it.
    copies = 1 if vocab_axis or not token_axes else jax.lax.axis_size("tensor")
    dhidden = _unsort(dx.reshape(-1, D), order, count).reshape(B, T, D) / copies
    if not train_head:
        return outputs, (dhidden.astype(hidden.dtype), jnp.zeros(head.shape, head.dtype))
    if width_axis:
        head_gradient = jax.lax.psum_scatter(head_gradient, width_axis, scatter_dimension=0, tiled=True)
    return outputs, (dhidden.astype(hidden.dtype), (head_gradient / copies).astype(head.dtype))


def _soften(products: jax.Array, plan: _Plan) -> tuple[jax.Array, jax.Array | float | None]:
    """Returns the logits of `hidden @ head`, -inf in columns of padding, and their derivative by it (None: 1)."""
    logits = products if plan.logit_scale == 1 else products * plan.logit_scale
    slope: Any = None if plan.logit_scale == 1 else plan.logit_scale
    if plan.softcap is not None:
        bent = jnp.tanh(logits / plan.softcap)
        logits, slope = plan.softcap * bent, (1 - jnp.square(bent)) * plan.logit_scale
    if plan.vocab_size is not None:
        logits = jnp.where(_columns(logits, plan.vocab_axis)[None, :] < plan.vocab_size, logits, -jnp.inf)
    return logits, slope


def _columns(logits: jax.Array, vocab_axis: str | None) -> jax.Array:
    """Returns the numbers `[V]` in the whole vocabulary of this device's columns `[t V]`."""
    size = logits.shape[1]
    return jnp.arange(size) + (jax.lax.axis_index(vocab_axis) * size if vocab_axis else 0)


def _softmax_statistics(
    logits: jax.Array, targets: jax.Array, vocab_axis: str | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns (nll `[t]`, correct `[t]`, log normalizer `[t]`, is_target `[t V]`) of logits `[t V]`.

    With `vocab_axis` each device holds a range of the vocabulary, in order, and the sums run over all of them.
    """
    is_target = _columns(logits, vocab_axis)[None, :] == targets[:, None]
    top = jnp.max(logits, axis=1)
    target = jnp.sum(jnp.where(is_target, logits, 0), axis=1)
    if vocab_axis:
        top, target = jax.lax.pmax(top, vocab_axis), jax.lax.psum(target, vocab_axis)
    normalizer = jnp.sum(jnp.exp(logits - top[:, None]), axis=1)
    if vocab_axis:
        normalizer = jax.lax.psum(normalizer, vocab_axis)
    log_normalizer = top + jnp.log(normalizer)
    return log_normalizer - target, target >= top, log_normalizer, is_target


def _unsort(values: jax.Array, order: jax.Array, count: int) -> jax.Array:
    """Returns `values` (in the order of `order`) back in the order of the tokens, padding dropped."""
    return jnp.zeros((count, *values.shape[1:]), values.dtype).at[order].set(values, mode="drop")
