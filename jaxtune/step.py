"""One update, and one evaluation: pure functions of (state, batch), compiled once.

Losses and gradients are sums over tokens until the one division by the global weight, so that neither the number of
microbatches nor the split over devices changes what is learned.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune.batch import AnyBatch
from jaxtune.compiler_options import compiler_options
from jaxtune.guard import Guard, Limits, after, initial_guard, limits
from jaxtune.loss import TokenLosses, token_losses
from jaxtune.models.experts import RouterSums
from jaxtune.models.grouped import Kernels
from jaxtune.router_loss import RouterMetrics, load_balance, router_metrics, z_loss
from jaxtune.sharding import constrain_parameters, parameter_shardings, replicated


class TrainState(NamedTuple):
    """All that training changes.

    `step`: int32 scalar, batches consumed. `trainable`: state of the trained variables. `opt_state`: optax's.
    `bad_steps`: int32 scalar, updates in a row, up to now, that were not applied because of a NaN or infinity.
    `guard`: what loss and gradient norm usually are.
    """

    step: Any
    trainable: Any
    opt_state: Any
    bad_steps: Any
    guard: Guard


class SourceSums(NamedTuple):
    """Sums over the trained tokens of each source, float32 `[S]`: weight x loss, weight, weight x correct."""

    loss: Any
    weight: Any
    correct: Any


class StepMetrics(NamedTuple):
    """Numbers of one update: scalars, but for `sources` and `router`. `loss` is the weighted mean in nats.

    An update is applied when it is `finite` and within `limits`, the guard's; `spikes` counts those in a row that were
    not. `examples` int32 `[S]`: of each source. `router` is None where no layer is sparse.
    """

    loss: Any
    weight: Any
    grad_norm: Any
    tokens: Any
    trained_tokens: Any
    finite: Any
    bad_steps: Any
    applied: Any
    spikes: Any
    limits: Limits
    sources: SourceSums
    examples: Any
    router: RouterMetrics | None


class EvalSums(NamedTuple):
    """Sums over evaluated tokens: weight x loss, weight, weight x correct, and the count of trained tokens."""

    loss: Any
    weight: Any
    correct: Any
    tokens: Any
    sources: SourceSums


class Compute(NamedTuple):
    """How the model is computed; nothing in it changes what is computed beyond rounding.

    `attention` is a resolved kernel of `models.attention`; `remat` names a policy of the decoder; `microbatches` is the
    number of parts that a batch is computed in; `train_head` says whether the unembedding is trained; `sources` is the
    number S of sources that losses are told for. `load_balance` and `router_z` are the coefficients of the losses of
    `router_loss`, each taken over a microbatch and weighted as its tokens are. `dropout_rate` is that of the model's
    own dropout, which draws from `dropout_seed` as adapters' does. `expert_kernels` are those of
    `models.grouped`, where the model has experts. An update more than `spike_factor` deviations above what is usual is
    not applied; None applies all.
    """

    dtype: Any
    attention: Callable
    remat: str
    microbatches: int
    train_head: bool
    dropout_seed: int | None = None
    sources: int = 1
    load_balance: float = 0.0
    router_z: float = 0.0
    dropout_rate: float = 0.0
    expert_kernels: Kernels | None = None
    spike_factor: float | None = None


class _Told(NamedTuple):
    """What a microbatch says besides its gradient: the sum of its tokens' losses, by source too, and its routers."""

    loss: Any
    sources: SourceSums
    router: RouterSums | None


def make_loss(
    graph: nnx.GraphDef, compute: Compute
) -> Callable[[nnx.State, nnx.State, AnyBatch, Any], tuple[jax.Array, _Told]]:
    """Returns `loss_sum(trainable, frozen, batch, keys)`: what is differentiated, and what it says besides."""

    def loss_sum(trainable: nnx.State, frozen: nnx.State, batch: AnyBatch, keys: Any) -> tuple[jax.Array, _Told]:
        losses, router = _losses(nnx.merge(graph, trainable, frozen), batch, compute, keys)
        total = losses.total
        if router is not None and (compute.load_balance or compute.router_z):
            penalty = compute.load_balance * load_balance(router) + compute.router_z * z_loss(router)
            total += jnp.sum(batch.loss_weights) * penalty
        return total, _Told(losses.total, _by_source(losses, batch, compute.sources), router)

    return loss_sum


