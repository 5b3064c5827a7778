"""From a configuration to the stream that training or evaluation reads: sources opened, measured and planned."""

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from jaxtune import hub
from jaxtune.config import Config, SourceConfig
from jaxtune.data import formats, funnel, mixture, sources, templates
from jaxtune.data.examples import ExampleOptions, RowReader
from jaxtune.data.records import RowError
from jaxtune.data.stream import QUARANTINE, Stream, quarantine
from jaxtune.data.windows import WindowMaker, window_lengths

EXACT_ROWS = 200_000  # up to here every row is tokenised before step 1
SAMPLE_ROWS = 20_000  # beyond, the funnel is estimated from so many
_MIN_WINDOWS_PER_LANE = 8
_DETECTION_ROWS = 20
EVAL_QUARANTINE = "quarantine_eval.jsonl"


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
        quarantine(bad, output_dir, EVAL_QUARANTINE if evaluation else QUARANTINE, mode="w")
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
