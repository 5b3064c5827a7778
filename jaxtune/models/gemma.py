"""Gemma 1, 2 and 3 (text): norms around 1 and scaled embeddings; then norms after each half, soft-caps or q/k norms.

A multimodal Gemma 3 folder is tuned as a text model: its image tower is left as it is, and copied on export.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxtune.models.decoder_config import DecoderConfig, LayerGroup, LayerKind, group_layers
from jaxtune.models.family import LLAMA_NORMS, Family, Weight, llama_line_weights
from jaxtune.models.reading import (
    HFConfig,
    activation_of,
    complete_rope_by_type,
    leave_as_it_is,
    llama_line,
    refuse,
    required,
    rope_by_type,
    rope_of,
    window_of,
    windows_of,
)
from jaxtune.models.rope import Rope

NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
# What a published Gemma 3 text_config leaves out.
GEMMA3_DEFAULTS = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}


def read_gemma(config: HFConfig) -> DecoderConfig:
    """Translates a Gemma 1 config.json; its `gelu` means the tanh form, as the release was trained."""
    found = config.get("hidden_activation") or config.get("hidden_act")
    activation = "gelu_tanh" if found in (None, "gelu") else activation_of({"hidden_act": found})
    kind = LayerKind(None, rope_of({"head_dim": 256, **config}))
    groups = (LayerGroup((kind,), int(required(config, "num_hidden_layers"))),)
    return _gemma({"head_dim": 256, **config}, groups, activation=activation)


def read_gemma2(config: HFConfig) -> DecoderConfig:
    """Translates a Gemma 2 config.json: every other layer has the window, scores and logits are cut off softly."""
    config = {"head_dim": 256, **config}
    rope = rope_of(config)
    windows = windows_of(config, default=lambda layer: layer % 2 == 0, window=window_of(config))
    return _gemma2(
        config,
        group_layers([LayerKind(window, rope) for window in windows]),
        softcap=config.get("attn_logit_softcapping", 50.0),
        final_softcap=config.get("final_logit_softcapping", 30.0),
    )


def read_gemma3(config: HFConfig) -> DecoderConfig:
    """Translates a Gemma 3 text config: five layers with window and a rope of their own, then one without."""
    config = {**GEMMA3_DEFAULTS, **config}
    if config.get("use_bidirectional_attention"):
        raise refuse("use_bidirectional_attention", True, supported="false", advice="This is an embedding model.")
    flat: dict[str, Any] = {k: v for k, v in config.items() if k != "rope_parameters"}
    everywhere = rope_by_type(config, "full_attention", rope_of(flat, default_theta=1000000.0))
    local = rope_by_type(config, "sliding_attention", Rope(float(config.get("rope_local_base_freq", 10000.0))))
    period = int(config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6)
    windows = windows_of(config, default=lambda layer: (layer + 1) % period != 0, window=window_of(config))
    kinds = [LayerKind(window, everywhere if window is None else local) for window in windows]
    return _gemma2(
        config,
        group_layers(kinds),
        final_softcap=config.get("final_logit_softcapping"),
        qk_norm="head",
    )


def read_gemma3_multimodal(config: HFConfig) -> DecoderConfig:
    """Translates the text part of a multimodal Gemma 3 config.json."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise refuse("text_config", text, supported="the text model's own keys", advice="The file is damaged.")
    return read_gemma3({"tie_word_embeddings": config.get("tie_word_embeddings", True), **text})


def _gemma2(config: HFConfig, groups: tuple[LayerGroup, ...], **more: Any) -> DecoderConfig:
    scale = float(config.get("query_pre_attn_scalar", 256)) ** -0.5
    activation = activation_of(config, "hidden_activation", "gelu_pytorch_tanh")
    return _gemma(config, groups, activation=activation, post_norm=True, query_scale=scale, **more)


def _gemma(config: HFConfig, groups: tuple[LayerGroup, ...], **more: Any) -> DecoderConfig:
    has_bias = bool(config.get("attention_bias", False))
    return llama_line(
        config,
        groups=groups,
        positions=8192,
        qkv_bias=has_bias,
        o_bias=has_bias,
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
        embed_scale=float(required(config, "hidden_size")) ** 0.5,
        norm_offset=1.0,
        **more,
    )


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Returns the names of Gemma 1, 2 and 3."""
    return llama_line_weights(config, norms=NORMS if config.post_norm else LLAMA_NORMS)


def multimodal_weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Returns the names of the text model inside a multimodal one."""
    return tuple(replace(w, hf=w.hf.replace("model.", "model.language_model.", 1)) for w in weights(config))


GEMMA = Family("gemma", "GemmaForCausalLM", read_gemma, weights)
GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", read_gemma2, weights)
GEMMA3_TEXT = Family("gemma3_text", "Gemma3ForCausalLM", read_gemma3, weights, complete=complete_rope_by_type)
GEMMA3 = Family(
    "gemma3",
    "Gemma3ForConditionalGeneration",
    read_gemma3_multimodal,
    multimodal_weights,
    ignored=("*vision_tower.*", "*multi_modal_projector.*"),
    prefixes=(("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")),
    complete=leave_as_it_is,
)
