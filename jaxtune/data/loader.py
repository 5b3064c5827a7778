"""From a configuration to the stream that training or evaluation reads: sources opened, measured and planned."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from jaxtune.config import Config
from jaxtune.data import lengths
from jaxtune.data.ahead.attaching import attach
from jaxtune.data.counting import choose_lanes, choose_window, count_rows, epoch_draws, estimated_draws
from jaxtune.data.leaves import OpenLeaf, row_orders
from jaxtune.data.lengths import Progress, Wanted
from jaxtune.data.measuring import Counted, Opening, Survey, rows_to_measure
from jaxtune.data.mixing import mixture, tree
from jaxtune.data.mixing.plan import MixturePlan, make_plan
from jaxtune.data.mixing.shares import Sizes
from jaxtune.data.planning import counts_tokens, evaluation_tree, known_ends, phase_end, phase_shares, training_tree
from jaxtune.data.rows import row_kind
from jaxtune.data.stream import Stream
from jaxtune.data.windows import WindowMaker

_WINDOW_SAMPLE = 10  # rows of each source that say how long its examples are, for the size of a window
PLAN_FILE = "mixture.json"


def open_stream(
    config: Config,
    *,
    tokenizer: Any,
    max_length: int,
    encoder_length: int | None = None,
    start_token: int = 0,
    cache_dir: str | None = None,
    output_dir: str | None = None,
    progress: Progress | None = None,
    survey: Survey | None = None,
    read_all: lengths.ReadAll | None = None,
) -> Stream:
    """The training stream of `config`: opens and measures its sources, and plans the run.

    With an `encoder_length` its batches are `PairBatch`es for an encoder-decoder: `max_length` is then the decoder's,
    whose inputs begin with `start_token` (0 in T5) in each segment.

    Raises ValueError for whatever would make the run wrong: unreadable rows (unless data.on_bad_row says otherwise), a
    source with nothing to train on, a template that never trains its stop token, more lost than data.max_lost, shares
    that cannot be met. With a `survey` all rows are read, and the first four of these are told to it instead.
    `read_all` reads the rows of the length pass, perhaps in other processes.
    """
    kind = row_kind(max_length, packing=config.data.packing, encoder_length=encoder_length, start_token=start_token)
    opening = Opening(config, tokenizer, max_length, encoder_length, cache_dir, output_dir, progress, survey, read_all)
    root, evaluated = training_tree(config)
    opened, root, skipped = opening.opener.find(root)
    excluded, unseen = opening.hashes(evaluated) if evaluated is not None else (None, ())
    leaves = opening.gated(opening.opener.open(root, opened, fraction=config.data.eval_fraction, excluded=excluded))
    exact = opening.is_exact(leaves)
    rows = opening.rows(leaves, exact)
    phases, draws = _mixture(config, root, leaves, opening, rows)
    in_epoch = epoch_draws(config, draws)
    endless = config.train.steps is not None or not exact
    total = None if endless else max(1, round(in_epoch * config.train.epochs))
    counted = opening.count(leaves, rows_to_measure(leaves, rows, draws, total), rows, exact, evaluation=False)
    few = [Wanted(leaf.rows(config.seed, _WINDOW_SAMPLE)) for leaf in leaves]
    looked_at = opening.measure(leaves, few, silent=True)
    maker = WindowMaker(
        readers=tuple(leaf.reader for leaf in leaves),
        draws=draws,
        epoch_draws=in_epoch,
        total=total,
        size=choose_window(config, draws.wheels[0].rates, [table.mean_lengths() for table in looked_at], kind),
        rows=kind,
        seed=config.seed,
    )
    stream = _stream(config, maker, counted, leaves, exact, lanes=config.data.lanes, output_dir=output_dir)
    stream = attach(config, stream, cache_dir=cache_dir)
    plan = _plan(config, root, phases, stream, counted, skipped)
    warnings = [
        *stream.warnings,
        *_template_warnings(config, leaves),
        *_skipped_warning(skipped),
        *_unseen_warning(unseen),
        *_size_warnings(leaves),
        *_undrawn_warning(plan),
        *opening.warnings,
    ]
    return dataclasses.replace(
        stream,
        warnings=tuple(warnings),
        plan=plan,
        phase_ends=tuple(phase_end(p.until) for p in config.data.phases[:-1]),
    )


def open_eval_stream(
    config: Config,
    *,
    tokenizer: Any,
    max_length: int,
    encoder_length: int | None = None,
    start_token: int = 0,
    cache_dir: str | None = None,
    output_dir: str | None = None,
    progress: Progress | None = None,
    survey: Survey | None = None,
) -> Stream | None:
    """The evaluation stream: data.eval, the clusters of data.hold_out, or the rows that data.eval_fraction holds out.

    None without any of these. One pass in a fixed order, packed as in training; it ends after `steps_per_run` batches.
    `encoder_length` and `start_token` are as for `open_stream`.
    """
    kind = row_kind(max_length, packing=config.data.packing, encoder_length=encoder_length, start_token=start_token)
    opening = Opening(config, tokenizer, max_length, encoder_length, cache_dir, output_dir, progress, survey)
    fraction = 0.0
    root = evaluation_tree(config)
    if root is None and config.data.eval_fraction:
        root, fraction = training_tree(config)[0], config.data.eval_fraction
    if root is None:
        return None
    opened, root, skipped = opening.opener.find(root)
    leaves = opening.opener.open(root, opened, fraction=fraction)
    rows = [leaf.held_rows(config.seed) if fraction else np.arange(leaf.size) for leaf in leaves]
    counted = opening.count(leaves, [Wanted(r) for r in rows], rows, True, evaluation=True)
    draws = mixture.InOrder(rows)
    maker = WindowMaker(
        readers=tuple(leaf.reader for leaf in leaves),
        draws=draws,
        epoch_draws=draws.total,
        total=draws.total,
        size=choose_window(config, [len(r) for r in rows], [table.mean_lengths() for table in counted.tables], kind),
        rows=kind,
        seed=config.seed,
    )
    stream = _stream(config, maker, counted, leaves, True, lanes=1, output_dir=output_dir, evaluation=True)
    return dataclasses.replace(stream, warnings=(*stream.warnings, *_unseen_warning(skipped)))


def _mixture(
    config: Config, root: tree.Node, leaves: Sequence[OpenLeaf], opening: Opening, rows: Sequence[np.ndarray]
) -> tuple[list[tuple[str, list[Fraction]]], mixture.Mixture]:
    """The shares of each phase, and the draws that they make."""
    tokens = None
    if counts_tokens(root):
        tables = opening.measure(leaves, [Wanted(r) for r in rows])
        tokens = {leaf.node.name: table.mean_tokens() for leaf, table in zip(leaves, tables, strict=True)}
    pools = {leaf.node.name: leaf.pool for leaf in leaves}
    given = {leaf.node.name: leaf.node.config.examples or leaf.pool for leaf in leaves}
    phases = phase_shares(config, root, Sizes(given, tokens, pools))
    orders = row_orders(leaves, opening.measure_one, config.seed, on_bad_row=config.data.on_bad_row)
    drawn = [
        mixture.Leaf(
            size=leaf.size,
            epochs=float(leaf.node.config.epochs),
            held_out=leaf.held_out,
            source=leaf.node.source,
            held_key=leaf.held_key,
            part=leaf.part if order is None else None,
            order=order,
        )
        for leaf, order in zip(leaves, orders, strict=True)
    ]
    draws = mixture.Mixture(drawn, [shares for _, shares in phases], seed=config.seed)
    return phases, draws.ending(known_ends(config, ()))


def _stream(
    config: Config,
    maker: WindowMaker,
    counted: Counted,
    leaves: Sequence[OpenLeaf],
    exact: bool,
    *,
    lanes: int | str,
    output_dir: str | None,
    evaluation: bool = False,
) -> Stream:
    number = lanes if isinstance(lanes, int) else choose_lanes(config, maker, counted.tables)
    counts, fill = count_rows(maker, counted.tables) if exact and maker.total is not None else (None, None)
    names = tuple(leaf.node.name for leaf in leaves)
    keys = dict(zip(names, lengths.reader_keys(maker.readers), strict=True))
    identity = _identity(config, maker, keys)
    return Stream(
        maker=maker,
        batch_rows=config.train.batch_rows,
        lanes=number,
        funnel=counted.funnel,
        source_names=names,
        source_tags=tuple(leaf.node.tags for leaf in leaves),
        layouts=tuple(reader.layout for reader in maker.readers),
        rows_of_windows=counts,
        fill=fill,
        warnings=tuple(counted.funnel.warnings(evaluation=evaluation)),
        identity=identity,
        fingerprint=hashlib.blake2b(repr(sorted(identity.items())).encode(), digest_size=16).hexdigest(),
        workers=config.data.workers,
        on_bad_row=config.data.on_bad_row,
        output_dir=output_dir,
    )


def _identity(config: Config, maker: WindowMaker, keys: Mapping[str, str]) -> dict[str, str]:
    """What the stream is a function of, by name: for each source its data, wording and rates, then the options."""
    rates = (
        [":".join(str(wheel.rates[i]) for wheel in maker.draws.wheels) for i in range(len(keys))]
        if isinstance(maker.draws, mixture.Mixture)
        else ["" for _ in keys]
    )
    found = {
        f"source {name}": f"{key}:{rate}:{_leaf_key(maker, i)}"
        for i, ((name, key), rate) in enumerate(zip(keys.items(), rates, strict=True))
    }
    phases = [phase.until.model_dump() if phase.until else None for phase in config.data.phases]
    return {
        **found,
        "window, length, packing": f"{maker.size}:{maker.rows.key}",
        "seed": str(maker.seed),
        "eval_fraction": str(config.data.eval_fraction),
        "epoch": str(maker.epoch_draws),
        "phases": str(phases),
    }


def _leaf_key(maker: WindowMaker, i: int) -> str:
    if not isinstance(maker.draws, mixture.Mixture):
        return ""
    leaf = maker.draws.leaves[i]
    order = "" if leaf.order is None else hashlib.blake2b(leaf.order.tobytes(), digest_size=8).hexdigest()
    return f"{leaf.epochs}:{leaf.source}:{leaf.part}:{order}"


def _plan(
    config: Config,
    root: tree.Node,
    phases: Sequence[tuple[str, Sequence[Fraction]]],
    stream: Stream,
    counted: Counted,
    skipped: Sequence[str],
) -> MixturePlan:
    draws = stream.maker.draws
    assert isinstance(draws, mixture.Mixture)
    total = stream.maker.total
    known = total is not None or config.train.steps is not None
    run = total if total is not None else estimated_draws(config, stream.maker, counted.tables) if known else 0
    names = stream.source_names
    return make_plan(
        root,
        phases[0][1],
        {name: leaf.rows for name, leaf in zip(names, draws.leaves, strict=True)},
        tokens={s.name: s.tokens for s in counted.funnel.sources},
        drawn=[draws.drawn_before(run, i) for i in range(len(names))] if known else None,
        estimated=total is None,
        phases=phases if len(phases) > 1 else (),
        skipped=skipped,
    )


def write_plan(stream: Stream, output_dir: str) -> None:
    """Writes the stream's plan to OUTPUT/mixture.json."""
    if stream.plan is not None:
        os.makedirs(output_dir, exist_ok=True)
        stream.plan.write(os.path.join(output_dir, PLAN_FILE))


