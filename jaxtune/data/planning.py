"""From a configuration to trees of sources, their phases and their plan, before any text is read."""

import dataclasses
import os
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from jaxtune import hub
from jaxtune.config import Config
from jaxtune.data.files import sources
from jaxtune.data.leaves import held_out
from jaxtune.data.mixing import tree
from jaxtune.data.mixing.plan import MixturePlan, make_plan
from jaxtune.data.mixing.shares import Sizes, leaf_shares
from jaxtune.data.windows import PhaseEnd
from jaxtune.data.wording import tasks


def mixture_plan(config: Config, *, cache_dir: str | None = None) -> MixturePlan:
    """The plan of `config` without its texts: sources are counted only where no `examples` are given.

    Where `data.missing` says to skip, files on this machine are looked for, unread, even where `examples` are given;
    else such sources are believed to be there, and the plan says how many.

    Raises ValueError for shares that cannot be met, and for shares of tokens, which need the texts.
    """
    root, _ = training_tree(config)
    if counts_tokens(root):
        raise ValueError("mixing.unit: shares of tokens need the texts; the training command prints this plan")
    examples, missing = {}, {}
    believed: set[int] = set()
    skips = config.data.missing == "skip"
    for leaf in root.leaves():
        try:
            if leaf.config.examples is None:
                size = len(sources.open_source(leaf.config, cache_dir=cache_dir))
            else:
                size = leaf.config.examples
                if not (skips and _looked_for(leaf.config.path)):
                    believed.add(leaf.source)
            examples[leaf.name] = size - held_out(size, config.data.eval_fraction)
        except sources.MissingSource as problem:
            missing[leaf.name] = str(problem)
    if missing and not skips:
        raise ValueError(
            "\n".join([*missing.values(), "set `examples` for sources that are not here, or data.missing=skip"])
        )
    kept = tree.prune(root, set(missing))
    if kept is None:
        raise ValueError(f"data.train: none of the sources is there; the first: {next(iter(missing.values()))}")
    phases = phase_shares(config, kept, Sizes(examples))
    plan = make_plan(kept, phases[0][1], examples, phases=phases if len(phases) > 1 else (), skipped=tuple(missing))
    return dataclasses.replace(plan, believed=len(believed))


def _looked_for(path: str | None) -> bool:
    """Whether files on this machine are meant; raises MissingSource where there are none. Nothing is read."""
    if path is None or hub.is_url(path):
        return False
    if not os.path.exists(os.path.expanduser(path)):
        if hub.is_hub_id(path):
            return False
        hub.resolve_files(path)
    return True


def phase_shares(config: Config, root: tree.Node, sizes: Sizes) -> list[tuple[str, list[Fraction]]]:
    """Each phase's end, in words, and the shares of the leaves in it; one phase without `data.phases`."""
    if not config.data.phases:
        return [("the end", leaf_shares(root, sizes))]
    return [
        (
            "the end" if phase.until is None else str(phase_end(phase.until)),
            leaf_shares(root, sizes, weights=phase.weights or None, tags=phase.tags or None),
        )
        for phase in config.data.phases
    ]


def known_ends(config: Config, reached: Sequence[int]) -> list[int]:
    """First draws of the phases after the first, as far as they are known: those reached, and those asked in draws."""
    ends = list(reached)
    for phase in config.data.phases[len(ends) : -1]:
        if phase.until is None or phase.until.draws is None:
            break
        ends.append(phase.until.draws)
    return ends


def phase_end(until: Any) -> PhaseEnd:
    """Where a phase ends, of a configuration's `until`."""
    kind = next(key for key in ("steps", "tokens", "draws") if getattr(until, key) is not None)
    return PhaseEnd(kind, getattr(until, kind))


def training_tree(config: Config) -> tuple[tree.Node, tree.Node | None]:
    """The tree that is trained on, and the held-out clusters of it."""
    root = tree.expand(config, config.data.train, key="data.train", template_names=tasks.template_names)
    held, related = tree.hold_out(root, config.data.hold_out, folder=config.data.root)
    if not held:
        return root, None
    kept = tree.prune(root, held | related)
    if kept is None:
        raise ValueError("data.hold_out.clusters: nothing is left to train on; hold out fewer clusters")
    return kept, tree.prune(root, {leaf.name for leaf in root.leaves()} - held)


def evaluation_tree(config: Config) -> tree.Node | None:
    """The tree of data.eval and of the clusters held out; None without either."""
    held = training_tree(config)[1] if config.data.hold_out.clusters else None
    if not config.data.eval:
        return held
    root = tree.expand(config, config.data.eval, key="data.eval", template_names=tasks.template_names)
    if held is None:
        return root
    # Numbers say which source a leaf reads: those of the second tree go on after the first's.
    first = 1 + max(leaf.source for leaf in root.leaves())
    both = dataclasses.replace(root, members=(*root.members, *(tree.renumbered(m, first) for m in held.members)))
    tree.refuse_one_name_twice(both)
    return both


def counts_tokens(node: tree.Node) -> bool:
    """Whether some shares of a tree are shares of tokens, which only the texts can tell."""
    return node.mixing.unit == "tokens" or any(counts_tokens(member) for member in node.members)
