"""Low-rank adapters: attach them to a model's linear layers, say what is trained, merge them.

An adapter adds `scale * (x @ A) @ B` to a linear layer, scale = alpha / r. A is drawn, B starts at zero, so that an
adapted model begins as the model it adapts. Both inherit from their kernel: A `[in r]` the input axis, B `[r out]` the
output axis, stacked on L where the kernel is; r is not split.
"""

import difflib
import math
import zlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.models.experts import ExpertLinear, RouterParam
from jaxtune.models.layers import Linear, LoRAParam
from jaxtune.placement import add_update
from jaxtune.sharding import own_shape

ALL_LINEAR = "all-linear"


def attach(
    model: nnx.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: str | Sequence[str],
    key: jax.Array,
) -> tuple[str, ...]:
    """Gives linear layers of the model an adapter, in place, and returns their names; works under `nnx.eval_shape`.

    Args:
        rank, alpha: size r, and strength over r.
        dropout: rate on the adapter's input while training.
        targets: all-linear (every linear layer but the head; in a model with experts those of attention), or names
            and globs such as q_proj, mlp.* or experts.*.
        key: typed jax key of the A matrices.

    Raises:
        ValueError: a target that names no linear layer; lists the choices and the nearest.
    """
    chosen = _choose(model, targets)
    for path, linear in linear_layers(model):
        if linear.name in chosen:
            site = jax.random.fold_in(key, zlib.crc32("/".join(map(str, path)).encode()))
            _attach_one(linear, rank=rank, alpha=alpha, dropout=dropout, key=site)
    return chosen


def linear_layers(model: nnx.Module) -> Iterator[tuple[tuple[Any, ...], Linear | ExpertLinear]]:
    """Yields (path, layer) of every linear layer that may have an adapter.

    The head is left out, as PEFT's all-linear does: the loss multiplies by its kernel in chunks. So are experts whose
    matrices a checkpoint holds in one tensor, for which PEFT has no adapter of this form.
    """
    for path, node in nnx.iter_graph(model):
        is_one = isinstance(node, Linear) and node.name != "lm_head"
        if is_one or (isinstance(node, ExpertLinear) and node.adaptable):
            yield path, node


def _choose(model: nnx.Module, targets: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the names that the targets ask for, in the model's order."""
    names: dict[str, set[str]] = {}  # name -> what a glob may match: the name, and the name with its block
    of_mlp: set[str] = set()
    for path, linear in linear_layers(model):
        names.setdefault(linear.name, set()).update({linear.name, f"{path[-2]}.{linear.name}"})
        if "mlp" in path:
            of_mlp.add(linear.name)
    if targets == ALL_LINEAR:
        # PEFT takes an adapter on gate_proj in a model with experts for one on all the experts, dense layers or not.
        is_sparse = any(isinstance(node, ExpertLinear) for _, node in nnx.iter_graph(model))
        return tuple(name for name in names if not (is_sparse and name in of_mlp))
    asked = [targets] if isinstance(targets, str) else list(targets)
    chosen: set[str] = set()
    for target in asked:
        found = {name for name, spellings in names.items() if any(fnmatchcase(s, target) for s in spellings)}
        if not found:
            nearest = difflib.get_close_matches(target, names, n=1)
            raise ValueError(
                f"tuning.targets: found {target!r}, which names no linear layer of this model; expected "
                f"{ALL_LINEAR} or some of {', '.join(names)}" + (f"; nearest: {nearest[0]!r}" if nearest else "")
            )
        chosen |= found
    if not chosen:
        raise ValueError(f"tuning.targets: found none; expected {ALL_LINEAR} or some of {', '.join(names)}")
    return tuple(name for name in names if name in chosen)


def _attach_one(linear: Linear | ExpertLinear, *, rank: int, alpha: float, dropout: float, key: jax.Array) -> None:
    *stack, in_size, out_size = linear.kernel.shape
    *stack_axes, in_axis, out_axis = linear.kernel.get_metadata()["axes"]
    # PEFT's draw: kaiming_uniform_(a=sqrt(5)) on [r in], which is uniform within 1/sqrt(in).
    bound = 1.0 / math.sqrt(in_size)
    drawn = jax.random.uniform(key, (*stack, in_size, rank), jnp.float32, -bound, bound)
    zeros = jnp.zeros((*stack, rank, out_size), jnp.float32)
    linear.lora_a = LoRAParam(drawn, axes=(*stack_axes, in_axis, None), scale=alpha / rank, dropout=dropout)
    linear.lora_b = LoRAParam(zeros, axes=(*stack_axes, None, out_axis))


def trainable_filter(method: str, *, routers: str = "train") -> Any:
    """Returns the nnx filter of the variables that a method trains; `nnx.split(model, filter, ...)`.

    Args:
        method: lora or full.
        routers: train or freeze; what full tuning does with the routers of experts.
    """
    filters = {"lora": LoRAParam, "full": nnx.Param}
    if method not in filters:
        raise ValueError(f"tuning.method: found {method!r}; expected one of {', '.join(filters)}")
    if method == "full" and routers == "freeze":
        return nnx.All(nnx.Param, nnx.Not(RouterParam))
    return filters[method]


def count(state: Any) -> int:
    """Returns how many numbers a tree of nnx variables holds, abstract or not, without padding of a vocabulary."""
    variables = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return sum(math.prod(own_shape(variable)) for variable in variables)


def merge(state: nnx.State) -> nnx.State:
    """Returns the state without adapters, each kernel with its adapter's update: float32, then cast once."""
    variables = dict(nnx.to_flat_state(state))
    merged = []
    for path, variable in variables.items():
        if isinstance(variable, LoRAParam):
            continue
        lora_a, lora_b = (variables.get((*path[:-1], slot)) for slot in ("lora_a", "lora_b"))
        if path[-1] == "kernel" and lora_a is not None and lora_b is not None:
            kernel = variable.get_value()
            scale = lora_a.get_metadata()["scale"]
            updated = add_update(kernel, lora_a.get_value(), lora_b.get_value(), scale=scale)
            variable = variable.replace(updated.astype(kernel.dtype))
        merged.append((path, variable))
    return nnx.from_flat_state(merged)
