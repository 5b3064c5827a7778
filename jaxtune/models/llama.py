"""Llama 2, 3, 3.1, 3.2, 3.3 and what is shaped like them."""

from jaxtune.models.decoder_config import DecoderConfig, LayerGroup, LayerKind
from jaxtune.models.family import Family, llama_line_weights
from jaxtune.models.reading import HFConfig, llama_line, required, rope_of


def read_config(config: HFConfig) -> DecoderConfig:
    """Translates a Llama config.json; one group of equal layers."""
    kind = LayerKind(window=None, rope=rope_of(config))
    has_bias = bool(config.get("attention_bias", False))
    return llama_line(
        config,
        groups=(LayerGroup((kind,), int(required(config, "num_hidden_layers"))),),
        qkv_bias=has_bias,
        o_bias=has_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        positions=2048,
    )


LLAMA = Family("llama", "LlamaForCausalLM", read_config, llama_line_weights)
