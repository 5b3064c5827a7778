"""FLOPs and kept bytes of traces, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from jaxtune.cost_model.traced import matmul_flops, residual_bytes

M, K, N, STEPS = 8, 16, 32, 5
PRODUCT = 2 * M * K * N


def array(*shape: int, dtype: object = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def flops(function: object, *shapes: jax.ShapeDtypeStruct) -> float:
    return matmul_flops(jax.make_jaxpr(function)(*shapes))


@pytest.mark.parametrize(
    ("equation", "left", "right", "expected"),
    [
        ("MK,KN->MN", (M, K), (K, N), PRODUCT),
        ("KM,KN->MN", (K, M), (K, N), PRODUCT),
        ("BMK,BKN->BMN", (3, M, K), (3, K, N), 3 * PRODUCT),
        ("BTNH,BSNH->BNTS", (2, 6, 3, 4), (2, 7, 3, 4), 2 * 2 * 3 * 6 * 7 * 4),
        ("MNH,NHD->MD", (M, 3, 4), (3, 4, K), 2 * M * 3 * 4 * K),  # two contracted axes
    ],
)
def test_a_product_is_counted_by_its_sizes(
    equation: str, left: tuple[int, ...], right: tuple[int, ...], expected: int
) -> None:
    assert flops(lambda x, y: jnp.einsum(equation, x, y), array(*left), array(*right)) == expected


def test_a_loop_counts_every_turn_and_a_loop_in_a_loop_the_product() -> None:
    def turns(x: jax.Array, ws: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda carry, w: (carry @ w, None), x, ws)[0]

    one = flops(turns, array(M, K), array(STEPS, K, K))
    assert one == STEPS * 2 * M * K * K

    def nested(x: jax.Array, ws: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda carry, _: (turns(carry, ws), None), x, length=3)[0]

    assert flops(nested, array(M, K), array(STEPS, K, K)) == 3 * one


def test_a_while_loop_counts_once() -> None:
    def turns(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda carry: jnp.sum(carry) < 9, lambda carry: carry @ w, x)

    assert flops(turns, array(M, K), array(K, K)) == 2 * M * K * K


def test_of_branches_the_costliest_counts() -> None:
    def chosen(which: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
        branches = [lambda x, w: x, lambda x, w: x @ w @ w, lambda x, w: x @ w]
        return jax.lax.switch(which, branches, x, w)

    assert flops(chosen, array(dtype=jnp.int32), array(M, K), array(K, K)) == 2 * 2 * M * K * K


def test_functions_within_count_where_they_are_called() -> None:
    inner = jax.jit(lambda x, w: x @ w)
    assert flops(lambda x, w: inner(inner(x, w), w), array(M, K), array(K, K)) == 2 * 2 * M * K * K


def test_what_is_added_or_multiplied_elementwise_is_no_product() -> None:
    assert flops(lambda x, y: jnp.sum(jnp.tanh(x) * y + x), array(M, K), array(M, K)) == 0


def chain(ws: list[jax.Array], x: jax.Array) -> jax.Array:
    for w in ws:
        x = jnp.sin(x @ w)
    return jnp.sum(x)


def test_a_gradient_costs_three_times_the_products() -> None:
    """One more by each input; not by the first, which nobody asks for."""
    ws, x = [array(K, K)] * 4, array(M, K)
    forward = flops(chain, ws, x)
    assert forward == 4 * 2 * M * K * K
    assert flops(jax.grad(chain, argnums=(0, 1)), ws, x) == 3 * forward
    assert flops(jax.grad(chain), ws, x) == 3 * forward - 2 * M * K * K


def test_what_a_checkpoint_computes_again_counts_again() -> None:
    """All of the chain: the gradient of its last sine needs what the last product gives."""
    ws, x = [array(K, K)] * 4, array(M, K)
    plain = flops(jax.grad(chain, argnums=(0, 1)), ws, x)
    again = flops(jax.grad(jax.checkpoint(chain), argnums=(0, 1)), ws, x)
    assert again == plain + flops(chain, ws, x)
    kept = jax.checkpoint(chain, policy=jax.checkpoint_policies.dots_saveable)
    assert flops(jax.grad(kept, argnums=(0, 1)), ws, x) == plain


def test_a_checkpoint_in_a_loop_counts_again_in_every_turn() -> None:
    def looped(ws: jax.Array, x: jax.Array, *, again: bool) -> jax.Array:
        body = lambda carry, w: (jnp.sin(carry @ w), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(jax.checkpoint(body) if again else body, x, ws)[0])

    shapes = array(STEPS, K, K), array(M, K)
    plain = flops(jax.grad(lambda *trees: looped(*trees, again=False), argnums=(0, 1)), *shapes)
    assert plain == STEPS * 3 * 2 * M * K * K
    again = flops(jax.grad(lambda *trees: looped(*trees, again=True), argnums=(0, 1)), *shapes)
    assert again == plain + STEPS * 2 * M * K * K


def test_of_groups_of_rows_each_row_meets_one_matrix() -> None:
    """Forward, and the gradients by rows and by matrices."""
    rows, matrices, sizes = array(M, K), array(4, K, N), array(4, dtype=jnp.int32)

    def product(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, matrices, sizes)

    assert flops(product, rows, matrices, sizes) == PRODUCT

    def loss(*arrays: jax.Array) -> jax.Array:
        return jnp.sum(product(*arrays) ** 2)

    assert flops(jax.grad(loss, argnums=(0, 1)), rows, matrices, sizes) == 3 * PRODUCT


BYTES = 4 * M * K  # of an activation in the functions below


def test_what_is_kept_is_what_the_gradient_needs() -> None:
    """A sine keeps its cosine, a product its inputs; the first of them, and the matrices, are arguments."""
    ws = [array(N, K), array(K, K), array(K, K)]
    assert residual_bytes(chain, ws, array(M, N)) == (3 + 2) * BYTES


def test_an_activation_of_the_shape_and_dtype_of_an_argument_is_taken_for_it() -> None:
    ws = [array(K, K)] * 3
    assert residual_bytes(chain, ws, array(M, K)) == 0


def test_dtypes_decide_how_much_it_is() -> None:
    ws = [array(N, K, dtype=jnp.bfloat16), array(K, K, dtype=jnp.bfloat16)]
    assert residual_bytes(chain, ws, array(M, N, dtype=jnp.bfloat16)) == (2 + 1) * BYTES // 2


def test_what_nobody_trains_keeps_no_inputs() -> None:
    """x @ frozen needs no x for the gradient by the matrix before it."""

    def both(w: jax.Array, frozen: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum((x @ w) @ frozen)

    trained, frozen, x = array(N, K), array(K, K), array(M, N)
    assert residual_bytes(both, trained, frozen, x) == 0
    squared = residual_bytes(lambda *trees: both(*trees) ** 2, trained, frozen, x)
    assert squared == 4, "the sum alone"


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (jax.checkpoint_policies.nothing_saveable, 0),
        (jax.checkpoint_policies.everything_saveable, 5),
        (jax.checkpoint_policies.dots_saveable, 3),
        (jax.checkpoint_policies.save_only_these_names("second"), 1),
    ],
)
def test_policies_of_checkpoints_decide_what_is_kept(policy: object, kept: int) -> None:
    def named(ws: list[jax.Array], x: jax.Array) -> jax.Array:
        for number, w in enumerate(ws):
            x = checkpoint_name(x @ w, ("first", "second", "third")[number])
            x = jnp.sin(x)
        return jnp.sum(x)

    ws = [array(N, K), array(K, K), array(K, K)]
    found = residual_bytes(jax.checkpoint(named, policy=policy), ws, array(M, N))
    assert found == kept * BYTES


def test_a_loop_keeps_for_every_turn() -> None:
    def looped(ws: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(lambda carry, w: (jnp.sin(carry @ w), None), x, ws)[0])

    def again(ws: jax.Array, x: jax.Array) -> jax.Array:
        body = jax.checkpoint(lambda carry, w: (jnp.sin(jnp.cos(carry) @ w), None))
        return jnp.sum(jax.lax.scan(body, x, ws)[0])

    ws, x = array(STEPS, K, K), array(M, K)
    assert residual_bytes(looped, ws, x) == 2 * STEPS * BYTES, "what goes into each turn, and the cosine"
    assert residual_bytes(again, ws, x) == STEPS * BYTES, "what goes in"
