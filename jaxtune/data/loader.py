"""From a configuration to batches: the stream that training reads, and its state.

A *window* is W consecutive draws of the mixture, rendered, tokenised and packed: a pure function of its number.
*Lane* v runs windows v, v + lanes, ...; row i of every global batch comes from lane `i * lanes // batch_rows`. The
state is one (window, row) per lane, so any number of hosts and workers gives the same batches, and any of them can
go on where another stopped. Windows never cross the plan's epochs: a run may be given more epochs later.
"""

import collections
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from jaxtune import hub
from jaxtune.batch import ExampleId, HostBatch
from jaxtune.config import Config, SourceConfig
from jaxtune.data import formats, funnel, mixture, packing, sources, templates
from jaxtune.data.examples import ExampleOptions, RowReader
from jaxtune.data.records import RowError
from jaxtune.data.windows import LaneWindows, Window, WindowMaker, window_lengths

EXACT_ROWS = 200_000  # up to here every row is tokenised before step 1
SAMPLE_ROWS = 20_000  # beyond, the funnel is estimated from so many
_MIN_WINDOWS_PER_LANE = 8
_DETECTION_ROWS = 20
_QUARANTINE = "quarantine.jsonl"
_EVAL_QUARANTINE = "quarantine_eval.jsonl"


