"""Shapes of published models: parameter counts are the published ones, and adapters have the size they should."""

import jax
import models_helpers
import pytest
from flax import nnx

from jaxtune import adapters
from jaxtune.models.decoder import Decoder
from jaxtune.models.layers import LoRAParam
from jaxtune.models.registry import family_of

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def published(model_type, vocab, width, mlp, layers, heads, kv_heads, **more):
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


LLAMA31 = {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE}
PUBLISHED = {
    "Llama-2-7B": (published("llama", 32000, 4096, 11008, 32, 32, 32), 6_738_415_616),
    "Llama-3.1-8B": (published("llama", 128256, 4096, 14336, 32, 32, 8, **LLAMA31), 8_030_261_248),
    "Llama-3.1-70B": (published("llama", 128256, 8192, 28672, 80, 64, 8, **LLAMA31), 70_553_706_496),
    "Llama-3.2-1B": (
        published("llama", 128256, 2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True, **LLAMA31),
        1_235_814_400,
    ),
    "Mistral-7B": (published("mistral", 32000, 4096, 14336, 32, 32, 8), 7_241_732_096),
    "Qwen2.5-7B": (
        published("qwen2", 152064, 3584, 18944, 28, 28, 4, use_sliding_window=False),
        7_615_616_512,
    ),
}


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
    hf_config = published("qwen2", 97, 32, 48, 5, 4, 2, use_sliding_window=True, sliding_window=4, max_window_layers=3)
    config = family_of(hf_config, where="here").read_config(hf_config)
    assert [(group.pattern[0].window, group.count) for group in config.groups] == [(None, 3), (4, 2)]
    assert [config.layer_place(layer) for layer in range(5)] == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (1, 0, 0), (1, 0, 1)]
    assert config.num_layers == 5


def test_one_layer_is_traced_whatever_the_depth(tmp_path):
    """The jaxpr of 2 and of 40 layers has equally many equations."""
    sizes = []
    for layers in (2, 40):
        hf_config = published("llama", 97, 32, 48, layers, 4, 2)
        model = models_helpers.abstract_decoder(family_of(hf_config, where="here").read_config(hf_config))
        sizes.append(len(str(models_helpers.jaxpr_of(model)).splitlines()))
    assert sizes[0] == sizes[1]
