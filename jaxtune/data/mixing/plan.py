"""What a run will draw from each source, as a person and a program read it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from jaxtune.data.mixing.tree import Node

_SHOWN = 40  # sources listed on a terminal; mixture.json has all


@dataclasses.dataclass(frozen=True)
class PlannedLeaf:
    """One leaf of the plan.

    `rate`: share of draws asked for; `realised`: share of the draws of the run, which the whole numbers of the sampler
    make of it. `examples`: rows it has, `tokens`: what one pass over them trains and reads, where measured; `draws` and
    `epochs`: over the run, where its length is known.
    """

    name: str
    rate: Fraction
    tags: tuple[str, ...]
    style: str
    examples: int
    tokens: int | None = None
    realised: float | None = None
    draws: int | None = None

    @property
    def epochs(self) -> float | None:
        """How often each of its rows is drawn over the run."""
        return None if self.draws is None else self.draws / max(1, self.examples)


@dataclasses.dataclass(frozen=True)
class MixturePlan:
    """The mixture of a run; with phases, `leaves` is the first and `phases` has each phase's shares.

    `draws`: of the whole run, an estimate when `estimated`. `skipped`: sources left out because they are not there;
    `believed`: how many have only their `examples`' word for it that they are there.
    """

    leaves: tuple[PlannedLeaf, ...]
    draws: int | None = None
    estimated: bool = False
    phases: tuple[tuple[str, tuple[Fraction, ...]], ...] = ()
    skipped: tuple[str, ...] = ()
    believed: int = 0

    def by_tag(self) -> dict[str, float]:
        """Share of draws by tag; a source with several tags counts for each."""
        out: dict[str, Fraction] = {}
        for leaf in self.leaves:
            for tag in leaf.tags:
                out[tag] = out.get(tag, Fraction(0)) + leaf.rate
        return {tag: float(share) for tag, share in sorted(out.items())}

    def as_json(self) -> dict[str, Any]:
        """Plain values: `leaves` with name, rate (they sum to 1), examples, tags, and what else is known."""
        return {
            "draws": self.draws,
            "draws_estimated": self.estimated,
            "leaves": [
                {
                    "name": leaf.name,
                    "rate": float(leaf.rate),
                    "examples": leaf.examples,
                    "tags": list(leaf.tags),
                    "style": leaf.style,
                    "tokens": leaf.tokens,
                    "realised": leaf.realised,
                    "draws": leaf.draws,
                    "epochs": leaf.epochs,
                }
                for leaf in self.leaves
            ],
            "tags": self.by_tag(),
            "phases": [{"until": until, "rates": [float(rate) for rate in rates]} for until, rates in self.phases],
            "skipped": list(self.skipped),
            "believed": self.believed,
        }

    def write(self, path: str) -> None:
        """Writes `as_json` to a file."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.as_json(), file, indent=1)
            file.write("\n")

    def table(self) -> str:
        """Lines for a terminal: a row for each source, the largest shares when there are many, then the tags."""
        head = ("source", "examples", "tokens", "asked", "realised", "epochs")
        shown = sorted(self.leaves, key=lambda leaf: -leaf.rate)[:_SHOWN] if len(self.leaves) > _SHOWN else self.leaves
        lines = [
            (
                leaf.name,
                f"{leaf.examples:,}",
                "" if leaf.tokens is None else f"{leaf.tokens:,}",
                f"{float(leaf.rate):.4%}",
                "" if leaf.realised is None else f"{leaf.realised:.4%}",
                "" if leaf.epochs is None else f"{leaf.epochs:.3g}",
            )
            for leaf in shown
        ]
        told = [i for i in range(len(head)) if any(line[i] for line in lines)]
        widths = {i: max(len(line[i]) for line in [head, *lines]) for i in told}
        out = [
            "  ".join(line[i].ljust(widths[i]) if i == 0 else line[i].rjust(widths[i]) for i in told)
            for line in [head, *lines]
        ]
        if len(shown) < len(self.leaves):
            rest = sum(float(leaf.rate) for leaf in self.leaves) - sum(float(leaf.rate) for leaf in shown)
            out.append(f"... and {len(self.leaves) - len(shown):,} more sources with {rest:.2%} together")
        tags = ", ".join(f"{tag} {share:.2%}" for tag, share in self.by_tag().items())
        out += [f"by tag: {tags}"] if tags else []
        if self.phases:
            ends = ", ".join(until for until, _ in self.phases)
            out.append(f"{len(self.phases)} phases ({ends}); the shares above are the first's")
        if self.draws is not None:
            about = "about " if self.estimated else ""
            out.append(f"{about}{self.draws:,} draws over the run")
        return "\n".join(out)


def make_plan(
    root: Node,
    shares: Sequence[Fraction],
    examples: Mapping[str, int],
    *,
    tokens: Mapping[str, int] | None = None,
    drawn: Sequence[int] | None = None,
    estimated: bool = False,
    phases: Sequence[tuple[str, Sequence[Fraction]]] = (),
    skipped: Sequence[str] = (),
) -> MixturePlan:
    """The plan of a tree; `drawn` counts each leaf's draws over the run."""
    total = None if drawn is None else sum(drawn)
    leaves = tuple(
        PlannedLeaf(
            name=leaf.name,
            rate=share,
            tags=leaf.tags,
            style=leaf.style,
            examples=examples[leaf.name],
            tokens=None if tokens is None else tokens.get(leaf.name),
            realised=None if drawn is None else drawn[i] / max(1, total or 0),
            draws=None if drawn is None else drawn[i],
        )
        for i, (leaf, share) in enumerate(zip(root.leaves(), shares, strict=True))
    )
    return MixturePlan(
        leaves=leaves,
        draws=total,
        estimated=estimated,
        phases=tuple((until, tuple(rates)) for until, rates in phases),
        skipped=tuple(skipped),
    )
