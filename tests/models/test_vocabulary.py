"""A vocabulary that nothing divides is held with padding, split over devices, and nobody outside sees it."""

import hf_folders
import jax
import jax.numpy as jnp
import models_helpers
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxtune import adapters, assembly
from jaxtune.adafactor import adafactor
from jaxtune.batch import Batch
from jaxtune.config import TuningConfig
from jaxtune.convert import hf, writing
from jaxtune.convert.folder import open_folder
from jaxtune.decoding import Rows, make_decoding
from jaxtune.loss import token_losses
from jaxtune.models.attention import xla
from jaxtune.sharding import batch_sharding, create_on_mesh, make_mesh, parameter_shardings
from jaxtune.step import Compute, initial_state, make_train_step, state_shardings

V, HELD = 99, 128
KINDS = {"llama2": "its own head", "gemma2": "a tied head, cut off softly"}


@pytest.fixture(scope="module", params=KINDS)
def opened(request, tmp_path_factory):
    path = hf_folders.tiny_folder(request.param, tmp_path_factory.mktemp("model"), vocab_size=V)
    return path, *models_helpers.load(path)


def test_rows_behind_the_vocabulary_are_zeros_and_are_not_counted(opened):
    path, decoder, _ = opened
    state = nnx.state(decoder)
    embedding = state["embed"]["embedding"].get_value()
    assert embedding.shape[0] == HELD
    assert np.count_nonzero(embedding[V:]) == 0
    assert (np.count_nonzero(embedding[:V], axis=1) > 0).all()
    in_file = sum(np.prod(info.shape) for info in open_folder(path).tensors.values())
    assert adapters.count(state) == in_file


def test_what_is_written_has_the_vocabulary_alone(opened, tmp_path):
    path, decoder, _ = opened
    base = open_folder(path)
    writing.export_folder(base, nnx.state(decoder), str(tmp_path))
    assert (tmp_path / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_rows_are_read_onto_every_mesh(opened, devices):
    path, decoder, _ = opened
    _, abstract = nnx.split(nnx.eval_shape(lambda: decoder))
    mesh = make_mesh({"tensor": devices}, jax.devices()[:devices])
    loaded = hf.load_params(open_folder(path), abstract, shardings=parameter_shardings(abstract, mesh))
    embedding = loaded["embed"]["embedding"].get_value()
    assert embedding.sharding.spec == PartitionSpec("tensor", "fsdp")
    assert {shard.data.shape[0] for shard in embedding.addressable_shards} == {HELD // devices}
    np.testing.assert_array_equal(embedding, nnx.state(decoder)["embed"]["embedding"].get_value())


def test_nothing_behind_the_vocabulary_is_ever_answered(opened):
    """Every logit of the vocabulary is below 0, the logits of zero rows: they would win."""
    _, decoder, config = opened
    graph, state = nnx.split(decoder)
    state = jax.tree.map(jnp.copy, state)
    name = ("embed", "embedding") if config.tie_embeddings else ("lm_head", "kernel")
    values = state[name[0]][name[1]].get_value()
    row = (slice(V), slice(None)) if config.tie_embeddings else (slice(None), slice(V))
    state["norm"]["weight"].set_value(jnp.full_like(state["norm"]["weight"].get_value(), 1.0))
    state[name[0]][name[1]].set_value(values.at[row].set(-jnp.abs(values[row])))
    model = nnx.merge(graph, state)
    hidden = jnp.ones((1, 3, config.width))
    assert model.logits(hidden).shape == (1, 3, V) and (model.logits(hidden) < 0).all()
    decoding = make_decoding(graph, config, stop_ids=(), dtype=jnp.float32)
    rows = Rows(jnp.array([3]), jnp.array([6]), jax.random.split(jax.random.key(0), 1), 1.0, 0.9)
    for draw in ("likeliest", "drawn", "nucleus"):
        tokens, _ = decoding.batch(state, jnp.array([[5, 6, 7]]), rows, new_tokens=6, draw=draw)
        assert (tokens < V).all()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("sizes", [None, {"tensor": 8}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_the_loss_leaves_padding_out(sizes, softcap):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, head = jax.random.normal(keys[0], (2, 12, 16)), jax.random.normal(keys[1], (16, V))
    targets, weights = jax.random.randint(keys[2], (2, 12), 0, V), jnp.ones((2, 12))

    def loss(hidden, head, vocab_size):
        options = {"targets": targets, "weights": weights, "train_head": True, "softcap": softcap}
        return token_losses(hidden, head, vocab_size=vocab_size, **options).total

    both = jax.value_and_grad(loss, argnums=(0, 1))
    expected, (d_hidden, d_head) = both(hidden, head, V)
    padded = jnp.pad(head, [(0, 0), (0, HELD - V)])

    def check():
        found, gradients = jax.jit(both, static_argnums=2)(hidden, padded, V)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        np.testing.assert_allclose(gradients[0], d_hidden, atol=1e-5)
        np.testing.assert_allclose(gradients[1][:, :V], d_head, atol=1e-5)
        assert not np.any(gradients[1][:, V:])

    if sizes is None:
        check()
    else:
        with jax.set_mesh(make_mesh(sizes)):
            check()


def update(mesh, optimizer, hf_config):
    """Returns (loss, the model after an update)."""
    plan = assembly.plan_model(hf_config, TuningConfig(method="full"), param_dtype=jnp.float32, seed=0, where="test")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (8, 13)).astype(np.int32)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), (8, 12))
    ones = np.ones((8, 12), np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], positions, ones, ones.astype(np.float32), 0 * ones)
    with jax.set_mesh(mesh):
        trainable, frozen = create_on_mesh(
            plan.make, (parameter_shardings(plan.trainable, mesh), parameter_shardings(plan.frozen, mesh))
        )
        state = jax.device_put(initial_state(optimizer, trainable), state_shardings(optimizer, plan.trainable, mesh))
        step = jax.jit(make_train_step(plan.graph, optimizer, Compute(jnp.float32, xla, "none", 1, True)))
        after, metrics = step(state, frozen, Batch(*jax.device_put(tuple(batch), batch_sharding(mesh))))
    return float(metrics.loss), after.trainable


