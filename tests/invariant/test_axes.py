"""Axes of the mesh in combination change no update: dense and with experts, packed, and on rows of 8,192 tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune import assembly
from jaxtune.batch import AnyBatch, Batch, PairBatch
from jaxtune.config import TuningConfig
from jaxtune.models import attention
from jaxtune.models.t5_layers import plain
from jaxtune.sharding import (
    MESH_AXES,
    PARAMETER_RULES,
    batch_sharding,
    create_on_mesh,
    make_mesh,
    parameter_shardings,
    parameter_spec,
)
from jaxtune.step import Compute, initial_state, make_train_step, state_shardings

V = 61
DENSE = {
    "model_type": "llama", "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "initializer_range": 0.2,
    "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {
    "dense": DENSE,
    "experts": {**DENSE, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "latent": {
        **DENSE, "model_type": "deepseek_v3", "q_lora_rank": 10, "kv_lora_rank": 6, "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 8, "v_head_dim": 14, "moe_intermediate_size": 12, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1,
    },
    "encoder-decoder": {
        "model_type": "t5", "vocab_size": V, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 4,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False, "dropout_rate": 0.0, "decoder_start_token_id": 0,
    },
}  # fmt: skip
# The kernel is the interpreted one where it has something of its own to do: values of another width than keys.
KERNELS = {"latent": attention.splash_interpreted, "encoder-decoder": plain}
ONE = (("fsdp", 1),)
RATE = 2.0**12  # so that a gradient is not lost in the last bits of a norm's weight of 1


def packed(rows: int, length: int, cuts: tuple[int, ...]) -> Batch:
    """Rows of segments that end at `cuts`, and padding behind the last."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, V, (rows, length + 1)).astype(np.int32)
    index = np.arange(length)
    segments = np.where(index < cuts[-1], 1 + np.searchsorted(cuts, index, side="right"), 0)
    positions = index - np.array([0, *cuts])[np.searchsorted(cuts, index, side="right")]
    segments, positions = (np.tile(x.astype(np.int32), (rows, 1)) for x in (segments, positions))
    weights = ((segments > 0) * rng.choice([0.0, 0.5, 1.0], segments.shape)).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], positions, segments, weights, np.zeros_like(segments))


def packed_pairs(rows: int, length: int, cuts: tuple[int, ...]) -> PairBatch:
    """Rows of pairs: what is read ends elsewhere than what is written, so that a pair lies on several devices."""
    read = packed(rows, length, tuple(cut - 3 for cut in cuts))
    return PairBatch(read.tokens, read.positions, read.segment_ids, *packed(rows, length, cuts))


@functools.lru_cache(maxsize=8)
def update(model: str, sizes: tuple, rows: int, length: int, cuts: tuple, microbatches: int, remat: str) -> Any:
    """Returns (loss, {name: gradient}) of full tuning, read from what SGD does with them."""
    mesh = make_mesh(dict(sizes), jax.devices()[: int(np.prod([size for _, size in sizes]))])
    tuning = TuningConfig(method="full")
    plan = assembly.plan_model(MODELS[model], tuning, param_dtype=jnp.float32, seed=0, where="test")
    with jax.set_mesh(mesh):
        places = (parameter_shardings(plan.trainable, mesh), parameter_shardings(plan.frozen, mesh))
        trainable, frozen = create_on_mesh(plan.make, places)
        optimizer = optax.sgd(RATE)
        state = jax.device_put(initial_state(optimizer, trainable), state_shardings(optimizer, plan.trainable, mesh))
        compute = Compute(jnp.float32, KERNELS.get(model, attention.xla), remat, microbatches, True)
        lay_out = packed_pairs if model == "encoder-decoder" else packed
        batch: AnyBatch = jax.device_put(lay_out(rows, length, cuts), batch_sharding(mesh))
        lowered = jax.jit(make_train_step(plan.graph, optimizer, compute)).lower(state, frozen, batch)
        step = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})  # compiling is most of the time
        after, metrics = step(state, frozen, batch)
        before, after = jax.device_get((state.trainable, after.trainable))
        gradient = jax.tree.map(lambda old, new: (old - new) / RATE, before, after)
    paths, _ = jax.tree_util.tree_flatten_with_path(gradient)
    return float(metrics.loss), {jax.tree_util.keystr(path): leaf for path, leaf in paths}


