"""What share of the draws each leaf of a tree gets, in exact fractions.

A node's members share its draws by their rates, as SeqIO's nested mixtures do (google/seqio, dataset_providers.py): a
leaf's share is the product, along its path, of its rate over the sum of its siblings' rates. Rates by examples are
scaled, then capped, then taken to the power 1 / temperature (`seqio.mixing_rate_num_examples`). Shares by tag are met
by scaling the leaves that have the tag, and all others with them; where leaves have several tags the smallest change
that meets all shares is found by Newton's method.
"""

import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from jaxtune.config_data import MixingConfig
from jaxtune.data.mixing.tree import Node

BY_SIZE = ("proportional", "temperature")
_ROUNDS = 200
_CLOSE = 1e-12
_LONGEST_STEP = 5.0
_ROUNDING = 1e-12


class Sizes:
    """What is known of the leaves: `examples` each, and `tokens` that one draw brings on average, where asked.

    `rows` are those that are there, where they have been counted: what is seen so many times is they, whatever number
    of examples a configuration gives for rates.
    """

    def __init__(
        self,
        examples: Mapping[str, int],
        tokens: Mapping[str, float] | None = None,
        rows: Mapping[str, int] | None = None,
    ) -> None:
        self.examples, self.tokens, self.rows = examples, tokens, examples if rows is None else rows

    def of(self, node: Node) -> Fraction:
        """Examples of a node: the sum of its members', but a source's once however many styles it has."""
        return self._sum(node, self.examples)

    def rows_of(self, node: Node) -> Fraction:
        """Rows of a node, in the same way."""
        return self._sum(node, self.rows)

    def _sum(self, node: Node, counts: Mapping[str, int]) -> Fraction:
        if not node.members:
            return Fraction(counts[node.name])
        if node.same_rows:
            return self._sum(node.members[0], counts)
        return sum((self._sum(member, counts) for member in node.members), Fraction(0))

    def tokens_of(self, leaf: Node) -> Fraction:
        """Tokens of an average draw of a leaf."""
        if self.tokens is None:
            raise ValueError(f"{leaf.where}: rates by tokens need the sources to be measured first")
        return Fraction(max(self.tokens[leaf.name], 1e-9)).limit_denominator(1 << 20)


def leaf_shares(
    root: Node,
    sizes: Sizes,
    *,
    weights: Mapping[str, float] | None = None,
    tags: Mapping[str, float] | None = None,
) -> list[Fraction]:
    """The share of every leaf, in order; they sum to 1.

    `weights` (of the root's members) and `tags` stand in place of the root's own, for a phase; a member without a
    weight there gets nothing. Raises ValueError for shares that cannot be met.
    """
    shares = _shares(root, sizes, weights, tags)
    return [shares.get(leaf.name, Fraction(0)) for leaf in root.leaves()]


def _shares(
    node: Node,
    sizes: Sizes,
    weights: Mapping[str, float] | None = None,
    tags: Mapping[str, float] | None = None,
    by_rows: bool = True,
) -> dict[str, Fraction]:
    """Shares of the leaves under a node, by name; they sum to 1. `by_rows`: all above share by rows x epochs."""
    if not node.members:
        return {node.name: Fraction(1)}
    if node.same_rows and by_rows:
        rates = [Fraction(stop - start) for start, stop in style_parts(node, sizes.rows[node.members[0].name])]
    else:
        rates = member_rates(node, sizes) if weights is None else _phase_rates(node, weights)
    by_rows = by_rows and weights is None and rates_kind(node) == "epochs"
    inner = {
        member.name: _shares(member, sizes, by_rows=by_rows)
        for member, rate in zip(node.members, rates, strict=True)
        if rate
    }
    in_tokens = node.mixing.unit == "tokens"
    leaves = {leaf.name: leaf for leaf in node.leaves()}
    if in_tokens:  # a share of tokens is a share of draws over the tokens that a draw brings
        mean = {
            name: sum((share * sizes.tokens_of(leaves[leaf]) for leaf, share in found.items()), Fraction(0))
            for name, found in inner.items()
        }
        rates = [r / mean[m.name] if r else r for r, m in zip(rates, node.members, strict=True)]
    total = sum(rates)
    out = {
        leaf: rate / total * share
        for member, rate in zip(node.members, rates, strict=True)
        if rate
        for leaf, share in inner[member.name].items()
    }
    wanted = node.mixing.tags if tags is None or not tags else tags
    if wanted:
        size = {name: sizes.tokens_of(leaves[name]) if in_tokens else Fraction(1) for name in out}
        out = _with_tags(node, out, size, wanted)
    return out


