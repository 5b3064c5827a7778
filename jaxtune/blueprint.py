"""The update of a run before any array exists: shapes where they will lie, and the function over them.

`train` compiles it for the devices that are here, `plan` for those that are not: one path for both.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxtune import assembly
from jaxtune.batch import AnyBatch, Batch, PairBatch
from jaxtune.config import Config
from jaxtune.config_data import PAIR_LENGTHS
from jaxtune.memory import OutOfMemory
from jaxtune.optimizer import make_optimizer
from jaxtune.sharding import batch_sharding, check_batch, check_length, own_shape, parameter_shardings
from jaxtune.step import Compute, TrainState, compile_train_step, initial_state, make_train_step, state_shardings


class Blueprint(NamedTuple):
    """All that a run's update is made of.

    `model` is the model's plan, `compute` how it is computed and `why_attention` a sentence about the kernel; `state`,
    `frozen` and `batch` are shapes with their shardings on `mesh`; `update` maps them to the next state.
    """

    config: Config
    mesh: jax.sharding.Mesh
    model: assembly.ModelPlan
    optimizer: Any
    compute: Compute
    why_attention: str
    state: TrainState
    frozen: Any
    batch: AnyBatch
    update: Callable[..., Any]

    @property
    def device_kind(self) -> str:
        """Of the mesh's devices, whether they are here or not."""
        return str(self.mesh.devices.flat[0].device_kind)

    @property
    def tokens(self) -> int:
        """Positions of one update, padding included; both sides of an encoder-decoder's rows."""
        return self.batch.room


def draw(
    config: Config, hf_config: dict[str, Any], mesh: jax.sharding.Mesh, *, where: str, steps: int, sources: int
) -> Blueprint:
    """Returns the update of a configuration on a model and a mesh; nothing is computed.

    Args:
        config: with its lengths filled in (`fill_lengths`).
        hf_config: config.json.
        where: what to call the model in errors.
        steps: updates of the run, for the schedule.
        sources: how many sources losses are told for.

    Raises:
        ValueError: a model that is not supported, or rows that the mesh does not divide.
    """
    check_rows(config, mesh)
    check_lengths(config, mesh)
    platform = str(mesh.devices.flat[0].platform)
    dtype, param_dtype = assembly.resolve_dtypes(config, platform)
    model = assembly.plan_model(
        hf_config, config.tuning, param_dtype=param_dtype or dtype, seed=config.seed, where=where
    )
    optimizer = make_optimizer(config, max(steps, 1), model.trainable)
    compute, why = assembly.resolve_compute(config, model, platform)
    compute = compute._replace(sources=sources, spike_factor=config.train.spike_factor)
    state = jax.eval_shape(lambda tree: initial_state(optimizer, tree), model.trainable)
    return Blueprint(
        config=config,
        mesh=mesh,
        model=model,
        optimizer=optimizer,
        compute=compute,
        why_attention=why,
        state=placed(state, state_shardings(optimizer, model.trainable, mesh)),
        frozen=placed(model.frozen, parameter_shardings(model.frozen, mesh)),
        batch=abstract_batch(config, mesh),
        update=make_train_step(model.graph, optimizer, compute),
    )


def compile_update(blueprint: Blueprint, state: Any = None, frozen: Any = None) -> jax.stages.Compiled:
    """Compiles the update; for arrays that are there already, their dtypes decide (`model.param_dtype=file`).

    Raises:
        ValueError: an option of `train.compiler_options` that the compiler does not have or take.
    """
    options = blueprint.config.train.compiler_options
    try:
        with jax.set_mesh(blueprint.mesh):  # tracing only: nothing runs, so the devices may be absent
            return compile_train_step(
                blueprint.update,
                blueprint.state if state is None else state,
                blueprint.frozen if frozen is None else frozen,
                blueprint.batch,
                device_kind=blueprint.device_kind,
                options=options,
            )
    except jax.errors.JaxRuntimeError as error:
        if not options or not any(name in str(error) for name in options):
            raise
        told = str(error).splitlines()[0]
        raise ValueError(
            f"train.compiler_options: found {options}; the compiler says {told!r}; expected options that XLA has for "
            f"{blueprint.device_kind}"
        ) from None


