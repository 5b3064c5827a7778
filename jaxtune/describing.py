"""What a model's configuration says, for people and as data: sizes, windows, positions, experts, head."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from jaxtune.models.decoder_config import DecoderConfig, ExpertsConfig, LatentConfig
from jaxtune.models.rope import Rope
from jaxtune.models.t5_config import T5Config

Facts = dict[str, Any]
WIDTH = 13  # of the words before the colon


def describe(config: Any, *, parameters: int) -> Facts:
    """Returns what was read of a config.json, as plain values.

    Args:
        config: as a family reads it.
        parameters: how many numbers the model holds.
    """
    return {**(_pairs(config) if config.is_encoder_decoder else _decoder(config)), "parameters": parameters}


def _decoder(config: DecoderConfig) -> Facts:
    kinds = config.layer_kinds()
    windows = Counter(kind.window for kind in kinds)
    ropes = Counter(kind.rope for kind in kinds)
    return {
        "layers": config.num_layers,
        "width": config.width,
        "mlp_width": config.mlp_width,
        "activation": config.activation,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_size": config.head_dim,
        "latent": _latent(config.latent) if config.latent else None,
        "windows": [{"window": window, "layers": count} for window, count in windows.items()],
        "ropes": [{**_rope(rope, config.rope_dim), "layers": count} for rope, count in ropes.items()],
        "learned_positions": config.learned_positions,
        "max_positions": config.max_positions,
        "experts": _experts(config.experts, sum(kind.sparse for kind in kinds)) if config.experts else None,
        "norm": config.norm,
        "qk_norm": config.qk_norm,
        "sinks": config.sinks,
        "softcap": config.softcap,
        "final_softcap": config.final_softcap,
        "qkv_bias": config.qkv_bias,
        "o_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "tied_head": config.tie_embeddings,
        "vocabulary": config.vocab_size,
    }


def _latent(latent: LatentConfig) -> Facts:
    return {
        "query_rank": latent.q_rank,
        "key_value_rank": latent.kv_rank,
        "turned": latent.rope_dim,
        "not_turned": latent.nope_dim,
        "value_size": latent.v_dim,
    }


def _rope(rope: Rope | None, size: int) -> Facts:
    if rope is None:
        return {"kind": None}
    facts: Facts = {"kind": rope.kind, "theta": rope.theta}
    if rope.factor != 1:
        facts["factor"] = rope.factor
    if rope.original_positions:
        facts["original_positions"] = rope.original_positions
    if rope.rotary_dim is not None:
        facts["turned"] = f"{rope.rotary_dim} of {size}"
    return facts


def _experts(experts: ExpertsConfig, layers: int) -> Facts:
    return {
        "count": experts.count,
        "per_token": experts.per_token,
        "layers": layers,
        "width": experts.width,
        "shared_width": experts.shared_width or None,
        "score": experts.score,
    }


def _pairs(config: T5Config) -> Facts:
    return {
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "width": config.width,
        "mlp_width": config.mlp_width,
        "activation": config.activation,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_size": config.head_dim,
        "buckets": config.buckets,
        "max_distance": config.max_distance,
        "bias_in_every_layer": config.bias_in_every_layer,
        "gated": config.gated,
        "tied_head": config.tie_embeddings,
        "vocabulary": config.vocab_size,
    }


def lines(facts: Facts) -> Iterator[str]:
    """Yields the facts of `describe` as lines of a few words, only those that a model has."""
    if "encoder_layers" in facts:
        depth = f"{facts['encoder_layers']} of the encoder, {facts['decoder_layers']} of the decoder"
    else:
        depth = str(facts["layers"])
    yield line("layers", f"{depth}; width {facts['width']:,}, mlp {facts['mlp_width']:,} ({facts['activation']})")
    yield line("heads", f"{facts['heads']}, of keys and values {facts['kv_heads']}, size {facts['head_size']}")
    if "encoder_layers" in facts:
        where = "a table in every layer" if facts["bias_in_every_layer"] else "one table for each stack"
        told = f"biases for distances in {facts['buckets']} buckets up to {facts['max_distance']}, {where}"
        yield line("positions", told)
    else:
        yield from _attention_lines(facts)
    if facts.get("experts"):
        yield line("experts", _experts_text(facts["experts"]))
    extras = [
        text
        for key, text in (
            ("qk_norm", "norms of queries and keys"),
            ("sinks", "attention sinks"),
            ("softcap", f"scores cut off softly at {facts.get('softcap')}"),
            ("final_softcap", f"logits cut off softly at {facts.get('final_softcap')}"),
            ("qkv_bias", "biases of q, k and v"),
        )
        if facts.get(key)
    ]
    if extras:
        yield line("also", "; ".join(extras))
    head = "the embedding (tied)" if facts["tied_head"] else "a matrix of its own (not tied)"
    yield line("head", f"{head}; vocabulary {facts['vocabulary']:,}")
    yield line("parameters", f"{facts['parameters']:,}")


def _attention_lines(facts: Facts) -> Iterator[str]:
    if facts["latent"]:
        told = "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts["latent"].items() if value)
        yield line("latent", told)
    windows = [
        f"{entry['window']:,} in {_layers(entry)}" if entry["window"] else f"none in {_layers(entry)}"
        for entry in facts["windows"]
    ]
    yield line("windows", "; ".join(windows))
    ropes = [_rope_text(entry) for entry in facts["ropes"]]
    learned = "learned" if facts["learned_positions"] else "; ".join(ropes)
    yield line("positions", f"{learned}; at most {facts['max_positions']:,}")


def _rope_text(entry: Facts) -> str:
    if entry["kind"] is None:
        return f"no rope in {_layers(entry)}"
    told = [f"base {entry['theta']:,.0f}"]
    for key, words in (("factor", "factor {:g}"), ("original_positions", "first trained on {:,}"), ("turned", "{}")):
        if key in entry:
            told.append(words.format(entry[key]))
    return f"rope {entry['kind']} ({', '.join(told)}) in {_layers(entry)}"


def _experts_text(entry: Facts) -> str:
    shared = f", a shared mlp of {entry['shared_width']:,}" if entry["shared_width"] else ""
    of_each = f"{entry['count']} of width {entry['width']:,}, {entry['per_token']} a token ({entry['score']})"
    return f"{of_each}{shared}, in {_layers(entry)}"


def _layers(entry: Facts) -> str:
    return f"{entry['layers']} layer{'s' if entry['layers'] != 1 else ''}"


def line(word: str, text: str) -> str:
    """Returns `word  text`, the texts of several lines below one another."""
    return f"{word:{WIDTH}} {text}"


def some(names: Sequence[str], *, most: int = 12) -> str:
    """Returns names in one line, at most so many, and how many there are besides."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f", and {rest:,} more (--json FILE lists all)" if rest > 0 else "")