def member_rates(node: Node, sizes: Sizes) -> list[Fraction]:
    """The rate of each member of a node, before they are divided by their sum."""
    kind, mixing = rates_kind(node), node.mixing
    if kind == "weights":
        return [m.weight or Fraction(0) for m in node.members]
    if kind == "equal":
        return [Fraction(1) for _ in node.members]
    if kind == "epochs":
        return [_shown(member, sizes) for member in node.members]
    return [_by_size(member, mixing, sizes) for member in node.members]


def style_parts(node: Node, rows: int) -> list[tuple[int, int]]:
    """First and last place (exclusive) of each style in an epoch's order of a source's rows; at least one place each.

    With 10 rows and shares 1 : 1 : 2 these are (0, 2), (2, 5), (5, 10).
    """
    total = sum((m.weight or Fraction(0) for m in node.members), Fraction(0))
    ends, upto = [0], Fraction(0)
    for member in node.members:
        upto += member.weight or Fraction(0)
        ends.append(round(rows * upto / total))
    return [(min(a, rows - 1), max(b, min(a, rows - 1) + 1)) for a, b in itertools.pairwise(ends)]


def rates_kind(node: Node) -> str:
    """The rule by which a node's members share: `auto` is weights where they have them, else epochs."""
    if node.mixing.rates != "auto":
        return node.mixing.rates
    return "weights" if any(member.weight is not None for member in node.members) else "epochs"


def _shown(node: Node, sizes: Sizes) -> Fraction:
    """Rows x epochs of everything under a node."""
    if not node.members or node.same_rows:
        return Fraction(max(1, round(sizes.rows_of(node) * node.epochs)))
    return sum((_shown(member, sizes) for member in node.members), Fraction(0)) * node.epochs


def _amount(node: Node, mixing: MixingConfig, sizes: Sizes) -> Fraction:
    return sizes.of(node) if mixing.unit == "examples" else _tokens(node, sizes)


def _tokens(node: Node, sizes: Sizes) -> Fraction:
    if not node.members:
        return sizes.of(node) * sizes.tokens_of(node)
    return sum((_tokens(member, sizes) for member in node.members), Fraction(0))


def _by_size(member: Node, mixing: MixingConfig, sizes: Sizes) -> Fraction:
    """SeqIO's rate by number of examples: scale, then cap, then temperature.

    A group whose members share by size counts for the sum of their rates, so that their caps hold for it too.
    """
    if member.members and rates_kind(member) in BY_SIZE:
        rate = sum(member_rates(member, sizes), Fraction(0))
    else:
        rate = _amount(member, mixing, sizes)
    rate *= Fraction(str(mixing.scale))
    cap = member.config.cap if member.config.cap is not None else mixing.cap
    if cap is not None:
        rate = min(rate, Fraction(str(cap)))
    return rate if mixing.temperature == 1 else Fraction(float(rate) ** (1 / mixing.temperature))


def _phase_rates(node: Node, weights: Mapping[str, float]) -> list[Fraction]:
    return [Fraction(str(weights.get(member.name, 0))) for member in node.members]


def _with_tags(
    node: Node, shares: Mapping[str, Fraction], size: Mapping[str, Fraction], wanted: Mapping[str, float]
) -> dict[str, Fraction]:
    """Shares scaled so that, counted in `size`, each tag has the share wanted; the untagged keep their proportions."""
    having = {leaf.name: [tag for tag in leaf.tags if tag in wanted] for leaf in node.leaves() if leaf.name in shares}
    weight = {name: share * size[name] for name, share in shares.items()}
    if all(len(tags) <= 1 for tags in having.values()):
        met = _disjoint(node, weight, having, wanted)
    else:
        met = _raked(node, weight, having, wanted)
    out = {name: value / size[name] for name, value in met.items()}
    total = sum(out.values())
    return {name: value / total for name, value in out.items()}


