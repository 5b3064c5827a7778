"""Where arrays lie: the mesh, and one table from logical axes to mesh axes.

A parameter names its axes where it is declared (`vocab embed mlp heads kv_heads head_dim layers experts`), an
activation where it is computed (`batch seq stream heads mlp`). This file alone says which mesh axis each of them is
split over, so that a change of layout is a change of the table.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtune import hub

MESH_AXES = ("slice", "data", "fsdp", "tensor", "context", "expert")
BATCH_AXES = ("slice", "data", "fsdp", "expert")

# Vocabularies are held as a multiple of this: the lanes of a TPU's registers, and every power of two that a mesh axis
# may have. It is the same on every mesh, so that a checkpoint fits any.
VOCAB_MULTIPLE = 128

# Parameters are split over fsdp along the model's width and over tensor along heads, mlp and vocabulary; nothing is
# split over slice, for the data-centre network is too slow to gather weights through.
PARAMETER_RULES: Mapping[str, str | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "layers": None,
    "experts": "expert",
}
ACTIVATION_RULES: Mapping[str, tuple[str, ...] | str | None] = {
    "batch": BATCH_AXES,
    "seq": "context",
    "stream": ("context", "tensor"),  # the sequence between the halves of layers (Korthikanti et al. 2022)
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh over all devices, every axis partitioned by the compiler.

    Args:
        sizes: size of each axis of `MESH_AXES`; absent means 1, and one may be -1 for all devices that are left.
        devices: jax devices, or abstract ones of a topology; default `jax.devices()`.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_sizes(sizes, len(devices), kind=devices[0].device_kind)
    array = _device_array(tuple(shape.values()), devices)
    return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_sizes(sizes: Mapping[str, int], devices: int, *, kind: str) -> dict[str, int]:
    """Returns the size of every axis, one that is -1 filled in.

    Args:
        sizes: as `make_mesh` takes them.
        devices: how many there are.
        kind: what to call them in errors.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    shape = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
    fixed = math.prod(size for size in shape.values() if size != -1)
    free = [axis for axis, size in shape.items() if size == -1]
    if devices % fixed or (not free and fixed != devices):
        asked = ", ".join(f"{axis}={size}" for axis, size in shape.items() if size != 1)
        raise ValueError(
            f"mesh: found {asked or 'size 1 on every axis'}, which {'divides into' if free else 'makes'} {fixed} "
            f"devices, but {devices} {kind} device(s) are here; expected sizes whose product is {devices}. Set one "
            "axis to -1 (mesh.fsdp=-1) to take all that are left."
        )
    for axis in free:
        shape[axis] = devices // fixed
    return shape


def mesh_words(sizes: Mapping[str, int]) -> str:
    """Returns the axes that split anything, "fsdp 4 x tensor 2"."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


def _device_array(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """Orders devices so that neighbours on an axis are neighbours on the wire; plain order where that is unknown."""
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    from jax.experimental import mesh_utils

    # Sides of a torus are split where sizes ask for it: 8 x 2 on 4x4.
    split = {"allow_split_physical_axes": True}
    if shape[0] > 1:
        between = (shape[0], *[1] * (len(shape) - 1))
        return mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), between, devices, **split)
    return mesh_utils.create_device_mesh(shape, devices, **split)


def use_compilation_cache() -> None:
    """Keeps compiled functions between runs, unless the user already says where (JAX_COMPILATION_CACHE_DIR)."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", os.path.join(hub.cache_dir(), "xla"))


def check_batch(rows: int, mesh: Mesh, *, key: str = "train.batch_rows") -> None:
    """Raises ValueError when `rows` rows cannot be split evenly over the mesh's batch axes."""
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if rows % ways:
        nearest = -(-rows // ways) * ways
        split = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in BATCH_AXES if mesh.shape[axis] > 1)
        raise ValueError(
            f"{key}: found {rows}, which does not divide over the mesh's {ways} batch shards ({split}); "
            f"expected a multiple of {ways}, e.g. {key}={nearest}, or a mesh with more tensor parallelism"
        )


def check_length(length: int, mesh: Mesh, *, key: str = "data.max_length") -> None:
    """Raises ValueError when rows of `length` tokens cannot be split evenly over the mesh's context axis."""
    ways = mesh.shape["context"]
    if length % ways:
        raise ValueError(
            f"{key}: found {length}, which does not divide over mesh.context={ways}; expected a multiple of {ways}, "
            f"e.g. {key}={max(ways, length // ways * ways)}"
        )


