"""DeepSeek V2 and V3: latent attention, shared and routed experts, the first layers dense."""

from typing import Any

from jaxtune.models.decoder_config import DecoderConfig, ExpertsConfig, LatentConfig, LayerKind, group_layers
from jaxtune.models.family import (
    LLAMA_NORMS,
    ExpertNames,
    Family,
    Weight,
    head_weight,
    linear_weights,
    mlp_weights,
    sparse_weights,
)
from jaxtune.models.reading import HFConfig, llama_line, refuse, required, rope_of, yarn_growth

TOP_K_METHODS = ("greedy", "group_limited_greedy")


def read_v2(config: HFConfig) -> DecoderConfig:
    """Translates a DeepSeek V2 config.json: a softmax over all experts, the best of the best groups."""
    method = config.get("topk_method") or "greedy"
    if method not in TOP_K_METHODS:
        raise refuse("topk_method", method, supported=", ".join(TOP_K_METHODS), advice="Choose a released model.")
    if config.get("norm_topk_prob"):
        raise refuse("norm_topk_prob", True, supported="false", advice="transformers ignores it in this family.")
    is_grouped = method == "group_limited_greedy"
    return _deepseek(
        config,
        interleaved=True,
        groups=int(config.get("n_group") or 1) if is_grouped else 1,
        groups_kept=int(config.get("topk_group") or 1) if is_grouped else 1,
    )


def read_v3(config: HFConfig) -> DecoderConfig:
    """Translates a DeepSeek V3 (or R1) config.json: sigmoid scores, chosen with a stored bias."""
    return _deepseek(
        config,
        interleaved=bool(config.get("rope_interleave", True)),
        score="sigmoid",
        normalize=bool(config.get("norm_topk_prob", True)),
        groups=int(config.get("n_group") or 1),
        groups_kept=int(config.get("topk_group") or 1),
        group_score="top2",
        correction_bias=True,
    )


def _deepseek(config: HFConfig, *, interleaved: bool, **routing: Any) -> DecoderConfig:
    count = int(required(config, "num_hidden_layers"))
    dense = int(config.get("first_k_dense_replace", 0))
    latent = LatentConfig(
        q_rank=int(config["q_lora_rank"]) if config.get("q_lora_rank") is not None else None,
        kv_rank=int(required(config, "kv_lora_rank")),
        nope_dim=int(required(config, "qk_nope_head_dim")),
        rope_dim=int(required(config, "qk_rope_head_dim")),
        v_dim=int(required(config, "v_head_dim")),
    )
    width = int(required(config, "moe_intermediate_size"))
    experts = ExpertsConfig(
        count=int(required(config, "n_routed_experts")),
        per_token=int(required(config, "num_experts_per_tok")),
        width=width,
        shared_width=width * int(config.get("n_shared_experts") or 0),
        scale=float(config.get("routed_scaling_factor", 1.0)),
        **routing,
    )
    rope = rope_of(config, head_dim=latent.rope_dim, interleaved=interleaved)
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    sharpened = yarn_growth(rope.factor, float(scaling.get("mscale_all_dim") or 0)) if rope.kind == "yarn" else 1.0
    head_dim = latent.nope_dim + latent.rope_dim
    has_bias = bool(config.get("attention_bias", False))
    return llama_line(
        config,
        groups=group_layers([LayerKind(None, rope, sparse=layer >= dense) for layer in range(count)]),
        positions=2048,
        head_dim=head_dim,
        qkv_bias=has_bias,
        o_bias=has_bias,
        query_scale=head_dim**-0.5 * sharpened**2,
        latent=latent,
        experts=experts,
        linear_names=(("kv_a_proj", "kv_a_proj_with_mqa"),),
    )


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Returns the names of DeepSeek V2 and V3."""
    assert config.latent is not None
    inner, bias = "model.layers.{layer}.", config.qkv_bias
    attention, ours = f"{inner}self_attn.", ("attention",)
    table = [Weight("model.embed_tokens.weight", ("embed", "embedding"))]
    if config.latent.q_rank is None:
        table += linear_weights(f"{attention}q_proj", (*ours, "q_proj"), bias=False)
    else:
        table += linear_weights(f"{attention}q_a_proj", (*ours, "q_a_proj"), bias=bias)
        table.append(Weight(f"{attention}q_a_layernorm.weight", (*ours, "q_a_norm", "weight")))
        table += linear_weights(f"{attention}q_b_proj", (*ours, "q_b_proj"), bias=False)
    table += linear_weights(f"{attention}kv_a_proj_with_mqa", (*ours, "kv_a_proj"), bias=bias)
    table.append(Weight(f"{attention}kv_a_layernorm.weight", (*ours, "kv_a_norm", "weight")))
    table += linear_weights(f"{attention}kv_b_proj", (*ours, "kv_b_proj"), bias=False)
    table += linear_weights(f"{attention}o_proj", (*ours, "o_proj"), bias=config.o_bias)
    table += mlp_weights(config, f"{inner}mlp", ("mlp",), sparse=False)
    table += sparse_weights(config, inner, ExpertNames())
    table += [Weight(f"{inner}{theirs}.weight", (norm, "weight")) for norm, theirs in LLAMA_NORMS.items()]
    return (*table, Weight("model.norm.weight", ("norm", "weight")), head_weight(config))


# V3's 62nd layer predicts a second token in training; transformers leaves it out too.
IGNORED = ("*.rotary_emb.inv_freq", "model.layers.61.*")
DEEPSEEK_V2 = Family("deepseek_v2", "DeepseekV2ForCausalLM", read_v2, weights)
DEEPSEEK_V3 = Family("deepseek_v3", "DeepseekV3ForCausalLM", read_v3, weights, ignored=IGNORED)
