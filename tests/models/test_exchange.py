"""Rows go to their experts' devices and back, as drawn; the gradient takes the other way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxtune.models.exchange import exchange, experts_of, gathered, ragged, routes
from jaxtune.sharding import make_mesh

P, ROOM = 2, 6


def on_devices(function, *arrays):
    """Runs a function on each of two devices with its part of the arrays' first axis."""
    mesh = make_mesh({"expert": P}, jax.devices()[:P])
    spec = PartitionSpec("expert")
    with jax.set_mesh(mesh):
        return jax.jit(jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False))(*arrays)


def test_rows_arrive_as_drawn():
    rows = jnp.array([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])  # a a b | c d d
    sizes = jnp.array([2, 1, 1, 2])

    def there(rows, sizes):
        route, back, _ = routes(sizes, P)
        return exchange(rows, route, back, ROOM, gathered)

    found = on_devices(there, rows, sizes).reshape(P, ROOM)
    np.testing.assert_array_equal(found, [[1, 2, 4, 0, 0, 0], [3, 5, 6, 0, 0, 0]])


def test_there_and_back_changes_nothing_and_the_gradient_takes_the_other_way():
    rows, slope = jax.random.normal(jax.random.key(0), (6, 3)), jax.random.normal(jax.random.key(1), (12, 3))
    sizes = jnp.array([0, 3, 2, 1])  # device 0 keeps nothing

    def both(rows, sizes, slope):
        route, back, _ = routes(sizes, P)
        came, backward = jax.vjp(lambda rows: exchange(rows, route, back, ROOM, gathered), rows)
        return exchange(came, back, route, 3, gathered), backward(slope)[0], came

    returned, gradient, came = on_devices(both, rows, sizes, slope)
    np.testing.assert_array_equal(returned, rows)
    moved = slope.reshape(P, ROOM, 3)
    expected = [moved[1, 0], moved[1, 1], moved[1, 2], moved[0, 0], moved[0, 1], moved[1, 3]]
    np.testing.assert_array_equal(gradient, jnp.stack(expected))
    assert float(jnp.vdot(came, slope)) == pytest.approx(float(jnp.vdot(rows, gradient)), rel=1e-5)


def test_the_collective_of_accelerators_is_asked_for_the_same():
    """CPU cannot run it: what it is asked for is seen in what is traced."""

    def there(rows, sizes):
        route, back, _ = routes(sizes, P)
        return exchange(rows, route, back, ROOM, ragged)

    mesh = make_mesh({"expert": P}, jax.devices()[:P])
    spec = PartitionSpec("expert")
    with jax.set_mesh(mesh):
        run = jax.shard_map(there, in_specs=spec, out_specs=spec, check_vma=False)
        both = jax.value_and_grad(lambda rows, sizes: run(rows, sizes).sum())
        text = str(jax.make_jaxpr(both)(jnp.zeros((6, 3)), jnp.zeros((4,), jnp.int32)))
    assert text.count("ragged_all_to_all[") == 2


def test_experts_of_rows_that_came():
    assert experts_of(jnp.array([[1, 2], [0, 1]]), 6).tolist() == [0, 1, 1, 1, 2, 2]
