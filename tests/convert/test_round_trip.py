"""HF -> jaxtune -> HF with zero steps changes no byte of weights, index and tokenizer, and no key of the configs."""

import json
import pathlib

import hf_folders
import jax
import jax.numpy as jnp
import ml_dtypes
import models_helpers
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxtune.convert import hf, writing
from jaxtune.convert.folder import open_folder
from jaxtune.models.registry import family_of
from jaxtune.sharding import make_mesh, parameter_shardings


def state_of(path, *, mesh=None, dtype_of=None):
    folder = open_folder(path)
    config = family_of(folder.config, where=path).read_config(folder.config)
    abstract = nnx.state(models_helpers.abstract_decoder(config))
    shardings = parameter_shardings(abstract, mesh) if mesh is not None else None
    return folder, hf.load_params(folder, abstract, shardings=shardings, dtype_of=dtype_of)


# What config.json says rope with, so that transformers 4 and 5 read the same.
ROPE_WORDS = {
    "gemma3_text": {"rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq"},
    "olmo3": {"rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq"},
    "phi3": {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"},
    "gpt_neox": {"rope_parameters", "rotary_pct", "rotary_emb_base"},
    "qwen3_moe": {"rope_theta", "rope_scaling", "rope_parameters", "num_experts"},
    "gpt2": set(),
}


def assert_same_files(base: pathlib.Path, out: pathlib.Path) -> None:
    names = {file.name for file in base.iterdir()}
    assert {file.name for file in out.iterdir()} == names | {"generation_config.json"}
    for name in names - {"config.json"}:
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    before, after = (json.loads((path / "config.json").read_text()) for path in (base, out))
    assert {key: after[key] for key in before} == before
    assert {"dtype", "torch_dtype"} <= set(after)
    rope = ROPE_WORDS.get(before["model_type"], {"rope_theta", "rope_scaling", "rope_parameters"})
    assert rope <= set(after)
    assert set(after) - set(before) <= {"dtype", "torch_dtype", *rope}


@pytest.mark.parametrize("kind", sorted(hf_folders.KINDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_step_round_trip_is_byte_equal(kind, dtype, tmp_path, shared):
    tokenizer = shared / "tokenizer" / "llama2_hf"
    base = hf_folders.tiny_folder(kind, tmp_path / "base", max_shard_size="20KB", dtype=dtype, tokenizer=tokenizer)
    assert (base / "model.safetensors.index.json").exists()
    folder, state = state_of(base, dtype_of=hf.file_dtypes(open_folder(base)))
    writing.export_folder(folder, state, str(tmp_path / "out"))
    assert_same_files(base, tmp_path / "out")


def test_round_trip_of_a_real_checkpoint_over_a_mesh(tmp_path, shared):
    base = shared / "models" / "stories260K"
    folder, state = state_of(base, mesh=make_mesh({"fsdp": 4, "tensor": 2}))
    kernel = state["groups"][0][0]["mlp"]["gate_proj"]["kernel"].get_value()
    assert len(kernel.sharding.device_set) == 8
    assert kernel.addressable_shards[0].data.shape == (5, 64 // 4, 172 // 2)
    writing.export_folder(folder, state, str(tmp_path / "out"))
    assert_same_files(base, tmp_path / "out")


def test_bfloat16_file_held_in_float32_comes_back_byte_equal(tmp_path):
    base = hf_folders.tiny_folder("llama31", tmp_path / "base", dtype=torch.bfloat16)
    folder, state = state_of(base, dtype_of=lambda path: jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    writing.export_folder(folder, state, str(tmp_path / "out"))
    assert_same_files(base, tmp_path / "out")


def test_tensors_that_carry_no_weights_and_tied_heads_survive(tmp_path):
    base = hf_folders.tiny_folder("llama32", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.arange(4, dtype=np.float32)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    folder, state = state_of(base)
    writing.export_folder(folder, state, str(tmp_path / "same"))
    assert_same_files(base, tmp_path / "same")
    embedding = state["embed"]["embedding"]
    embedding.set_value(embedding.get_value() + 1)
    writing.export_folder(folder, state, str(tmp_path / "moved"))
    moved = load_file(tmp_path / "moved" / "model.safetensors")
    np.testing.assert_array_equal(moved["lm_head.weight"], tensors["lm_head.weight"] + 1)


@pytest.mark.parametrize("kind", ["llama31", "mistral", "qwen25"])
def test_export_loads_in_transformers_with_equal_logits(kind, tmp_path):
    base = hf_folders.tiny_folder(kind, tmp_path / "base")
    folder, state = state_of(base)
    writing.export_folder(folder, jax.tree.map(lambda x: x * 1.01, state), str(tmp_path / "out"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    decoder, _ = models_helpers.load(tmp_path / "out")
    tokens = np.arange(3, 23)[None]
    ours = models_helpers.logits(decoder, tokens, np.arange(20)[None], np.ones_like(tokens))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_model_without_base_weights_is_written_in_the_familys_order(tmp_path):
    base = hf_folders.tiny_folder("llama31", tmp_path / "base")
    _, state = state_of(base)
    (base / "model.safetensors").unlink()
    folder = open_folder(base, needs_weights=False)
    writing.export_folder(folder, state, str(tmp_path / "out"))
    out = open_folder(tmp_path / "out")
    assert next(iter(out.tensors)) == "model.embed_tokens.weight"
    assert list(out.tensors)[-1] == "lm_head.weight"
    _, again = state_of(tmp_path / "out")
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, state)))
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("style", ["4", "5"])
def test_either_rope_style_is_read_the_same_and_both_are_written(style, tmp_path):
    base = hf_folders.tiny_folder("llama31", tmp_path / "base")
    rope = json.loads((base / "config.json").read_text())["rope_parameters"]
    if style == "4":
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        old = {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
        hf_folders.rewrite_config(base, drop=("rope_parameters",), **old)
    folder, state = state_of(base)
    assert models_helpers.load(base)[1].groups[0].pattern[0].rope.kind == "llama3"
    writing.export_folder(folder, state, str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5000.0
    assert written["rope_scaling"]["factor"] == written["rope_parameters"]["factor"] == 8.0
    assert written["rope_scaling"]["rope_type"] == written["rope_parameters"]["rope_type"] == "llama3"


def test_stop_ids_and_template_are_gained_and_nothing_else_changes(tmp_path, shared):
    base = hf_folders.tiny_folder("llama31", tmp_path / "base", tokenizer=shared / "tokenizer" / "llama2_hf")
    (base / "generation_config.json").write_text('{"eos_token_id": 2, "pad_token_id": 0, "temperature": 0.6}')
    folder, state = state_of(base)
    writing.export_folder(folder, state, str(tmp_path / "out"), chat_template="{{ messages }}", stop_ids=(2, 7, 0))
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2, 7], "pad_token_id": 0, "temperature": 0.6}
    before, after = (json.loads((path / "tokenizer_config.json").read_text()) for path in (base, tmp_path / "out"))
    assert after == {**before, "chat_template": "{{ messages }}"}
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_dtype_of_each_file_tensor_is_kept(tmp_path):
    base = hf_folders.tiny_folder("llama31", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(ml_dtypes.bfloat16)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    folder, state = state_of(base)
    writing.export_folder(folder, state, str(tmp_path / "out"))
    assert_same_files(base, tmp_path / "out")
