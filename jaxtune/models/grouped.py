"""Rows sorted by expert: the way there and back, and matrix products group by group, with a kernel for each platform.

n tokens, k experts of each, m = n k rows, E experts, D model width. Three tokens of two experts each, E = 3:

    experts of tokens   [[2 0] [0 1] [2 1]]     rows 0 1 | 2 3 | 4 5, row r is token r // 2
    order               [1 2 3 5 0 4]           which row stands at each sorted place: experts 0 0 1 1 2 2
    place               [4 0 1 2 5 3]           where each row stands

Sorting is one sort of one array, and no gradient is a scatter: on TPU a stable sort of pairs, or a scatter that adds,
takes seconds to compile each, several times a layer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.models.exchange import Collective, gathered, ragged

Matmul = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Order(NamedTuple):
    """How rows are sorted by group; see the picture above.

    `group` int32 `[m]` of each sorted row; `sizes` int32 `[E + 1]`, the last counts the rows of no group here.
    """

    order: jax.Array
    place: jax.Array
    group: jax.Array
    sizes: jax.Array


def sort_rows(group: jax.Array, *, count: int) -> Order:
    """Sorts rows by their group, int32 `[m]` from 0 to `count`; rows of one group keep their order."""
    m = group.shape[0]
    assert (count + 1) * m < 2**31, f"{m} rows of {count} experts on one device do not fit the keys"
    index = jnp.arange(m, dtype=jnp.int32)
    keys = jax.lax.sort(group * m + index, is_stable=False)  # all different
    order = keys % m
    place = jnp.zeros_like(order).at[order].set(index, unique_indices=True)
    sizes = jnp.sum(group[:, None] == jnp.arange(count + 1), axis=0, dtype=jnp.int32)
    return Order(order, place, keys // m, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def spread(x: jax.Array, order: jax.Array, place: jax.Array, k: int) -> jax.Array:
    """Copies tokens `[n ...]` to sorted rows `[m ...]`, k of each."""
    return x[order // k]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def collect(rows: jax.Array, order: jax.Array, place: jax.Array, k: int) -> jax.Array:
    """Adds sorted rows `[m ...]` up to tokens `[n ...]`: the transpose of `spread`."""
    by_token = rows[place].reshape(-1, k, *rows.shape[1:])
    return jnp.sum(by_token, axis=1) if k > 1 else by_token[:, 0]


def _spread_forward(x: jax.Array, order: jax.Array, place: jax.Array, k: int) -> Any:
    return spread(x, order, place, k), (order, place)


def _collect_forward(rows: jax.Array, order: jax.Array, place: jax.Array, k: int) -> Any:
    return collect(rows, order, place, k), (order, place)


spread.defvjp(_spread_forward, lambda k, saved, slope: (collect(slope, *saved, k), None, None))
collect.defvjp(_collect_forward, lambda k, saved, slope: (spread(slope, *saved, k), None, None))


def ragged_dot(rows: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """Multiplies rows `[m in]`, sorted by group, each by the kernel `[E in out]` of its group: the plain reference.

    Args:
        sizes: rows of each group, int32 `[E]`, or `[E + 1]` where the last counts rows of no group: these give 0.
    """
    count = kernels.shape[0]
    y = jax.lax.ragged_dot(rows, kernels, sizes[:count])
    if sizes.shape[0] == count:
        return y
    return jnp.where((jnp.arange(len(rows)) < len(rows) - sizes[-1])[:, None], y, 0)


def megablox(rows: jax.Array, kernels: jax.Array, sizes: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Multiplies as `ragged_dot` does, by jax's grouped matmul kernels for TPU.

    libtpu has a kernel for `ragged_dot` too, but none for its gradient by the kernels, which it multiplies out over all
    experts (190 times the cycles for 128 of them), and the gradient by the rows copies the kernels transposed.
    """
    from jax.experimental.pallas.ops.tpu.megablox import ops

    m, count = rows.shape[0], kernels.shape[0]
    tile = _row_tile(m, count)
    missing = -m % tile
    if missing:
        rows = jnp.pad(rows, [(0, missing), (0, 0)])
        if sizes.shape[0] == count:
            sizes = jnp.append(sizes, 0)
        sizes = sizes.at[-1].add(missing)
    return ops.gmm(rows, kernels, sizes, rows.dtype, _Tiling(tile), None, None, False, interpret)[:m]


def megablox_interpreted(rows: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """Multiplies as `megablox` does, with the kernels interpreted: slow, and the same on any machine."""
    return megablox(rows, kernels, sizes, interpret=True)


class _Tiling(NamedTuple):
    """Says the sizes of the blocks that the kernels take at a time, from the shape (m, in, out) of a product."""

    rows: int

    def __call__(self, m: int, k: int, n: int) -> tuple[int, int, int]:
        # A group's kernel stays in vector memory from one block of rows to the next if `in` is one block.
        return self.rows, _block(k, 2048), _block(n, 768)


def _row_tile(m: int, groups: int) -> int:
    """Returns how many rows make a block: a group's last block is computed whole, so few where groups are small."""
    if m < 128:
        return -(-m // 16) * 16
    return 512 if m >= 2048 * groups else 256 if m >= 512 * groups else 128


def _block(size: int, limit: int) -> int:
    """Returns a block of at most `limit` of which `size` is a multiple, or nearly `size`, which then is one block."""
    if size <= limit or size % 128:
        return min(size, limit * 3 // 2)
    return max(block for block in range(128, limit + 1, 128) if size % block == 0)


class Kernels(NamedTuple):
    """How experts are computed on a platform: products group by group, and rows sent to other devices."""

    matmul: Matmul
    collective: Collective


REFERENCE = Kernels(ragged_dot, gathered)
PLATFORMS: dict[str, Kernels] = {
    "tpu": Kernels(megablox, ragged),
    **dict.fromkeys(("gpu", "cuda", "rocm"), Kernels(ragged_dot, ragged)),
}


def resolve(platform: str) -> Kernels:
    """Returns the kernels for the platform of a mesh's devices (`device.platform`)."""
    return PLATFORMS.get(platform, REFERENCE)
