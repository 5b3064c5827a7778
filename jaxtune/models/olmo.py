"""OLMo 2 and 3: norms after each half instead of before, queries and keys normed over all heads; 3 adds windows."""

from typing import Any

from jaxtune.models.decoder_config import DecoderConfig, LayerGroup, LayerKind, group_layers
from jaxtune.models.family import Family, Weight, llama_line_weights
from jaxtune.models.reading import (
    HFConfig,
    complete_rope_by_type,
    llama_line,
    required,
    rope_by_type,
    rope_of,
    window_of,
    windows_of,
)
from jaxtune.models.rope import Rope

NORMS = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}


def read_olmo2(config: HFConfig) -> DecoderConfig:
    """Translates an OLMo 2 config.json."""
    kind = LayerKind(None, rope_of(config))
    return _olmo(config, (LayerGroup((kind,), int(required(config, "num_hidden_layers"))),))


def read_olmo3(config: HFConfig) -> DecoderConfig:
    """Translates an OLMo 3 config.json: three layers with window, then one without, which alone has scaled rope."""
    flat: dict[str, Any] = {k: v for k, v in config.items() if k != "rope_parameters"}
    plain = rope_of(flat, default_theta=500000.0)
    everywhere = rope_by_type(config, "full_attention", plain)
    local = rope_by_type(config, "sliding_attention", Rope(plain.theta))
    windows = windows_of(config, default=lambda layer: (layer + 1) % 4 != 0, window=window_of(config))
    return _olmo(config, group_layers([LayerKind(w, everywhere if w is None else local) for w in windows]))


def _olmo(config: HFConfig, groups: tuple[LayerGroup, ...]) -> DecoderConfig:
    has_bias = bool(config.get("attention_bias", False))
    return llama_line(
        config,
        groups=groups,
        positions=2048,
        qkv_bias=has_bias,
        o_bias=has_bias,
        norm_eps=float(config.get("rms_norm_eps", 1e-5)),
        pre_norm=False,
        post_norm=True,
        qk_norm="width",
    )


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Returns the names of OLMo 2 and 3."""
    return llama_line_weights(config, norms=NORMS)


OLMO2 = Family("olmo2", "Olmo2ForCausalLM", read_olmo2, weights)
OLMO3 = Family("olmo3", "Olmo3ForCausalLM", read_olmo3, weights, complete=complete_rope_by_type)
