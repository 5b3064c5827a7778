"""Schedules at known points, what weight decay touches, and optimizers that can or cannot be used."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxtune.config import Config
from jaxtune.optimizer import decay_mask, make_optimizer, make_schedule, warmup_steps
from jaxtune.sharding import make_mesh
from jaxtune.step import initial_state, state_shardings


def configured(steps: int = 100, **optimizer) -> Config:
    given = {"learning_rate": 1.0, **optimizer}
    return Config(output="o", model={"path": "m"}, data={"train": ({"path": "d"},)}, optimizer=given)


def parameters() -> nnx.State:
    """A stack of two kernels and of two norms, an embedding and a bias."""
    shapes = {
        "kernel": ((2, 16, 24), ("layers", "embed", "mlp")),
        "norm": ((2, 16), ("layers", "embed")),
        "embedding": ((40, 16), ("vocab", "embed")),
        "bias": ((24,), ("mlp",)),
    }
    variables = [((name,), nnx.Param(jnp.ones(shape), axes=axes)) for name, (shape, axes) in shapes.items()]
    return nnx.from_flat_state(variables)


def values(state) -> dict[str, np.ndarray]:
    return {path[0]: np.asarray(variable.get_value()) for path, variable in nnx.to_flat_state(state)}


def rates(steps: int, **optimizer) -> list[float]:
    schedule = make_schedule(configured(**optimizer), steps)
    return [float(schedule(step)) for step in range(steps)]


# Schedules.


def test_warm_up_is_a_share_of_the_steps_rounded_up_or_a_number():
    assert warmup_steps(configured(warmup_ratio=0.03), 100) == 3
    assert warmup_steps(configured(warmup_ratio=0.03), 101) == 4
    assert warmup_steps(configured(warmup_ratio=0.03), 1) == 1
    assert warmup_steps(configured(warmup_ratio=0.5, warmup_steps=7), 100) == 7
    assert warmup_steps(configured(warmup_steps=7), 3) == 3
    assert warmup_steps(configured(warmup_ratio=0.0), 100) == 0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd", "inverse_sqrt"])
def test_every_schedule_climbs_evenly_and_moves_from_the_first_update(schedule):
    climbing = rates(40, schedule=schedule, warmup_steps=4)[:5]
    np.testing.assert_allclose(climbing, [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd", "inverse_sqrt"])
def test_every_schedule_begins_at_the_peak_without_a_warm_up(schedule):
    assert rates(10, schedule=schedule, warmup_steps=0)[0] == 1.0


def test_constant_stays():
    assert rates(10, schedule="constant", warmup_steps=2)[2:] == [1.0] * 8


def test_linear_is_half_way_down_in_the_middle():
    found = rates(101, schedule="linear", warmup_steps=1, final_ratio=0.2)
    np.testing.assert_allclose([found[1], found[51]], [1.0, 0.6], rtol=1e-6)
    np.testing.assert_allclose(found[100], 0.2 + 0.8 * 0.01, rtol=1e-5)  # the last update is one short of the end


def test_cosine_follows_its_formula():
    found = rates(100, schedule="cosine", warmup_steps=0, final_ratio=0.1)
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 100)) / 2 for step in range(100)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_wsd_is_flat_until_its_last_part():
    found = rates(100, schedule="wsd", warmup_steps=10, decay_ratio=0.2, final_ratio=0.0)
    assert found[10:81] == [1.0] * 71
    np.testing.assert_allclose(found[81:], [1 - step / 20 for step in range(1, 20)], rtol=1e-5)


def test_inverse_sqrt_halves_after_four_times_the_warm_up():
    found = rates(64, schedule="inverse_sqrt", warmup_steps=10)
    assert found[10] == 1.0
    np.testing.assert_allclose(found[40], 0.5, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd", "inverse_sqrt"])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_shortest_runs_have_a_rate(schedule, steps):
    assert all(0 < rate <= 1 for rate in rates(steps, schedule=schedule))


def test_the_peak_is_the_methods_own_unless_given():
    for method, rate in (("lora", 2e-4), ("full", 1e-5)):
        given = Config(output="o", model={"path": "m"}, data={"train": ({"path": "d"},)}, tuning={"method": method})
        assert given.learning_rate == rate
        assert max(float(make_schedule(given, 50)(step)) for step in range(50)) == pytest.approx(rate)


# Weight decay and clipping.


def test_weight_decay_touches_matrices_and_not_norms_or_biases():
    assert {name: bool(value) for name, value in values(decay_mask(parameters())).items()} == {
        "kernel": True,
        "norm": False,
        "embedding": True,
        "bias": False,
    }


@pytest.mark.parametrize("name", ["adamw", "lion", "lamb", "lars", "adan", "adamaxw"])
def test_a_zero_gradient_decays_matrices_alone(name):
    trained = parameters()
    optimizer = make_optimizer(configured(name=name, weight_decay=0.1, warmup_steps=0), 10, trained)
    zeros = jax.tree.map(jnp.zeros_like, trained)
    updates, _ = optimizer.update(zeros, optimizer.init(trained), trained)
    moved = {name: bool(np.any(value != 0)) for name, value in values(updates).items()}
    assert moved == {"kernel": True, "norm": False, "embedding": True, "bias": False}


def test_without_weight_decay_a_zero_gradient_moves_nothing():
    trained = parameters()
    optimizer = make_optimizer(configured(warmup_steps=0), 10, trained)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, trained), optimizer.init(trained), trained)
    assert all(np.all(value == 0) for value in values(updates).values())


@pytest.mark.parametrize("clip", [0.5, None])
def test_gradients_are_clipped_by_their_global_norm(clip):
    trained = parameters()
    optimizer = make_optimizer(configured(name="sgd", max_grad_norm=clip, warmup_steps=0), 10, trained)
    gradient = jax.tree.map(lambda leaf: 3 * jnp.ones_like(leaf), trained)
    updates, _ = optimizer.update(gradient, optimizer.init(trained), trained)
    norm = float(optax.global_norm(updates))
    assert norm == pytest.approx(0.5 if clip else float(optax.global_norm(gradient)), rel=1e-5)


# Optimizers.

# Each needs something that a run does not have: a line search's loss function, or a rate that never changes.
UNUSABLE = ("lbfgs", "optimistic_adam", "rprop", "sm3")
NAMES = [
    name
    for name in dir(optax)
    if inspect.isfunction(getattr(optax, name))
    and "learning_rate" in inspect.signature(getattr(optax, name)).parameters
    and not name.startswith(("_", "scale_by_"))
]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNUSABLE])
def test_optimizers_of_optax_are_made_by_name_and_their_state_lies_with_its_parameters(name):
    trained = parameters()
    optimizer = make_optimizer(configured(name=name), 10, trained)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    where = state_shardings(optimizer, trained, mesh)
    state = jax.eval_shape(lambda tree: initial_state(optimizer, tree), trained)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        sharding.shard_shape(leaf.shape)  # raises where a shape does not divide
    big = [
        sharding.shard_shape(leaf.shape)
        for leaf, sharding in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(where.opt_state), strict=True)
        if leaf.shape == (2, 16, 24)
    ]
    assert all(shape == (2, 4, 12) for shape in big)
    if name in ("adamw", "adam", "lion", "lamb"):
        assert len(big) >= 1


@pytest.mark.parametrize("name", UNUSABLE)
def test_optimizers_that_need_more_than_gradients_are_refused(name):
    with pytest.raises(ValueError, match=rf"optimizer\.name: optax\.{name} cannot be used: .*expected an optimizer"):
        make_optimizer(configured(name=name), 10, parameters())


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        ({"name": "adammw"}, "found 'adammw'; expected an optimizer of optax: .*did you mean adamw"),
        ({"name": "scale_by_learning_rate"}, "found 'scale_by_learning_rate'"),
        ({"name": "apply_updates"}, "found 'apply_updates'"),
        ({"name": "__name__"}, "found '__name__'"),
        ({"options": {"beta1": 0.9}}, "optimizer.options: found beta1; optax.adamw takes b1, b2"),
        ({"options": {"learning_rate": 0.9}}, "optimizer.options: found learning_rate.*optimizer.learning_rate"),
        ({"options": {"weight_decay": 0.9}}, "optimizer.options: found weight_decay.*optimizer.weight_decay"),
        ({"options": {"b1": "high"}}, r"optax\.adamw with optimizer.options \{'b1': 'high'\} cannot be used"),
        ({"name": "sgd", "weight_decay": 0.1}, "optimizer.weight_decay: found 0.1, but optax.sgd has no weight decay"),
        ({"name": "novograd", "weight_decay": 0.1}, "optax.novograd decays norms and biases as well"),
    ],
)
def test_what_an_optimizer_does_not_take_is_refused_with_its_choices(optimizer, told):
    with pytest.raises(ValueError, match=told):
        make_optimizer(configured(**optimizer), 10, parameters())


def test_options_reach_the_optimizer():
    trained = parameters()
    gradient = jax.tree.map(jnp.ones_like, trained)
    plain, heavy = (
        make_optimizer(configured(name="sgd", options=options, warmup_steps=0, max_grad_norm=None), 10, trained)
        for options in ({}, {"momentum": 0.9})
    )
    for optimizer, expected in ((plain, -1.0), (heavy, -1.9)):
        state = optimizer.init(trained)
        _, state = optimizer.update(gradient, state, trained)
        updates, _ = optimizer.update(gradient, state, trained)
        rate = float(make_schedule(configured(warmup_steps=0), 10)(1))
        np.testing.assert_allclose(values(updates)["bias"], expected * rate, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"min_dim_size_to_factor": 8}], ids=str)
def test_adafactor_moves_stacked_layers_as_optax_moves_each_by_itself(options):
    """One layer's weights and gradients are a thousand times the other's: no scale of the whole stack would do."""
    sizes = jnp.array([1e-3, 1.0])[:, None, None]
    drawn = jax.random.normal(jax.random.key(0), (4, 2, 16, 24)) * sizes
    stack = nnx.State({"kernel": nnx.Param(drawn[0], axes=("layers", "embed", "mlp"))})
    layers = [drawn[0, layer] for layer in range(2)]
    ours = make_optimizer(
        configured(name="adafactor", schedule="constant", warmup_ratio=0.0, options=options, max_grad_norm=None),
        9,
        stack,
    )
    theirs = optax.adafactor(1.0, **options)
    state, states = ours.init(stack), [theirs.init(layer) for layer in layers]
    for gradient in drawn[1:]:
        given = jax.tree.map(lambda _, g=gradient: g, stack)
        update, state = ours.update(given, state, stack)
        stack = optax.apply_updates(stack, update)
        for layer in range(2):
            change, states[layer] = theirs.update(gradient[layer], states[layer], layers[layer])
            layers[layer] = optax.apply_updates(layers[layer], change)
    np.testing.assert_allclose(stack["kernel"].get_value(), jnp.stack(layers), rtol=1e-5)
