"""One update of every family is the same on one device and on eight: fsdp x tensor, and experts over their own axis."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from hf_kinds import KINDS, ONE_OF_EACH, SIZES, WITH_EXPERTS

from jaxtune import assembly
from jaxtune.batch import Batch
from jaxtune.config import TuningConfig
from jaxtune.models.attention import xla
from jaxtune.sharding import batch_sharding, create_on_mesh, make_mesh, parameter_shardings
from jaxtune.step import Compute, initial_state, make_train_step, state_shardings

ONE = (("fsdp", 1),)
EIGHT = (("fsdp", 4), ("tensor", 2))
OVER_EXPERTS = ((("expert", 4), ("tensor", 2)), (("expert", 2), ("fsdp", 2), ("tensor", 2)))


@functools.cache
def hf_config(kind: str) -> dict[str, Any]:
    model_type, own = KINDS[kind]
    fewer = {} if "layer_types" in own else {"num_hidden_layers": 2, "n_layer": 2}
    config = transformers.CONFIG_MAPPING[model_type](**{**SIZES, "initializer_range": 0.2, **own, **fewer})
    return config.to_dict()


def batch_of() -> Batch:
    """Eight rows of two packed examples and padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 97, (8, 25)).astype(np.int32)
    segments = np.repeat(np.array([[1] * 10 + [2] * 11 + [0] * 3], np.int32), 8, axis=0)
    positions = np.repeat(np.array([[*range(10), *range(11), 0, 0, 0]], np.int32), 8, axis=0)
    weights = (segments > 0) * rng.choice([0.0, 0.5, 1.0], segments.shape)
    return Batch(
        tokens[:, :-1], tokens[:, 1:], positions, segments, weights.astype(np.float32), np.zeros_like(segments)
    )


@functools.cache
def update(kind: str, method: str, sizes: tuple, targets: str | tuple = "all-linear") -> Any:
    """Returns (loss, {name: gradient}, router metrics) of one update; SGD with rate 1 makes it the gradient."""
    mesh = make_mesh(dict(sizes), jax.devices()[: int(np.prod([size for _, size in sizes]))])
    tuning = TuningConfig(method=method, rank=4, alpha=8.0, targets=targets)
    plan = assembly.plan_model(hf_config(kind), tuning, param_dtype=jnp.float32, seed=0, where="test")
    with jax.set_mesh(mesh):
        places = (parameter_shardings(plan.trainable, mesh), parameter_shardings(plan.frozen, mesh))

        def make() -> Any:
            trainable, frozen = plan.make()
            keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(trainable))))
            # Adapters start with B = 0, where A has no gradient: every trained number gets a value.
            return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), trainable), frozen

        trainable, frozen = create_on_mesh(make, places)
        optimizer = optax.sgd(1.0)
        state = jax.device_put(initial_state(optimizer, trainable), state_shardings(optimizer, plan.trainable, mesh))
        penalty = 0.05 if plan.config.experts else 0.0
        compute = Compute(jnp.float32, xla, "none", 1, method == "full", load_balance=penalty, router_z=penalty / 10)
        batch = Batch(*jax.device_put(tuple(batch_of()), batch_sharding(mesh)))
        lowered = jax.jit(make_train_step(plan.graph, optimizer, compute)).lower(state, frozen, batch)
        step = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})  # compiling is all the time
        after, metrics = step(state, frozen, batch)
        gradient = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), state.trainable, after.trainable)
    paths, _ = jax.tree_util.tree_flatten_with_path(gradient)
    router = jax.device_get(metrics.router)
    return float(metrics.loss), {jax.tree_util.keystr(path): leaf for path, leaf in paths}, router


def assert_equal(found: Any, expected: Any) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert any(np.linalg.norm(gradient) > 0 for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert np.linalg.norm(found[1][name] - gradient) <= 2e-5 * np.linalg.norm(gradient) + 1e-8, name
    if expected[2] is not None:
        np.testing.assert_allclose(found[2], expected[2], rtol=1e-5)


# Adapters over devices are parts of linear layers: one kind for each sort of linear layer that there is.
ADAPTED = ("phi4_longrope", "gpt2", "gpt_neox", "deepseek_v3", "gemma3")
UPDATES = [(kind, "full") for kind in ONE_OF_EACH] + [(kind, "lora") for kind in ADAPTED]
AT_ONCE = (("gemma2", "full"), ("gpt2", "lora"))  # the others run in `make test-long`


@pytest.mark.parametrize(
    ("kind", "method"), [pytest.param(*p, marks=() if p in AT_ONCE else pytest.mark.long) for p in UPDATES]
)
def test_one_update_on_eight_devices_is_that_of_one(kind, method):
    assert_equal(update(kind, method, EIGHT), update(kind, method, ONE))


@pytest.mark.parametrize(
    "sizes", [OVER_EXPERTS[0], *(pytest.param(one, marks=pytest.mark.long) for one in OVER_EXPERTS[1:])], ids=str
)
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind == "mixtral" else pytest.mark.long)
        for kind in WITH_EXPERTS
        if kind in ONE_OF_EACH
    ],
)
def test_experts_over_an_axis_give_the_same_update(kind, sizes):
    found = update(kind, "full", sizes)
    assert_equal(found, update(kind, "full", ONE))
    routers = [gradient for name, gradient in found[1].items() if "'router']['kernel" in name]
    assert routers and all(np.linalg.norm(gradient) > 0 for gradient in routers)


@pytest.mark.long
@pytest.mark.parametrize("sizes", [EIGHT, OVER_EXPERTS[1]], ids=str)
def test_adapters_of_experts_give_the_same_update_over_devices(sizes):
    targets = ("q_proj", "experts.*")
    expected = update("mixtral", "lora", ONE, targets)
    assert any("gate_proj" in name for name in expected[1])
    assert_equal(update("mixtral", "lora", sizes, targets), expected)
