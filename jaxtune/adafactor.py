"""Adafactor (Shazeer & Stern 2018) with its scales taken matrix by matrix, as T5X takes them.

optax's `adafactor` clips an update by the root mean square of a whole leaf, and scales it by that of its parameter. Our
layers are stacked in one leaf, so the largest layer would decide for all of them; here every layer (and expert) is
measured by itself, and a stacked model is updated exactly as its layers would be one by one.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxtune.sharding import own_shape

STACKING = ("layers", "experts")  # logical axes that only hold matrices side by side
SMALLEST_SCALE = 1e-3  # of a parameter: one that begins at zero has to begin to move (epsilon 2 of the paper)


def adafactor(
    learning_rate: optax.ScalarOrSchedule,
    min_dim_size_to_factor: int = 128,
    decay_rate: float = 0.8,
    decay_offset: int = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: float | None = 1.0,
    momentum: float | None = None,
    weight_decay_rate: float | None = None,
    eps: float = 1e-30,
    factored: bool = True,
    weight_decay_mask: Any = None,
) -> optax.GradientTransformation:
    """Returns the optimizer, for states of nnx variables that name their axes; arguments and defaults are optax's.

    The defaults are T5X's settings (t5x/examples/t5/t5_1_1/base.gin).
    """
    steps = [optax.scale_by_factored_rms(factored, decay_rate, decay_offset, min_dim_size_to_factor, eps)]
    if clipping_threshold is not None:
        steps.append(_by_matrix(lambda u, p, rms: u / jnp.maximum(1.0, rms(u) / clipping_threshold)))
    steps.append(optax.scale_by_learning_rate(learning_rate, flip_sign=False))
    if multiply_by_parameter_scale:
        steps.append(_by_matrix(lambda u, p, rms: u * jnp.maximum(rms(p), SMALLEST_SCALE)))
    if momentum is not None:
        steps.append(optax.ema(momentum, debias=False))
    if weight_decay_rate is not None:
        steps.append(optax.add_decayed_weights(weight_decay_rate, mask=weight_decay_mask))
    return optax.chain(*steps, optax.scale(-1.0))


def _by_matrix(change: Callable[[jax.Array, jax.Array, Callable[[jax.Array], jax.Array]], jax.Array]) -> Any:
    """Returns the transformation `change(update, parameter, rms)`; `rms` is over the axes that do not only stack."""

    def one(update: nnx.Variable, parameter: nnx.Variable) -> nnx.Variable:
        axes, shape = parameter.get_metadata()["axes"], own_shape(parameter)
        own = tuple(place for place, axis in enumerate(axes) if axis not in STACKING)
        size = math.prod(shape[place] for place in own)  # a vocabulary's padding is 0 in every sum, and not counted

        def rms(x: jax.Array) -> jax.Array:
            return jnp.sqrt(jnp.sum(jnp.square(x), axis=own, keepdims=True) / size)

        return update.replace(change(update.get_value(), parameter.get_value(), rms))

    def update_all(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(one, updates, params, is_leaf=lambda node: isinstance(node, nnx.Variable)), state

    return optax.GradientTransformation(optax.init_empty_state, update_all)
