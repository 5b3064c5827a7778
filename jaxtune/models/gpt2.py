"""GPT-2: learned positions, layer norms with biases, one matrix for q, k and v, matrices stored as we hold them."""

from jaxtune.models.decoder_config import DecoderConfig, LayerGroup, LayerKind
from jaxtune.models.family import Family, Weight, head_weight
from jaxtune.models.reading import HFConfig, activation_of, first_of, leave_as_it_is, refuse, required

# What the class can be told to do and no released model does: key -> the value that all of them have.
RELEASED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
LINEARS = {
    "attn.c_attn": ("attention", "qkv_proj"),
    "attn.c_proj": ("attention", "o_proj"),
    "mlp.c_fc": ("mlp", "up_proj"),
    "mlp.c_proj": ("mlp", "down_proj"),
}


def read_config(config: HFConfig) -> DecoderConfig:
    """Translates a GPT-2 config.json."""
    for key, value in RELEASED.items():
        if config.get(key, value) != value:
            raise refuse(key, config[key], supported=repr(value), advice="Choose a model that was trained so.")
    width = int(first_of(config, "n_embd", "hidden_size"))
    heads = int(first_of(config, "n_head", "num_attention_heads"))
    if width % heads:
        raise refuse("n_head", heads, supported=f"a divisor of n_embd = {width}", advice="The file is damaged.")
    layers = int(first_of(config, "n_layer", "num_hidden_layers"))
    return DecoderConfig(
        vocab_size=int(required(config, "vocab_size")),
        width=width,
        mlp_width=int(config.get("n_inner") or 4 * width),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        groups=(LayerGroup((LayerKind(None, None),), layers),),
        norm_eps=float(config.get("layer_norm_epsilon", 1e-5)),
        max_positions=int(config.get("n_positions") or config.get("max_position_embeddings") or 1024),
        activation=activation_of(config, "activation_function", "gelu_new"),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
        init_std=float(config.get("initializer_range", 0.02)),
        learned_positions=True,
        norm="layer",
        fused_qkv="blocks",
        gated=False,
        linear_names=(
            ("qkv_proj", "c_attn"),
            ("o_proj", "c_proj"),
            ("up_proj", "c_fc"),
            ("down_proj", "c_proj"),
        ),
    )


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Returns GPT-2's names."""
    inner = "transformer.h.{layer}."
    table = [
        Weight("transformer.wte.weight", ("embed", "embedding")),
        Weight("transformer.wpe.weight", ("embed_positions", "embedding")),
    ]
    for theirs, ours in LINEARS.items():
        table.append(Weight(f"{inner}{theirs}.weight", (*ours, "kernel")))
        table.append(Weight(f"{inner}{theirs}.bias", (*ours, "bias")))
    norms = {f"{inner}ln_1": "attention_norm", f"{inner}ln_2": "mlp_norm", "transformer.ln_f": "norm"}
    for theirs, norm in norms.items():
        table += [Weight(f"{theirs}.{part}", (norm, part)) for part in ("weight", "bias")]
    return (*table, head_weight(config))


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    read_config,
    weights,
    ignored=("*.attn.bias", "*.attn.masked_bias"),
    prefixes=(("transformer.", ""),),  # the first release's files
    complete=leave_as_it_is,
)
