"""Learning-rate schedules and the optax optimizer of a run."""

import difflib
import inspect
import math
from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import nnx

from jaxtune.adafactor import adafactor
from jaxtune.config import Config

OURS = {"adafactor": adafactor}  # in place of optax's own


def make_schedule(config: Config, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the update's number, from 0 to `steps` - 1.

    It climbs linearly over the warm-up and is at its peak in the update after it; the shapes are constant, linear and
    cosine (Loshchilov & Hutter 2017) down to `final_ratio`, wsd (warm-up, stable, linear decay over the last
    `decay_ratio`; Hu et al. 2024, MiniCPM section 4) and inverse_sqrt (Vaswani et al. 2017, section 5.3).
    """
    settings = config.optimizer
    peak, final = config.learning_rate, config.learning_rate * settings.final_ratio
    warmup = warmup_steps(config, steps)
    after = max(steps - warmup, 1)
    decay = max(math.ceil(settings.decay_ratio * steps), 1)

    def inverse_sqrt(step: Any) -> Any:
        since = jax.numpy.maximum(step, 0)  # join_schedules asks during the warm-up as well, with steps below 0
        return peak * jax.numpy.sqrt(max(warmup, 1) / (since + max(warmup, 1)))

    body = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, final, after),
        "cosine": lambda: optax.cosine_decay_schedule(peak, after, alpha=settings.final_ratio),
        "wsd": lambda: optax.linear_schedule(peak, final, decay, transition_begin=max(after - decay, 0)),
        "inverse_sqrt": lambda: inverse_sqrt,
    }[settings.schedule]()
    if not warmup:
        return body
    # The first update already moves: update i of the warm-up uses (i + 1) / (warmup + 1) of the peak.
    climb = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([climb, body], [warmup])


def warmup_steps(config: Config, steps: int) -> int:
    """Returns how many updates the warm-up takes: as asked for, else its share of the steps, rounded up."""
    if config.optimizer.warmup_steps is not None:
        return min(config.optimizer.warmup_steps, steps)
    return math.ceil(config.optimizer.warmup_ratio * steps)


def make_optimizer(config: Config, steps: int, trainable: nnx.State) -> optax.GradientTransformation:
    """Returns the optax chain of a run: clip by the global norm, then the optimizer that the config names.

    Args:
        config: `optimizer.name` is any function of optax that makes an optimizer from a learning rate.
        steps: updates of the whole run, for the schedule.
        trainable: the trained parameters or their shapes; weight decay leaves norms and biases alone.

    Raises:
        ValueError: no such optimizer, or it does not take one of the options given.
    """
    settings = config.optimizer
    names = [name for name in dir(optax) if _makes_optimizer(name)]
    if settings.name not in names:
        near = difflib.get_close_matches(settings.name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"optimizer.name: found {settings.name!r}; expected an optimizer of optax: {', '.join(names)}{hint}"
        )
    make: Any = OURS.get(settings.name) or getattr(optax, settings.name)
    parameters = inspect.signature(make).parameters
    own = [name for name in ("learning_rate", "weight_decay") if name in settings.options]
    if own:
        raise ValueError(f"optimizer.options: found {own[0]}, which has a key of its own: optimizer.{own[0]}")
    unknown = [name for name in settings.options if name not in parameters]
    if unknown:
        raise ValueError(
            f"optimizer.options: found {', '.join(unknown)}; optax.{settings.name} takes "
            f"{', '.join(name for name in parameters if name not in ('learning_rate', 'weight_decay'))}"
        )
    options = {**_decay_options(config, parameters, trainable), **settings.options}
    clip = [] if settings.max_grad_norm is None else [optax.clip_by_global_norm(settings.max_grad_norm)]
    try:
        optimizer = optax.chain(*clip, make(learning_rate=make_schedule(config, steps), **options))
        jax.eval_shape(lambda tree: optimizer.update(tree, optimizer.init(tree), tree), trainable)
    except (TypeError, ValueError) as error:
        told = f" with optimizer.options {settings.options}" if settings.options else ""
        raise ValueError(
            f"optimizer.name: optax.{settings.name}{told} cannot be used: {str(error).splitlines()[0]}; expected an "
            "optimizer that needs only gradients and a learning rate that changes, and options of the types it takes"
        ) from None
    return optimizer


def _makes_optimizer(name: str) -> bool:
    """Whether optax's `name` makes a whole optimizer; its `scale_by_...` are parts of one."""
    candidate = getattr(optax, name)
    if not inspect.isfunction(candidate) or name.startswith(("_", "scale_by_")):
        return False
    return "learning_rate" in inspect.signature(candidate).parameters


def _decay_options(config: Config, parameters: Mapping[str, Any], trainable: nnx.State) -> dict[str, Any]:
    """Returns the arguments by which an optimizer decays matrices alone; raises ValueError where it cannot."""
    settings = config.optimizer
    mask = next((name for name in ("mask", "weight_decay_mask") if name in parameters), None)
    if "weight_decay" in parameters and mask is not None:
        return {"weight_decay": settings.weight_decay, mask: decay_mask(trainable)}
    if settings.weight_decay:
        lack = "decays norms and biases as well" if "weight_decay" in parameters else "has no weight decay"
        raise ValueError(
            f"optimizer.weight_decay: found {settings.weight_decay}, but optax.{settings.name} {lack}; "
            "set it to 0, or take an optimizer that decays matrices alone, e.g. optimizer.name=adamw"
        )
    # Adafactor decays by options.weight_decay_rate, which is not scaled by the learning rate: not our weight_decay.
    return {mask: decay_mask(trainable)} if mask is not None else {}


def decay_mask(trainable: nnx.State) -> nnx.State:
    """Returns the tree that says which parameters weight decay touches: those with at least two axes of their own.

    A stack of norms is `[layers embed]`, one axis of its own beside `layers`, and is left alone as a norm should be.
    """

    def is_matrix(variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata()["axes"]
        return variable.replace(sum(axis != "layers" for axis in axes) >= 2)

    return jax.tree.map(is_matrix, trainable, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