@dataclasses.dataclass(frozen=True)
class Stream:
    """Batches with exact state, and what is known about them beforehand.

    `steps_per_run`: batches until the plan's epochs are seen, None when rows are too many to count beforehand (then
    `train.steps` must say) or when `train.steps` says so: then batches never end. `rows_of_windows` int64, where
    counted. `fill`: share of positions that hold a token. `warnings` are sentences for just before step 1.
    """

    maker: WindowMaker
    batch_rows: int
    lanes: int
    funnel: funnel.Funnel
    source_names: tuple[str, ...]
    layouts: tuple[formats.Layout, ...]
    rows_of_windows: np.ndarray | None
    fill: float | None
    warnings: tuple[str, ...]
    fingerprint: str
    workers: int
    on_bad_row: str
    output_dir: str | None

    @property
    def steps_per_run(self) -> int | None:
        """Batches from the first to the last, None when they never end."""
        return self.steps_left(self.initial_state())

    def steps_left(self, state: Mapping[str, Any]) -> int | None:
        """Batches from `state` to the end, the same on every host; None when they never end."""
        if self.rows_of_windows is None:
            return None
        lanes = len(state["lanes"])
        left = [int(self.rows_of_windows[w::lanes].sum()) - row for w, row in state["lanes"]]
        return max(-(-rows // (self.batch_rows // lanes)) for rows in left)

    def initial_state(self) -> dict[str, Any]:
        """The state before the first batch; plain JSON."""
        lanes = [[lane, 0] for lane in range(self.lanes)]
        return {"fingerprint": self.fingerprint, "batch": 0, "lanes": lanes}

    def batches(
        self, state: Mapping[str, Any], *, rows: range | None = None
    ) -> Iterator[tuple[HostBatch, dict[str, Any]]]:
        """Yields (batch, the state after it) from `state` on.

        `rows` are the rows of the global batch that this host makes, all by default. A state knows only the lanes that
        were run for it, None for the others; `merge_states` joins the hosts' states for a checkpoint. Raises ValueError
        for a state of another stream.
        """
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                "the data stream has changed since this state was saved (files, sources, template, tokenizer, seed or "
                "data options); go back to the old configuration, or start anew with checkpoint.resume=never"
            )
        lanes, rows = len(state["lanes"]), range(self.batch_rows) if rows is None else rows
        if self.batch_rows % lanes:
            raise ValueError(
                f"train.batch_rows: found {self.batch_rows}; expected a multiple of the run's {lanes} lanes"
            )
        needed = sorted({i * lanes // self.batch_rows for i in rows})
        missing = [lane for lane, cursor in enumerate(state["lanes"]) if cursor is None]
        if missing:
            raise ValueError(f"this state knows nothing of lanes {missing}: join the hosts' states with merge_states")
        cursors = {lane: list(state["lanes"][lane]) for lane in needed}
        return self._run(int(state["batch"]), self.steps_left(state), lanes, rows, cursors)

    def _run(
        self, batch: int, left: int | None, lanes: int, rows: range, cursors: dict[int, list[int]]
    ) -> Iterator[tuple[HostBatch, dict[str, Any]]]:
        windows = self._windows(lanes, {lane: window for lane, (window, _) in cursors.items()})
        waiting: dict[int, collections.deque[tuple[int, Window]]] = {lane: collections.deque() for lane in cursors}
        share = self.batch_rows // lanes
        last = None if left is None else batch + left
        while last is None or batch < last:
            taken = {lane: self._take(lane, cursors[lane], share, lanes, waiting, windows) for lane in cursors}
            # Row i is row i - lane * share of its lane's portion.
            picked = [taken[i * lanes // self.batch_rows][i % share] for i in rows]
            batch += 1
            state = [list(cursors[lane]) if lane in cursors else None for lane in range(lanes)]
            yield self._batch(picked), {"fingerprint": self.fingerprint, "batch": batch, "lanes": state}

    def _windows(self, lanes: int, at: Mapping[int, int]) -> Iterator[tuple[int, Window]]:
        """Windows in order, made ahead by threads, or by processes with `data.workers`."""
        ahead = grain.MapDataset.source(LaneWindows(self.maker, lanes=lanes, at=at)).to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=max(2, len(at)))
        )
        if self.workers:
            if not flags.FLAGS.is_parsed():  # Grain asks absl for its own settings, which only absl programs parse
                flags.FLAGS.mark_as_parsed()
            ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=2))
        return iter(ahead)

    def _take(
        self,
        lane: int,
        cursor: list[int],
        count: int,
        lanes: int,
        waiting: Mapping[int, collections.deque[tuple[int, Window]]],
        windows: Iterator[tuple[int, Window]],
    ) -> list[tuple[Window, int] | None]:
        """The lane's next rows as (window, row); None for each row past its end. Moves the cursor."""
        taken: list[tuple[Window, int] | None] = []
        counts = self.rows_of_windows
        # In the last window the cursor stays behind the last row taken: a longer run goes on from there.
        end = None if counts is None else [len(counts) - 1, int(counts[-1])]
        while len(taken) < count:
            if end is not None and cursor >= end:
                taken.append(None)
                continue
            while not waiting[lane]:
                number, window = next(windows)
                self._report(window)
                waiting[number % lanes].append((number, window))
            window = waiting[lane][0][1]
            if cursor[1] < len(window.splits) - 1:
                taken.append((window, cursor[1]))
                cursor[1] += 1
            else:
                waiting[lane].popleft()
                cursor[:] = [cursor[0] + lanes, 0]
        return taken

    def _report(self, window: Window) -> None:
        """Bad rows met while streaming: those of large data, which no pass has seen before."""
        if window.bad and self.on_bad_row == "error":
            raise ValueError(f"{window.bad[0][2]}; repair it, or set data.on_bad_row=skip to go on without such rows")
        exact = all(s.exact for s in self.funnel.sources)
        if window.bad and self.on_bad_row == "quarantine" and not exact:
            found = [(self.maker.readers[s].source, row, message) for s, row, message in window.bad]
            quarantine(found, self.output_dir, _QUARANTINE, mode="a")  # evaluation is always counted

    def _batch(self, picked: Sequence[tuple[Window, int] | None]) -> HostBatch:
        rows, names = [], []
        for place in picked:
            row, ids = [], []
            if place is not None:
                window, r = place
                first = np.cumsum(window.lengths) - window.lengths
                for e in window.order[window.splits[r] : window.splits[r + 1]].tolist():
                    span = slice(int(first[e]), int(first[e] + window.lengths[e]))
                    example = packing.Example(window.tokens[span], window.targets[span], window.weights[span])
                    ids.append(ExampleId(*window.ids[e].tolist()))
                    row.append((example, ids[-1].source))
            rows.append(row)
            names.append(tuple(ids))
        return HostBatch(packing.lay_out(rows, self.maker.length), tuple(names))

    def describe(self) -> str:
        """What will be learnt from, for a person: layouts, one rendered example, the funnel."""
        lines = []
        for name, layout, reader in zip(self.source_names, self.layouts, self.maker.readers, strict=True):
            lines.append(f"{name}: format {layout.describe()}; template {reader.template.name}")
        reader = self.maker.readers[0]
        lines += [f"  {reader.template.checks.describe()}", "  one example, what is trained between « and »:"]
        shown = example_text(reader)
        lines += [f"    {line}" for line in shown.splitlines()] + [self.funnel.table()]
        if self.fill is not None:
            lines.append(f"packing fills {self.fill:.1%} of {self.maker.length} positions a row; {self.lanes} lanes")
        return "\n".join(lines)


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state from those of several hosts at the same batch, each knowing its own lanes."""
    if len({state["batch"] for state in states}) != 1:
        raise ValueError(f"states of different batches: {sorted({state['batch'] for state in states})}")
    lanes = [
        next((known for known in lane if known is not None), None)
        for lane in zip(*(s["lanes"] for s in states), strict=True)
    ]
    return {**states[0], "lanes": lanes}


def open_stream(
    config: Config,
    *,
    tokenizer: Any,
    max_length: int,
    cache_dir: str | None = None,
    output_dir: str | None = None,
    progress: funnel.Progress | None = None,
) -> Stream:
    """The training stream of `config`: opens and measures its sources, and plans the run.

    Raises ValueError for whatever would make the run wrong: unreadable rows (unless data.on_bad_row says otherwise), a
    source with nothing to train on, a template that never trains its stop token, more lost than data.max_lost.
    """
    readers = _readers(config, config.data.train, tokenizer, max_length, cache_dir)
    held = [_held_out(len(r.source), config.data.eval_fraction) for r in readers]
    rows = [_all_but(len(r.source), h, config.seed, i) for i, (r, h) in enumerate(zip(readers, held, strict=True))]
    exact = sum(map(len, rows)) <= EXACT_ROWS
    counted = _count(config, config.data.train, readers, rows, exact, cache_dir, output_dir, progress, evaluation=False)
    weighted = any(s.weight is not None for s in config.data.train)
    leaves = [
        mixture.Leaf(len(r.source), Fraction(str(s.weight or 1)), s.epochs, h)
        for r, s, h in zip(readers, config.data.train, held, strict=True)
    ]
    draws = mixture.Mixture(leaves, seed=config.seed, epochs=1.0, by_rows=not weighted)
    endless = config.train.steps is not None or not exact
    maker = WindowMaker(
        readers=readers,
        draws=draws,
        epoch_draws=draws.total,
        total=None if endless else max(1, round(draws.total * config.train.epochs)),
        size=config.data.window,
        length=max_length,
        packing=config.data.packing,
        seed=config.seed,
    )
    stream = _stream(config, maker, counted, config.data.train, exact, lanes=config.data.lanes, output_dir=output_dir)
    return dataclasses.replace(stream, warnings=(*stream.warnings, *_template_warnings(config, readers)))


def open_eval_stream(
    config: Config,
    *,
    tokenizer: Any,
    max_length: int,
    cache_dir: str | None = None,
    output_dir: str | None = None,
    progress: funnel.Progress | None = None,
) -> Stream | None:
    """The evaluation stream: data.eval, or the rows that data.eval_fraction holds out; None without either.

    One pass in a fixed order, packed as in training; it ends after `steps_per_run` batches.
    """
    chosen = config.data.eval or (config.data.train if config.data.eval_fraction else ())
    if not chosen:
        return None
    for i, source in enumerate(config.data.eval):
        for key, value, default in (("weight", source.weight, None), ("epochs", source.epochs, 1.0)):
            if value != default:
                raise ValueError(
                    f"data.eval.{i}.{key}: found {value}; evaluation reads every row once, so remove it (it is for "
                    "data.train)"
                )
    readers = _readers(config, chosen, tokenizer, max_length, cache_dir)
    if config.data.eval:
        rows = [np.arange(len(r.source)) for r in readers]
    else:
        counts = [_held_out(len(r.source), config.data.eval_fraction) for r in readers]
        rows = [
            mixture.held_out_rows(len(r.source), n, seed=config.seed, source=i)
            for i, (r, n) in enumerate(zip(readers, counts, strict=True))
        ]
    counted = _count(config, chosen, readers, rows, True, cache_dir, output_dir, progress, evaluation=True)
    draws = mixture.InOrder(rows)
    maker = WindowMaker(
        readers=readers,
        draws=draws,
        epoch_draws=draws.total,
        total=draws.total,
        size=config.data.window,
        length=max_length,
        packing=config.data.packing,
        seed=config.seed,
    )
    return _stream(config, maker, counted, chosen, True, lanes=1, output_dir=output_dir)


class _Counted(NamedTuple):
    tables: tuple[funnel.RowTable, ...]
    funnel: funnel.Funnel


def _readers(
    config: Config, chosen: Sequence[SourceConfig], tokenizer: Any, max_length: int, cache_dir: str | None
) -> tuple[RowReader, ...]:
    # Those of all sources, so that a template is refused before any source is read.
    listed = (*config.data.train, *config.data.eval)
    names = {config.data.template, *(source.template for source in listed if source.template)}
    made = {name: templates.load_template(name, tokenizer) for name in sorted(names)}
    text_template = templates.load_template("plain", tokenizer)
    options = ExampleOptions(
        max_length=max_length,
        train_on=config.data.train_on,
        overlong=config.data.overlong,
        loss_weighting=config.tuning.loss_weighting,
    )
    readers = []
    for source in chosen:
        opened = sources.open_source(source, cache_dir=cache_dir)
        layout = _layout(opened, source)
        template = made[source.template or config.data.template]
        readers.append(RowReader(opened, layout, template, text_template=text_template, options=options))
    return tuple(readers)


def _template_warnings(config: Config, readers: Sequence[RowReader]) -> list[str]:
    """Sentences about templates that the run can follow, and that the folder it writes, or a resumed run, cannot."""
    out = []
    others = sorted({s.template for s in config.data.train if s.template} - {config.data.template})
    if others:
        out.append(
            f"data.template: the exported folder carries {config.data.template}, but sources are trained with "
            f"{', '.join(others)}; set data.template to the one that the model is to be asked with"
        )
    dated = sorted({reader.template.name for reader in readers if "strftime_now" in reader.template.text})
    out += [
        f"template {name} writes today's date (strftime_now): the data stream changes from day to day, also when a run "
        "is resumed"
        for name in dated
    ]
    return out


def _layout(opened: sources.Source, source: SourceConfig) -> formats.Layout:
    """Decided by the first rows that can be read; unreadable ones are told of later, by the rule for them."""
    first, error = [], None
    for i in range(min(len(opened), 5 * _DETECTION_ROWS)):
        try:
            first.append(opened.row(i))
        except RowError as problem:
            error = error or f"{opened.where(i)}: {problem}"
        if len(first) == _DETECTION_ROWS:
            break
    if not first:
        raise ValueError(error or f"{source.path}: found no rows; expected at least one")
    try:
        return formats.find_layout(first, format=source.format, columns=source.columns)
    except ValueError as problem:
        raise ValueError(f"{source.path}: {problem}") from problem


def _held_out(size: int, fraction: float) -> int:
    return min(size - 1, max(1, round(size * fraction))) if fraction and size > 1 else 0


def _all_but(size: int, held: int, seed: int, source: int) -> np.ndarray:
    rows = np.arange(size, dtype=np.int64)
    return rows if not held else np.delete(rows, mixture.held_out_rows(size, held, seed=seed, source=source))


def _count(
    config: Config,
    chosen: Sequence[SourceConfig],
    readers: Sequence[RowReader],
    rows: Sequence[np.ndarray],
    exact: bool,
    cache_dir: str | None,
    output_dir: str | None,
    progress: funnel.Progress | None,
    *,
    evaluation: bool,
) -> _Counted:
    """Measures all rows, or a sample of each source; raises ValueError with every reason not to start."""
    total = sum(map(len, rows))
    tables, found = [], []
    for reader, mine, name in zip(readers, rows, source_names(chosen), strict=True):
        wanted = mine
        if not exact:
            size = min(len(mine), max(100, SAMPLE_ROWS * len(mine) // total))
            wanted = mine[np.linspace(0, len(mine) - 1, size).astype(np.int64)]
        table, _ = funnel.measure(reader, wanted, cache_dir=cache_dir or hub.cache_dir(), progress=progress)
        tables.append(table)
        found.append(
            funnel.summarise(
                name, reader, table, at=np.arange(len(wanted)), rows=len(mine), exact=len(wanted) == len(mine)
            )
        )
    counted = _Counted(tuple(tables), funnel.Funnel(tuple(found)))
    wrong = funnel.problems(
        counted.funnel,
        tables,
        on_bad_row=config.data.on_bad_row,
        max_lost=config.data.max_lost,
        held_out=evaluation and not config.data.eval,
    )
    if wrong:
        raise ValueError("\n".join(wrong))
    bad = [(r.source, row, m) for r, t in zip(readers, tables, strict=True) for row, m in t.messages.items()]
    if config.data.on_bad_row == "quarantine" and bad:
        quarantine(bad, output_dir, _EVAL_QUARANTINE if evaluation else _QUARANTINE, mode="w")
    return counted


def _stream(
    config: Config,
    maker: WindowMaker,
    counted: _Counted,
    chosen: Sequence[SourceConfig],
    exact: bool,
    *,
    lanes: int | str,
    output_dir: str | None,
) -> Stream:
    batch_rows = config.train.batch_rows
    number = lanes if isinstance(lanes, int) else _lanes(config, maker, counted.funnel)
    counts, fill = _plan(maker, counted.tables) if exact and maker.total is not None else (None, None)
    return Stream(
        maker=maker,
        batch_rows=batch_rows,
        lanes=number,
        funnel=counted.funnel,
        source_names=source_names(chosen),
        layouts=tuple(reader.layout for reader in maker.readers),
        rows_of_windows=counts,
        fill=fill,
        warnings=tuple(counted.funnel.warnings()),
        fingerprint=_fingerprint(config, maker, chosen),
        workers=config.data.workers,
        on_bad_row=config.data.on_bad_row,
        output_dir=output_dir,
    )


def _lanes(config: Config, maker: WindowMaker, counted: funnel.Funnel) -> int:
    """The largest of 1, 2, 4, 8 that divides the batch and leaves each lane enough windows over the run."""
    windows = maker.count
    if windows is None:
        steps = config.train.steps or sys.maxsize
        positions = counted.total("tokens") / max(1, counted.total("rows"))  # of one draw, on average
        per_row = maker.length / max(positions, 1.0) if maker.packing else 1.0
        windows = int(steps * config.train.batch_rows * per_row / maker.size)
    rows = config.train.batch_rows
    return max(n for n in (1, 2, 4, 8) if n == 1 or (rows % n == 0 and windows >= n * _MIN_WINDOWS_PER_LANE))


def _plan(maker: WindowMaker, tables: Sequence[funnel.RowTable]) -> tuple[np.ndarray, float]:
    """Rows of every window of the run, and the share of positions filled, by packing all measured lengths."""
    counts, tokens = [], 0
    for window in range(maker.count or 0):
        lengths = window_lengths(maker.draw(window), tables)
        rows = maker.pack(lengths, window)
        rows = rows[: maker.rows_taken(window, len(rows))]
        tokens += sum(lengths[example] for row in rows for example in row)
        counts.append(len(rows))
    return np.array(counts, np.int64), tokens / max(1, sum(counts) * maker.length)


def source_names(chosen: Sequence[SourceConfig]) -> tuple[str, ...]:
    """A short name for each source: its path's last part, or the whole path where those are not unique.

    A glob is named by the folder that it looks into.
    """
    short = []
    for source in chosen:
        plain = [part for part in source.path.rstrip("/").split("/") if not set(part) & set("*?[")]
        short.append((plain[-1].split(".")[0] if plain else "") or source.path)
    names = [s if short.count(s) == 1 else c.path for s, c in zip(short, chosen, strict=True)]
    return tuple(n if names.count(n) == 1 else f"{n}#{i}" for i, n in enumerate(names))


def _fingerprint(config: Config, maker: WindowMaker, chosen: Sequence[SourceConfig]) -> str:
    parts = [
        *(funnel.reader_key(reader) for reader in maker.readers),
        *(f"{source.weight}:{source.epochs}" for source in chosen),
        f"{maker.size}:{maker.length}:{maker.packing}:{maker.seed}:{config.data.eval_fraction}",
    ]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def quarantine(bad: Sequence[tuple[sources.Source, int, str]], output_dir: str | None, name: str, *, mode: str) -> None:
    """Writes bad rows with where and why they were set aside to OUTPUT/`name`."""
    if output_dir is None:
        return
    os.makedirs(output_dir, exist_ok=True)
    with open(os.path.join(output_dir, name), mode, encoding="utf-8") as file:
        for source, row, message in bad:
            entry = {"where": source.where(row), "problem": message, "row": source.raw(row)}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def example_text(reader: RowReader) -> str:
    """The first row that trains anything, as the model sees it, with « » around what is trained."""
    for row in range(min(len(reader.source), 1000)):
        if not reader.read([row])[0].examples:
            continue
        rendered = reader.render(reader.conversations(row)[0])
        pieces, at = [], 0
        for start, end, _ in sorted(rendered.spans):
            pieces += [rendered.text[at:start], "«", rendered.text[start:end], "»"]
            at = end
        return "".join([*pieces, rendered.text[at:]])
    return "(none among the first 1,000 rows)"
