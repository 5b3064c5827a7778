"""Experts: transformers' load-balance loss, a z-loss by hand, routers that are frozen, numbers that are logged."""

import hf_folders
import jax
import jax.numpy as jnp
import models_helpers
import numpy as np
import pytest
import tiny_runs
import torch
import transformers
from flax import nnx
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from jaxtune import adapters, router_loss
from jaxtune.models.attention import xla
from jaxtune.models.decoder_config import ExpertsConfig
from jaxtune.models.experts import ExpertLinear, RouterParam, choose_experts
from jaxtune.models.grouped import REFERENCE
from jaxtune.train import train


def router_sums(decoder, tokens, segments):
    graph, state = nnx.split(decoder)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)

    @jax.jit
    def run(state):
        return nnx.merge(graph, state)(tokens, positions, segments, compute_dtype=jnp.float32, attention=xla).router

    return run(state)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("padding", [0, 7])
def test_load_balance_loss_is_that_of_transformers(kind, padding, tmp_path):
    decoder, config = models_helpers.load(hf_folders.tiny_folder(kind, tmp_path))
    model = hf_folders.tiny_model(kind)
    tokens = np.random.default_rng(0).integers(3, 97, (2, 20))
    mask = np.ones_like(tokens)
    mask[0, 20 - padding :] = 0
    found = router_loss.load_balance(router_sums(decoder, tokens, mask))
    with torch.no_grad():
        told = model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask), output_router_logits=True)
    experts, k = config.experts.count, config.experts.per_token
    expected = load_balancing_loss_func(told.router_logits, experts, k, torch.tensor(mask))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert float(found) > 1.005 * k  # an even load gives k: the loss has something to say here


def test_z_loss_and_metrics_by_hand(tmp_path):
    decoder, _ = models_helpers.load(hf_folders.tiny_folder("mixtral", tmp_path))
    tokens = np.random.default_rng(0).integers(3, 97, (2, 20))
    sums = router_sums(decoder, tokens, np.ones_like(tokens))
    model = hf_folders.tiny_model("mixtral")
    with torch.no_grad():
        scores = torch.stack(model(input_ids=torch.tensor(tokens), output_router_logits=True).router_logits).numpy()
    expected = np.mean(np.log(np.exp(scores).sum(-1)) ** 2)
    assert float(router_loss.z_loss(sums)) == pytest.approx(expected, rel=1e-4)
    chosen = np.argsort(-scores, axis=-1)[..., :2]
    counts = np.stack([np.bincount(layer.reshape(-1), minlength=4) for layer in chosen])
    np.testing.assert_array_equal(sums.selected, counts)
    metrics = router_loss.router_metrics(sums)
    assert float(metrics.busiest) == pytest.approx((counts.max(1) / counts.mean(1)).max())
    assert int(metrics.unused) == (counts == 0).sum()


def test_nothing_is_dropped_however_uneven_the_load(tmp_path):
    """All tokens to two experts: a capacity would drop most of them, and the sum by hand would differ."""
    decoder, config = models_helpers.load(hf_folders.tiny_folder("mixtral", tmp_path))
    layer = jax.tree.map(lambda x: x[0], nnx.split(decoder.groups[0][0].mlp))
    graph, state = layer
    state["router"]["kernel"].set_value(jnp.zeros((config.width, 4)).at[:, 1].set(1.0).at[:, 3].set(0.5))
    x = jnp.abs(jax.random.normal(jax.random.key(0), (2, 30, config.width)))
    y, sums = nnx.merge(graph, state)(x, jnp.ones((2, 30), jnp.int32), kernels=REFERENCE, dropout=None)
    np.testing.assert_array_equal(sums.selected, [0, 60, 0, 60])
    total = jnp.sum(x, axis=-1)
    share = jax.nn.sigmoid(0.5 * total)[..., None]

    def expert(number):
        gate, up, down = (state[name]["kernel"][...][number] for name in ("gate_proj", "up_proj", "down_proj"))
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    np.testing.assert_allclose(y, share * expert(1) + (1 - share) * expert(3), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1]),
        ({"groups": 2, "groups_kept": 1}, [0, 1]),
        ({"groups": 2, "groups_kept": 1, "group_score": "top2"}, [2, 3]),
    ],
)
def test_groups_are_chosen_by_their_best_or_two_best(options, expected):
    scores = jnp.array([[[3.2, -9.0, 3.0, 2.9]]]) if options else jnp.array([[[4.0, 3.0, 1.0, 0.0]]])
    _, chosen = choose_experts(scores, ExpertsConfig(count=4, per_token=2, width=4, **options), None)
    assert sorted(np.asarray(chosen)[0, 0].tolist()) == expected


def test_a_correction_moves_the_choice_and_not_the_weights():
    config = ExpertsConfig(count=3, per_token=1, width=4, score="sigmoid")
    weights, chosen = choose_experts(jnp.array([[[2.0, 1.0, 0.0]]]), config, jnp.array([0.0, 0.0, 9.0]))
    assert np.asarray(chosen).item() == 2
    assert float(weights[0, 0, 0]) == pytest.approx(0.5)


@pytest.mark.parametrize("routers", ["train", "freeze"])
def test_routers_are_trained_or_frozen(routers, tmp_path):
    decoder, _ = models_helpers.load(hf_folders.tiny_folder("mixtral", tmp_path))
    trainable, frozen = nnx.split(decoder, adapters.trainable_filter("full", routers=routers), ...)[1:]
    found = [variable for _, variable in nnx.to_flat_state(trainable) if isinstance(variable, RouterParam)]
    assert bool(found) == (routers == "train")
    assert bool(jax.tree.leaves(frozen)) == (routers == "freeze")


def test_adapters_leave_experts_alone_unless_named(tmp_path):
    decoder, _ = models_helpers.load(hf_folders.tiny_folder("mixtral", tmp_path))
    options = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "key": jax.random.key(0)}
    assert set(adapters.attach(decoder, targets="all-linear", **options)) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    named = adapters.attach(decoder, targets=("experts.*",), **options)
    assert set(named) == {"experts.w1", "experts.w3", "experts.w2"}
    experts = [node for _, node in nnx.iter_graph(decoder) if isinstance(node, ExpertLinear)]
    assert len(experts) == 3 and all(node.lora_a[...].shape[:2] == (3, 4) for node in experts)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_with_experts_trains_logs_and_exports(method, tmp_path):
    base = tiny_runs.write_model(tmp_path / "base", "mixtral")
    data, output = tiny_runs.write_rows(tmp_path / "data.jsonl", tiny_runs.rows(64)), tmp_path / "out"
    penalties = ("tuning.load_balance=0.02", "tuning.router_z=0.001") if method == "full" else ()
    mesh = ("mesh.expert=2", "mesh.fsdp=4", "train.microbatch_rows=8")
    train(tiny_runs.config(base, data, output, f"tuning.method={method}", *penalties, *mesh))
    losses = tiny_runs.losses(output)
    assert len(losses) == 6 and losses[6][0] < losses[1][0]
    for record in tiny_runs.records(output):
        if "loss" in record:
            assert set(record["router"]) == {"load_balance", "z_loss", "busiest", "unused"}
            assert 1 <= record["router"]["busiest"] <= 4
    model = transformers.AutoModelForCausalLM.from_pretrained(output / "hf")
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()
