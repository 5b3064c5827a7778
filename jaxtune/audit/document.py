"""audit.json: everything that was found, as plain values; audit.html shows the same."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtune.audit.findings import Finding, findings
from jaxtune.audit.flags import flags
from jaxtune.audit.looking import Look
from jaxtune.audit.statistics import statistics
from jaxtune.audit.survey import Surveyed, overlap
from jaxtune.data.counting import count_rows
from jaxtune.data.funnel import SourceFunnel
from jaxtune.data.row_results import STAGES
from jaxtune.data.stream import Stream

VERSION = 1
_MANY = 200  # sources with statistics of their own


def document(surveyed: Surveyed) -> tuple[dict[str, Any], list[Finding]]:
    """The facts of an audit, and what is worth attention among them."""
    stream, look = surveyed.stream, surveyed.look
    total = statistics(look.tables, look.facts)
    tags = stream.plan.by_tag() if stream.plan is not None else {}
    flagged = flagged_rows(look, stream.source_names)
    common = None if surveyed.eval_look is None else overlap(surveyed)
    told = findings(
        total,
        overlap=common,
        contaminated=len(surveyed.contaminated),
        first_of={flag: row["where"] for row in reversed(flagged) for flag in row["flags"]},
        by_tag=tags,
        stream_warnings=_warnings(surveyed),
        problems=surveyed.problems,
    )
    counted = len(look.leaves) <= _MANY
    out = {
        "version": VERSION,
        "findings": [finding._asdict() for finding in told],
        "funnel": _funnel(stream),
        "packing": _packing(stream, surveyed),
        "mixture": None if stream.plan is None else stream.plan.as_json(),
        "shares": _shares(surveyed, tags),
        "statistics": total,
        "statistics_by_source": {
            name: statistics([table], [facts])
            for name, table, facts in zip(stream.source_names, look.tables, look.facts, strict=True)
        }
        if counted
        else {},
        "duplicates": {
            "exact": surveyed.exact.as_json(),
            "near": None if surveyed.near is None else surveyed.near.as_json(),
        },
        "contamination": list(surveyed.contaminated),
        "evaluation": None
        if surveyed.eval_stream is None or surveyed.eval_look is None
        else {
            "funnel": _funnel(surveyed.eval_stream),
            "lost_rows": lost_rows(surveyed.eval_look, surveyed.eval_stream.source_names),
            "overlap": common,
        },
        "lost_rows": lost_rows(look, stream.source_names),
        "flagged_rows": flagged,
        "seconds": {key: round(value, 2) for key, value in surveyed.seconds.items()},
    }
    return out, told


def lost_rows(look: Look, names: Sequence[str]) -> list[dict[str, Any]]:
    """Every row that was lost, or a part of it: `file:line`, the stage that it did not reach, and why."""
    out = []
    for name, leaf, table in zip(names, look.leaves, look.tables, strict=True):
        column, seen = table.columns, set()
        for entry in np.flatnonzero(column["reason"]).tolist():
            row, reason = int(table.rows[entry]), table.reasons[int(column["reason"][entry])]
            if (row, reason) in seen:  # in another epoch
                continue
            seen.add((row, reason))
            lost = {
                "where": leaf.reader.source.where(row),
                "source": name,
                "stage": STAGES[int(column["stage"][entry]) - 1],
                "reason": reason,
                "tokens": int(column["lost"][entry] + column["left_out"][entry]),
                "whole": not column["examples"][entry],
            }
            out.append(lost | ({"message": table.messages[row]} if row in table.messages else {}))
    return out


def flagged_rows(look: Look, names: Sequence[str]) -> list[dict[str, Any]]:
    """Every row with something to look at, source by source in their order: `file:line`, and its flags' names."""
    out: dict[str, dict[str, Any]] = {}
    for name, leaf, table, facts in zip(names, look.leaves, look.tables, look.facts, strict=True):
        found = flags(table, facts)
        at = [(row, flag) for flag, entries in found.items() for row in table.rows[entries].tolist()]
        for row, flag in sorted(at, key=lambda one: one[0]):
            where = leaf.reader.source.where(row)
            told = out.setdefault(where, {"where": where, "source": name, "flags": []})
            if flag not in told["flags"]:
                told["flags"].append(flag)
    return list(out.values())


