"""Reading config.json: what families have in common, and refusing by name what cannot be expressed."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.models.decoder_config import DecoderConfig, LayerGroup
from jaxtune.models.rope import ROPE_KINDS, Rope

HFConfig = Mapping[str, Any]

HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def refuse(key: str, found: Any, *, supported: str, advice: str) -> ValueError:
    """Returns the error for a config.json value that cannot be expressed here."""
    return ValueError(f"config.json: found {key} = {found!r}; supported: {supported}. {advice}")


def required(config: HFConfig, key: str) -> Any:
    """Returns a value that config.json must have."""
    if config.get(key) is None:
        raise ValueError(f"config.json: found no {key!r}; expected the model's own config.json, complete")
    return config[key]


def first_of(config: HFConfig, *keys: str) -> Any:
    """Returns the value of the first of these keys that config.json has: readers of different age call it otherwise."""
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    return required(config, keys[0])


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


def activation_of(config: HFConfig, key: str = "hidden_act", default: str = "silu") -> str:
    """Returns our name of the mlp's activation."""
    found = str(config.get(key) or default)
    if found not in HF_ACTIVATIONS:
        raise refuse(key, found, supported=", ".join(HF_ACTIVATIONS), advice="Choose a model with one of these.")
    return HF_ACTIVATIONS[found]


def llama_line(
    config: HFConfig,
    *,
    groups: tuple[LayerGroup, ...],
    positions: int,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    **more: Any,
) -> DecoderConfig:
    """Reads what every family of the Llama line calls by the same names.

    Args:
        groups: the layers, with their windows and rope.
        positions: the family's default of `max_position_embeddings`.
        more: fields of `DecoderConfig` that the family adds, or says otherwise.
    """
    heads = int(required(config, "num_attention_heads"))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise refuse(
            "num_key_value_heads", kv_heads, supported=f"a divisor of {heads} heads", advice="The file is damaged."
        )
    common: dict[str, Any] = {
        "vocab_size": int(required(config, "vocab_size")),
        "width": int(required(config, "hidden_size")),
        "mlp_width": int(required(config, "intermediate_size")),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "max_positions": int(config.get("max_position_embeddings") or positions),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "init_std": float(config.get("initializer_range", 0.02)),
    }
    if "activation" not in more:
        common["activation"] = activation_of(config)
    if "head_dim" not in more:
        common["head_dim"] = head_dim_of(config)
    biases = {"qkv_bias": qkv_bias, "o_bias": o_bias, "mlp_bias": mlp_bias}
    return DecoderConfig(groups=groups, **{**biases, **common, **more})


def window_of(config: HFConfig, *, default: int | None = 4096) -> int | None:
    """Returns the sliding window that config.json says, checked; absent means the family's default, null none."""
    window = config.get("sliding_window", default)
    if window is not None and int(window) < 1:
        raise refuse("sliding_window", window, supported="null or at least 1", advice="Correct config.json.")
    return int(window) if window is not None else None


def windows_of(config: HFConfig, *, default: Callable[[int], bool], window: int | None) -> list[int | None]:
    """Reads which layers have the sliding window: `layer_types` says each, else `default(layer)` does.

    Args:
        window: its size; None gives no layer one, and then `layer_types` must not ask for it.
    """
    count = int(required(config, "num_hidden_layers"))
    types = config.get("layer_types")
    known = {"full_attention": False, "sliding_attention": True}
    if types is None:
        return [window if default(layer) else None for layer in range(count)]
    if len(types) != count or set(types) - set(known):
        raise refuse(
            "layer_types", types, supported=f"{count} times full_attention or sliding_attention", advice="Correct it."
        )
    if window is None and "sliding_attention" in types:
        raise refuse(
            "layer_types",
            types,
            supported="sliding_attention only with a sliding_window, and use_sliding_window: true where that key is",
            advice="Set them to what the model was trained with.",
        )
    return [window if known[kind] else None for kind in types]


def rope_of(
    config: HFConfig,
    *,
    default_theta: float = 10000.0,
    head_dim: int | None = None,
    partial: bool = False,
    interleaved: bool = False,
) -> Rope:
    """Reads rope in either style: `rope_theta` + `rope_scaling` (transformers 4), `rope_parameters` (5), or both.

    Args:
        head_dim: of what rope turns; default the head's, as `head_dim_of` reads it.
        partial: whether the family can turn a part of the head only (`partial_rotary_factor`).
        interleaved: as in `Rope`.
    """
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
    kind = {"su": "longrope"}.get(kind, kind)  # Phi-3's first files
    if kind not in ROPE_KINDS:
        raise refuse(
            "rope_type",
            kind,
            supported=", ".join(ROPE_KINDS),
            advice="Set it to one of these only if the weights were trained so.",
        )
    size = head_dim or head_dim_of(config)
    rotary_dim = _rotary_dim(size, scaling.pop("partial_rotary_factor", None), config, partial)
    return Rope(
        float(theta if theta is not None else default_theta),
        kind,
        rotary_dim=rotary_dim if rotary_dim != size else None,
        interleaved=interleaved,
        **_SCALINGS[kind](_Scaling(kind, scaling, config, rotary_dim)),
    )


def rope_by_type(config: HFConfig, kind: str, otherwise: Rope) -> Rope:
    """Returns the rope of layers of a type (`full_attention`, `sliding_attention`), where config.json has one for each.

    Args:
        otherwise: what the family's older files mean.
    """
    nested = config.get("rope_parameters") or {}
    if not isinstance(nested.get(kind), Mapping):
        return otherwise
    own = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    return rope_of({**own, "rope_parameters": nested[kind]}, default_theta=otherwise.theta)


