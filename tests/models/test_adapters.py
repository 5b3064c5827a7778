"""Adapters begin as nothing, inherit their kernel's axes, merge exactly, and drop out row by row."""

import hf_folders
import jax
import jax.numpy as jnp
import models_helpers
import numpy as np
import pytest
from flax import nnx

from jaxtune import adapters
from jaxtune.models import layers
from jaxtune.models.attention import ATTENTIONS
from jaxtune.models.layers import LoRAParam


def options(**changes):
    return {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "key": jax.random.key(3), **changes}


def redraw_b(decoder):
    for _, variable in nnx.to_flat_state(nnx.state(decoder, LoRAParam)):
        if variable.shape[-2] == 4:
            variable.set_value(0.3 * jax.random.normal(jax.random.key(variable.shape[-1]), variable.shape))
    return decoder


@pytest.fixture
def decoder(tmp_path):
    return models_helpers.load(hf_folders.tiny_folder("qwen25", tmp_path))[0]


def run(decoder, **more):
    tokens = np.arange(3, 15)[None].repeat(2, 0)
    return models_helpers.logits(decoder, tokens, np.arange(12)[None].repeat(2, 0), np.ones_like(tokens), **more)


def test_fresh_adapter_changes_nothing_and_a_trained_one_does(decoder):
    before = run(decoder)
    adapters.attach(decoder, **options())
    np.testing.assert_array_equal(run(decoder), before)
    assert np.abs(run(redraw_b(decoder)) - before).max() > 0.1


def test_adapter_inherits_axes_and_dtype(decoder):
    adapters.attach(decoder, **options())
    o_proj = decoder.groups[0][0].attention.o_proj
    assert o_proj.lora_a.get_metadata()["axes"] == ("layers", "heads", None)
    assert o_proj.lora_b.get_metadata()["axes"] == ("layers", None, "embed")
    assert o_proj.lora_a.shape == (1, 32, 4) and o_proj.lora_b.shape == (1, 4, 32)
    assert o_proj.lora_a[...].dtype == o_proj.lora_b[...].dtype == jnp.float32
    assert np.abs(o_proj.lora_a[...]).max() <= 1 / np.sqrt(32)
    assert np.abs(o_proj.lora_a[...]).max() > 0.9 / np.sqrt(32)


def test_targets_by_name_and_glob(decoder):
    names = adapters.attach(decoder, **options(targets=("v_proj", "mlp.*")))
    assert set(names) == {"v_proj", "gate_proj", "up_proj", "down_proj"}
    assert decoder.groups[1][0].attention.q_proj.lora_a is None
    assert decoder.groups[1][0].attention.v_proj.lora_a is not None


@pytest.mark.parametrize("target", ["qproj", "lm_head", "w*"])
def test_unknown_target_lists_the_choices(decoder, target):
    with pytest.raises(ValueError) as caught:
        adapters.attach(decoder, **options(targets=(target,)))
    assert repr(target) in str(caught.value) and "q_proj" in str(caught.value) and "all-linear" in str(caught.value)


def test_merged_equals_unmerged(decoder):
    redraw_b(adapters.attach(decoder, **options()) and decoder)
    before = run(decoder)
    merged = adapters.merge(nnx.state(decoder))
    assert not any(isinstance(variable, LoRAParam) for _, variable in nnx.to_flat_state(merged))
    for _, linear in adapters.linear_layers(decoder):
        linear.lora_a = linear.lora_b = None
    np.testing.assert_allclose(run(nnx.merge(nnx.graphdef(decoder), merged)), before, atol=1e-4, rtol=0)


def test_only_adapters_have_gradients_and_b_gets_one(decoder):
    adapters.attach(decoder, **options())
    graph, trainable, frozen = nnx.split(decoder, adapters.trainable_filter("lora"), ...)
    tokens = jnp.arange(3, 15)[None]

    def loss(trainable):
        model = nnx.merge(graph, trainable, frozen)
        hidden = model(
            tokens, jnp.arange(12)[None], jnp.ones_like(tokens), compute_dtype=jnp.float32, attention=ATTENTIONS["xla"]
        ).hidden
        return jnp.sum(model.logits(hidden) ** 2)

    gradient = nnx.to_flat_state(jax.grad(loss)(trainable))
    assert {path[-1] for path, _ in gradient} == {"lora_a", "lora_b"}
    assert all(np.abs(v.get_value()).max() > 0 for path, v in gradient if path[-1] == "lora_b")


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match="lora, full"):
        adapters.trainable_filter("lorra")


def test_dropout_of_a_row_depends_on_its_key_alone(decoder):
    redraw_b(adapters.attach(decoder, **options(dropout=0.5)) and decoder)
    keys = jax.random.split(jax.random.key(9), 2)
    both = run(decoder, dropout_keys=keys)
    tokens = np.arange(3, 15)[None]
    for row in range(2):
        positions = np.arange(12)[None]
        alone = models_helpers.logits(
            decoder, tokens, positions, np.ones_like(tokens), dropout_keys=keys[row : row + 1]
        )
        np.testing.assert_allclose(alone[0], both[row], atol=1e-5, rtol=0)
    assert np.abs(both[0] - both[1]).max() > 0.1  # equal tokens, other noise
    assert np.abs(both[0] - run(decoder)[0]).max() > 0.1


def test_dropout_differs_between_layers_and_sites_and_keeps_the_mean():
    x = jnp.ones((2, 64, 64))
    keys = jax.random.split(jax.random.key(0), 2)
    draws = {
        (layer, site): np.asarray(layers.drop_rows(x, layers.Dropout(keys, jnp.int32(layer)), site=site, rate=0.25))
        for layer in (0, 1)
        for site in ("q_proj", "k_proj")
    }
    assert len({draw.tobytes() for draw in draws.values()}) == 4
    for draw in draws.values():
        assert set(np.unique(draw)) == {np.float32(0), np.float32(1 / 0.75)}
        assert abs(draw.mean() - 1) < 0.03
