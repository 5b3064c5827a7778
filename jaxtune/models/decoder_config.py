"""What a family of decoders does, as data: no family is named in the code that reads it."""

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtune.models.rope import Rope


@dataclass(frozen=True)
class LayerKind:
    """What may differ from layer to layer.

    Attributes:
        window: how many positions, its own included, a token sees; None is all earlier ones.
        rope: None turns nothing (positions are learned, or not told at all).
        sparse: experts instead of the one mlp.
    """

    window: int | None
    rope: Rope | None
    sparse: bool = False


@dataclass(frozen=True)
class LayerGroup:
    """`count` repetitions of a pattern of layers, scanned."""

    pattern: tuple[LayerKind, ...]
    count: int


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): queries and keys through low-rank bottlenecks.

    A head's query and key are `nope_dim` entries that are not turned and `rope_dim` that are; the turned part of the
    key is one for all heads.
    """

    q_rank: int | None  # None: queries have no bottleneck
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in place of the mlp.

    Attributes:
        count, per_token: E experts, of which a token goes to so many.
        width: of one expert.
        score: `softmax` or `sigmoid` over all experts, then the best are taken; `top_softmax` takes the best first and
            puts the softmax over them.
        normalize: whether the chosen experts' scores are divided by their sum.
        scale: the chosen scores are multiplied by it at the end.
        groups, groups_kept: experts stand in so many groups, of which a token may use the best ones only.
        group_score: a group is as good as its best expert (`max`), or as its two best together (`top2`).
        correction_bias: scores for the choice, not those used, are shifted by a stored bias (DeepSeek-V3, 2.1.2).
        router_bias, bias: biases of the router, and of the experts.
        shared_width: of the mlp that sees every token; 0 for none.
        shared_gate: whether that mlp's output is weighted by a sigmoid of its own.
        fused: one matrix holds gate and up, their columns alternating.
        swiglu_limit, swiglu_alpha: gate and up are cut off at the limit, and the unit is `(up + 1) * gate *
            sigmoid(alpha * gate)` (GPT-OSS); None for the plain gated unit.
        load_balance: the coefficient that config.json names for the load-balance loss.
    """

    count: int
    per_token: int
    width: int
    score: str = "softmax"
    normalize: bool = False
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    group_score: str = "max"
    correction_bias: bool = False
    router_bias: bool = False
    bias: bool = False
    shared_width: int = 0
    shared_gate: bool = False
    fused: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    load_balance: float = 0.0