def _rotary_dim(size: int, factor: float | None, config: HFConfig, allowed: bool) -> int:
    """Returns how many entries of a head are turned."""
    factor = factor or config.get("partial_rotary_factor") or 1.0
    found = int(size * float(factor))
    if found != size and not allowed:
        raise refuse("partial_rotary_factor", factor, supported="1.0", advice="Choose a fully rotary model.")
    if found % 2 or not 0 < found <= size:
        raise refuse("partial_rotary_factor", factor, supported="an even part of the head", advice="Correct it.")
    return found


class _Scaling:
    """The keys of a rope scaling, with what the rest of config.json adds to them."""

    def __init__(self, kind: str, given: Mapping[str, Any], config: HFConfig, rotary_dim: int) -> None:
        self.kind, self.given, self.config, self.rotary_dim = kind, given, config, rotary_dim
        self.positions = config.get("max_position_embeddings")

    def value(self, key: str) -> Any:
        """Returns a value that this kind needs."""
        if self.given.get(key) is None:
            raise ValueError(f"config.json: rope_type {self.kind!r} needs {key!r} in rope_scaling or rope_parameters")
        return self.given[key]

    def original(self) -> int:
        """Length of the first training: in the scaling, beside it, or all positions."""
        key = "original_max_position_embeddings"
        return int(self.given.get(key) or self.config.get(key) or self.positions or self.value(key))

    def growth(self) -> float:
        """How many times as long contexts may now be: said, or the ratio of both lengths."""
        return float(self.given.get("factor") or int(self.positions or self.original()) / self.original())


def _read_dynamic(scaling: _Scaling) -> dict[str, Any]:
    positions = int(scaling.positions or scaling.value("max_position_embeddings"))
    return {"factor": float(scaling.value("factor")), "original_positions": positions}


def _read_llama3(scaling: _Scaling) -> dict[str, Any]:
    return {
        "factor": float(scaling.value("factor")),
        "low_freq_factor": float(scaling.value("low_freq_factor")),
        "high_freq_factor": float(scaling.value("high_freq_factor")),
        "original_positions": int(scaling.value("original_max_position_embeddings")),
    }


def _read_yarn(scaling: _Scaling) -> dict[str, Any]:
    given, factor = scaling.given, scaling.growth()
    over, under = given.get("mscale"), given.get("mscale_all_dim")
    amplitude = yarn_growth(factor, float(over)) / yarn_growth(factor, float(under)) if over and under else None
    said = given.get("attention_factor")
    return {
        "factor": factor,
        "original_positions": scaling.original(),
        "beta_fast": float(given.get("beta_fast") or 32),
        "beta_slow": float(given.get("beta_slow") or 1),
        "truncate": bool(given.get("truncate", True)),
        "amplitude": float(said) if said is not None else amplitude or yarn_growth(factor),
    }


def _read_longrope(scaling: _Scaling) -> dict[str, Any]:
    factor, original = scaling.growth(), scaling.original()
    amplitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    speeds = scaling.rotary_dim // 2
    for key in ("short_factor", "long_factor"):
        if len(scaling.value(key)) != speeds:
            found = f"{len(scaling.value(key))} numbers"
            raise refuse(key, found, supported=f"{speeds}, one for each speed", advice="Correct it.")
    return {
        "original_positions": original,
        "short_factors": tuple(map(float, scaling.value("short_factor"))),
        "long_factors": tuple(map(float, scaling.value("long_factor"))),
        "amplitude": float(scaling.given.get("attention_factor") or amplitude),
    }


_SCALINGS: dict[str, Callable[[_Scaling], dict[str, Any]]] = {
    "default": lambda scaling: {},
    "linear": lambda scaling: {"factor": float(scaling.value("factor"))},
    "dynamic": _read_dynamic,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
    "longrope": _read_longrope,
}


def yarn_growth(factor: float, mscale: float = 1.0) -> float:
    """Returns how much attention is sharpened for a context `factor` times as long (YaRN, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def complete_rope(config: dict[str, Any]) -> None:
    """Says rope in the words of transformers 4 and of 5, whichever of them config.json lacks; changes nothing there is.

    4 reads a file with the words of 5 alone as rope base 10000 without scaling, and warns of nothing.
    """
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    if new is None:
        scaling = {key: value for key, value in (old or {}).items() if key != "type"}
        scaling.setdefault("rope_type", (old or {}).get("type", "default"))
        config["rope_parameters"] = {"rope_theta": config.get("rope_theta", 10000.0), **scaling}
    config.setdefault("rope_theta", config["rope_parameters"].get("rope_theta", 10000.0))
    if "rope_scaling" not in config:
        scaling = {key: value for key, value in config["rope_parameters"].items() if key != "rope_theta"}
        config["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling


def complete_rope_by_type(config: dict[str, Any]) -> None:
    """Says rope of layer types in the words of transformers 4 where config.json has those of 5 alone."""
    nested = config.get("rope_parameters") or {}
    everywhere, local = nested.get("full_attention"), nested.get("sliding_attention")
    if everywhere is None or "rope_theta" in config:
        return
    scaling = {key: value for key, value in everywhere.items() if key != "rope_theta"}
    config["rope_theta"] = everywhere.get("rope_theta")
    config["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    if local and local.get("rope_theta") is not None:
        config["rope_local_base_freq"] = local["rope_theta"]


def leave_as_it_is(config: dict[str, Any]) -> None:
    """Completes nothing: all versions of transformers read this family's words."""
