"""A folder that cannot be read gets one error that names the file, the tensor and what to do."""

import json

import hf_folders
import models_helpers
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxtune.convert.folder import open_folder
from jaxtune.convert.hf import load_params
from jaxtune.models.registry import family_of

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path):
    return hf_folders.tiny_folder("llama31", tmp_path / "base", max_shard_size="20KB")


@pytest.fixture
def single(tmp_path):
    return hf_folders.tiny_folder("llama31", tmp_path / "base")


def message_of(path) -> str:
    with pytest.raises(ValueError) as caught:
        open_folder(path)
    return str(caught.value)


def test_no_such_folder(tmp_path):
    assert "found no such folder" in message_of(tmp_path / "nowhere")


def test_folder_without_config(tmp_path):
    assert "found no config.json" in message_of(tmp_path)


def test_missing_shard_is_named(sharded):
    first = sorted(sharded.glob("model-*.safetensors"))[0]
    first.unlink()
    message = message_of(sharded)
    assert first.name in message and "download" in message


def test_truncated_file_names_file_and_tensor(single):
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    message = message_of(single)
    assert "model.safetensors has" in message and "tensor" in message and "truncated" in message


@pytest.mark.parametrize("size", [0, 5, 100])
def test_file_cut_inside_its_header(single, size):
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "truncated" in message_of(single)


def test_header_that_is_no_json(single):
    file = single / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[8:20] = b"x" * 12
    file.write_bytes(bytes(raw))
    assert "unreadable header" in message_of(single)


def test_only_pickled_weights(single):
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    message = message_of(single)
    assert "pytorch_model.bin" in message and "safetensors" in message


def test_no_weights_at_all(single):
    (single / "model.safetensors").unlink()
    assert "model.init=random" in message_of(single)


def test_quantised_model(single):
    hf_folders.rewrite_config(single, quantization_config={"quant_method": "gptq"})
    assert "gptq" in message_of(single)


def test_adapter_given_as_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    message = message_of(tmp_path)
    assert "PEFT adapter" in message and "org/base" in message


def test_index_that_disagrees(sharded):
    index = json.loads((sharded / INDEX).read_text())
    file = index["weight_map"].pop("model.norm.weight")
    index["weight_map"]["model.ghost.weight"] = file
    (sharded / INDEX).write_text(json.dumps(index))
    message = message_of(sharded)
    assert "model.ghost.weight" in message and "model.norm.weight" in message


def test_every_wrong_tensor_is_listed_at_once(single):
    tensors = load_file(single / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = tensors["model.norm.weight"].copy()
    tensors["model.layers.2.self_attn.k_proj.weight"] = tensors["model.layers.2.self_attn.k_proj.weight"][:8].copy()
    save_file(tensors, single / "model.safetensors", metadata={"format": "pt"})
    folder = open_folder(single)
    config = family_of(folder.config, where=single).read_config(folder.config)
    with pytest.raises(ValueError) as caught:
        load_params(folder, nnx.state(models_helpers.abstract_decoder(config)))
    message = str(caught.value)
    assert "3 tensor(s) differ" in message
    assert "model.layers.1.mlp.up_proj.weight: missing; expected shape [48, 32]" in message
    assert "model.layers.0.self_attn.q_norm.weight in model.safetensors: not a tensor of a llama" in message
    assert "model.layers.2.self_attn.k_proj.weight in model.safetensors: found shape [8, 32]" in message


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "lama"}, ["lama", "Nearest: 'llama'", "mistral", "qwen2"]),
        ({"rope_parameters": {"rope_type": "mrope", "factor": 2.0}}, ["mrope", "default, linear, dynamic, yarn"]),
        ({"rope_theta": 7.0}, ["rope_theta = 7.0", "5000.0"]),
        ({"hidden_act": "xielu"}, ["xielu", "silu"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads = 3", "divisor of 4"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
    ],
)
def test_config_that_cannot_be_expressed_is_refused_by_name(single, changes, parts):
    hf_folders.rewrite_config(single, **changes)
    config = open_folder(single).config
    with pytest.raises(ValueError) as caught:
        family_of(config, where=single).read_config(config)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
