"""GPT-OSS: attention sinks, every other layer with a window, experts with biases and a clipped unit."""

from jaxtune.models.decoder_config import DecoderConfig, ExpertsConfig, LayerKind, group_layers
from jaxtune.models.family import Family, Weight, llama_line_weights
from jaxtune.models.reading import HFConfig, first_of, llama_line, required, rope_of, window_of, windows_of

ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read_config(config: HFConfig) -> DecoderConfig:
    """Translates a GPT-OSS config.json, of weights that are not quantized."""
    said = config.get("rope_parameters") or config.get("rope_scaling")
    config = {"head_dim": 64, **config} if said else {"head_dim": 64, **config, "rope_parameters": ROPE}
    rope = rope_of(config, default_theta=150000.0)
    windows = windows_of(config, default=lambda layer: layer % 2 == 0, window=window_of(config, default=128))
    experts = ExpertsConfig(
        count=int(first_of(config, "num_local_experts", "num_experts")),
        per_token=int(first_of(config, "num_experts_per_tok", "experts_per_token")),
        width=int(required(config, "intermediate_size")),
        score="top_softmax",
        router_bias=True,
        bias=True,
        fused=True,
        swiglu_limit=float(config.get("swiglu_limit", 7.0)),
        swiglu_alpha=float(config.get("swiglu_alpha", 1.702)),
        load_balance=float(config.get("router_aux_loss_coef", 0.001)) if config.get("output_router_logits") else 0.0,
    )
    has_bias = bool(config.get("attention_bias", True))
    return llama_line(
        config,
        groups=group_layers([LayerKind(window, rope, sparse=True) for window in windows]),
        positions=131072,
        norm_eps=float(config.get("rms_norm_eps", 1e-5)),
        qkv_bias=has_bias,
        o_bias=has_bias,
        sinks=True,
        experts=experts,
    )


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Returns GPT-OSS's names; all experts' matrices of a layer are one tensor, `[E in out]` as we hold them."""
    block = "model.layers.{layer}.mlp."
    router = ("mlp", "router")
    table = [
        Weight(f"{block}router.weight", (*router, "kernel"), transpose=True, sparse=True),
        Weight(f"{block}router.bias", (*router, "bias"), sparse=True),
    ]
    for name in ("gate_up_proj", "down_proj"):
        table.append(Weight(f"{block}experts.{name}", ("mlp", name, "kernel"), sparse=True))
        table.append(Weight(f"{block}experts.{name}_bias", ("mlp", name, "bias"), sparse=True))
    return (*llama_line_weights(config), *table)


GPT_OSS = Family("gpt_oss", "GptOssForCausalLM", read_config, weights)
