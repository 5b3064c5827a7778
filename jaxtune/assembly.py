"""Puts a model together: config.json to parameters on the mesh, split into what is trained and what is not."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune import adapters
from jaxtune.config import Config, TuningConfig
from jaxtune.convert.folder import HFFolder
from jaxtune.convert.hf import file_dtypes, load_params
from jaxtune.models import grouped, t5_layers
from jaxtune.models.attention import resolve
from jaxtune.models.registry import family_of
from jaxtune.sharding import create_on_mesh, parameter_shardings
from jaxtune.step import Compute

Progress = Callable[[int, int], None] | None  # called with (bytes read, bytes in all)


class ModelPlan(NamedTuple):
    """A model before any of its numbers exist.

    `config` is the model's, `graph` its structure, `trainable` and `frozen` its variables as shapes, `make` the
    function that draws both (traced only), `adapted` the names of linear layers with an adapter.
    """

    config: Any
    graph: nnx.GraphDef
    trainable: nnx.State
    frozen: nnx.State
    make: Callable[[], tuple[nnx.State, nnx.State]]
    adapted: tuple[str, ...]


def plan_model(
    hf_config: dict[str, Any], tuning: TuningConfig, *, param_dtype: Any, seed: int, where: str
) -> ModelPlan:
    """Returns the model that a config.json and the tuning method describe; nothing is computed.

    Args:
        hf_config: config.json.
        param_dtype: dtype of the model's own weights; adapters are float32.
        seed: of randomly drawn weights and adapters.
        where: what to call the model in errors.

    Raises:
        ValueError: a model or a target that is not supported.
    """
    family = family_of(hf_config, where=where)
    config = family.read_config(hf_config)
    adapted: tuple[str, ...] = ()

    def build() -> nnx.Module:
        nonlocal adapted
        model_key, adapter_key = jax.random.split(jax.random.key(seed))
        model = family.build(config, key=model_key, param_dtype=param_dtype)
        if tuning.method == "lora":
            adapted = adapters.attach(
                model,
                rank=tuning.rank,
                alpha=tuning.alpha,
                dropout=tuning.dropout,
                targets=tuning.targets,
                key=adapter_key,
            )
        return model

    def split(model: nnx.Module) -> Any:
        return nnx.split(model, adapters.trainable_filter(tuning.method, routers=tuning.routers), ...)

    def make() -> tuple[nnx.State, nnx.State]:
        return split(build())[1:]

    graph, trainable, frozen = split(nnx.eval_shape(build))
    return ModelPlan(config, graph, trainable, frozen, make, adapted)


def resolve_dtypes(config: Config, platform: str) -> tuple[Any, Any]:
    """Returns (dtype of the computation, dtype that the model's weights are held in) on a platform.

    The second is None where `model.param_dtype=file` keeps each tensor's own.
    """
    names = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    compute = names.get(config.model.dtype, jnp.float32 if platform == "cpu" else jnp.bfloat16)
    if config.model.param_dtype == "file":
        return compute, None
    automatic = jnp.float32 if config.tuning.method == "full" else compute
    return compute, names.get(config.model.param_dtype, automatic)


def resolve_compute(config: Config, plan: ModelPlan, platform: str) -> tuple[Compute, str]:
    """Returns how the model is computed on a platform, and why that attention kernel was chosen."""
    attention, reason = resolve_attention(config.model.attention, plan.config, platform=platform)
    remat = config.model.remat
    if remat == "auto":
        remat = "none" if platform == "cpu" else "minimal"
    dropout = config.model.dropout > 0 or (config.tuning.method == "lora" and config.tuning.dropout > 0)
    compute = Compute(
        dtype=resolve_dtypes(config, platform)[0],
        attention=attention,
        remat=remat,
        microbatches=config.train.batch_rows // config.rows_at_once,
        train_head=config.tuning.method == "full",
        dropout_seed=config.seed if dropout else None,
        dropout_rate=config.model.dropout,
        load_balance=_load_balance(config.tuning, plan.config),
        router_z=config.tuning.router_z,
        expert_kernels=grouped.resolve(platform) if getattr(plan.config, "experts", None) else None,
    )
    return compute, reason


def resolve_attention(name: str, config: Any, *, platform: str) -> tuple[Callable[..., jax.Array], str]:
    """Returns the attention of a model on a platform, and a sentence that says which one and why; see `resolve`."""
    if not config.is_encoder_decoder:
        return resolve(name, platform=platform)
    if name not in ("auto", "xla"):
        raise ValueError(
            f"model.attention: found {name!r}, a kernel for decoders alone, which takes no biases for distances; this "
            "model is an encoder-decoder that needs them: use auto or xla"
        )
    return t5_layers.plain, "attention: xla, the plain reference with biases for distances"


def _load_balance(tuning: TuningConfig, config: Any) -> float:
    """Returns the coefficient of the load-balance loss: the one asked for, or the model's own."""
    if tuning.load_balance != "auto":
        return float(tuning.load_balance)
    experts = getattr(config, "experts", None)
    return experts.load_balance if experts is not None else 0.0


def load_trainable(
    plan: ModelPlan, folder: HFFolder, *, mesh: Any, init: str, keep_file_dtypes: bool, progress: Progress
) -> nnx.State:
    """Returns what is trained, on the mesh: adapters (and random models) drawn, whole models read from the folder."""
    places = parameter_shardings(plan.trainable, mesh)
    if plan.adapted or init == "random":
        return create_on_mesh(lambda: plan.make()[0], places)
    dtype_of = file_dtypes(folder) if keep_file_dtypes else None
    return load_params(folder, plan.trainable, shardings=places, dtype_of=dtype_of, progress=progress)


def load_frozen(
    plan: ModelPlan, folder: HFFolder, *, mesh: Any, init: str, keep_file_dtypes: bool, progress: Progress
) -> nnx.State:
    """Returns what is not trained, on the mesh: under LoRA the whole model, otherwise little (routers) or nothing."""
    places = parameter_shardings(plan.frozen, mesh)
    if not jax.tree.leaves(plan.frozen):
        return plan.frozen
    if init == "random":
        return create_on_mesh(lambda: plan.make()[1], places)
    dtype_of = file_dtypes(folder) if keep_file_dtypes else None
    return load_params(folder, plan.frozen, shardings=places, dtype_of=dtype_of, progress=progress)


def model_config(folder: HFFolder) -> Any:
    """Returns what the folder's config.json says, as our configuration of the model."""
    return family_of(folder.config, where=folder.path).read_config(folder.config)


def trainable_specs(plan: ModelPlan, folder: HFFolder, *, keep_file_dtypes: bool) -> nnx.State:
    """Returns the trained variables as shapes, in the dtypes that `load_trainable` would give them."""
    if plan.adapted or not keep_file_dtypes or not folder.tensors:
        return plan.trainable
    dtype_of = file_dtypes(folder)
    flat = [
        (path, variable.replace(jax.ShapeDtypeStruct(variable.get_value().shape, dtype_of(path))))
        for path, variable in nnx.to_flat_state(plan.trainable)
    ]
    return nnx.from_flat_state(flat)


def refuse_float16(plan: ModelPlan, folder: HFFolder) -> None:
    """Raises ValueError when weights would be trained in float16, where Adam's epsilon rounds to 0."""
    specs = jax.tree.leaves(trainable_specs(plan, folder, keep_file_dtypes=True))
    if any(leaf.dtype == jnp.float16 for leaf in specs):
        raise ValueError(
            f"model.param_dtype: found file, and {folder.path} holds float16, which cannot be trained; expected auto "
            "or float32. What is exported has the file's dtypes all the same"
        )