@dataclass(frozen=True)
class DecoderConfig:
    """What a family does, as numbers; hashable, so that it can key a compiled function.

    Fields with a default are what some families add to the Llama line, in the order of a token's way.

    Attributes:
        embed_scale: embeddings are multiplied by it.
        learned_positions: embeddings of positions are added.
        norm: rms or layer; `norm_offset` is added to the weight of an rms norm.
        pre_norm, post_norm: whether a half of a layer has a norm before it, and one after it (inside the residual).
        parallel: both halves read the layer's input, and both are added to it.
        fused_qkv: one matrix holds q, k and v: `blocks` one after the other, `heads` head by head.
        qk_norm: queries and keys are normed over a `head`, or over all heads (`width`).
        query_scale: what scores are multiplied by; None is head_dim ** -0.5.
        softcap: scores s become `softcap * tanh(s / softcap)`; `final_softcap` does so to logits.
        sinks: every head has a score that takes part in the softmax and gives nothing.
        latent: queries, keys and values as `LatentConfig` says.
        gated: the mlp is `down(activation(gate) * up)`, else `down(activation(up))`.
        fused_gate_up: one matrix holds gate, then up.
        experts: what sparse layers have.
        residual_scale: the output of each half is multiplied by it.
        logit_scale: logits are multiplied by it.
        linear_names: (our name, the checkpoint's) of linear layers that are called otherwise there.
    """

    vocab_size: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    groups: tuple[LayerGroup, ...]
    norm_eps: float
    max_positions: int
    activation: str
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tie_embeddings: bool
    init_std: float
    embed_scale: float = 1.0
    learned_positions: bool = False
    norm: str = "rms"
    norm_offset: float = 0.0
    pre_norm: bool = True
    post_norm: bool = False
    parallel: bool = False
    fused_qkv: str | None = None
    qk_norm: str | None = None
    query_scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    latent: LatentConfig | None = None
    gated: bool = True
    fused_gate_up: bool = False
    experts: ExpertsConfig | None = None
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    final_softcap: float | None = None
    linear_names: tuple[tuple[str, str], ...] = ()

    is_encoder_decoder: ClassVar[bool] = False

    @property
    def num_layers(self) -> int:
        return sum(len(group.pattern) * group.count for group in self.groups)

    @property
    def rope_dim(self) -> int:
        """Size of the part of a head that rope is given."""
        return self.latent.rope_dim if self.latent else self.head_dim

    @property
    def cache_sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(heads, size) of the two arrays that are kept of a token: keys and values, or a latent and a turned key."""
        if self.latent:
            return (1, self.latent.kv_rank), (1, self.latent.rope_dim)
        return (self.num_kv_heads, self.head_dim), (self.num_kv_heads, self.head_dim)

    def layer_kinds(self) -> list[LayerKind]:
        """Returns the kind of every layer, first to last."""
        return [kind for group in self.groups for _ in range(group.count) for kind in group.pattern]

    def layer_place(self, layer: int) -> tuple[int, int, int]:
        """Returns (group, place in the pattern, repetition) of a layer: where its parameters are stacked."""
        for number, group in enumerate(self.groups):
            size = len(group.pattern) * group.count
            if layer < size:
                return number, layer % len(group.pattern), layer // len(group.pattern)
            layer -= size
        raise IndexError(layer)

    def stacks(self) -> dict[str, list["StackedLayer"]]:
        """Returns where the layers that `{layer}` in a tensor's name counts are held, first to last."""
        kinds = self.layer_kinds()
        places = map(self.layer_place, range(self.num_layers))
        return {
            "layer": [
                StackedLayer(("groups", group, place), repetition, kind)
                for (group, place, repetition), kind in zip(places, kinds, strict=True)
            ]
        }

    def linear_name(self, name: str) -> str:
        """Returns what the checkpoint, and so a user's `tuning.targets`, calls one of our linear layers."""
        return dict(self.linear_names).get(name, name)

    def expert_name(self, name: str) -> str:
        """Returns what `tuning.targets` calls a linear layer of the experts."""
        return "experts." + dict(self.linear_names).get(f"experts.{name}", name)


@dataclass(frozen=True)
class StackedLayer:
    """Where one layer's parameters are: below `path`, at `index` of the leading axis; `kind` says what it is."""

    path: tuple[Any, ...]
    index: int
    kind: Any = None


def group_layers(kinds: list[LayerKind]) -> tuple[LayerGroup, ...]:
    """Returns the layers as few scanned groups.

    Layers that repeat a pattern at least twice (five local, one global) form a group of its whole repetitions, and
    what is left follows; otherwise runs of equal layers are groups (28 full and then 4 windowed layers are two).
    """
    groups: list[LayerGroup] = []
    period = _period(kinds)
    if period > 1 and len(kinds) >= 2 * period:
        groups.append(LayerGroup(tuple(kinds[:period]), len(kinds) // period))
        kinds = kinds[len(kinds) // period * period :]
    for kind in kinds:
        if groups and groups[-1].pattern == (kind,):
            groups[-1] = LayerGroup((kind,), groups[-1].count + 1)
        else:
            groups.append(LayerGroup((kind,), 1))
    return tuple(groups)


def _period(kinds: list[LayerKind]) -> int:
    """Returns the least p such that layer i + p is like layer i."""
    return next(p for p in range(1, len(kinds) + 1) if kinds[p:] == kinds[: len(kinds) - p])