def make_train_step(
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation, compute: Compute
) -> Callable[[TrainState, nnx.State, AnyBatch], tuple[TrainState, StepMetrics]]:
    """Returns `train_step(state, frozen, batch)`, a pure function ready for `jax.jit`.

    An update whose loss or gradient is not finite, or a spike, leaves parameters and optimizer as they were and is
    counted.
    """
    loss_sum = make_loss(graph, compute)

    def train_step(state: TrainState, frozen: nnx.State, batch: AnyBatch) -> tuple[TrainState, StepMetrics]:
        keys = _row_keys(compute.dropout_seed, state.step, batch.tokens.shape[0])
        gradient_of = jax.grad(loss_sum, has_aux=True)
        if compute.microbatches == 1:
            gradient, told = gradient_of(state.trainable, frozen, batch, keys)
        else:

            def add(sums: tuple, part: tuple) -> tuple:
                gradient, told = gradient_of(state.trainable, frozen, *part)
                return constrain_parameters_in(jax.tree.map(jnp.add, sums, (told, gradient))), None

            parts = split_rows((batch, keys), compute.microbatches)
            first = jax.tree.map(lambda x: x[0], parts)
            nothing = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient_of, state.trainable, frozen, *first)[1]
            )
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, _wide(x)), state.trainable)
            (told, gradient), _ = jax.lax.scan(add, constrain_parameters_in((nothing, zeros)), parts)

        weight = jnp.sum(batch.loss_weights)
        divisor = jnp.where(weight > 0, weight, 1).astype(told.loss.dtype)
        loss = told.loss / divisor
        gradient = jax.tree.map(lambda g: g.astype(_wide(g)) / divisor.astype(_wide(g)), gradient)
        gradient = jax.tree.map(lambda g, x: g.astype(x.dtype), gradient, state.trainable)
        grad_norm = optax.global_norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        allowed = limits(state.guard, compute.spike_factor)
        applied = finite & (loss <= allowed.loss) & (grad_norm <= allowed.norm)
        guard = after(state.guard, loss, grad_norm, applied)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(applied, new, old)

        bad_steps = jnp.where(finite, 0, state.bad_steps + 1)
        metrics = StepMetrics(
            loss=loss,
            weight=weight,
            grad_norm=grad_norm,
            tokens=batch.token_count,
            trained_tokens=jnp.sum(batch.loss_weights > 0),
            finite=finite,
            bad_steps=bad_steps,
            applied=applied,
            spikes=guard.spikes,
            limits=allowed,
            sources=told.sources,
            examples=_examples_by_source(batch, compute.sources),
            router=router_metrics(told.router) if told.router is not None else None,
        )
        new_state = TrainState(
            step=state.step + 1,
            trainable=jax.tree.map(keep, trainable, state.trainable),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            bad_steps=bad_steps,
            guard=guard,
        )
        return new_state, metrics

    return train_step


def make_eval_step(graph: nnx.GraphDef, compute: Compute) -> Callable[[nnx.State, nnx.State, AnyBatch], EvalSums]:
    """Returns `eval_step(trainable, frozen, batch)`, which gives scalars only: logits never leave the device."""

    def part_sums(trainable: nnx.State, frozen: nnx.State, batch: AnyBatch) -> EvalSums:
        losses, _ = _losses(nnx.merge(graph, trainable, frozen), batch, compute, None)
        return EvalSums(
            loss=losses.total,
            weight=jnp.sum(batch.loss_weights),
            correct=jnp.sum(losses.correct * batch.loss_weights),
            tokens=jnp.sum(batch.loss_weights > 0),
            sources=_by_source(losses, batch, compute.sources),
        )

    def eval_step(trainable: nnx.State, frozen: nnx.State, batch: AnyBatch) -> EvalSums:
        if compute.microbatches == 1:
            return part_sums(trainable, frozen, batch)
        # The same portions as in training: what fits there fits here.
        parts = jax.lax.map(lambda part: part_sums(trainable, frozen, part), split_rows(batch, compute.microbatches))
        return jax.tree.map(lambda sums: jnp.sum(sums, axis=0), parts)

    return eval_step


def _by_source(losses: TokenLosses, batch: AnyBatch, sources: int) -> SourceSums:
    """Adds tokens' losses up by the source that each came from; padding has weight 0."""
    weights = batch.loss_weights.astype(jnp.float32)
    values = jnp.stack([losses.nll.astype(jnp.float32) * weights, weights, losses.correct * weights], axis=-1)
    sums = jax.ops.segment_sum(values.reshape(-1, 3), batch.source_ids.reshape(-1), num_segments=sources)
    return SourceSums(*jnp.moveaxis(jax.lax.stop_gradient(sums), 1, 0))


def _examples_by_source(batch: AnyBatch, sources: int) -> jax.Array:
    """Counts the segments of each source: every one has a position 0."""
    begins = (batch.positions == 0) & (batch.segment_ids > 0)
    return jax.ops.segment_sum(begins.reshape(-1).astype(jnp.int32), batch.source_ids.reshape(-1), sources)


