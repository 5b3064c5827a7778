"""Every row counted before the first step: what is kept, what is lost and why, as a person reads it."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxtune.data.examples import RowReader
from jaxtune.data.lengths import RowTable
from jaxtune.data.row_results import OVERLONG, STAGES

_SHOWN = 40  # sources, and reasons of loss, listed on a terminal


@dataclasses.dataclass(frozen=True)
class Loss:
    """Rows lost for one reason: how many, with how many tokens, where the first is, and its message if it has one.

    `stage` is which of row_results.STAGES they did not reach; those of `kept` are left out on purpose.
    """

    stage: str
    rows: int
    tokens: int
    where: str
    message: str


@dataclasses.dataclass(frozen=True)
class SourceFunnel:
    """One source from rows read to tokens trained; `exact` is False when estimated from a sample.

    `stages` are the rows that reach each of row_results.STAGES, at least in part; `tokens_left_out` those that were
    left out on purpose. `remedy` says what to do about rows over length, `reasoning` is the rule by which blocks were
    removed, and `reasoning_left` counts the answers in which it leaves marks of reasoning.
    """

    name: str
    rows: int
    stages: Mapping[str, int]
    kept: int
    examples: int
    tokens: int
    trained_tokens: int
    tokens_lost: int
    tokens_left_out: int
    turns: int
    stops: int
    lost: Mapping[str, Loss]
    exact: bool
    remedy: str
    reasoning: str
    reasoning_removed: int
    reasoning_left: int

    def why_lost(self) -> str:
        """Every reason of loss with its number of rows and the first of them."""
        told = "; ".join(f"{loss.rows:,} {reason}, first at {loss.where}" for reason, loss in self.lost.items())
        return told or "it has no row"


@dataclasses.dataclass(frozen=True)
class Funnel:
    """All sources of a stream."""

    sources: tuple[SourceFunnel, ...]

    def total(self, field: str) -> int:
        """The sum of one of the sources' numbers."""
        return sum(getattr(source, field) for source in self.sources)

    @property
    def lost_share(self) -> float:
        """Share of tokens lost, for whatever reason."""
        return self.total("tokens_lost") / max(1, self.total("tokens") + self.total("tokens_lost"))

    def warnings(self, *, evaluation: bool) -> list[str]:
        """Sentences worth a person's attention before step 1."""
        out = []
        for s in self.sources:
            share = s.tokens_lost / max(1, s.tokens + s.tokens_lost)
            if share > 0.01:
                out.append(f"{s.name}: {share:.1%} of its tokens are lost, {_main_loss([s])}")
            if not s.kept and evaluation:  # which may go on without a source
                out.append(
                    f"{s.name}: none of its {s.rows:,} rows held out can be evaluated ({s.why_lost()}), so it has no "
                    "share in the evaluation loss; raise data.eval_fraction, or name rows in data.eval"
                )
            if s.stops < s.turns:
                out.append(f"{s.name}: the end-of-turn token is trained in {s.stops:,} of {s.turns:,} assistant turns")
            if s.reasoning_left:
                out.append(
                    f"{s.name}: {s.reasoning_left:,} answers still hold <think> or </think>, since "
                    f"data.reasoning={s.reasoning} removes only a whole block that an answer opens with; repair them"
                )
        return out

    def _shown(self) -> Sequence[SourceFunnel]:
        if len(self.sources) <= _SHOWN:
            return self.sources
        return sorted(self.sources, key=lambda source: -source.tokens)[:_SHOWN]

    def table(self) -> str:
        """Lines for a terminal: a row per source (the largest of many) and one for all, a line per reason of loss."""
        head = ("source", "rows", "kept", "examples", "tokens", "trained", "lost tokens", "stops trained")
        lines = [
            (
                s.name if s.exact else f"{s.name} (estimate)",
                *(f"{n:,}" for n in (s.rows, s.kept, s.examples, s.tokens, s.trained_tokens, s.tokens_lost)),
                f"{s.stops:,} of {s.turns:,}",
            )
            for s in self._shown()
        ]
        if len(self.sources) > 1:
            whole = (
                self.total(field) for field in ("rows", "kept", "examples", "tokens", "trained_tokens", "tokens_lost")
            )
            name = f"all {len(self.sources):,} sources"
            lines.append((name, *(f"{n:,}" for n in whole), f"{self.total('stops'):,} of {self.total('turns'):,}"))
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        shown = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in [head, *lines]
        ]
        reasons = [(loss.rows, s.name, reason, loss.where) for s in self.sources for reason, loss in s.lost.items()]
        reasons = sorted(reasons, key=lambda r: -r[0])[:_SHOWN] if len(reasons) > _SHOWN else reasons
        shown += [f"  {name}: {rows:,} rows: {reason}, first at {where}" for rows, name, reason, where in reasons]
        shown += [
            f"  {s.name}: {s.reasoning_removed:,} reasoning blocks removed by data.reasoning={s.reasoning}"
            for s in self._shown()
            if s.reasoning_removed
        ]
        return "\n".join(shown)


