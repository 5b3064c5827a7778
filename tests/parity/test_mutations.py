"""A feature left out or read wrongly is seen: every one moves the logits by ten times the tolerance or more."""

import dataclasses

import hf_folders
import models_helpers
import numpy as np
import pytest
from flax import nnx
from parity_helpers import FAR, T, tokens_of, tolerance_of, torch_logits


def _rope(**changes):
    def change(config):
        def in_kind(kind):
            return dataclasses.replace(kind, rope=kind.rope and dataclasses.replace(kind.rope, **changes))

        return _kinds(config, in_kind)

    return change


def _experts(**changes):
    return lambda config: dataclasses.replace(config, experts=dataclasses.replace(config.experts, **changes))


def _turned_everywhere(config):
    rope = next(kind.rope for kind in config.layer_kinds() if kind.rope is not None)
    return _kinds(config, lambda kind: dataclasses.replace(kind, rope=rope))


def _kinds(config, change):
    groups = tuple(
        dataclasses.replace(group, pattern=tuple(change(kind) for kind in group.pattern)) for group in config.groups
    )
    return dataclasses.replace(config, groups=groups)


def _no_window(config):
    return _kinds(config, lambda kind: dataclasses.replace(kind, window=None))


def _wider_window(config):
    return _kinds(config, lambda kind: dataclasses.replace(kind, window=kind.window and kind.window + 1))


def _set(**changes):
    return lambda config: dataclasses.replace(config, **changes)


CONFIG_MUTATIONS = {
    "rope base": ("llama2", _rope(theta=9000.0)),
    "rope base of qwen2": ("qwen2", _rope(theta=10000.0)),
    "llama3 scaling": ("llama31", _rope(kind="default")),
    "llama3 scaling, tied": ("llama32", _rope(kind="default")),
    "llama3 factor": ("llama31", _rope(factor=4.0)),
    "llama3 low_freq_factor": ("llama31", _rope(low_freq_factor=2.0)),
    "llama3 high_freq_factor": ("llama31", _rope(high_freq_factor=2.0)),
    "llama3 original positions": ("llama31", _rope(original_positions=128)),
    "linear scaling": ("llama_linear", _rope(kind="default")),
    "linear factor": ("llama_linear", _rope(factor=2.0)),
    "window": ("mistral", _no_window),
    "window off by one": ("mistral", _wider_window),
    "window of late layers": ("qwen25", _no_window),
    "window off by one in late layers": ("qwen25", _wider_window),
    "norm eps": ("llama2", _set(norm_eps=1e-2)),
    "activation": ("llama2", _set(activation="gelu")),
    "dynamic scaling": ("llama_dynamic", _rope(kind="default")),
    "dynamic factor": ("llama_dynamic", _rope(factor=2.0)),
    "yarn": ("llama_yarn", _rope(kind="default")),
    "yarn amplitude": ("llama_yarn", _rope(amplitude=1.0)),
    "yarn beta_fast": ("llama_yarn", _rope(beta_fast=0.5)),
    "yarn beta_slow": ("llama_yarn", _rope(beta_slow=3.0)),
    "yarn truncate": ("gpt_oss", _rope(truncate=True)),
    "longrope": ("phi4_longrope", _rope(long_factors=(1.0, 1.0, 1.0))),
    "longrope amplitude": ("phi4_longrope", _rope(amplitude=1.0)),
    "longrope original positions": ("phi4_longrope", _rope(original_positions=9000)),
    "partial rope": ("gpt_neox", _rope(rotary_dim=None)),
    "a rope by layer type": ("gemma3", _rope(theta=50000.0)),
    "a scaling by layer type": ("olmo3", _rope(kind="default")),
    "interleaved rope": ("deepseek_v3", _rope(interleaved=False)),
    "layers without rope": ("smollm3", _turned_everywhere),
    "norm offset": ("gemma", _set(norm_offset=0.0)),
    "embedding scale": ("gemma", _set(embed_scale=1.0)),
    "gelu by tanh": ("gemma", _set(activation="gelu")),
    "score soft-cap": ("gemma2", _set(softcap=None)),
    "logit soft-cap": ("gemma2", _set(final_softcap=None)),
    "query scale": ("gemma2", _set(query_scale=None)),
    "alternating windows": ("gemma2", _no_window),
    "windows by layer type": ("gemma3", _wider_window),
    "windows of olmo3": ("olmo3", _wider_window),
    "windows of phi3": ("phi3", _wider_window),
    "windows of qwen3": ("qwen3_windows", _wider_window),
    "windows of gpt_oss": ("gpt_oss", _wider_window),
    "windows of mixtral": ("mixtral", _wider_window),
    "embedding multiplier": ("granite", _set(embed_scale=1.0)),
    "attention multiplier": ("granite", _set(query_scale=None)),
    "residual multiplier": ("granite", _set(residual_scale=1.0)),
    "logits scaling": ("granite", _set(logit_scale=1.0)),
    "parallel halves": ("gpt_neox", _set(parallel=False)),
    "serial halves": ("gpt_neox_serial", _set(parallel=True)),
    "latent query scale": ("deepseek_v3", _set(query_scale=None)),
    "experts per token": ("mixtral", _experts(per_token=1)),
    "normalized weights": ("mixtral", _experts(normalize=False)),
    "normalized weights of qwen3": ("qwen3_moe", _experts(normalize=False)),
    "weights not normalized": ("deepseek_v2", _experts(normalize=True)),
    "routing scale": ("deepseek_v2", _experts(scale=1.0)),
    "groups of experts": ("deepseek_v2_groups", _experts(groups_kept=4)),
    "a group's score": ("deepseek_v3", _experts(group_score="max")),
    "sigmoid scores": ("deepseek_v3", _experts(score="softmax")),
    "softmax after the choice": ("gpt_oss", _experts(score="softmax")),
    "clipped unit": ("gpt_oss", _experts(swiglu_limit=7.0)),
    "the unit's alpha": ("gpt_oss", _experts(swiglu_alpha=1.0)),
}


