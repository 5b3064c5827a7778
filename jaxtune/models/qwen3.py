"""Qwen 3, dense and with experts: Llama's shape with a norm over each head's query and key."""

from typing import Any

from jaxtune.models.decoder_config import DecoderConfig, ExpertsConfig, LayerKind, group_layers
from jaxtune.models.family import ExpertNames, Family, Weight, llama_line_weights
from jaxtune.models.reading import (
    HFConfig,
    complete_rope,
    first_of,
    llama_line,
    required,
    rope_of,
    window_of,
    windows_of,
)


def read_config(config: HFConfig) -> DecoderConfig:
    """Translates a Qwen 3 config.json; runs of layers with and without window become groups."""
    rope = rope_of(config)
    window = window_of(config) if config.get("use_sliding_window", False) else None
    first = int(config.get("max_window_layers", 28))
    windows = windows_of(config, default=lambda layer: layer >= first, window=window)
    return _qwen3(config, [LayerKind(w, rope) for w in windows])


def read_sparse_config(config: HFConfig) -> DecoderConfig:
    """Translates a Qwen 3 MoE config.json: experts in every `decoder_sparse_step`-th layer but `mlp_only_layers`."""
    rope = rope_of(config)
    window = window_of(config) if config.get("use_sliding_window", False) else None
    step, dense = int(config.get("decoder_sparse_step", 1)), set(config.get("mlp_only_layers") or ())
    kinds = [
        LayerKind(window, rope, sparse=layer not in dense and (layer + 1) % step == 0)
        for layer in range(int(required(config, "num_hidden_layers")))
    ]
    experts = ExpertsConfig(
        count=int(first_of(config, "num_experts", "num_local_experts")),
        per_token=int(required(config, "num_experts_per_tok")),
        width=int(required(config, "moe_intermediate_size")),
        normalize=bool(config.get("norm_topk_prob", False)),
        load_balance=float(config.get("router_aux_loss_coef", 0.001)) if config.get("output_router_logits") else 0.0,
    )
    return _qwen3(config, kinds, experts=experts)


def _qwen3(config: HFConfig, kinds: list[LayerKind], experts: ExpertsConfig | None = None) -> DecoderConfig:
    has_bias = bool(config.get("attention_bias", False))
    return llama_line(
        {"head_dim": 128, **config} if experts is None else config,
        groups=group_layers(kinds),
        positions=32768,
        qkv_bias=has_bias,
        o_bias=has_bias,
        qk_norm="head",
        experts=experts,
    )


def sparse_weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Returns the names of Qwen 3 MoE."""
    return llama_line_weights(config, experts=ExpertNames())


def complete_sparse(config: dict[str, Any]) -> None:
    """Says rope, and the number of experts, in the words of transformers 4 and 5."""
    complete_rope(config)
    config.setdefault("num_experts", config.get("num_local_experts"))


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", read_config, llama_line_weights)
QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", read_sparse_config, sparse_weights, complete=complete_sparse)