def assert_equal(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in expected[1].items():
        norm = np.linalg.norm(gradient)
        assert norm > 0, f"{name} has no gradient: the test would be blind to it"
        assert np.linalg.norm(found[1][name] - gradient) <= tolerance * norm, name


COMBINATIONS = [
    ("dense", {"slice": 2, "fsdp": 2, "context": 2}),
    ("experts", {"expert": 2, "context": 2, "tensor": 2}),
    ("dense", {"context": 8}),
    ("dense", {"slice": 2, "data": 2, "tensor": 2}),
    ("dense", {"data": 2, "context": 2, "tensor": 2}),
    ("dense", {"slice": 2, "context": 2, "tensor": 2}),
    ("dense", {"fsdp": 2, "expert": 2, "tensor": 2}),
    ("dense", {"fsdp": 2, "context": 4}),
    ("dense", {"data": 8}),
    ("dense", {"slice": 4, "fsdp": 2}),
    ("experts", {"slice": 2, "expert": 2, "fsdp": 2}),
    ("experts", {"data": 2, "expert": 2, "context": 2}),
    ("experts", {"expert": 4, "context": 2}),
    ("experts", {"slice": 2, "expert": 2, "tensor": 2}),
    ("experts", {"fsdp": 2, "context": 2, "tensor": 2}),
    ("experts", {"slice": 2, "data": 2, "fsdp": 2}),
    ("experts", {"expert": 4, "tensor": 2}),
    ("latent", {"context": 4, "tensor": 2}),
    ("latent", {"fsdp": 2, "expert": 2, "context": 2}),
    ("encoder-decoder", {"context": 4, "tensor": 2}),
    ("encoder-decoder", {"fsdp": 2, "data": 2, "context": 2}),
]
AT_ONCE = 2  # the first of them; the others run in `make test-long`


@pytest.mark.parametrize(
    ("model", "sizes"),
    [pytest.param(*p, marks=() if n < AT_ONCE else pytest.mark.long) for n, p in enumerate(COMBINATIONS)],
    ids=str,
)
def test_any_axes_that_divide_give_the_update_of_one_device(model: str, sizes: dict) -> None:
    shape = (8, 24, (5, 13, 21), 1, "none")
    assert_equal(update(model, tuple(sizes.items()), *shape), update(model, ONE, *shape), tolerance=2e-5)


def test_nothing_is_split_over_slices() -> None:
    """The network between them is too slow to gather weights through: each slice holds a copy (HSDP)."""
    mesh = make_mesh({"slice": 2, "fsdp": 2, "tensor": 2})
    for axis in PARAMETER_RULES:
        assert "slice" not in parameter_spec((axis,), (64,), mesh)
    assert MESH_AXES[0] == "slice"


LONG_ROWS = [
    ({"context": 4, "tensor": 2}, 1),
    ({"context": 8}, 1),
    ({"context": 2, "fsdp": 4}, 4),
]


@pytest.mark.long
@pytest.mark.parametrize(("sizes", "rows"), LONG_ROWS, ids=str)
def test_rows_of_8192_tokens_split_over_devices_give_the_update_of_one(sizes: dict, rows: int) -> None:
    """Segments of some thousand tokens cross the devices' borders, which lie at multiples of 1,024."""
    shape = (rows, 8192, (1500, 1700, 5900, 8100))
    expected = update("dense", ONE, *shape, rows, "full")
    assert_equal(update("dense", tuple(sizes.items()), *shape, 1, "full"), expected)