def parameter_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Returns how a parameter with these logical axes lies on the mesh.

    A dimension that its mesh axis does not divide stays whole (an odd vocabulary, a single kv head): correct
    everywhere, split where it can be. No mesh axis is used twice; the first dimension that asks for it has it.
    """
    taken: set[str] = set()
    spec: list[str | None] = []
    for name, size in zip(axes, shape, strict=True):
        if name is not None and name not in PARAMETER_RULES:
            raise ValueError(f"unknown logical axis {name!r}; expected one of {', '.join(PARAMETER_RULES)}")
        axis = PARAMETER_RULES[name] if name is not None else None
        if axis is None or axis in taken or size % mesh.shape[axis]:
            spec.append(None)
        else:
            taken.add(axis)
            spec.append(axis)
    return PartitionSpec(*spec)


def own_shape(variable: Any) -> tuple[int, ...]:
    """Returns an nnx variable's shape as people and checkpoints know it: without the padding of its vocabulary."""
    metadata, shape = variable.get_metadata(), tuple(variable.get_value().shape)
    if "vocab_size" not in metadata:
        return shape
    sizes = zip(metadata["axes"], shape, strict=True)
    return tuple(metadata["vocab_size"] if axis == "vocab" else size for axis, size in sizes)


def parameter_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """Returns the tree of NamedShardings for a state of nnx variables, each read from its variable's `axes`."""
    from flax import nnx

    def place(variable: nnx.Variable) -> nnx.Variable:
        shape = variable.get_value().shape
        axes = variable.get_metadata().get("axes") or (None,) * len(shape)
        return variable.replace(NamedSharding(mesh, parameter_spec(axes, shape, mesh)))

    return jax.tree.map(place, abstract_state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Returns the sharding of `[B T]` batch arrays, after `leading` unsharded axes (microbatches)."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, BATCH_AXES, "context"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Asks the compiler to lay an activation out by its logical axes; does nothing without an ambient mesh.

    A dimension that its mesh axes do not divide is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(axes, x.shape, mesh))


def constrain_parameters(state: Any) -> Any:
    """Asks the compiler to lay a state of nnx variables out as its parameters are (gradients, accumulators).

    Without it the sum of gradients over microbatches may be kept whole on every device.
    """
    from flax import nnx

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return state

    def place(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        spec = parameter_spec(variable.get_metadata()["axes"], value.shape, mesh)
        return variable.replace(jax.lax.with_sharding_constraint(value, spec))

    return jax.tree.map(place, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def activation_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """Returns how an activation with these logical axes lies on the mesh (axes of size 1 or not dividing: whole).

    A sequence that context and tensor together do not divide is split over context alone.
    """
    spec: list[Any] = []
    for name, size in zip(axes, shape, strict=True):
        rule = ACTIVATION_RULES[name] if name is not None else None
        names = (rule,) if isinstance(rule, str) else rule or ()
        if name == "stream" and size % math.prod(mesh.shape[axis] for axis in names):
            names = ("context",)
        ways = math.prod(mesh.shape[axis] for axis in names)
        spec.append(names if ways > 1 and size % ways == 0 else None)
    return PartitionSpec(*spec)


def create_on_mesh(make: Callable[..., Any], shardings: Any, *args: Any) -> Any:
    """Runs `make(*args)` compiled, every result created where `shardings` says: no leaf strays on one device."""
    return jax.jit(make, out_shardings=shardings)(*args)


def time_all_reduce(mesh: Mesh, axis: str, *, size: int, repeats: int = 5) -> float:
    """Returns the seconds that an all-reduce over a mesh axis takes, the shortest of a few.

    Args:
        size: bytes that each device brings, as float32.
    """
    everywhere = NamedSharding(mesh, PartitionSpec(MESH_AXES))
    values = create_on_mesh(lambda: jnp.ones(mesh.size * (size // 4), jnp.float32), everywhere)

    def total(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, axis)

    run = jax.jit(jax.shard_map(total, mesh=mesh, in_specs=everywhere.spec, out_specs=everywhere.spec, check_vma=False))
    run(values).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(values).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
