"""The leaves of a tree opened: files found, layouts decided, templates bound, rows trained on or held out."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from jaxtune.config import Config
from jaxtune.config_data import SourceConfig
from jaxtune.data import lengths
from jaxtune.data.chat import templates
from jaxtune.data.encoder_decoder import PairReader
from jaxtune.data.examples import ExampleOptions, RowReader
from jaxtune.data.files import readers, sources
from jaxtune.data.layouts import formats
from jaxtune.data.mixing import mixture
from jaxtune.data.mixing.shares import style_parts
from jaxtune.data.mixing.tree import Node, prune
from jaxtune.data.records import RowError
from jaxtune.data.row_values import missing
from jaxtune.data.wording import tasks

_DETECTION_ROWS = 20  # of each source
_ALL_DETECTION_ROWS = 4000  # of all together: thousands of sources are looked at more briefly
_CHECKED_ROWS = 20
_LOOKED_AT = 100_000  # rows, for some that can be read


@dataclasses.dataclass(frozen=True)
class OpenLeaf:
    """A leaf with what reads it; of the `size` rows of its source the hold-out keeps `held_out` for evaluation.

    Which rows these are depends on the source's bytes alone: leaves that read one file hold out the same rows of it.
    """

    node: Node
    reader: RowReader
    held_out: int
    part: tuple[int, int] | None

    @property
    def held_key(self) -> int:
        """The key of the hold-out."""
        return _held_key(self.reader.source)

    @property
    def size(self) -> int:
        """Rows of its source."""
        return len(self.reader.source)

    @property
    def pool(self) -> int:
        """Rows of its source that are trained on, in whatever style."""
        return self.size - self.held_out

    def held_rows(self, seed: int) -> np.ndarray:
        """The rows held out, int64 ascending."""
        return mixture.held_out_rows(self.size, self.held_out, seed=seed, source=self.held_key)

    def rows(self, seed: int, sample: int | None = None) -> np.ndarray:
        """The rows trained on, int64 ascending: all, or `sample` of them spread evenly."""
        if sample is not None and sample < self.pool:
            at = np.linspace(0, self.pool - 1, sample).astype(np.int64)
            return np.sort(mixture.not_held_out(at, self.size, self.held_out, seed=seed, source=self.held_key))
        rows = np.arange(self.size, dtype=np.int64)
        return rows if not self.held_out else np.delete(rows, self.held_rows(seed))


class Opener:
    """Opens trees of one run: each source, template and phrasing once."""

    def __init__(
        self, config: Config, *, tokenizer: Any, max_length: int, encoder_length: int | None, cache_dir: str | None
    ) -> None:
        self.config, self.tokenizer, self.cache_dir = config, tokenizer, cache_dir
        # Those of all sources, so that a template is refused before any source is read.
        named = {source.template for source in every_source((*config.data.train, *config.data.eval)) if source.template}
        self.templates = {
            name: templates.load_template(name, tokenizer) for name in sorted({config.data.template, *named})
        }
        self.text_template = templates.load_template("plain", tokenizer)
        self.options = ExampleOptions(
            max_length=max_length,
            train_on=config.data.train_on,
            overlong=config.data.overlong,
            loss_weighting=config.tuning.loss_weighting,
            reasoning=config.data.reasoning,
            encoder_length=encoder_length,
        )
        self.reader_type = RowReader if encoder_length is None else PairReader

    def find(self, root: Node) -> tuple[dict[int, readers.Source], Node, tuple[str, ...]]:
        """Opens the sources of a tree, by number; returns them, the tree of those found, and the names of the others.

        Raises ValueError listing every source that is not there, unless data.missing says to skip them.
        """
        opened: dict[int, readers.Source] = {}
        missing: dict[str, str] = {}
        gone: set[int] = set()
        for leaf in root.leaves():
            if leaf.source in opened or leaf.source in gone:
                continue
            try:
                opened[leaf.source] = sources.open_source(leaf.config, cache_dir=self.cache_dir)
            except sources.MissingSource as problem:
                gone.add(leaf.source)
                missing[leaf.name] = str(problem)
        if not missing:
            return opened, root, ()
        if self.config.data.missing == "error":
            told = list(missing.values())
            raise ValueError(
                "\n".join(
                    [
                        *told[:20],
                        *([f"... and {len(told) - 20:,} more sources that are not there"] if len(told) > 20 else []),
                        *(
                            [
                                f"{len(told):,} of {sum(1 for _ in root.leaves()):,} sources are not there; "
                                "data.missing=skip trains on the others, with their shares scaled up"
                            ]
                            if len(told) > 1
                            else []
                        ),
                    ]
                )
            )
        names = {leaf.name for leaf in root.leaves() if leaf.source in gone}
        kept = prune(root, names)
        if kept is None:
            raise ValueError(f"{root.where}: none of the sources is there; the first: {next(iter(missing.values()))}")
        return opened, kept, tuple(leaf.name for leaf in root.leaves() if leaf.source in gone)

    def open(
        self,
        root: Node,
        opened: dict[int, readers.Source],
        *,
        fraction: float,
        excluded: np.ndarray | None = None,
    ) -> tuple[OpenLeaf, ...]:
        """A reader for each leaf; `fraction` of each source's rows is held out, `excluded` are hashes of examples."""
        layouts: dict[int, formats.Layout] = {}
        out = []
        for leaf, part in _with_parts(root, opened, fraction):
            source = opened[leaf.source]
            if leaf.source not in layouts:
                layouts[leaf.source] = _layout(source, leaf.config, max(2, _ALL_DETECTION_ROWS // len(opened)))
            layout = layouts[leaf.source]
            held = held_out(len(source), fraction)
            out.append(OpenLeaf(leaf, self._reader(leaf, source, layout, held=held, excluded=excluded), held, part))
        return tuple(out)

    def _reader(
        self, leaf: Node, source: readers.Source, layout: formats.Layout, *, held: int, excluded: np.ndarray | None
    ) -> RowReader:
        seed = self.config.seed
        phrasing = tasks.load_phrasing(
            leaf.config,
            task=leaf.task,
            style=leaf.style,
            seed=seed,
            layout=layout,
            count_tokens=self._count_tokens,
            template_name=leaf.template,
        )
        pool = None
        if held and phrasing is not None:
            pool = np.delete(
                np.arange(len(source)), mixture.held_out_rows(len(source), held, seed=seed, source=_held_key(source))
            )
        if phrasing is not None:
            first = [fields for i in range(min(len(source), _CHECKED_ROWS)) if (fields := _fields(source, layout, i))]
            try:
                phrasing.check(first)
            except ValueError as problem:
                raise ValueError(f"{leaf.name}: {problem}") from problem
        return self.reader_type(
            source,
            layout,
            self.templates[leaf.config.template or self.config.data.template],
            text_template=self.text_template,
            options=self.options,
            phrasing=phrasing,
            exemplar_rows=pool,
            excluded=excluded,
        )

    def _count_tokens(self, texts: Sequence[str]) -> list[int]:
        encoded = self.tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [len(encoding.ids) for encoding in encoded]


def _with_parts(
    root: Node, opened: dict[int, readers.Source], fraction: float
) -> Iterator[tuple[Node, tuple[int, int] | None]]:
    """The leaves, those that are styles of one source with their part of its rows."""
    if root.same_rows:
        size = len(opened[root.members[0].source])
        yield from zip(root.members, style_parts(root, size - held_out(size, fraction)), strict=True)
    elif not root.members:
        yield root, None
    else:
        for member in root.members:
            yield from _with_parts(member, opened, fraction)


def held_out(size: int, fraction: float) -> int:
    """How many rows of a source are held out: at least one, never all."""
    return min(size - 1, max(1, round(size * fraction))) if fraction and size > 1 else 0


def _held_key(source: readers.Source) -> int:
    return int.from_bytes(hashlib.blake2b(source.fingerprint.encode(), digest_size=7).digest(), "little")


def row_orders(
    leaves: Sequence[OpenLeaf], measure: Callable[[OpenLeaf], lengths.RowTable], seed: int, *, on_bad_row: str = "error"
) -> list[Any]:
    """For each leaf the rows to draw in place of a shuffle, int64, or None.

    Rows without the column to order by are an error, or by `on_bad_row` come last. Styles of one source have one order,
    by its first style, and are dealt its rows evenly: each row has one style, and no style has all the short ones.
    Raises ValueError for a column that is not there or holds no numbers.
    """
    out: list[Any] = [None] * len(leaves)
    for number in {leaf.node.source for leaf in leaves if leaf.node.config.order != "shuffle"}:
        mine = [i for i, leaf in enumerate(leaves) if leaf.node.source == number]
        order = _row_order(leaves[mine[0]], measure, seed, on_bad_row)
        parts = [leaves[i].part or (0, len(order)) for i in mine]
        dealt = mixture.Wheel([Fraction(stop - start) for start, stop in parts], seed=0).leaves(0, len(order))
        for style, i in enumerate(mine):
            out[i] = order[dealt == style]
    return out


def _row_order(
    leaf: OpenLeaf, measure: Callable[[OpenLeaf], lengths.RowTable], seed: int, on_bad_row: str
) -> np.ndarray:
    rows, by = leaf.rows(seed), leaf.node.config.order
    sign, column = (-1, by[1:]) if by.startswith("-") else (1, by)
    if column == "file":
        return rows[::sign]
    if column == "length":
        score = measure(leaf).columns["tokens"].astype(np.float64)
    else:
        found = [_score(leaf, int(row), column, needed=on_bad_row == "error") for row in rows]
        if rows.size and all(value is None for value in found):
            _score(leaf, int(rows[0]), column, needed=True)
        score = np.array([sign * np.inf if value is None else value for value in found])  # last, whatever the sign
    return rows[np.argsort(sign * score, kind="stable")]


def _score(leaf: OpenLeaf, row: int, column: str, *, needed: bool) -> float | None:
    """The row's number in a column; None for a row that cannot be read, or has none and needs none."""
    try:
        fields = leaf.reader.source.row(row)
    except RowError:
        return None  # told of by the length pass
    value, where = fields.get(column), f"{leaf.reader.source.where(row)}: {leaf.node.where}.order"
    if value is None:
        if not needed:
            return None
        told = f"column {column!r} is null" if column in fields else missing(column, list(fields))
        raise ValueError(
            f"{where}: {told}; expected a number to order by; put it there, or set data.on_bad_row=skip, by which such "
            "rows come last"
        )
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: column {column!r} is {value!r}; expected a finite number to order by")
    return float(value)


def _layout(opened: readers.Source, source: SourceConfig, rows: int) -> formats.Layout:
    """Decided by the first rows that can be read; unreadable ones are told of later, by the rule for them."""
    first, error = [], None
    rows = min(rows, _DETECTION_ROWS)
    for i in range(min(len(opened), _LOOKED_AT)):
        try:
            first.append(opened.row(i))
        except RowError as problem:
            error = error or f"{opened.where(i)}: {problem}"
        if len(first) == rows:
            break
    if not first:
        raise ValueError(error or f"{source.path}: found no rows; expected at least one")
    try:
        return formats.find_layout(
            first, format=_format(source), columns=source.columns, options=source.options, system=source.system
        )
    except ValueError as problem:
        raise ValueError(f"{source.path}: {problem}") from problem


def _format(source: SourceConfig) -> str:
    """Templates are filled from columns, whatever these are, unless a format is named."""
    return "fields" if source.templates is not None and source.format == "auto" else source.format


def _fields(source: readers.Source, layout: formats.Layout, row: int) -> Any:
    try:
        return layout.fields(source.row(row))
    except RowError:
        return None


def every_source(listed: Sequence[SourceConfig]) -> Iterator[SourceConfig]:
    """The sources and, below groups, their members."""
    for source in listed:
        yield source
        yield from every_source(source.sources)
