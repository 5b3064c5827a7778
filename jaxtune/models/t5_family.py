"""The T5 line of Hugging Face: T5 1.0 and 1.1, FLAN-T5, UL2, mT5, umT5; config.json and names."""

from functools import partial
from typing import Any

from jaxtune.models.family import Family, Weight
from jaxtune.models.reading import HF_ACTIVATIONS, HFConfig, leave_as_it_is, refuse, required
from jaxtune.models.t5 import T5
from jaxtune.models.t5_config import T5Config

# A table that released T5 1.0 checkpoints carry and that no version of T5 has ever read.
UNREAD = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


def read_config(config: HFConfig, *, bias_in_every_layer: bool = False, ties_by_default: bool = True) -> T5Config:
    """Translates a config.json of the T5 line.

    Args:
        bias_in_every_layer: as in `T5Config`.
        ties_by_default: what a config.json without `tie_word_embeddings` means.
    """
    if not config.get("is_encoder_decoder", True):
        raise refuse("is_encoder_decoder", False, supported="true", advice="Choose a model with both stacks.")
    activation, gated = _activation(config)
    ties, scales = _head(config, ties_by_default)
    width, layers = int(required(config, "d_model")), int(required(config, "num_layers"))
    buckets = int(config.get("relative_attention_num_buckets", 32))
    max_distance = int(config.get("relative_attention_max_distance", 128))
    if buckets < 4 or buckets % 4:
        raise refuse("relative_attention_num_buckets", buckets, supported="multiples of 4", advice="Correct the file.")
    if max_distance <= buckets // 2:
        raise refuse(
            "relative_attention_max_distance",
            max_distance,
            supported=f"more than half of the {buckets} buckets",
            advice="Correct the file.",
        )
    start = config.get("decoder_start_token_id")
    return T5Config(
        vocab_size=int(required(config, "vocab_size")),
        width=width,
        mlp_width=int(required(config, "d_ff")),
        num_heads=int(required(config, "num_heads")),
        head_dim=int(required(config, "d_kv")),
        encoder_layers=layers,
        decoder_layers=int(config.get("num_decoder_layers") or layers),
        buckets=buckets,
        max_distance=max_distance,
        bias_in_every_layer=bias_in_every_layer,
        norm_eps=float(config.get("layer_norm_epsilon", 1e-6)),
        activation=activation,
        gated=gated,
        tie_embeddings=ties,
        head_scale=width**-0.5 if scales else 1.0,
        start_token=int(start if start is not None else config.get("pad_token_id") or 0),
        init_factor=float(config.get("initializer_factor", 1.0)),
    )


def _activation(config: HFConfig) -> tuple[str, bool]:
    """Reads (activation, whether the mlp is gated): gated-gelu is the tanh form, as T5 1.1 was trained."""
    projection = str(config.get("feed_forward_proj", "relu"))
    kind, _, name = projection.rpartition("-")
    name = "gelu_new" if projection == "gated-gelu" else name
    name = str(config.get("dense_act_fn") or name)  # transformers believes it where both are there
    if kind not in ("", "gated") or name not in HF_ACTIVATIONS:
        known = ", ".join(HF_ACTIVATIONS)
        raise refuse(
            "feed_forward_proj",
            projection if kind not in ("", "gated") else name,
            supported=f"{known}, each also as gated-...",
            advice="Choose a model with one of these.",
        )
    return HF_ACTIVATIONS[name], bool(config.get("is_gated_act", kind == "gated"))


def _head(config: HFConfig, ties_by_default: bool) -> tuple[bool, bool]:
    """Reads (whether the head is the embedding, whether hidden states are scaled before it).

    T5 1.0 does both, every later model neither. transformers 5 writes `tie_word_embeddings: true` for all of them and
    says in `scale_decoder_outputs` what was there before, for model_type t5 alone; mT5 never has a tied head.
    """
    ties = bool(config.get("tie_word_embeddings", ties_by_default))
    if config.get("scale_decoder_outputs") is not None:
        ties = ties and bool(config["scale_decoder_outputs"])
    elif ties and not ties_by_default:
        if _written_by_5(config) and config["model_type"] == "umt5":
            raise refuse(
                "tie_word_embeddings",
                True,
                supported="false, as in Google's release",
                advice="transformers 5 writes true for every umT5 and reads it as a scaled head: correct config.json.",
            )
        ties = not _written_by_5(config)
    return ties, ties


def _written_by_5(config: HFConfig) -> bool:
    return str(config.get("transformers_version", "4")).split(".")[0] >= "5"


def weights(config: T5Config) -> tuple[Weight, ...]:
    """Returns the names of the T5 line; copies of the embedding are written where the base has them."""
    embedding = ("embed", "embedding")
    table = [
        Weight("shared.weight", embedding),
        Weight("encoder.embed_tokens.weight", embedding, optional=True),
        Weight("decoder.embed_tokens.weight", embedding, optional=True),
    ]
    table += _stack(config, "encoder", [("SelfAttention", "attention")])
    table += _stack(config, "decoder", [("SelfAttention", "attention"), ("EncDecAttention", "cross_attention")])
    if config.tie_embeddings:
        table.append(Weight("lm_head.weight", embedding, optional=True))
    else:
        table.append(Weight("lm_head.weight", ("lm_head", "kernel"), transpose=True))
    return tuple(table)


def _stack(config: T5Config, side: str, attentions: list[tuple[str, str]]) -> list[Weight]:
    """Returns the names of one stack, whose sub-layers are numbered in checkpoints: attentions, then mlp."""
    block = f"{side}.block.{{{side}_layer}}.layer"
    bias = "SelfAttention.relative_attention_bias.weight"
    table = []
    for number, (theirs, ours) in enumerate(attentions):
        for name in ("q", "k", "v", "o"):
            table.append(Weight(f"{block}.{number}.{theirs}.{name}.weight", (ours, name, "kernel"), transpose=True))
        if number == 0 and config.bias_in_every_layer:
            table.append(Weight(f"{block}.0.{bias}", ("attention", "position_bias")))
        norm = "cross_norm" if number else "attention_norm"
        table.append(Weight(f"{block}.{number}.layer_norm.weight", (norm, "weight")))
    last = len(attentions)
    for name in (("wi_0", "wi_1") if config.gated else ("wi",)) + ("wo",):
        hf = f"{block}.{last}.DenseReluDense.{name}.weight"
        table.append(Weight(hf, ("mlp", name, "kernel"), transpose=True))
    table.append(Weight(f"{block}.{last}.layer_norm.weight", ("mlp_norm", "weight")))
    if not config.bias_in_every_layer:
        table.append(Weight(f"{side}.block.0.layer.0.{bias}", (side, "position_bias")))
    table.append(Weight(f"{side}.final_layer_norm.weight", (side, "norm", "weight")))
    return table


def _family(model_type: str, architecture: str, **differs: Any) -> Family:
    return Family(
        model_type,
        architecture,
        partial(read_config, **differs),
        weights,
        ignored=UNREAD,
        complete=leave_as_it_is,
        build=T5,
        task_type="SEQ_2_SEQ_LM",
    )


T5_FAMILY = _family("t5", "T5ForConditionalGeneration")
MT5 = _family("mt5", "MT5ForConditionalGeneration", ties_by_default=False)
UMT5 = _family("umt5", "UMT5ForConditionalGeneration", ties_by_default=False, bias_in_every_layer=True)
