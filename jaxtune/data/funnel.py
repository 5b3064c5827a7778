"""Every row counted before the first step: what is kept, what is lost and why.

`measure` tokenises each row once and keeps, per row, its examples' lengths and what was lost; the result is cached
under a key of everything that decides it. A `Funnel` sums such tables into what a person reads.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxtune.data.examples import RowReader

Progress = Callable[[int, int], None]
_BLOCK = 1024
_VERSION = "2"  # of everything between a row and its tokens: raise it when the code's answer changes
_COLUMNS = ("tokens", "trained", "lost", "turns", "stops", "reason", "bad", "examples")


@dataclasses.dataclass(frozen=True)
class RowTable:
    """What became of each of `rows` (int64 [n]): arrays [n], and `lengths` of all their examples in order.

    `reason` indexes `reasons`, whose entry 0 is for rows without loss; `messages` tells each bad row's full story.
    """

    rows: np.ndarray
    columns: Mapping[str, np.ndarray]
    lengths: np.ndarray
    reasons: tuple[str, ...]
    messages: Mapping[int, str]

    def examples_of(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lengths of the examples of the table's entries `at`, in order, and how many each entry has."""
        counts = self.columns["examples"][at]
        first = np.concatenate([[0], np.cumsum(self.columns["examples"])])[at]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.lengths[np.repeat(first, counts) + within], counts


@dataclasses.dataclass(frozen=True)
class Loss:
    """Rows lost for one reason: how many, where the first is, and its message if it has one."""

    rows: int
    where: str
    message: str


@dataclasses.dataclass(frozen=True)
class SourceFunnel:
    """One source from rows read to tokens trained; `exact` is False when estimated from a sample."""

    name: str
    rows: int
    kept: int
    examples: int
    tokens: int
    trained_tokens: int
    tokens_lost: int
    turns: int
    stops: int
    lost: Mapping[str, Loss]
    exact: bool

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
        """Share of tokens lost because rows were over length."""
        return self.total("tokens_lost") / max(1, self.total("tokens") + self.total("tokens_lost"))

    def warnings(self) -> list[str]:
        """Sentences worth a person's attention before step 1."""
        out = []
        for s in self.sources:
            share = s.tokens_lost / max(1, s.tokens + s.tokens_lost)
            if share > 0.01:
                rows = sum(loss.rows for reason, loss in s.lost.items() if reason == "over length")
                out.append(
                    f"{s.name}: {share:.1%} of its tokens are lost because {rows:,} rows are over length; raise "
                    "data.max_length or choose data.overlong=split (loses nothing), truncate_turns or truncate_right"
                )
            if not s.kept:  # only evaluation may go on without a source
                out.append(
                    f"{s.name}: none of its {s.rows:,} rows held out can be evaluated ({s.why_lost()}), so it has no "
                    "share in the evaluation loss; raise data.eval_fraction, or name rows in data.eval"
                )
            if s.stops < s.turns:
                out.append(f"{s.name}: the end-of-turn token is trained in {s.stops:,} of {s.turns:,} assistant turns")
        return out

    def table(self) -> str:
        """Lines for a terminal: a row per source, and a line per reason of loss."""
        head = ("source", "rows", "kept", "examples", "tokens", "trained", "lost tokens", "stops trained")
        lines = [
            (
                s.name if s.exact else f"{s.name} (estimate)",
                *(f"{n:,}" for n in (s.rows, s.kept, s.examples, s.tokens, s.trained_tokens, s.tokens_lost)),
                f"{s.stops:,} of {s.turns:,}",
            )
            for s in self.sources
        ]
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        shown = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in [head, *lines]
        ]
        for s in self.sources:
            shown += [
                f"  {s.name}: {loss.rows:,} rows: {reason}, first at {loss.where}" for reason, loss in s.lost.items()
            ]
        return "\n".join(shown)