def _skipped_warning(skipped: Sequence[str]) -> list[str]:
    if not skipped:
        return []
    named = ", ".join(skipped[:10]) + (f" and {len(skipped) - 10:,} more" if len(skipped) > 10 else "")
    return [f"{len(skipped):,} sources are not there and are left out, the others' shares scaled up: {named}"]


def _unseen_warning(skipped: Sequence[str]) -> list[str]:
    if not skipped:
        return []
    return [
        f"{len(skipped):,} sources of the evaluation are not there, so nothing of them is evaluated or kept out of "
        f"training: {', '.join(skipped[:10])}"
    ]


def _size_warnings(leaves: Sequence[OpenLeaf]) -> list[str]:
    """A sentence where sources have another number of rows than the configuration says."""
    other = [
        (leaf.node.name, leaf.node.config.examples, leaf.size)
        for leaf in leaves
        if leaf.node.config.examples and abs(leaf.node.config.examples - leaf.size) > 0.01 * leaf.size
    ]
    if not other:
        return []
    name, said, found = other[0]
    return [
        f"{len(other):,} sources have another number of rows than their `examples` says, e.g. {name} {found:,} rather "
        f"than {said:,}; rates by size go by the number given"
    ]


def _undrawn_warning(plan: MixturePlan) -> list[str]:
    names = [leaf.name for leaf in plan.leaves if leaf.draws == 0]
    if not names:
        return []
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return [f"{len(names):,} sources get no draw in this run: {', '.join(names[:10])}{more}"]


def _template_warnings(config: Config, leaves: Sequence[OpenLeaf]) -> list[str]:
    """Sentences about templates that the run can follow, and that the folder it writes, or a resumed run, cannot."""
    out = []
    others = sorted({t for leaf in leaves if (t := leaf.node.config.template)} - {config.data.template})
    if others:
        out.append(
            f"data.template: the exported folder carries {config.data.template}, but sources are trained with "
            f"{', '.join(others)}; set data.template to the one that the model is to be asked with"
        )
    dated = sorted({leaf.reader.template.name for leaf in leaves if "strftime_now" in leaf.reader.template.text})
    out += [
        f"template {name} writes today's date (strftime_now): the data stream changes from day to day, also when a run "
        "is resumed"
        for name in dated
    ]
    return out
