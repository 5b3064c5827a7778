"""The same examples give the same gradient, however they are split, packed, or spread over devices.

Plain SGD with rate 1 and no clipping turns the update itself into the gradient, so the tests read it from the state
that the real train step returns.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune import assembly
from jaxtune.batch import Batch
from jaxtune.config import TuningConfig
from jaxtune.data.packing import Example, lay_out
from jaxtune.models.attention import xla
from jaxtune.sharding import batch_sharding, create_on_mesh, make_mesh, parameter_shardings
from jaxtune.step import Compute, initial_state, make_train_step, state_shardings

T = 24
SOURCES = 3
HF_CONFIG = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "initializer_range": 0.2,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
ONE = {"fsdp": 1}
BOTH = ("full", "lora")
SPLITS = [  # mesh, microbatches, and the methods tried at once; the others run in `make test-long`
    pytest.param(ONE, 1, BOTH, id="1 device, 1 x 8"),
    pytest.param(ONE, 2, (), id="1 device, 2 x 4"),
    pytest.param(ONE, 4, ("full",), id="1 device, 4 x 2"),
    pytest.param(ONE, 8, ("lora",), id="1 device, 8 x 1"),
    pytest.param({"fsdp": 8}, 1, ("full",), id="fsdp 8"),
    pytest.param({"tensor": 2, "fsdp": 1, "data": 4}, 2, (), id="data 4 x tensor 2, 2 x 4"),
    pytest.param({"fsdp": 4, "tensor": 2}, 1, (), id="fsdp 4 x tensor 2"),
    pytest.param({"fsdp": 4, "tensor": 2}, 2, BOTH, id="fsdp 4 x tensor 2, 2 x 4"),
    pytest.param({"fsdp": 1, "tensor": 8}, 8, (), id="tensor 8, 8 x 1"),
    pytest.param({"fsdp": 2, "context": 2, "tensor": 2}, 1, ("full",), id="fsdp 2 x context 2 x tensor 2"),
]


def _tried() -> list[Any]:
    """Every split with every method."""
    tried = []
    for split in SPLITS:
        sizes, microbatches, at_once = split.values
        for method in BOTH:
            marks = () if method in at_once else pytest.mark.long
            tried.append(pytest.param(method, sizes, microbatches, id=f"{method}, {split.id}", marks=marks))
    return tried


def _examples() -> list[Example]:
    """Sixteen conversations of many lengths, weights that are no mask, one example that trains nothing."""
    rng = np.random.default_rng(0)
    examples = []
    for number in range(16):
        length = int(rng.integers(3, 12))
        tokens = rng.integers(1, 64, length + 1).astype(np.int32)
        weights = np.where(rng.random(length) < 0.6, rng.choice([0.5, 1.0, 2.0], length), 0).astype(np.float32)
        examples.append(Example(tokens[:-1], tokens[1:], weights * (number != 3)))
    return examples


def _rows(packed: bool, rows: int) -> Batch:
    """Lays the sixteen examples out: two a row, or one a row."""
    per_row = 2 if packed else 1
    examples = [(example, number % SOURCES) for number, example in enumerate(_examples())]
    chunks = [examples[i : i + per_row] for i in range(0, len(examples), per_row)]
    return lay_out(chunks + [[]] * (rows - len(chunks)), T)


@functools.cache
def _update(method: str, sizes: tuple, microbatches: int, packed: bool, wide: bool) -> Any:
    """Returns (loss, {name: gradient}, sums by source `[3 S]`) of one update."""
    dtype = jnp.float64 if wide else jnp.float32
    count = int(np.prod([size for _, size in sizes]))
    mesh = make_mesh(dict(sizes), jax.devices()[:count])
    tuning = TuningConfig(method=method, rank=4, alpha=8.0)
    plan = assembly.plan_model(HF_CONFIG, tuning, param_dtype=dtype, seed=0, where="test")
    batch = _rows(packed, 8 if packed else 16)
    with jax.set_mesh(mesh):
        places = (parameter_shardings(plan.trainable, mesh), parameter_shardings(plan.frozen, mesh))
        trainable, frozen = create_on_mesh(plan.make, places)
        # Adapters start with B = 0, where A has no gradient at all: give every trained number a value.
        keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(trainable))))
        trainable = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape, x.dtype), trainable)
        trainable = jax.tree.map(lambda x: x.astype(dtype), trainable)
        optimizer = optax.sgd(1.0)
        state = initial_state(optimizer, trainable)
        state = jax.device_put(state, state_shardings(optimizer, plan.trainable, mesh))
        compute = Compute(dtype, xla, "none", microbatches, method == "full", sources=SOURCES)
        batch = Batch(*jax.device_put(tuple(batch), batch_sharding(mesh)))
        lowered = jax.jit(make_train_step(plan.graph, optimizer, compute)).lower(state, frozen, batch)
        step = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})  # compiling is all the time
        after, metrics = step(state, frozen, batch)
        gradient = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), state.trainable, after.trainable)
    paths, _ = jax.tree_util.tree_flatten_with_path(gradient)
    named = {jax.tree_util.keystr(path): leaf for path, leaf in paths}
    return float(metrics.loss), named, np.stack(jax.device_get(tuple(metrics.sources)))


def _assert_equal(found: Any, expected: Any, tolerance: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-5)
    loss, weight, correct = expected[2]
    assert loss.sum() / weight.sum() == pytest.approx(expected[0], rel=1e-5)
    assert (weight > 0).all() and (correct <= weight).all() and len(set(loss.tolist())) == SOURCES
    for name, gradient in expected[1].items():
        norm = np.linalg.norm(gradient)
        assert norm > 0, f"{name} has no gradient: the test would be blind to it"
        assert np.linalg.norm(found[1][name] - gradient) <= tolerance * norm, name


@pytest.mark.parametrize(("method", "sizes", "microbatches"), _tried())
def test_no_split_changes_the_gradient(method: str, sizes: dict, microbatches: int) -> None:
    expected = _update(method, tuple(ONE.items()), 1, True, False)
    _assert_equal(_update(method, tuple(sizes.items()), microbatches, True, False), expected, 1e-5)


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        ("full", ONE),
        ("lora", {"fsdp": 4, "tensor": 2}),
        pytest.param("lora", ONE, marks=pytest.mark.long),
        pytest.param("full", {"fsdp": 4, "tensor": 2}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_packed_and_padded_rows_have_the_same_gradient(method: str, sizes: dict) -> None:
    expected = _update(method, tuple(ONE.items()), 1, True, False)
    _assert_equal(_update(method, tuple(sizes.items()), 2, False, False), expected, 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("method", ["full", "lora"])
def test_in_float64_splits_differ_by_rounding_alone(method: str) -> None:
    with jax.enable_x64(True):
        expected = _update(method, tuple(ONE.items()), 1, True, True)
        for sizes, microbatches, packed in (
            (ONE, 8, True),
            (ONE, 4, False),
            ({"fsdp": 8}, 1, True),
            ({"fsdp": 4, "tensor": 2}, 2, True),
            ({"fsdp": 2, "tensor": 2, "data": 2}, 2, False),
        ):
            _assert_equal(_update(method, tuple(sizes.items()), microbatches, packed, True), expected, 1e-10)


def test_dividing_each_microbatch_by_its_own_weight_would_be_seen() -> None:
    """The mistake that the tests above are for changes the gradient a thousand times more than they allow."""
    batch = _rows(True, 8)
    weights = np.asarray(batch.loss_weights).reshape(4, 2, T).sum(axis=(0, 2))
    assert abs(weights[0] / weights[1] - 1) > 1e-2