def _losses(model: Any, batch: AnyBatch, compute: Compute, keys: Any) -> tuple[TokenLosses, RouterSums | None]:
    options: dict[str, Any] = {}  # what not every model takes
    if compute.dropout_rate:
        options["dropout_rate"] = compute.dropout_rate
    if compute.expert_kernels is not None:
        options["expert_kernels"] = compute.expert_kernels
    output = model(
        *batch.inputs,
        compute_dtype=compute.dtype,
        attention=compute.attention,
        remat=compute.remat,
        dropout_keys=keys,
        **options,
    )
    head = model.head()
    losses = token_losses(
        output.hidden,
        head.kernel,
        vocab_size=head.vocab_size,
        targets=batch.targets,
        weights=batch.loss_weights,
        train_head=compute.train_head,
        logit_scale=head.scale,
        softcap=head.softcap,
    )
    return losses, output.router


def _wide(x: Any) -> Any:
    """Returns the dtype in which sums of x are kept: float32 at least."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _row_keys(seed: int | None, step: jax.Array, rows: int) -> jax.Array | None:
    """Returns one dropout key per global row `[B]`, so that no split of the batch changes a row's noise."""
    if seed is None:
        return None
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))


def split_rows(tree: Any, parts: int) -> Any:
    """Splits the rows `[B ...]` of every array into microbatches `[parts B/parts ...]`, strided.

    With B = 6 and 3 parts rows 0..5 become [0 3] [1 4] [2 5]: a device that holds rows 0..2 has one row of each part,
    so no row changes its device.
    """
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def constrain_parameters_in(sums: tuple[Any, nnx.State]) -> tuple[Any, nnx.State]:
    """Lays the gradient of a (losses, gradient) pair out as its parameters are."""
    return sums[0], constrain_parameters(sums[1])


def initial_state(optimizer: optax.GradientTransformation, trainable: nnx.State) -> TrainState:
    """Returns the state before the first update."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        opt_state=optimizer.init(trainable),
        bad_steps=jnp.zeros((), jnp.int32),
        guard=initial_guard(),
    )


def state_shardings(optimizer: optax.GradientTransformation, trainable: nnx.State, mesh: Any) -> TrainState:
    """Returns where each leaf of the state lies; optimizer moments lie where their parameters do.

    A statistic of another shape than its parameter (Adafactor's rows and columns) is small and held whole.
    """
    parameters = parameter_shardings(trainable, mesh)
    abstract = jax.eval_shape(lambda tree: initial_state(optimizer, tree), trainable)

    def beside(statistic: Any, parameter: Any, sharding: Any) -> Any:
        return sharding if statistic.shape == parameter.shape else replicated(mesh)

    opt_state = optax.tree_map_params(
        optimizer,
        beside,
        abstract.opt_state,
        trainable,
        parameters,
        transform_non_params=lambda _: replicated(mesh),
    )
    whole = jax.tree.map(lambda _: replicated(mesh), abstract)
    return whole._replace(trainable=parameters, opt_state=opt_state)


def compile_train_step(
    train_step: Callable,
    state: TrainState,
    frozen: nnx.State,
    batch: AnyBatch,
    *,
    device_kind: str,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Compiles the update for arguments that carry shardings (arrays, or ShapeDtypeStructs for absent hardware).

    The state's buffers are donated: the new state takes the old one's place in memory. The metrics are whole on every
    device, so that any host can read them. `options` are told to the compiler in place of ours or beside them.
    """
    told = {**compiler_options(device_kind), **(options or {})}
    out_shardings = (jax.tree.map(lambda leaf: leaf.sharding, state), _everywhere(batch))
    jitted = jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)
    return jitted.lower(state, frozen, batch).compile(compiler_options=told)


def compile_eval_step(
    eval_step: Callable, trainable: nnx.State, frozen: nnx.State, batch: AnyBatch, *, device_kind: str
) -> Any:
    """Compiles an evaluation for arguments that carry shardings; its sums are whole on every device."""
    jitted = jax.jit(eval_step, out_shardings=_everywhere(batch))
    return jitted.lower(trainable, frozen, batch).compile(compiler_options=compiler_options(device_kind))


def _everywhere(batch: AnyBatch) -> Any:
    """Returns the sharding of a result that every device of the batch's mesh holds; None where there is no mesh."""
    where = batch.tokens.sharding if isinstance(batch.tokens, jax.Array | jax.ShapeDtypeStruct) else None
    return NamedSharding(where.mesh, PartitionSpec()) if isinstance(where, NamedSharding) else None
