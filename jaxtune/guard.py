"""The guard against spikes: what loss and gradient norm usually are, and whether an update's lie far beyond.

Its numbers are leaves of the train state: exact under resume, and the same on every host.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

HISTORY = 20  # updates before any can be called a spike
_LONGEST = 100  # updates that the running means reach back
_CLIP = 3.0  # deviations: a far value moves the means as one at this distance would
_LEAST = 0.01  # of the mean: deviations are never taken to be smaller
_NORMAL = 1.2533  # standard deviation over mean absolute deviation, for normal values


class Running(NamedTuple):
    """Running mean and deviation of one number, float32 scalars."""

    mean: Any
    deviation: Any


class Guard(NamedTuple):
    """What is usual: `loss` and `norm` over `seen` updates (int32); `spikes` int32, updates not applied in a row."""

    loss: Running
    norm: Running
    seen: Any
    spikes: Any


class Limits(NamedTuple):
    """The largest loss and gradient norm that are no spike; infinite while the guard is off or knows too little."""

    loss: Any
    norm: Any


def initial_guard() -> Guard:
    """Returns the guard before the first update."""

    def running() -> Running:
        return Running(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

    return Guard(running(), running(), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def limits(guard: Guard, factor: float | None) -> Limits:
    """Returns the limits `factor` deviations above the means."""
    if factor is None:
        return Limits(jnp.float32(jnp.inf), jnp.float32(jnp.inf))

    def limit(running: Running) -> jax.Array:
        return jnp.where(guard.seen < HISTORY, jnp.inf, running.mean + factor * _deviation(running))

    return Limits(limit(guard.loss), limit(guard.norm))


def after(guard: Guard, loss: jax.Array, norm: jax.Array, applied: jax.Array) -> Guard:
    """Returns the guard after an update; one that was not applied only counts."""
    seen = jnp.where(applied, guard.seen + 1, guard.seen)
    share = 1 / jnp.minimum(guard.seen + 1, _LONGEST).astype(jnp.float32)

    def moved(running: Running, value: jax.Array) -> Running:
        far = jnp.where(guard.seen < HISTORY, jnp.inf, _CLIP * _deviation(running))
        distance = jnp.clip(value.astype(jnp.float32) - running.mean, -far, far)
        first = guard.seen == 0
        mean = running.mean + share * distance
        deviation = running.deviation + share * (jnp.where(first, 0.0, _NORMAL * jnp.abs(distance)) - running.deviation)
        return Running(jnp.where(applied, mean, running.mean), jnp.where(applied, deviation, running.deviation))

    spikes = jnp.where(applied, 0, guard.spikes + 1)
    return Guard(moved(guard.loss, loss), moved(guard.norm, norm), seen, spikes)


def _deviation(running: Running) -> jax.Array:
    return jnp.maximum(running.deviation, _LEAST * jnp.abs(running.mean))
