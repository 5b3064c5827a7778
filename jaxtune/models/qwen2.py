"""Qwen 2 and 2.5: biases on q, k and v, and a sliding window on some layers where it is switched on."""

from jaxtune.models.decoder_config import DecoderConfig, LayerKind, group_layers
from jaxtune.models.family import Family, llama_line_weights
from jaxtune.models.reading import HFConfig, llama_line, rope_of, windows_of


def read_config(config: HFConfig) -> DecoderConfig:
    """Translates a Qwen 2 config.json; runs of layers with and without window become groups."""
    rope = rope_of(config)
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else None
    first = int(config.get("max_window_layers", 28))
    windows = windows_of(config, default=lambda layer: layer >= first, window=window)
    return llama_line(
        config, groups=group_layers([LayerKind(w, rope) for w in windows]), qkv_bias=True, positions=32768
    )


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", read_config, llama_line_weights)
