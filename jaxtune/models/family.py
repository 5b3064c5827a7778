"""What a family of models must say: its translation of config.json, and its table of weight names.

The helpers here read what families in the Llama line have in common; a family file adds only what is its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models.decoder import DecoderConfig, LayerGroup
from jaxtune.models.layers import ROPE_KINDS, Rope

HFConfig = Mapping[str, Any]


@dataclass(frozen=True)
class Weight:
    """One tensor of the checkpoint and the parameter it is, both ways.

    Attributes:
        hf: its name in the checkpoint; `{layer}` stands for the layer's number.
        path: the parameter's path in the decoder, or in the layer when `hf` has `{layer}`.
        transpose: the checkpoint holds `[out in]` where we hold `[in out]`.
        optional: a second copy of a parameter that some checkpoints carry (a tied head): never read, and written only
            where the base has it.
    """

    hf: str
    path: tuple[str, ...]
    transpose: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face.

    Attributes:
        architecture: the class name in config.json that the translation was made for.
        read_config: config.json as a dict -> our config; refuses by name what it cannot express.
        weights: our config -> the table of names, in the order of a checkpoint.
        ignored: name patterns (fnmatch) of tensors in old checkpoints that carry no weights.
    """

    model_type: str
    architecture: str
    read_config: Callable[[HFConfig], DecoderConfig]
    weights: Callable[[DecoderConfig], tuple[Weight, ...]]
    ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq",)


def refuse(key: str, found: Any, *, supported: str, advice: str) -> ValueError:
    """Returns the error for a config.json value that cannot be expressed here."""
    return ValueError(f"config.json: found {key} = {found!r}; supported: {supported}. {advice}")


def required(config: HFConfig, key: str) -> Any:
    """Returns a value that config.json must have."""
    if config.get(key) is None:
        raise ValueError(f"config.json: found no {key!r}; expected the model's own config.json, complete")
    return config[key]


def head_dim_of(config: HFConfig) -> int:
    """Returns the head size, stated or width over heads."""
    if config.get("head_dim") is not None:
        return int(config["head_dim"])
    width, heads = required(config, "hidden_size"), required(config, "num_attention_heads")
    if width % heads:
        raise refuse(
            "num_attention_heads", heads, supported=f"a divisor of hidden_size = {width}", advice="State head_dim."
        )
    return int(width // heads)


def llama_line(
    config: HFConfig, *, groups: tuple[LayerGroup, ...], qkv_bias: bool, o_bias: bool, mlp_bias: bool, positions: int
) -> DecoderConfig:
    """Reads what every family of the Llama line calls by the same names.

    Args:
        groups: the layers, with their windows and rope.
        positions: the family's default of `max_position_embeddings`.
    """
    heads = int(required(config, "num_attention_heads"))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise refuse(
            "num_key_value_heads", kv_heads, supported=f"a divisor of {heads} heads", advice="The file is damaged."
        )
    activation = str(config.get("hidden_act", "silu"))
    if activation not in HF_ACTIVATIONS:
        raise refuse(
            "hidden_act", activation, supported=", ".join(HF_ACTIVATIONS), advice="Choose a model with one of these."
        )
    return DecoderConfig(
        vocab_size=int(required(config, "vocab_size")),
        width=int(required(config, "hidden_size")),
        mlp_width=int(required(config, "intermediate_size")),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim_of(config),
        groups=groups,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        max_positions=int(config.get("max_position_embeddings") or positions),
        activation=HF_ACTIVATIONS[activation],
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        init_std=float(config.get("initializer_range", 0.02)),
    )


HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def rope_of(config: HFConfig, *, default_theta: float = 10000.0) -> Rope:
    """Reads rope in either style: `rope_theta` + `rope_scaling` (transformers 4), `rope_parameters` (5), or both."""
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    scaling = dict(new or old or {})
    theta = scaling.pop("rope_theta", None)
    outer = config.get("rope_theta")
    if theta is not None and outer is not None and float(theta) != float(outer):
        raise refuse(
            "rope_theta",
            outer,
            supported=f"the same value as rope_parameters.rope_theta = {theta!r}",
            advice="Correct one of them: readers of transformers 4 and 5 would disagree.",
        )
    theta = theta if theta is not None else outer
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    for partial in (scaling.pop("partial_rotary_factor", None), config.get("partial_rotary_factor")):
        if partial not in (None, 1):
            raise refuse("partial_rotary_factor", partial, supported="1.0", advice="Choose a fully rotary model.")
    if kind not in ROPE_KINDS:
        raise refuse(
            "rope_type",
            kind,
            supported=", ".join(ROPE_KINDS),
            advice="Set it to one of these only if the weights were trained so.",
        )

    def value(key: str) -> Any:
        if scaling.get(key) is None:
            raise ValueError(f"config.json: rope_type {kind!r} needs {key!r} in rope_scaling or rope_parameters")
        return scaling[key]

    theta = float(theta if theta is not None else default_theta)
    if kind == "linear":
        return Rope(theta, kind, factor=float(value("factor")))
    if kind == "llama3":
        return Rope(
            theta,
            kind,
            factor=float(value("factor")),
            low_freq_factor=float(value("low_freq_factor")),
            high_freq_factor=float(value("high_freq_factor")),
            original_positions=int(value("original_max_position_embeddings")),
        )
    return Rope(theta)


def llama_line_weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Returns the names that Llama, Mistral and Qwen 2 share, biases where the config has them."""
    inner = "model.layers.{layer}."
    table = [Weight("model.embed_tokens.weight", ("embed", "embedding"))]
    linears = [("self_attn", "attention", name, config.qkv_bias) for name in ("q_proj", "k_proj", "v_proj")]
    linears += [("self_attn", "attention", "o_proj", config.o_bias)]
    linears += [("mlp", "mlp", name, config.mlp_bias) for name in ("gate_proj", "up_proj", "down_proj")]
    for theirs, ours, name, has_bias in linears:
        table.append(Weight(f"{inner}{theirs}.{name}.weight", (ours, name, "kernel"), transpose=True))
        if has_bias:
            table.append(Weight(f"{inner}{theirs}.{name}.bias", (ours, name, "bias")))
    table.append(Weight(f"{inner}input_layernorm.weight", ("attention_norm", "weight")))
    table.append(Weight(f"{inner}post_attention_layernorm.weight", ("mlp_norm", "weight")))
    table.append(Weight("model.norm.weight", ("norm", "weight")))
    if config.tie_embeddings:
        table.append(Weight("lm_head.weight", ("embed", "embedding"), optional=True))
    else:
        table.append(Weight("lm_head.weight", ("lm_head", "kernel"), transpose=True))
    return tuple(table)
