"""Rows sorted by expert come back as they went, and every grouped matmul is the reference, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.models import exchange, grouped
from jaxtune.models.grouped import collect, sort_rows, spread


def test_rows_are_sorted_as_drawn():
    found = sort_rows(jnp.array([2, 0, 0, 1, 2, 1]), count=3)
    assert found.order.tolist() == [1, 2, 3, 5, 0, 4]
    assert found.place.tolist() == [4, 0, 1, 2, 5, 3]
    assert found.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.sizes.tolist() == [2, 2, 2, 0]


def test_spread_and_collect_are_index_and_scatter_with_their_gradients():
    n, k, D = 7, 3, 5
    group = jax.random.randint(jax.random.key(0), (n * k,), 0, 4)
    order, place, _, _ = sort_rows(group, count=4)
    x, rows = jax.random.normal(jax.random.key(1), (n, D)), jax.random.normal(jax.random.key(2), (n * k, D))
    found, back = jax.vjp(lambda x: spread(x, order, place, k), x)
    expected, back_expected = jax.vjp(lambda x: x[order // k], x)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(back(rows)[0], back_expected(rows)[0], rtol=1e-6)
    found, back = jax.vjp(lambda rows: collect(rows, order, place, k), rows)
    expected, back_expected = jax.vjp(lambda rows: jnp.zeros((n, D)).at[order // k].add(rows), rows)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(back(x)[0], back_expected(x)[0])


@pytest.mark.parametrize(
    ("sizes", "m"),
    [
        pytest.param([100, 0, 28, 128], 256, id="an empty group"),
        pytest.param([0, 0, 0, 256], 256, id="all in the last"),
        pytest.param([30, 50, 0, 20, 156], 256, id="rows of no group"),
        pytest.param([3, 0, 7, 9, 1], 20, id="few rows"),
        pytest.param([100, 51, 0, 149], 300, id="no multiple of a block"),
        pytest.param([0, 0, 0, 0, 40], 40, id="no rows at all"),
    ],
)
@pytest.mark.parametrize("width", [32, 4])
def test_megablox_is_the_reference(sizes, m, width):
    keys = jax.random.split(jax.random.key(0), 3)
    rows, kernels = jax.random.normal(keys[0], (m, 24)), jax.random.normal(keys[1], (4, 24, width))
    slope = jax.random.normal(keys[2], (m, width))
    moved = []
    for matmul in (grouped.megablox_interpreted, grouped.ragged_dot):
        y, back = jax.vjp(lambda rows, kernels, f=matmul: f(rows, kernels, jnp.array(sizes)), rows, kernels)
        moved.append((y, *back(slope)))
    for ours, theirs in zip(*moved, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert not np.any(moved[0][0][sum(sizes[:4]) :]) and not np.any(moved[0][1][sum(sizes[:4]) :])


def test_reference_is_the_definition():
    rows, kernels = jax.random.normal(jax.random.key(0), (9, 4)), jax.random.normal(jax.random.key(1), (3, 4, 5))
    found = grouped.ragged_dot(rows, kernels, jnp.array([2, 0, 4, 3]))
    expected = np.zeros((9, 5), np.float32)
    expected[:2], expected[2:6] = rows[:2] @ kernels[0], rows[2:6] @ kernels[2]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("m", "k", "n"), [(32768, 2048, 768), (262144, 2880, 5760), (8192, 4096, 14336), (16384, 2048, 16), (300, 64, 96)]
)
@pytest.mark.parametrize("groups", [8, 128])
def test_blocks_fit_the_vector_memory(m, k, n, groups):
    rows, inner, outer = grouped._Tiling(grouped._row_tile(m, groups))(m, k, n)
    assert inner == k or inner % 128 == 0
    assert outer == n or outer % 128 == 0
    kernel, left, right = 2 * inner * outer, 2 * rows * inner, 2 * rows * outer  # bytes, in bfloat16
    forward = 2 * (kernel + left + right) + 2 * right
    by_kernels = 2 * (kernel + left + right) + 2 * kernel
    assert max(forward, by_kernels) < 28 * 2**20


def test_table_of_platforms():
    assert grouped.resolve("tpu") == (grouped.megablox, exchange.ragged)
    assert grouped.resolve("gpu") == (grouped.ragged_dot, exchange.ragged)
    assert grouped.resolve("cpu") == (grouped.ragged_dot, exchange.gathered)
