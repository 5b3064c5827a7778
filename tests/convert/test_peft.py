"""The written adapter is PEFT's own: same logits, no key missing or unexpected; and PEFT's are read."""

import json

import hf_folders
import jax
import models_helpers
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

from jaxtune import adapters
from jaxtune.convert import peft as adapter_folders
from jaxtune.convert import writing
from jaxtune.convert.folder import open_folder
from jaxtune.models.layers import LoRAParam
from jaxtune.sharding import make_mesh, parameter_shardings

TOKENS = np.random.default_rng(1).integers(3, 97, (2, 16))


def our_logits(decoder):
    positions = np.broadcast_to(np.arange(16), TOKENS.shape)
    return models_helpers.logits(decoder, TOKENS, positions, np.ones_like(TOKENS))


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def adapted(path, targets="all-linear", dropout=0.05):
    """Returns a decoder with an adapter whose B is not zero."""
    decoder, _ = models_helpers.load(path)
    adapters.attach(decoder, rank=4, alpha=10.0, dropout=dropout, targets=targets, key=jax.random.key(0))
    for path_, variable in nnx.to_flat_state(nnx.state(decoder, LoRAParam)):
        if path_[-1] == "lora_b":
            variable.set_value(0.1 * jax.random.normal(jax.random.key(len(str(path_))), variable.shape))
    return decoder