def measure(
    reader: RowReader, rows: np.ndarray, *, cache_dir: str, progress: Progress | None = None
) -> tuple[RowTable, bool]:
    """Reads `rows` and tokenises them, or takes an earlier identical pass from the cache (then the second is True)."""
    key = hashlib.blake2b(f"{reader_key(reader)}:{rows.tobytes().hex()}".encode(), digest_size=16).hexdigest()
    path = os.path.join(cache_dir, "lengths", f"{key}.npz")
    if os.path.exists(path):
        return _load(path), True
    table = _read_all(reader, rows, progress)
    _save(path, table)
    return table, False


def reader_key(reader: RowReader) -> str:
    """Names everything that decides what a row becomes: data bytes, layout, templates, tokenizer, options, code."""
    tokenizer = reader.template.tokenizer
    parts = (
        _VERSION,
        reader.source.fingerprint,
        repr(reader.layout),
        reader.template.text,
        reader.text_template.text,
        tokenizer.backend_tokenizer.to_str(),
        json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
        repr(reader.options),
    )
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def summarise(name: str, reader: RowReader, table: RowTable, *, at: np.ndarray, rows: int, exact: bool) -> SourceFunnel:
    """The funnel of the table's entries `at`, scaled up to `rows` when they are a sample."""
    scale = 1.0 if exact else rows / max(1, len(at))
    picked = {key: column[at] for key, column in table.columns.items()}
    lost = {}
    for code in np.unique(picked["reason"][picked["reason"] > 0]).tolist():
        which = at[picked["reason"] == code]
        first = int(table.rows[which[0]])
        count = round(len(which) * scale)
        lost[table.reasons[code]] = Loss(count, reader.source.where(first), table.messages.get(first, ""))

    def scaled(column: str) -> int:
        return round(int(picked[column].sum(dtype=np.int64)) * scale)

    return SourceFunnel(
        name=name,
        rows=rows,
        kept=round(int(np.count_nonzero(picked["examples"])) * scale),
        examples=scaled("examples"),
        tokens=scaled("tokens"),
        trained_tokens=scaled("trained"),
        tokens_lost=scaled("lost"),
        turns=scaled("turns"),
        stops=scaled("stops"),
        lost=lost,
        exact=exact,
    )


def _read_all(reader: RowReader, rows: np.ndarray, progress: Progress | None) -> RowTable:
    reasons: dict[str, int] = {"": 0}
    entries: list[tuple[int, ...]] = []
    lengths: list[int] = []
    messages: dict[int, str] = {}
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK].tolist()
        for row, r in zip(block, reader.read(block), strict=True):
            code = reasons.setdefault(r.reason or "", len(reasons))
            lengths += [len(example.tokens) for example in r.examples]
            entries.append((r.tokens, r.trained, r.lost_tokens, r.turns, r.stops, code, r.bad, len(r.examples)))
            if r.bad:
                messages[row] = r.message
        if progress is not None:
            progress(min(start + _BLOCK, len(rows)), len(rows))
    array = np.array(entries, np.int64).reshape(-1, len(_COLUMNS))
    columns = {key: array[:, i].copy() for i, key in enumerate(_COLUMNS)}
    return RowTable(rows, columns, np.array(lengths, np.int32), tuple(reasons), messages)


def _save(path: str, table: RowTable) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    told = json.dumps({"reasons": table.reasons, "messages": {str(k): v for k, v in table.messages.items()}})
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), delete=False) as aside:
        arrays = {"rows": table.rows, "lengths": table.lengths, "told": np.array(told), **table.columns}
        np.savez(aside, **arrays)  # type: ignore[arg-type]  # numpy's stub takes its flag for one of the arrays
    os.replace(aside.name, path)


def _load(path: str) -> RowTable:
    with np.load(path) as saved:
        told = json.loads(str(saved["told"]))
        columns = {key: saved[key] for key in _COLUMNS}
        messages = {int(k): v for k, v in told["messages"].items()}
        return RowTable(saved["rows"], columns, saved["lengths"], tuple(told["reasons"]), messages)


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
            f"data.max_lost: {funnel.lost_share:.2%} of the tokens are lost, more than {max_lost:.2%}; "
            "raise data.max_length or choose another data.overlong"
        )
    return out
