"""Rows sent to the devices of their experts and back, along the mesh's expert axis.

P devices of an expert group, m rows of each, E experts, E / P on each device. Nothing is dropped: the arrays that
receive have room for all rows that could come, and what comes stands in them sender after sender:

    device 0 sends   [a a b]  (a: expert of device 0, b: of device 1)     receives  [a a c . . .]
    device 1 sends   [c d d]  (c: expert of device 0, d: of device 1)     receives  [b d d . . .]
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

AXIS = "expert"


class Route(NamedTuple):
    """What one exchange sends, int32 `[P]` each, by the other device.

    `starts`: where the rows for it begin here. `sizes`: how many they are. `places`: where they go to there.
    `arriving`: how many rows come from it.
    """

    starts: jax.Array
    sizes: jax.Array
    places: jax.Array
    arriving: jax.Array


Collective = Callable[[jax.Array, Route, int], jax.Array]


def routes(sizes: jax.Array, devices: int) -> tuple[Route, Route, jax.Array]:
    """Returns the way there, the way back, and how many rows of each expert here come from each device `[P E/P]`.

    Args:
        sizes: int32 `[E]`, rows of each expert on this device, which stand in the order of the experts.
    """
    me = jax.lax.axis_index(AXIS)
    by_expert = jax.lax.all_gather(sizes, AXIS).reshape(devices, devices, -1)  # sender, receiver, expert
    rows = jnp.sum(by_expert, axis=2)
    starts = jnp.cumsum(rows, axis=1) - rows  # in the sender's rows
    places = jnp.cumsum(rows, axis=0) - rows  # in the receiver's
    there = Route(starts[me], rows[me], places[me], rows[:, me])
    back = Route(places[:, me], rows[:, me], starts[:, me], rows[me])
    return there, back, by_expert[:, me]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def exchange(rows: jax.Array, route: Route, back: Route, size: int, collective: Collective) -> jax.Array:
    """Sends rows `[m D]` by a route and returns those that came, `[size D]`, zeros behind them.

    Args:
        back: the route by which the result would return; the gradient takes it.
    """
    return collective(rows, route, size)


def _forward(rows: jax.Array, route: Route, back: Route, size: int, collective: Collective) -> Any:
    return collective(rows, route, size), (route, back, rows.shape[0])


def _backward(size: int, collective: Collective, saved: Any, slope: jax.Array) -> Any:
    route, back, m = saved
    return exchange(slope, back, route, m, collective), None, None


exchange.defvjp(_forward, _backward)


def ragged(rows: jax.Array, route: Route, size: int) -> jax.Array:
    """Exchanges by the collective of TPU and GPU, which sends each row once."""
    return jax.lax.ragged_all_to_all(
        rows,
        jnp.zeros((size, *rows.shape[1:]), rows.dtype),
        route.starts,
        route.sizes,
        route.places,
        route.arriving,
        axis_name=AXIS,
    )


def gathered(rows: jax.Array, route: Route, size: int) -> jax.Array:
    """Exchanges as `ragged` does by showing every row to every device: for CPU, which has no such collective."""
    me = jax.lax.axis_index(AXIS)
    everything = jax.lax.all_gather(rows, AXIS)
    starts, sizes, places = (jax.lax.all_gather(array, AXIS)[:, me] for array in route[:3])
    index = jnp.arange(size)[:, None]
    is_from = (index >= places) & (index < places + sizes)  # [size P]
    sender = jnp.argmax(is_from, axis=1)
    row = starts[sender] + index[:, 0] - places[sender]
    return jnp.where(jnp.any(is_from, axis=1)[:, None], everything[sender, row], 0)


def experts_of(counts: jax.Array, size: int) -> jax.Array:
    """Returns the expert, int32 `[size]`, of rows that stand by sender and expert; the number of experts behind them.

    Args:
        counts: int32 `[P E]`. With [[1 2] [0 1]] and size 6 the result is [0 1 1 1 2 2].
    """
    ends = jnp.cumsum(counts.reshape(-1))
    block = jnp.sum(jnp.arange(size)[:, None] >= ends, axis=1, dtype=jnp.int32)
    return jnp.where(block < ends.shape[0], block % counts.shape[1], counts.shape[1])
