"""GPT-NeoX and Pythia: both halves of a layer side by side, a quarter of each head turned, layer norms with biases."""

from typing import Any

from jaxtune.models.decoder_config import DecoderConfig, LayerGroup, LayerKind
from jaxtune.models.family import Family, Weight, linear_weights
from jaxtune.models.reading import HFConfig, llama_line, required, rope_of

LINEARS = {
    "attention.query_key_value": ("attention", "qkv_proj"),
    "attention.dense": ("attention", "o_proj"),
    "mlp.dense_h_to_4h": ("mlp", "up_proj"),
    "mlp.dense_4h_to_h": ("mlp", "down_proj"),
}


def read_config(config: HFConfig) -> DecoderConfig:
    """Translates a GPT-NeoX config.json; `rotary_pct` and `rotary_emb_base` are its older words for rope."""
    words = dict(config)
    words.setdefault("rope_theta", config.get("rotary_emb_base"))
    words.setdefault("partial_rotary_factor", config.get("rotary_pct", 0.25))
    kind = LayerKind(None, rope_of(words, partial=True))
    has_bias = bool(config.get("attention_bias", True))
    return llama_line(
        {"hidden_act": "gelu", **config, "num_key_value_heads": None},
        groups=(LayerGroup((kind,), int(required(config, "num_hidden_layers"))),),
        positions=2048,
        norm_eps=float(config.get("layer_norm_eps", 1e-5)),
        qkv_bias=has_bias,
        o_bias=has_bias,
        mlp_bias=True,
        norm="layer",
        parallel=bool(config.get("use_parallel_residual", True)),
        fused_qkv="heads",
        gated=False,
        linear_names=(
            ("qkv_proj", "query_key_value"),
            ("o_proj", "dense"),
            ("up_proj", "dense_h_to_4h"),
            ("down_proj", "dense_4h_to_h"),
        ),
    )


def complete(config: dict[str, Any]) -> None:
    """Says rope in this family's older words too, where config.json has those of transformers 5 alone."""
    new = config.get("rope_parameters") or {}
    if new and "rotary_pct" not in config:
        config["rotary_pct"] = new.get("partial_rotary_factor", 0.25)
        config["rotary_emb_base"] = new.get("rope_theta", 10000.0)


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Returns GPT-NeoX's names."""
    inner = "gpt_neox.layers.{layer}."
    table = [Weight("gpt_neox.embed_in.weight", ("embed", "embedding"))]
    for theirs, ours in LINEARS.items():
        table += linear_weights(f"{inner}{theirs}", ours, bias=config.qkv_bias if ours[0] == "attention" else True)
    for theirs, norm in (
        (f"{inner}input_layernorm", "attention_norm"),
        (f"{inner}post_attention_layernorm", "mlp_norm"),
        ("gpt_neox.final_layer_norm", "norm"),
    ):
        table += [Weight(f"{theirs}.{part}", (norm, part)) for part in ("weight", "bias")]
    if config.tie_embeddings:
        return (*table, Weight("embed_out.weight", ("embed", "embedding"), optional=True))
    return (*table, Weight("embed_out.weight", ("lm_head", "kernel"), transpose=True))


GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    read_config,
    weights,
    ignored=("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq"),
    complete=complete,
)
