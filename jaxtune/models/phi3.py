"""Phi-3, Phi-3.5 and Phi-4: Llama's shape with fused matrices; longrope and a partial rope in some sizes."""

from typing import Any

from jaxtune.models.decoder_config import DecoderConfig, LayerGroup, LayerKind
from jaxtune.models.family import Family, llama_line_weights
from jaxtune.models.reading import HFConfig, llama_line, required, rope_of, window_of


def read_config(config: HFConfig) -> DecoderConfig:
    """Translates a Phi-3 config.json; `su` and `yarn` are what its first files call longrope."""
    words = dict(config)
    for key in ("rope_scaling", "rope_parameters"):
        scaling = dict(words.get(key) or {})
        if scaling.get("type", scaling.get("rope_type")) in ("su", "yarn"):
            words[key] = {**scaling, "type": "longrope", "rope_type": "longrope"}
    kind = LayerKind(window_of(config, default=None), rope_of(words, partial=True))
    return llama_line(
        config,
        groups=(LayerGroup((kind,), int(required(config, "num_hidden_layers"))),),
        positions=4096,
        norm_eps=float(config.get("rms_norm_eps", 1e-5)),
        fused_qkv="blocks",
        fused_gate_up=True,
    )


def complete(config: dict[str, Any]) -> None:
    """Says rope in the words of transformers 4 where config.json has those of 5 alone: there three keys, no more."""
    new = config.get("rope_parameters") or {}
    if not new or "rope_theta" in config:
        return
    config["rope_theta"] = new.get("rope_theta", 10000.0)
    config.setdefault("partial_rotary_factor", new.get("partial_rotary_factor", 1.0))
    three = {"type": "longrope", "short_factor": new.get("short_factor"), "long_factor": new.get("long_factor")}
    config.setdefault("rope_scaling", three if new.get("rope_type") == "longrope" else None)


PHI3 = Family("phi3", "Phi3ForCausalLM", read_config, llama_line_weights, complete=complete)