@pytest.mark.parametrize("name", sorted(CONFIG_MUTATIONS))
def test_a_changed_config_is_seen(name, tmp_path):
    kind, change = CONFIG_MUTATIONS[name]
    decoder, config = models_helpers.load(hf_folders.tiny_folder(kind, tmp_path))
    graph, _ = nnx.split(models_helpers.abstract_decoder(change(config)))
    _assert_seen(kind, nnx.merge(graph, nnx.state(decoder)))


TENSOR_MUTATIONS = [
    (kind, part)
    for kind, parts in {
        "llama_biases": "q_proj/bias k_proj/bias v_proj/bias o_proj/bias gate_proj/bias up_proj/bias down_proj/bias",
        "qwen2": "q_proj/bias k_proj/bias v_proj/bias",
        "llama31": "attention_norm/weight mlp_norm/weight norm/weight q_proj/kernel o_proj/kernel lm_head/kernel",
        "llama32": "embed/embedding",
        "qwen3": "q_norm/weight k_norm/weight",
        "qwen3_windows": "q_proj/bias o_proj/bias",
        "gemma2": "attention_post_norm/weight mlp_post_norm/weight mlp_norm/weight",
        "gemma3": "q_norm/weight k_norm/weight",
        "olmo2": "q_norm/weight k_norm/weight attention_post_norm/weight mlp_post_norm/weight",
        "gpt2": "embed_positions/embedding qkv_proj/bias o_proj/bias up_proj/bias down_proj/bias attention_norm/bias "
        "mlp_norm/bias norm/bias",
        "gpt_neox": "qkv_proj/bias o_proj/bias up_proj/bias down_proj/bias attention_norm/bias mlp_norm/bias",
        "qwen3_moe": "router/kernel gate_proj/kernel up_proj/kernel down_proj/kernel",
        "deepseek_v2_groups": "q_a_norm/weight kv_a_norm/weight shared/down_proj/kernel",
        "deepseek_v3": "router/correction",
        "gpt_oss": "attention/sinks router/bias gate_up_proj/bias mlp/down_proj/bias o_proj/bias",
    }.items()
    for part in parts.split()
]


@pytest.mark.parametrize(("kind", "part"), TENSOR_MUTATIONS)
def test_a_removed_tensor_is_seen(kind, part, tmp_path):
    """A bias set to 0 or a norm to 1, in all layers: what a forgotten tensor would look like."""
    decoder, _ = models_helpers.load(hf_folders.tiny_folder(kind, tmp_path))
    state = nnx.state(decoder)
    found = 0
    for path, variable in nnx.to_flat_state(state):
        if "/".join(map(str, path)).endswith(part) and not (part.startswith("norm/") and path[0] != "norm"):
            variable.set_value(variable.get_value() * 0 + (1 if "norm/weight" in part else 0))
            found += 1
    assert found
    _assert_seen(kind, nnx.merge(nnx.graphdef(decoder), state))


def test_kv_heads_in_another_order_are_seen(tmp_path):
    """Query head n belongs to kv head n // G, not n % K."""
    decoder, config = models_helpers.load(hf_folders.tiny_folder("llama31", tmp_path))
    for layers in (decoder.groups[0][0],):
        kernel = layers.attention.q_proj.kernel
        heads = kernel[...].reshape(3, config.width, config.num_kv_heads, -1, config.head_dim)
        kernel.set_value(heads.swapaxes(2, 3).reshape(kernel.shape))
    _assert_seen("llama31", decoder)


def _assert_seen(kind, decoder):
    tokens = tokens_of(2)
    positions = np.broadcast_to(np.arange(FAR, FAR + T), tokens.shape)
    ours = models_helpers.logits(decoder, tokens, positions, np.ones_like(tokens))
    theirs = torch_logits(hf_folders.tiny_model(kind), tokens, positions)
    assert np.abs(ours - theirs).max() > 10 * tolerance_of(kind)
