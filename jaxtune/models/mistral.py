"""Mistral 7B and its line: Llama's shape with a sliding window on every layer (none from v0.2 on)."""

from jaxtune.models.decoder import DecoderConfig, LayerGroup, LayerKind
from jaxtune.models.family import Family, HFConfig, llama_line, llama_line_weights, refuse, required, rope_of


def read_config(config: HFConfig) -> DecoderConfig:
    """Translates a Mistral config.json; one group of equal layers."""
    window = config.get("sliding_window", 4096)  # transformers' default where the key is absent; null means none
    if window is not None and int(window) < 1:
        raise refuse("sliding_window", window, supported="null or at least 1", advice="Correct config.json.")
    kind = LayerKind(window=int(window) if window is not None else None, rope=rope_of(config))
    return llama_line(
        config,
        groups=(LayerGroup((kind,), int(required(config, "num_hidden_layers"))),),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        positions=4096 * 32,
    )


MISTRAL = Family("mistral", "MistralForCausalLM", read_config, llama_line_weights)