def _warnings(surveyed: Surveyed) -> list[str]:
    evaluation = () if surveyed.eval_stream is None else surveyed.eval_stream.warnings
    return [*surveyed.stream.warnings, *(f"evaluation: {text}" for text in evaluation)]


def _funnel(stream: Stream) -> dict[str, Any]:
    """Rows and tokens of each source and in all, stage by stage."""
    sources = [_of_source(source) for source in stream.funnel.sources]
    numbers = [key for key, value in sources[0].items() if isinstance(value, int)]
    total: dict[str, Any] = {key: sum(source[key] for source in sources) for key in numbers}
    for key in ("stages", "tokens_at_stages"):
        total[key] = {stage: sum(source[key][stage] for source in sources) for stage in STAGES}
    reasons: dict[str, dict[str, Any]] = {}
    for source in sources:
        for reason, lost in source["lost"].items():
            one = reasons.setdefault(reason, {"stage": lost["stage"], "rows": 0, "tokens": 0, "where": lost["where"]})
            one["rows"] += lost["rows"]
            one["tokens"] += lost["tokens"]
    return {"total": {**total, "lost": reasons}, "sources": sources}


def _of_source(source: SourceFunnel) -> dict[str, Any]:
    return {
        "name": source.name,
        "rows": source.rows,
        "stages": dict(source.stages),
        "tokens_at_stages": _tokens_at_stages(source),
        "kept": source.kept,
        "examples": source.examples,
        "tokens": source.tokens,
        "trained_tokens": source.trained_tokens,
        "tokens_lost": source.tokens_lost,
        "tokens_left_out": source.tokens_left_out,
        "turns": source.turns,
        "stops": source.stops,
        "reasoning_removed": source.reasoning_removed,
        "reasoning_left": source.reasoning_left,
        "lost": {reason: dataclasses.asdict(loss) for reason, loss in source.lost.items()},
    }


def _tokens_at_stages(source: SourceFunnel) -> dict[str, int]:
    """Tokens that come so far; those of rows that cannot be read are not known."""
    out, tokens = {}, source.tokens
    for stage in reversed(STAGES):
        out[stage] = tokens
        tokens += sum(loss.tokens for loss in source.lost.values() if loss.stage == stage)
    return {stage: out[stage] for stage in STAGES}


def _packing(stream: Stream, surveyed: Surveyed) -> dict[str, Any]:
    """Rows of a batch, how full they are, and how many updates an epoch and the run make.

    Where a run ends after so many steps, `rows` and `fill` are those of one epoch.
    """
    epochs, asked = surveyed.config.train.epochs, surveyed.config.train.steps
    counts, fill, steps = stream.rows_of_windows, stream.fill, stream.steps_per_run
    if counts is None and not any(reader.varies for reader in stream.maker.readers):
        whole = dataclasses.replace(stream.maker, total=stream.maker.epoch_draws)
        counts, fill = count_rows(whole, surveyed.look.tables)
        of_epoch: float | None = int(counts.sum()) / stream.batch_rows
    else:
        of_epoch = None if steps is None else steps / epochs
    return {
        "row_length": list(stream.maker.rows.room),
        "packing": stream.maker.rows.packing,
        "fill": None if fill is None else list(fill),
        "rows": None if counts is None else int(counts.sum()),
        "batch_rows": stream.batch_rows,
        "lanes": stream.lanes,
        "epochs": epochs if asked is None else None,
        "steps": asked if asked is not None else steps,
        "steps_per_epoch": None if of_epoch is None else round(of_epoch, 2),
        "examples_per_epoch": stream.maker.epoch_draws,
    }


def _shares(surveyed: Surveyed, tags: dict[str, float]) -> dict[str, Any]:
    """Shares of trained tokens by tag, and of rows whose answers reason in steps."""
    tokens: collections.Counter[str] = collections.Counter()
    for source, of in zip(surveyed.stream.funnel.sources, surveyed.stream.source_tags, strict=True):
        tokens.update(dict.fromkeys(of, source.trained_tokens))
    all_tokens = max(1, surveyed.stream.funnel.total("trained_tokens"))
    rows = np.concatenate([facts.rows for facts in surveyed.look.facts])
    asked = max(1, int(np.count_nonzero(rows["turns"])))
    return {
        "draws_by_tag": tags,
        "trained_tokens_by_tag": {tag: count / all_tokens for tag, count in sorted(tokens.items())},
        "reasoning_rows": int(np.count_nonzero(rows["reasons"])) / asked,
    }