@pytest.mark.parametrize("ways", [2, pytest.param(4, marks=pytest.mark.long), pytest.param(8, marks=pytest.mark.long)])
def test_an_update_with_a_split_vocabulary_is_that_of_one_device(opened, ways):
    hf_config = open_folder(opened[0]).config
    loss, after = update(make_mesh({"tensor": ways, "fsdp": -1}), optax.sgd(1.0), hf_config)
    expected_loss, expected = update(make_mesh({"fsdp": 1}, jax.devices()[:1]), optax.sgd(1.0), hf_config)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    found, expected = (dict(nnx.to_flat_state(tree)) for tree in (after, expected))
    for path, variable in expected.items():
        theirs, ours = np.asarray(variable.get_value()), np.asarray(found[path].get_value())
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs), path
    embedding = found["embed", "embedding"].get_value()
    assert embedding.addressable_shards[0].data.shape[0] == HELD // ways
    assert not np.any(np.asarray(embedding)[V:])


def test_adafactors_scales_are_those_of_the_vocabulary_alone():
    """Zeros behind a matrix would make its root mean square smaller, and with it the update."""
    value = jax.random.normal(jax.random.key(0), (V, 32))
    gradient = jax.random.normal(jax.random.key(1), (V, 32))
    pad = [(0, HELD - V), (0, 0)]
    moved = []
    for arrays, metadata in (
        ((value, gradient), {}),
        ((jnp.pad(value, pad), jnp.pad(gradient, pad)), {"vocab_size": V}),
    ):
        p, g = (nnx.State({"embedding": nnx.Param(x, axes=("vocab", "embed"), **metadata)}) for x in arrays)
        optimizer = adafactor(0.1, min_dim_size_to_factor=16)
        updates, _ = optimizer.update(g, optimizer.init(p), p)
        moved.append(updates["embedding"].get_value())
    np.testing.assert_allclose(moved[1][:V], moved[0], rtol=1e-5)
    assert not np.any(moved[1][V:])
