"""What keeps the experts of a sparse model in balance, from the routers' sums."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.models.experts import RouterSums


def load_balance(sums: RouterSums) -> jax.Array:
    """Returns E x sum over experts of (share of tokens that chose it) x (its mean probability), over all layers.

    k where all experts are chosen alike, more where few are. Tokens and layers are counted together, padding is not
    (Switch Transformer, equations 4-6, over all layers at once as transformers' `load_balancing_loss_func` takes it).

    Args:
        sums: of all sparse layers, `selected` and `probabilities` `[layers E]`.
    """
    tokens = jnp.maximum(jnp.sum(sums.tokens), 1)
    share = jax.lax.stop_gradient(jnp.sum(sums.selected, axis=0)) / tokens
    probability = jnp.sum(sums.probabilities, axis=0) / tokens
    return sums.selected.shape[-1] * jnp.sum(share * probability)


def z_loss(sums: RouterSums) -> jax.Array:
    """Returns the mean squared log-normalizer of the routers' scores (ST-MoE, equation 5)."""
    return jnp.sum(sums.z) / jnp.maximum(jnp.sum(sums.tokens), 1)


class RouterMetrics(NamedTuple):
    """What is logged of routers: scalars. Both losses are without coefficients.

    `busiest`: how many times an even share the busiest expert of any layer has. `unused`: how many experts, of all
    layers, no token chose.
    """

    load_balance: Any
    z_loss: Any
    busiest: Any
    unused: Any


def router_metrics(sums: RouterSums) -> RouterMetrics:
    """Returns what is logged of the routers of an update."""
    even = jnp.maximum(jnp.mean(sums.selected, axis=-1), 1e-9)
    busiest = jnp.max(jnp.max(sums.selected, axis=-1) / even)
    return RouterMetrics(load_balance(sums), z_loss(sums), busiest, jnp.sum(sums.selected == 0))
