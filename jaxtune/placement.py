"""Putting a checkpoint's tensors where parameters lie, one at a time, and taking them back.

Checkpoints hold `[out in]`, parameters `[in out]`, stacked over layers; the last dimension of a tensor is often the one
that is split over devices. Reading it so would be many small strided reads, which is several times slower than whole
rows. So rows are read, split evenly over all devices whatever the parameter's own split is, and one compiled
transpose-and-reshard moves them into place over the devices' own network.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
ReadRows = Callable[[int, int], np.ndarray]


def default_sharding() -> Sharding:
    """Returns the placement on the first device, for who has no mesh."""
    return SingleDeviceSharding(jax.devices()[0])


def row_sharded(
    read: ReadRows, shape: tuple[int, ...], dtype: Any, sharding: Sharding, *, held: int | None = None
) -> jax.Array:
    """Forms an array split by rows over the devices of `sharding`; each process reads only what its devices hold.

    Args:
        shape: of the tensor, at least one dimension, rows first.
        read: `(start, stop)` -> those rows of the tensor.
        held: rows that the array is to have, zeros behind the tensor's own; None for its own alone.
    """
    held = held or shape[0]
    rows = _row_sharding(held, sharding)
    seen: dict[tuple[int, int], np.ndarray] = {}  # devices that hold the same rows read them once

    def piece(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(held)
        if (start, stop) not in seen:
            own = max(0, min(stop, shape[0]) - start)
            values = read(start, start + own) if own else np.zeros((0, *shape[1:]), dtype)
            if own < stop - start:
                values = np.concatenate([values, np.zeros((stop - start - own, *shape[1:]), dtype)])
            seen[start, stop] = values
        return seen[start, stop]

    return jax.make_array_from_callback((held, *shape[1:]), rows, piece, dtype=dtype)


def _row_sharding(rows: int, sharding: Sharding) -> Sharding:
    """Splits rows over as many devices as divide them; a row count that shares no divisor is held whole."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    devices = sharding.mesh.devices.reshape(-1)
    ways = math.gcd(rows, devices.size)
    mesh = Mesh(devices.reshape(ways, -1), ("rows", "copies"))
    return NamedSharding(mesh, PartitionSpec("rows"))


@functools.cache
def _putter(transpose: bool, dtype: Any, sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda rows: _move(rows, transpose, sharding).astype(dtype), out_shardings=sharding)


@functools.cache
def _filler(transpose: bool, sharding: Sharding) -> Callable[[jax.Array, jax.Array, tuple[int, ...]], jax.Array]:
    def fill(stack: jax.Array, rows: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
        depth = len(index)
        one = sharding
        if isinstance(sharding, NamedSharding):
            one = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[depth:]))
        moved = _move(rows, transpose, one).astype(stack.dtype)
        start = [jnp.asarray(i, jnp.int32) for i in (*index, *(0 for _ in moved.shape))]  # one type, in x64 too
        return jax.lax.dynamic_update_slice(stack, moved.reshape((1,) * depth + moved.shape), start)

    return jax.jit(fill, donate_argnums=0, out_shardings=sharding)


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


def _move(rows: jax.Array, transpose: bool, sharding: Sharding) -> jax.Array:
    """Transposes and reshards, moving bits: a CPU widens bfloat16 to float32 to send it, at twice the memory."""
    if not isinstance(sharding, NamedSharding):
        return _turn(rows, transpose)
    bits = jax.lax.bitcast_convert_type(rows, UNSIGNED[rows.dtype.itemsize])
    bits = jax.lax.with_sharding_constraint(_turn(bits, transpose), sharding)
    return jax.lax.bitcast_convert_type(bits, rows.dtype)


def _turn(array: jax.Array, transpose: bool) -> jax.Array:
    return array.T if transpose else array


def put(rows: jax.Array, *, transpose: bool, dtype: Any, sharding: Sharding) -> jax.Array:
    """Transposes, casts and reshards one tensor into a parameter of its own."""
    return _putter(transpose, np.dtype(dtype), sharding)(rows)


