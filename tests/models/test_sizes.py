"""Shapes of published models: parameter counts are the published ones, and adapters have the size they should."""

import jax
import models_helpers
import pytest
from flax import nnx
from published import PUBLISHED, shape

from jaxtune import adapters
from jaxtune.models.decoder import Decoder
from jaxtune.models.layers import LoRAParam
from jaxtune.models.registry import family_of


def config_of(name):
    hf_config = PUBLISHED[name][0]
    return family_of(hf_config, where=name).read_config(hf_config)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameter_count_is_the_published_one(name):
    assert adapters.count(nnx.state(models_helpers.abstract_decoder(config_of(name)))) == PUBLISHED[name][1]


@pytest.mark.parametrize(("name", "expected"), [("Llama-2-7B", 39_976_960), ("Llama-3.1-8B", 41_943_040)])
def test_lora_of_rank_16_on_the_seven_matrices(name, expected):
    def build():
        model = Decoder(config_of(name), key=jax.random.key(0))
        adapters.attach(model, rank=16, alpha=32, dropout=0.0, targets="all-linear", key=jax.random.key(1))
        return model

    _, trainable, frozen = nnx.split(nnx.eval_shape(build), adapters.trainable_filter("lora"), ...)
    assert adapters.count(trainable) == expected
    assert adapters.count(frozen) == PUBLISHED[name][1]
    assert all(isinstance(variable, LoRAParam) for _, variable in nnx.to_flat_state(trainable))


def test_every_parameter_says_its_axes():
    for name in PUBLISHED:
        for path, variable in nnx.to_flat_state(nnx.state(models_helpers.abstract_decoder(config_of(name)))):
            axes = variable.get_metadata()["axes"]
            assert len(axes) == len(variable.shape), path
            assert (axes[0] == "layers") == (path[0] == "groups")


def test_layers_with_and_without_window_are_two_groups():
    hf_config = shape("qwen2", 97, 32, 48, 5, 4, 2, use_sliding_window=True, sliding_window=4, max_window_layers=3)
    config = family_of(hf_config, where="here").read_config(hf_config)
    assert [(group.pattern[0].window, group.count) for group in config.groups] == [(None, 3), (4, 2)]
    assert [config.layer_place(layer) for layer in range(5)] == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (1, 0, 0), (1, 0, 1)]
    assert config.num_layers == 5


def test_one_layer_is_traced_whatever_the_depth(tmp_path):
    """The jaxpr of 2 and of 40 layers has equally many equations."""
    sizes = []
    for layers in (2, 40):
        hf_config = shape("llama", 97, 32, 48, layers, 4, 2)
        model = models_helpers.abstract_decoder(family_of(hf_config, where="here").read_config(hf_config))
        sizes.append(len(str(models_helpers.jaxpr_of(model)).splitlines()))
    assert sizes[0] == sizes[1]
