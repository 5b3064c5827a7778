"""The guard against spikes: what loss and gradient norm usually are, and whether an update's lie far beyond.

Median and median deviation of the last updates that were applied: the fall at the beginning does not blur them as it
does a running mean, nor does a far value. They are leaves of the train state: exact under resume, and the same on every
host.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

WINDOW = 64  # updates that are looked back on
HISTORY = 32  # updates before any can be called a spike
_LEAST = 0.01  # of the median: deviations are never taken to be smaller
_NORMAL = 1.4826  # standard deviation over median absolute deviation, for normal values


class Guard(NamedTuple):
    """`losses` and `norms` float32 `[WINDOW]` of the last updates, NaN where there was none yet.

    `seen` int32, updates applied; `spikes` int32, updates in a row, up to now, that were not.
    """

    losses: Any
    norms: Any
    seen: Any
    spikes: Any


class Limits(NamedTuple):
    """The largest loss and gradient norm that are no spike; infinite while the guard is off or knows too little."""

    loss: Any
    norm: Any


def initial_guard() -> Guard:
    """Returns the guard before the first update."""
    none, zero = jnp.full((WINDOW,), jnp.nan, jnp.float32), jnp.zeros((), jnp.int32)
    return Guard(losses=none, norms=none + 0, seen=zero, spikes=zero + 0)


def limits(guard: Guard, factor: float | None) -> Limits:
    """Returns the limits `factor` standard deviations above the medians."""
    if factor is None:
        return Limits(jnp.float32(jnp.inf), jnp.float32(jnp.inf))

    def limit(values: jax.Array) -> jax.Array:
        median = jnp.nanmedian(values)
        deviation = _NORMAL * jnp.nanmedian(jnp.abs(values - median))
        deviation = jnp.maximum(deviation, _LEAST * jnp.abs(median))
        return jnp.where(guard.seen < HISTORY, jnp.inf, median + factor * deviation)

    return Limits(limit(guard.losses), limit(guard.norms))


def after(guard: Guard, loss: jax.Array, norm: jax.Array, applied: jax.Array) -> Guard:
    """Returns the guard after an update; one that was not applied only counts."""
    here = (jnp.arange(WINDOW) == guard.seen % WINDOW) & applied
    return Guard(
        losses=jnp.where(here, loss.astype(jnp.float32), guard.losses),
        norms=jnp.where(here, norm.astype(jnp.float32), guard.norms),
        seen=guard.seen + applied.astype(jnp.int32),
        spikes=jnp.where(applied, 0, guard.spikes + 1),
    )
