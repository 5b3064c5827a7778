"""What a family of models must say: its translation of config.json, and its table of weight names.

The helpers here name what families in the Llama line have in common; a family file adds only what is its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.models.decoder import Decoder
from jaxtune.models.decoder_config import DecoderConfig
from jaxtune.models.reading import HFConfig, complete_rope


@dataclass(frozen=True)
class Weight:
    """One tensor of the checkpoint and the parameter it is, both ways.

    Attributes:
        hf: its name in the checkpoint; `{layer}` stands for the layer's number, `{expert}` for the expert's.
        path: the parameter's path in the model, or in the layer when `hf` has `{layer}`.
        transpose: the checkpoint holds `[out in]` where we hold `[in out]`.
        optional: a second copy of a parameter that some checkpoints carry (a tied head): never read, and written only
            where the base has it.
        sparse: True: layers with experts have it; False: the others; None: all.
    """

    hf: str
    path: tuple[str, ...]
    transpose: bool = False
    optional: bool = False
    sparse: bool | None = None


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face.

    Attributes:
        architecture: the class name in config.json that the translation was made for.
        read_config: config.json as a dict -> our config; refuses by name what it cannot express.
        weights: our config -> the table of names, in the order of a checkpoint.
        ignored: name patterns (fnmatch) of tensors that are no weights of the text model: buffers in old checkpoints,
            an image tower. They are copied on export.
        prefixes: (beginning of a name in the table, how it begins in other checkpoints of this family).
        complete: adds to a config.json what readers of other versions look for, in place.
        build: makes the module of a config: `build(config, key=..., param_dtype=...)`.
        task_type: what PEFT calls what the model does.
    """

    model_type: str
    architecture: str
    read_config: Callable[[HFConfig], Any]
    weights: Callable[[Any], tuple[Weight, ...]]
    ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    prefixes: tuple[tuple[str, str], ...] = ()
    complete: Callable[[dict[str, Any]], None] = complete_rope
    build: Callable[..., Any] = Decoder
    task_type: str = "CAUSAL_LM"


# Our norms and what the Llama line calls them.
LLAMA_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


@dataclass(frozen=True)
class ExpertNames:
    """What a checkpoint calls the parts of a sparse layer, below `model.layers.{layer}.`."""

    block: str = "mlp"
    router: str = "gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts"


def llama_line_weights(
    config: DecoderConfig, *, norms: Mapping[str, str] = LLAMA_NORMS, experts: ExpertNames | None = None
) -> tuple[Weight, ...]:
    """Returns the names that the Llama line shares; biases, q and k norms, sinks and experts where the config has them.

    Args:
        norms: our norm of a layer -> its name.
        experts: names in sparse layers; needed where the config has experts.
    """
    inner = "model.layers.{layer}."
    table = [Weight("model.embed_tokens.weight", ("embed", "embedding"))]
    qkv = ("qkv_proj",) if config.fused_qkv else ("q_proj", "k_proj", "v_proj")
    for name in qkv:
        table += linear_weights(f"{inner}self_attn.{name}", ("attention", name), bias=config.qkv_bias)
    table += linear_weights(f"{inner}self_attn.o_proj", ("attention", "o_proj"), bias=config.o_bias)
    if config.qk_norm:
        table += [Weight(f"{inner}self_attn.{n}.weight", ("attention", n, "weight")) for n in ("q_norm", "k_norm")]
    if config.sinks:
        table.append(Weight(f"{inner}self_attn.sinks", ("attention", "sinks")))
    table += mlp_weights(config, f"{inner}mlp", ("mlp",), sparse=False if config.experts else None)
    if experts is not None:
        table += sparse_weights(config, inner, experts)
    table += [Weight(f"{inner}{theirs}.weight", (ours, "weight")) for ours, theirs in norms.items()]
    table += [Weight("model.norm.weight", ("norm", "weight")), head_weight(config)]
    return tuple(table)


def head_weight(config: DecoderConfig, name: str = "lm_head.weight") -> Weight:
    """Returns the head's entry: a parameter of its own, or a second copy of the embedding."""
    if config.tie_embeddings:
        return Weight(name, ("embed", "embedding"), optional=True)
    return Weight(name, ("lm_head", "kernel"), transpose=True)


def linear_weights(hf: str, path: tuple[str, ...], *, bias: bool, sparse: bool | None = None) -> list[Weight]:
    """Returns the entries of one linear layer."""
    table = [Weight(f"{hf}.weight", (*path, "kernel"), transpose=True, sparse=sparse)]
    return [*table, Weight(f"{hf}.bias", (*path, "bias"), sparse=sparse)] if bias else table


def mlp_weights(config: DecoderConfig, hf: str, path: tuple[str, ...], *, sparse: bool | None) -> list[Weight]:
    """Returns the entries of one gated mlp, called alike there and here."""
    names = ("gate_up_proj", "down_proj") if config.fused_gate_up else ("gate_proj", "up_proj", "down_proj")
    return [w for n in names for w in linear_weights(f"{hf}.{n}", (*path, n), bias=config.mlp_bias, sparse=sparse)]


def sparse_weights(config: DecoderConfig, inner: str, names: ExpertNames) -> list[Weight]:
    """Returns the entries of a sparse layer: router, one tensor for each expert and matrix, shared experts."""
    assert config.experts is not None
    block = f"{inner}{names.block}."
    table = [Weight(f"{block}{names.router}.weight", ("mlp", "router", "kernel"), transpose=True, sparse=True)]
    if config.experts.correction_bias:
        path = ("mlp", "router", "correction")
        table.append(Weight(f"{block}{names.router}.e_score_correction_bias", path, sparse=True))
    for theirs, ours in ((names.gate, "gate_proj"), (names.up, "up_proj"), (names.down, "down_proj")):
        table += linear_weights(f"{block}experts.{{expert}}.{theirs}", ("mlp", ours), bias=False, sparse=True)
    if config.experts.shared_width:
        table += mlp_weights(config, f"{block}{names.shared}", ("mlp", "shared"), sparse=True)
    return table
