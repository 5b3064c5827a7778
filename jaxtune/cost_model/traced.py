"""What a traced function computes and keeps, before any compiler has seen it."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def matmul_flops(traced: Any) -> float:
    """Returns the FLOPs of a (closed) jaxpr's matrix products: 2 m n k each, those of loops times their length.

    Of a conditional's branches the costliest counts; a while loop's body counts once, for its trips are not known. What
    is computed again in a backward pass (`jax.checkpoint`) stands in the jaxpr again and is counted again.
    """
    jaxpr = getattr(traced, "jaxpr", traced)
    return sum(_flops(equation) for equation in jaxpr.eqns)


def _flops(equation: Any) -> float:
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        summed = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * summed
    if name.startswith("ragged_dot"):
        return _ragged(equation)
    inner = list(_inner(equation.params))
    if name == "cond":
        return max(map(matmul_flops, inner), default=0.0)
    times = equation.params["length"] if name == "scan" else 1
    return times * sum(map(matmul_flops, inner))


def _ragged(equation: Any) -> float:
    """Rows `[m k]` times the matrix of their group, or the gradient by the matrices: each row meets one of them."""
    left, right = (var.aval.shape for var in equation.invars[:2])
    out = equation.outvars[0].aval.shape
    if len(right) == 3:  # [groups k n]
        return 2.0 * math.prod(left) * out[-1]
    return 2.0 * math.prod(left) * right[-1]


def _inner(params: Any) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns") or hasattr(getattr(item, "jaxpr", None), "eqns"):
                yield item


def residual_bytes(function: Callable[..., Any], trained: Any, *held: Any) -> float:
    """Returns the bytes that the forward pass of `function(trained, *held)` keeps for its gradient by `trained`.

    Arrays of the shape and dtype of an argument are taken to be that argument, which is there anyway.
    """

    def both(*trees: Any) -> Any:
        return jax.vjp(lambda tree: function(tree, *trees[1:]), trees[0])

    _, backward = jax.eval_shape(both, trained, *held)
    there = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((trained, held))}
    kept = [leaf for leaf in jax.tree.leaves(backward) if (leaf.shape, leaf.dtype) not in there]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in kept if hasattr(leaf.dtype, "itemsize"))
