"""One update: who gets a gradient, what is kept when it goes wrong, and where its state lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from flax import nnx

from jaxtune import adapters, assembly
from jaxtune.batch import Batch
from jaxtune.config import Config
from jaxtune.convert.folder import open_folder
from jaxtune.optimizer import make_optimizer
from jaxtune.sharding import create_on_mesh, make_mesh, replicated
from jaxtune.step import (
    compile_eval_step,
    compile_train_step,
    initial_state,
    make_eval_step,
    make_train_step,
    split_rows,
    state_shardings,
)

ROWS, LENGTH = 8, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return open_folder(tiny_runs.write_model(tmp_path_factory.mktemp("step") / "base"))


def batch_of(seed=0, **changes) -> Batch:
    """Two examples of 8 tokens in each row, the second half of each trained."""
    drawn = np.random.default_rng(seed).integers(3, 280, (ROWS, LENGTH + 1))
    halves = np.arange(LENGTH) // 8
    fields = {
        "tokens": drawn[:, :-1],
        "targets": drawn[:, 1:],
        "positions": np.tile(np.arange(LENGTH) % 8, (ROWS, 1)),
        "segment_ids": np.tile(halves + 1, (ROWS, 1)),
        "source_ids": np.zeros((ROWS, LENGTH)),
    }
    arrays = {name: jnp.asarray(value, jnp.int32) for name, value in fields.items()}
    weights = jnp.asarray(np.tile(np.arange(LENGTH) % 8 >= 4, (ROWS, 1)), jnp.float32)
    return Batch(**{**arrays, "loss_weights": weights, **changes})


class Ready:
    """A model on the mesh of eight devices with its compiled update."""

    def __init__(self, folder, *, method="lora", **train):
        given = {"steps": 10, "batch_rows": ROWS, **train}
        self.config = Config(
            output="o",
            model={"path": folder.path},
            data={"train": ({"path": "d"},)},
            tuning={"method": method, "rank": 4},
            optimizer={"learning_rate": 0.01, "warmup_steps": 0, "weight_decay": 0.1},
            train=given,
        )
        self.mesh = make_mesh({"fsdp": 4, "tensor": 2})
        with jax.set_mesh(self.mesh):
            self.plan = assembly.plan_model(
                folder.config, self.config.tuning, param_dtype=jnp.float32, seed=0, where="here"
            )
            loading = {"mesh": self.mesh, "init": "pretrained", "keep_file_dtypes": False, "progress": None}
            self.frozen = assembly.load_frozen(self.plan, folder, **loading)
            trainable = assembly.load_trainable(self.plan, folder, **loading)
            self.optimizer = make_optimizer(self.config, 10, self.plan.trainable)
            places = state_shardings(self.optimizer, self.plan.trainable, self.mesh)
            self.state = create_on_mesh(lambda tree: initial_state(self.optimizer, tree), places, trainable)
            self.compute, _ = assembly.resolve_compute(self.config, self.plan, "cpu")
            step = make_train_step(self.plan.graph, self.optimizer, self.compute)
            self.compiled = compile_train_step(step, self.state, self.frozen, batch_of(), device_kind="cpu")
        self.kept = host(self.state)

    def step(self, batch):
        """Does an update from the state that was loaded, whose buffers stay."""
        state = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), leaf.sharding), self.state)
        return self.compiled(state, self.frozen, batch)


def host(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def same(one, other) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(host(one), host(other), strict=True))


@pytest.fixture(scope="module")
def lora(folder):
    return Ready(folder)


@pytest.fixture(scope="module")
def full(folder):
    return Ready(folder, method="full")


def test_frozen_weights_have_no_gradient_and_no_optimizer_state(lora):
    trained = [variable for _, variable in nnx.to_flat_state(lora.plan.trainable)]
    assert {type(variable).__name__ for variable in trained} == {"LoRAParam"}
    numbers = adapters.count(lora.plan.trainable)
    moments = [leaf for leaf in jax.tree.leaves(lora.state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * numbers
    before = host(lora.frozen)
    state, metrics = lora.step(batch_of())
    assert metrics.finite and same(before, lora.frozen)
    assert jax.tree.structure(state.trainable) == jax.tree.structure(lora.plan.trainable)


def test_full_tuning_trains_every_weight(full):
    assert jax.tree.leaves(full.frozen) == []
    state, _ = full.step(batch_of())
    moved = [not np.array_equal(a, b) for a, b in zip(host(state.trainable), host(full.state.trainable), strict=True)]
    assert all(moved)


def test_moments_lie_where_their_parameters_do_and_counters_everywhere(full):
    parameters = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(full.state.trainable)}
    split = 0
    for leaf in jax.tree.leaves(full.state.opt_state):
        expected = parameters.get(leaf.shape, replicated(full.mesh)) if leaf.ndim else replicated(full.mesh)
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), leaf.shape
        split += leaf.sharding.shard_shape(leaf.shape) != leaf.shape
    assert split >= 8
    assert full.state.step.sharding.is_equivalent_to(replicated(full.mesh), 0)


def test_the_new_state_lies_where_the_old_one_did(lora):
    state, _ = lora.step(batch_of())
    for new, old in zip(jax.tree.leaves(state), jax.tree.leaves(lora.state), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, new.ndim) and new.dtype == old.dtype


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_changes_nothing_but_the_counters(lora, bad):
    weights = np.array(batch_of().loss_weights)
    weights[3, 5] = bad
    state, metrics = lora.step(batch_of(loss_weights=jnp.asarray(weights)))
    assert not metrics.finite and metrics.bad_steps == 1
    assert same(state.trainable, lora.state.trainable) and same(state.opt_state, lora.state.opt_state)
    assert (state.step, state.bad_steps) == (1, 1)


def test_bad_updates_in_a_row_are_counted_and_a_good_one_ends_the_row(lora):
    bad = batch_of(loss_weights=batch_of().loss_weights.at[0, 4].set(jnp.nan))
    state, _ = lora.step(bad)
    counts = []
    for batch in (bad, bad, batch_of(), bad):
        state, metrics = lora.compiled(state, lora.frozen, batch)
        counts.append(int(metrics.bad_steps))
    assert counts == [2, 3, 0, 1] and state.step == 5


def test_a_batch_without_a_trained_token_has_loss_0_and_no_gradient(lora):
    nothing = jnp.zeros((ROWS, LENGTH), jnp.float32)
    empty = jnp.zeros((ROWS, LENGTH), jnp.int32)
    for batch in (batch_of(loss_weights=nothing), batch_of(loss_weights=nothing, segment_ids=empty)):
        _, metrics = lora.step(batch)
        assert metrics.finite and metrics.loss == 0 and metrics.grad_norm == 0 and metrics.weight == 0


def test_metrics_count_what_is_in_the_batch(lora):
    segments = batch_of().segment_ids.at[:, 12:].set(0)
    weights = jnp.where(segments > 0, batch_of().loss_weights, 0)
    _, metrics = lora.step(batch_of(segment_ids=segments, loss_weights=weights * 0.5))
    assert metrics.tokens == ROWS * 12 and metrics.trained_tokens == ROWS * 4
    assert metrics.weight == ROWS * 4 * 0.5


def test_loss_and_gradient_do_not_depend_on_the_scale_of_the_weights(lora):
    (_, one), (_, seven) = (lora.step(batch_of(loss_weights=batch_of().loss_weights * scale)) for scale in (1, 7))
    np.testing.assert_allclose([seven.loss, seven.grad_norm], [one.loss, one.grad_norm], rtol=1e-5)


def test_evaluation_gives_sums_of_the_same_loss(lora):
    with jax.set_mesh(lora.mesh):
        evaluate = compile_eval_step(
            make_eval_step(lora.plan.graph, lora.compute),
            lora.state.trainable,
            lora.frozen,
            batch_of(),
            device_kind="cpu",
        )
    sums = evaluate(lora.state.trainable, lora.frozen, batch_of())
    _, metrics = lora.step(batch_of())
    assert all(value.shape == () for value in sums[:-1])
    assert all(value.shape == (lora.compute.sources,) for value in sums.sources)
    np.testing.assert_allclose(sums.sources.loss.sum(), sums.loss, rtol=1e-6)
    np.testing.assert_allclose(sums.loss / sums.weight, metrics.loss, rtol=1e-6)
    assert sums.tokens == ROWS * 8 and 0 <= sums.correct <= sums.weight


def test_rows_are_dealt_to_microbatches_so_that_none_changes_its_device():
    """The picture of `split_rows`: six rows in three parts."""
    rows = jnp.arange(6)[:, None]
    assert split_rows(rows, 3)[..., 0].tolist() == [[0, 3], [1, 4], [2, 5]]