def check_rows(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError when the mesh does not divide the rows that are computed at once."""
    key = "train.microbatch_rows" if config.train.microbatch_rows else "train.batch_rows"
    check_batch(config.rows_at_once, mesh, key=key)


def check_lengths(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError when the mesh does not divide the rows' lengths."""
    for key, length in lengths(config).items():
        check_length(length, mesh, key=key)


def lengths(config: Config) -> dict[str, int]:
    """Returns the positions of a row by their key, of both sides of an encoder-decoder's."""
    found = {"data.encoder_length": config.data.encoder_length, "data.max_length": config.data.max_length}
    return {key: length for key, length in found.items() if length is not None}


def check_memory(compiled: jax.stages.Compiled, limit: float) -> None:
    """Raises OutOfMemory when a compiled update needs more than `limit` bytes of a device.

    A TPU's compiler refuses by itself; other compilers leave it to the run to fail.
    """
    needed = memory_needed(compiled)
    if needed > limit:
        raise OutOfMemory(f"the update needs {needed / 2**30:.1f} GiB of a device that has {limit / 2**30:.1f}")


def memory_needed(compiled: jax.stages.Compiled) -> int:
    """Returns the bytes of a device that a compiled update needs: what it is given, makes and has at hand."""
    memory: Any = compiled.memory_analysis()
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(whole + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes)


def placed(tree: Any, shardings: Any) -> Any:
    """Returns shapes with their shardings."""
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings)


def abstract_batch(config: Config, mesh: jax.sharding.Mesh) -> AnyBatch:
    """Returns a global batch as shapes, where its arrays will lie."""
    where, data = batch_sharding(mesh), config.data
    assert data.max_length is not None  # filled in by now

    def array(length: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.train.batch_rows, length), dtype, sharding=where)

    own = array(data.max_length)
    decoder = Batch(own, own, own, own, loss_weights=array(data.max_length, np.float32), source_ids=own)
    if data.encoder_length is None:
        return decoder
    read = array(data.encoder_length)
    return PairBatch(read, read, read, *decoder)


def fill_lengths(config: Config, model: Any, where: str) -> Config:
    """Returns the configuration with the lengths of rows that the model decides.

    Args:
        model: the model's configuration, ours.
        where: what to call the model in errors.

    Raises:
        ValueError: a length beyond the model's positions, or a key that means nothing for this kind of model.
    """
    data = config.data
    if model.is_encoder_decoder:
        encoder_length, max_length = PAIR_LENGTHS
        changes = {
            "encoder_length": data.encoder_length or encoder_length,
            "max_length": data.max_length or max_length,
        }
        return config.model_copy(update={"data": data.model_copy(update=changes)})
    for key, found in (("data.encoder_length", data.encoder_length), ("model.dropout", config.model.dropout)):
        if found:
            raise ValueError(
                f"{key}: found {found}, but {where} is a decoder alone, and this key is for an encoder-decoder such "
                f"as T5; remove it ({'data.max_length' if key.startswith('data') else 'tuning.dropout'} is for all)"
            )
    positions = model.max_positions
    length = data.max_length or min(2048, positions)
    if length > positions:
        raise ValueError(
            f"data.max_length: found {length}; expected at most the model's {positions} positions "
            f"(max_position_embeddings of {where})"
        )
    return config.model_copy(update={"data": data.model_copy(update={"max_length": length})})


def flops_per_token(config: Config, model: assembly.ModelPlan) -> float:
    """Returns model FLOPs of training on one token: 6 a parameter, 4 where weights get no gradient.

    The embedding lookup costs none; attention's own part is left out, as in PaLM's appendix B for short rows. Of a
    layer's experts those count that a token passes. A token of an encoder-decoder passes one of the two stacks, taken
    as half of all.
    """
    experts = getattr(model.config, "experts", None)
    used = experts.per_token / experts.count if experts is not None else 1.0

    def numbers(variable: nnx.Variable) -> float:
        is_expert = "experts" in (variable.get_metadata().get("axes") or ())
        return (used if is_expert else 1.0) * math.prod(own_shape(variable))

    parameters = (model.trainable, model.frozen)
    passed = sum(map(numbers, jax.tree.leaves(parameters, is_leaf=lambda node: isinstance(node, nnx.Variable))))
    if not model.config.tie_embeddings:
        passed -= model.config.vocab_size * model.config.width
    return (6.0 if config.tuning.method == "full" else 4.0) * passed / (2 if model.config.is_encoder_decoder else 1)


def shard_bytes(tree: Any) -> int:
    """Returns the bytes that one device holds of arrays or placed shapes."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
