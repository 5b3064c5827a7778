"""Learning-rate schedules and the optax optimizer of a run."""

import difflib
import inspect
import math
from typing import Any

import jax
import optax
from flax import nnx

from jaxtune.config import Config


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
        return peak * jax.numpy.sqrt(max(warmup, 1) / (step + max(warmup, 1)))

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
    make: Any = getattr(optax, settings.name, None)
    parameters = inspect.signature(make).parameters if inspect.isfunction(make) else {}
    if "learning_rate" not in parameters:
        names = [name for name in dir(optax) if _makes_optimizer(getattr(optax, name))]
        near = difflib.get_close_matches(settings.name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"optimizer.name: found {settings.name!r}; expected an optimizer of optax: {', '.join(names)}{hint}"
        )
    options = dict(settings.options)
    if "weight_decay" in parameters:
        options.setdefault("weight_decay", settings.weight_decay)
        if "mask" in parameters:
            options.setdefault("mask", decay_mask(trainable))
    elif settings.weight_decay:
        raise ValueError(
            f"optimizer.weight_decay: found {settings.weight_decay}, but optax.{settings.name} has no weight decay; "
            "set it to 0, or take an optimizer that has one, e.g. optimizer.name=adamw"
        )
    unknown = [name for name in options if name not in parameters]
    if unknown:
        raise ValueError(
            f"optimizer.options: found {', '.join(unknown)}; optax.{settings.name} takes "
            f"{', '.join(name for name in parameters if name != 'learning_rate')}"
        )
    optimizer = make(learning_rate=make_schedule(config, steps), **options)
    if settings.max_grad_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), optimizer)


def _makes_optimizer(candidate: Any) -> bool:
    return inspect.isfunction(candidate) and "learning_rate" in inspect.signature(candidate).parameters


def decay_mask(trainable: nnx.State) -> nnx.State:
    """Returns the tree that says which parameters weight decay touches: those with at least two axes of their own.

    A stack of norms is `[layers embed]`, one axis of its own beside `layers`, and is left alone as a norm should be.
    """

    def is_matrix(variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata()["axes"]
        return variable.replace(sum(axis != "layers" for axis in axes) >= 2)

    return jax.tree.map(is_matrix, trainable, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
