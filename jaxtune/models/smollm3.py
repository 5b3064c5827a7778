"""SmolLM 3: Llama's shape, and no positions at all in every fourth layer."""

from jaxtune.models.decoder_config import DecoderConfig, LayerKind, group_layers
from jaxtune.models.family import Family, llama_line_weights
from jaxtune.models.reading import HFConfig, llama_line, refuse, required, rope_of, window_of, windows_of


def read_config(config: HFConfig) -> DecoderConfig:
    """Translates a SmolLM 3 config.json; `no_rope_layers` is 1 for layers that have rope."""
    count, every = int(required(config, "num_hidden_layers")), int(config.get("no_rope_layer_interval", 4))
    turned = config.get("no_rope_layers") or [int((layer + 1) % every != 0) for layer in range(count)]
    if len(turned) != count:
        raise refuse("no_rope_layers", turned, supported=f"{count} times 0 or 1", advice="Correct it.")
    window = window_of(config, default=None) if config.get("use_sliding_window", False) else None
    windows = windows_of(config, default=lambda layer: not turned[layer], window=window)
    rope = rope_of(config)
    has_bias = bool(config.get("attention_bias", False))
    return llama_line(
        config,
        groups=group_layers([LayerKind(w, rope if t else None) for w, t in zip(windows, turned, strict=True)]),
        positions=32768,
        qkv_bias=has_bias,
        o_bias=has_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
    )


SMOLLM3 = Family("smollm3", "SmolLM3ForCausalLM", read_config, llama_line_weights)