def empty_stack(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> jax.Array:
    """Makes the buffer that a stacked parameter is filled into, piece by piece."""
    return _zeros(shape, np.dtype(dtype), sharding)()


def fill(
    stack: jax.Array, rows: jax.Array, index: tuple[int, ...], *, transpose: bool, sharding: Sharding
) -> jax.Array:
    """Writes one layer (and expert) into a stacked parameter in place: `stack` is donated, use the result."""
    return _filler(transpose, sharding)(stack, rows, index)


def from_sources(
    read: Callable[[tuple[slice, ...]], np.ndarray],
    shape: tuple[int, ...],
    dtype: Any,
    sharding: NamedSharding,
    *,
    unsplit: tuple[str, ...],
    sources: np.ndarray,
) -> jax.Array:
    """Forms an array of which some devices read their shards, and send them to those that hold the same.

    What is added up are bits, of which all but one are zeros, so that -0.0 and every NaN stay what they are.

    Args:
        read: the slices of a shard -> the shard.
        unsplit: mesh axes over which the array is not split; devices that differ only along these hold the same.
        sources: whether a device reads, `bool` in the shape of the mesh; one device of those that hold the same.
    """
    mesh, unsigned = sharding.mesh, np.dtype(UNSIGNED[np.dtype(dtype).itemsize])
    ways = math.prod(mesh.shape[axis] for axis in unsplit)
    whole = (ways, *shape)
    stacked = NamedSharding(mesh, PartitionSpec(unsplit, *sharding.spec))
    reads = dict(zip(mesh.devices.flat, sources.flat, strict=True))
    pieces = []
    for device, index in stacked.addressable_devices_indices_map(whole).items():
        assert index is not None
        if reads[device]:
            piece = read(index[1:]).view(unsigned)[None]
        else:
            piece = np.zeros(stacked.shard_shape(whole), unsigned)
        pieces.append(jax.device_put(piece, device))
    return _adder(np.dtype(dtype), stacked, sharding)(jax.make_array_from_single_device_arrays(whole, stacked, pieces))


@functools.cache
def _adder(dtype: Any, stacked: NamedSharding, sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    unsplit = stacked.spec[0]

    def add(bits: jax.Array) -> jax.Array:
        total = jax.lax.psum(bits[0], unsplit)
        return total != 0 if dtype.kind == "b" else jax.lax.bitcast_convert_type(total, dtype)

    each = jax.shard_map(
        add, mesh=sharding.mesh, in_specs=stacked.spec, out_specs=sharding.spec, check_vma=False
    )  # each device brings its own, also where jax would take several for the same
    return jax.jit(each, out_shardings=sharding)


@functools.cache
def _taker(transpose: bool, scale: float | None, dtype: Any, out: Sharding | None) -> Callable:
    def take(leaves: tuple[jax.Array, ...], index: tuple[jax.Array, ...]) -> jax.Array:
        for i in index:
            leaves = tuple(jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False) for leaf in leaves)
        value = leaves[0]
        if scale is not None:
            value = add_update(*leaves, scale=scale)
        return _turn(value, transpose).astype(dtype)

    return jax.jit(take, out_shardings=out)


def add_update(kernel: jax.Array, lora_a: jax.Array, lora_b: jax.Array, *, scale: float) -> jax.Array:
    """Returns `kernel + scale * lora_a @ lora_b`, `[... in out]`, in float32 at least: the caller casts, once."""
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    update = jnp.matmul(lora_a.astype(wide), lora_b.astype(wide), precision=jax.lax.Precision.HIGHEST)
    return kernel.astype(wide) + scale * update


def take(
    leaf: jax.Array,
    index: tuple[int, ...],
    *,
    transpose: bool,
    dtype: Any,
    update: tuple[jax.Array, jax.Array, float] | None = None,
    wanted: bool = True,
) -> np.ndarray | None:
    """Brings one tensor back to the host as a checkpoint holds it; every process must call it.

    Args:
        leaf: the parameter, `[in out]` or stacked `[L in out]`, `[L E in out]`.
        index: which layer, and which expert, of a stacked parameter; empty where it is not stacked.
        dtype: of the result; cast once, at the end.
        update: an adapter's (A, B, scale), added in float32.
        wanted: whether this process wants it; the others get None, and no memory of the host is taken.
    """
    leaves: tuple[jax.Array, ...] = (leaf,)
    scale = None
    if update is not None:
        leaves, scale = (leaf, *update[:2]), update[2]
    everywhere = None
    if jax.process_count() > 1 and isinstance(leaf.sharding, NamedSharding):
        everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    taken = _taker(transpose, scale, np.dtype(dtype), everywhere)(leaves, index)
    return np.asarray(taken) if wanted else None
