"""The fused loss against the textbook formula, on one device and on meshes, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.loss import token_losses
from jaxtune.sharding import make_mesh

B, T, D = 8, 24, 16


def _inputs(V: int) -> tuple:
    keys = jax.random.split(jax.random.key(0), 5)
    weights = (jax.random.uniform(keys[3], (B, T)) > 0.6) * jax.random.uniform(keys[4], (B, T))
    return (
        jax.random.normal(keys[0], (B, T, D), jnp.float64),
        jax.random.normal(keys[1], (D, V), jnp.float64),
        jax.random.randint(keys[2], (B, T), 0, V),
        weights,
    )


def _textbook(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple:
    nll = -jnp.take_along_axis(jax.nn.log_softmax(hidden @ head), targets[..., None], axis=-1)[..., 0]
    return jnp.sum(nll * weights), nll


MESHES = [
    None,
    {"fsdp": 8},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"tensor": 8},
    {"fsdp": 2, "context": 2, "tensor": 2},
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("V", [64, 63])
def test_losses_and_gradients_equal_the_textbook_formula(sizes: dict | None, V: int) -> None:
    with jax.enable_x64(True):
        hidden, head, targets, weights = _inputs(V)
        (expected, nll), gradients = jax.value_and_grad(_textbook, argnums=(0, 1), has_aux=True)(
            hidden, head, targets, weights
        )

        def ours(hidden: jax.Array, head: jax.Array, train_head: bool = True) -> tuple:
            losses = token_losses(
                hidden, head, targets=targets, weights=weights, train_head=train_head, vocab_size=V, chunk=7
            )
            return losses.total, losses

        def check() -> None:
            (total, losses), found = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(hidden, head)
            np.testing.assert_allclose(total, expected, rtol=1e-12)
            np.testing.assert_allclose(found[0], gradients[0], atol=1e-12)
            np.testing.assert_allclose(found[1], gradients[1], atol=1e-12)
            np.testing.assert_allclose(losses.nll, jnp.where(weights > 0, nll, 0), atol=1e-12)
            np.testing.assert_array_equal(
                losses.correct, (jnp.argmax(hidden @ head, axis=-1) == targets) & (weights > 0)
            )
            frozen = jax.jit(jax.grad(lambda h, w: 3 * ours(h, w, False)[0], argnums=(0, 1)))(hidden, head)
            np.testing.assert_allclose(frozen[0], 3 * gradients[0], atol=1e-11)
            assert not np.any(frozen[1])

        if sizes is None:
            check()
        else:
            with jax.set_mesh(make_mesh(sizes)):
                check()


def test_a_batch_without_trained_tokens_costs_nothing_and_has_no_gradient() -> None:
    hidden, head, targets, weights = (x.astype(jnp.float32) for x in _inputs(64))

    def total(hidden: jax.Array) -> jax.Array:
        return token_losses(
            hidden, head, targets=targets.astype(int), weights=0 * weights, train_head=True, vocab_size=64
        ).total

    value, gradient = jax.value_and_grad(total)(hidden)
    assert value == 0 and not np.any(gradient)


def test_logits_of_the_whole_batch_never_exist() -> None:
    V = 4096
    hidden, head, targets, weights = (
        jax.ShapeDtypeStruct(s, d)
        for s, d in (
            ((8, 512, 16), jnp.float32),
            ((16, V), jnp.float32),
            ((8, 512), jnp.int32),
            ((8, 512), jnp.float32),
        )
    )

    def total(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        return token_losses(
            hidden, head, targets=targets, weights=weights, train_head=True, vocab_size=V, chunk=256
        ).total

    compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(hidden, head, targets, weights).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 512 * V * 4 / 3