LLAMAS = ["llama31", "mistral", "qwen25"]
OTHERS = ["gemma2", "gemma3", "phi3", "olmo3", "gpt2", "gpt_neox", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"]


@pytest.mark.parametrize(
    ("kind", "targets"),
    [(kind, "all-linear") for kind in LLAMAS + OTHERS] + [(kind, ("q_proj", "down_proj")) for kind in LLAMAS],
)
def test_written_adapter_loads_in_peft_with_our_logits(kind, targets, tmp_path):
    base = hf_folders.tiny_folder(kind, tmp_path / "base")
    decoder = adapted(base, targets)
    out = tmp_path / "adapter"
    adapter_folders.export_adapter(
        open_folder(base), nnx.state(decoder), str(out), base_name="org/base", revision="0123abc"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    before = torch_logits(model)
    model = peft.PeftModel.from_pretrained(model, out)
    np.testing.assert_allclose(torch_logits(model), our_logits(decoder), atol=1e-4, rtol=0)
    assert np.abs(torch_logits(model) - before).max() > 0.1
    result = peft.set_peft_model_state_dict(model, peft.utils.load_peft_weights(str(out)))
    assert not [key for key in result.missing_keys if "lora" in key] and not result.unexpected_keys
    with safe_open(out / "adapter_model.safetensors", "np") as file:
        keys = set(file.keys())
        assert file.metadata() == {"format": "pt"}
    theirs = set(peft.get_peft_model_state_dict(model))
    stacked = [v.shape[0] for _, v in nnx.to_flat_state(nnx.state(decoder, LoRAParam))]
    assert keys == theirs and len(keys) == sum(stacked)
    merged = model.merge_and_unload()
    np.testing.assert_allclose(torch_logits(merged), our_logits(decoder), atol=1e-4, rtol=0)


def test_adapter_on_experts_loads_in_peft_with_our_logits(tmp_path):
    """One adapter for each expert and matrix, by the names of the checkpoint, which PEFT puts together itself."""
    base = hf_folders.tiny_folder("mixtral", tmp_path / "base")
    decoder = adapted(base, ("q_proj", "experts.*"), dropout=0.0)
    adapter_folders.export_adapter(
        open_folder(base), nnx.state(decoder), str(tmp_path / "adapter"), base_name="org/base", revision=None
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    before = torch_logits(model)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    np.testing.assert_allclose(torch_logits(model), our_logits(decoder), atol=2e-4, rtol=0)
    assert np.abs(torch_logits(model) - before).max() > 0.1
    writing.export_folder(open_folder(base), nnx.state(decoder), str(tmp_path / "merged"))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(torch_logits(merged), our_logits(decoder), atol=2e-4, rtol=0)
    again, _ = models_helpers.load(base)
    adapter = adapter_folders.open_adapter(str(tmp_path / "adapter"))
    adapters.attach(again, **adapter.attach_options(), key=jax.random.key(0))
    nnx.update(again, adapter_folders.load_adapter(adapter, open_folder(base), nnx.state(again)))
    np.testing.assert_allclose(our_logits(again), our_logits(decoder), atol=1e-6, rtol=0)


def test_adapter_config_has_the_keys_of_the_contract_and_no_more(tmp_path, shared):
    base = hf_folders.tiny_folder("llama31", tmp_path / "base", tokenizer=shared / "tokenizer" / "llama2_hf")
    state = nnx.state(adapted(base, ("q_proj", "v_proj")), LoRAParam)
    adapter_folders.export_adapter(open_folder(base), state, str(tmp_path / "out"), base_name="org/m", revision="c0")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config) == {
        *("base_model_name_or_path", "revision", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights"),
        *("lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"),
        *("layers_to_transform", "task_type", "peft_type", "r", "lora_alpha", "target_modules"),
    }
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 10, 0.05)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/m", "c0")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"} <= names
    assert "base_model: org/m" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("mesh", [None, {"fsdp": 4, "tensor": 2}])
@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_of_peft_is_read_with_its_logits(rslora, mesh, tmp_path):
    base = hf_folders.tiny_folder("llama31", tmp_path / "base")
    torch.manual_seed(0)
    options = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["k_proj", "up_proj"], task_type="CAUSAL_LM", use_rslora=rslora,
        init_lora_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), options)
    model.save_pretrained(tmp_path / "adapter")
    adapter = adapter_folders.open_adapter(str(tmp_path / "adapter"))
    decoder, _ = models_helpers.load(base)
    adapters.attach(decoder, **adapter.attach_options(), key=jax.random.key(0))
    state = nnx.state(decoder)
    shardings = parameter_shardings(state, make_mesh(mesh)) if mesh else None
    loaded = adapter_folders.load_adapter(adapter, open_folder(base), state, shardings=shardings)
    nnx.update(decoder, jax.tree.map(np.asarray, loaded))
    assert adapter.base_name == str(base)
    np.testing.assert_allclose(our_logits(decoder), torch_logits(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["llama31", "llama32", "qwen25"])
def test_merged_export_equals_the_adapter(kind, tmp_path):
    base = hf_folders.tiny_folder(kind, tmp_path / "base", max_shard_size="20KB")
    decoder = adapted(base)
    writing.export_folder(open_folder(base), nnx.state(decoder), str(tmp_path / "out"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(torch_logits(model), our_logits(decoder), atol=1e-4, rtol=0)
    merged = adapters.merge(nnx.state(decoder))
    again, _ = models_helpers.load(tmp_path / "out")
    for path, variable in nnx.to_flat_state(nnx.state(again)):
        ours = dict(nnx.to_flat_state(merged))[path].get_value()
        np.testing.assert_allclose(variable.get_value(), ours, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head']"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
    ],
)
def test_adapter_that_cannot_be_expressed_is_refused_by_name(changes, part, tmp_path):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **changes}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as caught:
        adapter_folders.open_adapter(str(tmp_path))
    assert part in str(caught.value)


def test_adapter_that_lacks_tensors_lists_them(tmp_path):
    base = hf_folders.tiny_folder("llama31", tmp_path / "base")
    state = nnx.state(adapted(base, ("q_proj",)))
    adapter_folders.export_adapter(open_folder(base), state, str(tmp_path / "out"), base_name="org/m", revision=None)
    adapter = adapter_folders.open_adapter(str(tmp_path / "out"))
    other = nnx.state(adapted(base, ("q_proj", "v_proj")))
    with pytest.raises(ValueError, match=r"6 tensor\(s\) differ") as caught:
        adapter_folders.load_adapter(adapter, open_folder(base), other)
    assert "layers.2.self_attn.v_proj.lora_B.weight: missing; expected shape [16, 4]" in str(caught.value)


def test_model_without_adapter_is_not_written(tmp_path):
    base = hf_folders.tiny_folder("llama31", tmp_path / "base")
    decoder, _ = models_helpers.load(base)
    with pytest.raises(ValueError, match="no adapter to write"):
        adapter_folders.export_adapter(
            open_folder(base), nnx.state(decoder), str(tmp_path / "out"), base_name="m", revision=None
        )
