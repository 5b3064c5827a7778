"""Mistral 7B and its line: Llama's shape with a sliding window on every layer (none from v0.2 on)."""

from jaxtune.models.decoder_config import DecoderConfig, LayerGroup, LayerKind
from jaxtune.models.family import Family, llama_line_weights
from jaxtune.models.reading import HFConfig, llama_line, required, rope_of, window_of


def read_config(config: HFConfig) -> DecoderConfig:
    """Translates a Mistral config.json; one group of equal layers."""
    kind = LayerKind(window_of(config), rope_of(config))  # transformers' window where the key is absent is 4096
    return llama_line(
        config,
        groups=(LayerGroup((kind,), int(required(config, "num_hidden_layers"))),),
        positions=4096 * 32,
    )


MISTRAL = Family("mistral", "MistralForCausalLM", read_config, llama_line_weights)