def _main_loss(sources: Sequence[SourceFunnel]) -> str:
    """The reason that lost most tokens of all, with its rows, and what to do about it."""
    tokens: dict[str, int] = {}
    for source in sources:
        for reason, loss in source.lost.items():
            if loss.stage != "kept":  # what is left out on purpose is not lost
                tokens[reason] = tokens.get(reason, 0) + loss.tokens
    main = max(tokens, key=lambda reason: tokens[reason])
    of = [source for source in sources if main in source.lost]
    worst = max(of, key=lambda source: source.lost[main].tokens)
    rows = sum(source.lost[main].rows for source in of)
    most = "most of them " if sum(count > 0 for count in tokens.values()) > 1 else ""
    if main == OVERLONG:
        return f"{most}because {rows:,} rows are over length; {worst.remedy}"
    return f"{most}in {rows:,} rows: {main}, first at {worst.lost[main].where}; repair such rows, or leave them out"


def summarise(name: str, reader: RowReader, table: RowTable, *, rows: int, exact: bool) -> SourceFunnel:
    """The funnel of a table, scaled up to `rows` when it is of a sample."""
    scale = 1.0 if exact else rows / max(1, len(table.rows))
    column, lost = table.columns, {}
    for code in np.unique(column["reason"][column["reason"] > 0]).tolist():
        which = np.flatnonzero(column["reason"] == code)
        first = int(table.rows[which[0]])
        count = round(len(which) * scale)
        tokens = round(int((column["lost"] + column["left_out"])[which].sum(dtype=np.int64)) * scale)
        stage = STAGES[int(column["stage"][which[0]]) - 1]
        where, message = reader.source.where(first), table.messages.get(first, "")
        lost[table.reasons[code]] = Loss(stage, count, tokens, where, message)

    def scaled(key: str) -> int:
        return round(int(column[key].sum(dtype=np.int64)) * scale)

    ended = np.where(column["examples"] > 0, 0, column["stage"])  # a row that gives anything reaches the end
    stages = {
        stage: round(int(np.count_nonzero((ended == 0) | (ended > number))) * scale)
        for number, stage in enumerate(STAGES, 1)
    }
    return SourceFunnel(
        name=name,
        rows=rows,
        stages=stages,
        kept=round(int(np.count_nonzero(column["examples"])) * scale),
        examples=scaled("examples"),
        tokens=scaled("tokens"),
        trained_tokens=scaled("trained"),
        tokens_lost=scaled("lost"),
        tokens_left_out=scaled("left_out"),
        turns=scaled("turns"),
        stops=scaled("stops"),
        lost=lost,
        exact=exact,
        remedy=reader.remedy,
        reasoning=reader.options.reasoning,
        reasoning_removed=scaled("reasoning_removed"),
        reasoning_left=scaled("reasoning_left"),
    )


def problems(
    funnel: Funnel, tables: Sequence[RowTable], *, on_bad_row: str, max_lost: float | None, held_out: bool = False
) -> list[str]:
    """Why training must not start; empty when it may.

    `held_out`: the rows are those of data.eval_fraction. A source may then have none of use, as long as one has some.
    """
    out = []
    for source, table in zip(funnel.sources, tables, strict=True):
        if on_bad_row == "error" and table.messages:
            first, others = next(iter(table.messages.values())), len(table.messages) - 1
            more = f" ({others:,} more rows of this source cannot be read)" if others else ""
            out.append(
                f"{first}{more}; repair it, or set data.on_bad_row=skip or quarantine to go on without such rows"
            )
        elif source.kept == 0 and not held_out:
            out.append(f"{source.name}: none of its {source.rows:,} rows can be trained on ({source.why_lost()})")
        elif source.turns and source.stops == 0:
            out.append(
                f"{source.name}: the end-of-turn token is trained in 0 of {source.turns:,} assistant turns, so the "
                "model would never stop; use a template that ends answers with it"
            )
    if held_out and not out and not funnel.total("kept"):
        why = "; ".join(f"{source.name}: {source.why_lost()}" for source in funnel.sources)
        out.append(
            f"data.eval_fraction: none of the {funnel.total('rows'):,} rows held out can be evaluated ({why}); raise "
            "data.eval_fraction, or name rows for evaluation in data.eval"
        )
    if max_lost is not None and funnel.lost_share > max_lost:
        out.append(
            f"data.max_lost: {funnel.lost_share:.2%} of the tokens are lost, more than {max_lost:.2%}, "
            f"{_main_loss(funnel.sources)}"
        )
    return out
