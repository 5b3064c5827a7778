"""Qwen 2 and 2.5: biases on q, k and v, and a sliding window on some layers where it is switched on."""

from jaxtune.models.decoder import DecoderConfig, LayerKind, group_layers
from jaxtune.models.family import Family, HFConfig, llama_line, llama_line_weights, refuse, required, rope_of


def read_config(config: HFConfig) -> DecoderConfig:
    """Translates a Qwen 2 config.json; runs of layers with and without window become groups."""
    rope = rope_of(config)
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else None
    kinds = [
        LayerKind(window=int(window) if windowed and window is not None else None, rope=rope)
        for windowed in _windowed_layers(config)
    ]
    return llama_line(config, groups=group_layers(kinds), qkv_bias=True, o_bias=False, mlp_bias=False, positions=32768)


def _windowed_layers(config: HFConfig) -> list[bool]:
    """Reads which layers have the window: `layer_types` says each, else all from `max_window_layers` on."""
    count = int(required(config, "num_hidden_layers"))
    types = config.get("layer_types")
    if types is None:
        first = int(config.get("max_window_layers", 28))
        return [layer >= first for layer in range(count)]
    known = {"full_attention": False, "sliding_attention": True}
    if len(types) != count or set(types) - set(known):
        raise refuse(
            "layer_types", types, supported=f"{count} times full_attention or sliding_attention", advice="Correct it."
        )
    if any(known[kind] for kind in types) and not config.get("use_sliding_window", False):
        raise refuse(
            "layer_types",
            types,
            supported="sliding_attention only with use_sliding_window: true",
            advice="Set use_sliding_window to what the model was trained with.",
        )
    return [known[kind] for kind in types]


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", read_config, llama_line_weights)
