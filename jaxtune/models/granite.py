"""Granite 3: Llama's shape with four multipliers (embeddings, scores, residuals, logits)."""

from jaxtune.models.decoder_config import DecoderConfig, LayerGroup, LayerKind
from jaxtune.models.family import Family, llama_line_weights
from jaxtune.models.reading import HFConfig, llama_line, required, rope_of


def read_config(config: HFConfig) -> DecoderConfig:
    """Translates a Granite config.json; its `logits_scaling` divides."""
    kind = LayerKind(None, rope_of(config))
    has_bias = bool(config.get("attention_bias", False))
    return llama_line(
        config,
        groups=(LayerGroup((kind,), int(required(config, "num_hidden_layers"))),),
        positions=2048,
        qkv_bias=has_bias,
        o_bias=has_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        embed_scale=float(config.get("embedding_multiplier", 1.0)),
        query_scale=float(config.get("attention_multiplier", 1.0)),
        residual_scale=float(config.get("residual_multiplier", 1.0)),
        logit_scale=1.0 / float(config.get("logits_scaling", 1.0)),
    )


GRANITE = Family("granite", "GraniteForCausalLM", read_config, llama_line_weights)