def _disjoint(
    node: Node, weight: Mapping[str, Fraction], having: Mapping[str, Sequence[str]], wanted: Mapping[str, float]
) -> dict[str, Fraction]:
    """Exact shares where no leaf has two of the tags."""
    asked = {tag: Fraction(str(share)) for tag, share in wanted.items()}
    rest = 1 - sum(asked.values())
    if rest < 0:
        raise ValueError(f"{_where(node)}: {_told(wanted)} add up to {float(1 - rest):g}; expected at most 1")
    groups: dict[str, Fraction] = {}
    for name, value in weight.items():
        group = next(iter(having[name]), "")
        groups[group] = groups.get(group, Fraction(0)) + value
    _refuse_empty(node, groups, wanted)
    if rest and not groups.get(""):
        raise ValueError(
            f"{_where(node)}: {_told(wanted)} add up to {float(1 - rest):g} and every source has one of these tags, so "
            "the rest has no source; expected shares that add up to 1, or a source without these tags"
        )
    asked[""] = Fraction(rest)
    return {
        name: value * asked[group] / groups[group]
        for name, value in weight.items()
        if (group := next(iter(having[name]), "")) is not None
    }


def _raked(
    node: Node, weight: Mapping[str, Fraction], having: Mapping[str, Sequence[str]], wanted: Mapping[str, float]
) -> dict[str, Fraction]:
    """Shares that meet every tag's, where leaves have several: each leaf is scaled by one factor for each of its tags.

    The factors' logarithms are where a convex function is least: Newton's method finds them in a few steps, where
    scaling one tag after another (Deming & Stephan 1940) has the same end, and may take thousands.
    """
    names, tags = list(weight), list(wanted)
    _refuse_empty(node, {tag: Fraction(sum(tag in having[name] for name in names)) for tag in tags}, wanted)
    has = np.array([[tag in having[name] for tag in tags] for name in names], np.float64)
    share = np.array([wanted[tag] for tag in tags])
    start = np.log([float(weight[name]) for name in names])
    factors = np.zeros(len(tags))
    value, height = _scaled(start, has, factors, share)
    for _ in range(_ROUNDS):
        reached = value @ has
        if np.abs(reached - share).max() < _CLOSE:
            return {name: Fraction(v) for name, v in zip(names, value.tolist(), strict=True)}
        slope = reached - share
        curve = (has * value[:, None]).T @ has - np.outer(reached, reached)
        step = np.linalg.lstsq(curve, slope, rcond=None)[0]
        size = min(1.0, _LONGEST_STEP / max(np.abs(step).max(), 1e-300))
        lower = _scaled(start, has, factors - size * step, share)
        while lower[1] > height + _ROUNDING and size > 1e-9:
            size /= 2
            lower = _scaled(start, has, factors - size * step, share)
        factors, (value, height) = factors - size * step, lower
    told = {tag: round(float(found), 4) for tag, found in zip(tags, value @ has, strict=True)}
    raise ValueError(
        f"{_where(node)}: {_told(wanted)} cannot all be met, since sources have several of these tags; the nearest "
        f"found is {told}; change the shares, or the tags"
    )


def _scaled(start: np.ndarray, has: np.ndarray, factors: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, float]:
    """The leaves' shares under these factors (logarithms, one for each tag), and the function that is to be least."""
    raised = start + has @ factors
    most = raised.max()
    value = np.exp(raised - most)
    total = value.sum()
    return value / total, float(most + np.log(total) - factors @ share)


def _refuse_empty(node: Node, groups: Mapping[str, Fraction], wanted: Mapping[str, float]) -> None:
    for tag in wanted:
        if not groups.get(tag):
            raise ValueError(
                f"{_where(node)}.{tag}: no source with this tag has a share to scale; expected at least one"
            )


def _told(wanted: Mapping[str, float]) -> str:
    return ", ".join(f"{tag} {share:g}" for tag, share in wanted.items())


def _where(node: Node) -> str:
    return f"{node.where}.mixing.tags" if node.name else "data.mixing.tags"
