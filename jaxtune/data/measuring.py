"""Sources of a run opened and measured: which rows are read before step 1, and what is found there."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune import hub
from jaxtune.config import Config
from jaxtune.data import funnel, lengths
from jaxtune.data.leaves import Opener, OpenLeaf
from jaxtune.data.leaving_out import gates
from jaxtune.data.lengths import Progress, Wanted
from jaxtune.data.mixing import mixture, tree
from jaxtune.data.stream import QUARANTINE, quarantine

EXACT_ROWS = 200_000  # up to here every row is tokenised before step 1
SAMPLE_ROWS = 20_000  # beyond, the funnel is estimated from so many
_MIN_SAMPLE = 10  # of each source
EVAL_QUARANTINE = "quarantine_eval.jsonl"


class Counted(NamedTuple):
    """The length pass of all leaves, and what a person reads of it."""

    tables: tuple[lengths.RowTable, ...]
    funnel: funnel.Funnel


@dataclasses.dataclass
class Survey:
    """Opens a stream to look it over: every row is read, by `measure`, and reasons not to start are collected."""

    measure: Callable[[Sequence[OpenLeaf], Sequence[Wanted]], list[lengths.RowTable]]
    problems: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Opening:
    """What opening a stream needs at every turn."""

    config: Config
    tokenizer: Any
    max_length: int
    encoder_length: int | None
    cache_dir: str | None
    output_dir: str | None
    progress: Progress | None
    survey: Survey | None = None
    read_all: lengths.ReadAll | None = None
    warnings: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.opener = Opener(
            self.config,
            tokenizer=self.tokenizer,
            max_length=self.max_length,
            encoder_length=self.encoder_length,
            cache_dir=self.cache_dir,
        )

    def measure(
        self, leaves: Sequence[OpenLeaf], wanted: Sequence[Wanted], *, silent: bool = False
    ) -> list[lengths.RowTable]:
        """The length pass over these rows."""
        return lengths.measure(
            [leaf.reader for leaf in leaves],
            wanted,
            cache_dir=self.cache_dir or hub.cache_dir(),
            progress=None if silent else self.progress,
            read_all=self.read_all,
        )

    def measure_one(self, leaf: OpenLeaf) -> lengths.RowTable:
        """The lengths of all rows that a leaf is trained on."""
        return self.measure([leaf], [Wanted(leaf.rows(self.config.seed))])[0]

    def gated(self, leaves: Sequence[OpenLeaf]) -> tuple[OpenLeaf, ...]:
        """The leaves without what `data` says to leave out."""
        cache = self.cache_dir or hub.cache_dir()
        found, self.warnings = gates(self.config, leaves, cache_dir=cache, progress=self.progress)
        return tuple(
            dataclasses.replace(leaf, reader=leaf.reader.gated(gate)) for leaf, gate in zip(leaves, found, strict=True)
        )

    def is_exact(self, leaves: Sequence[OpenLeaf]) -> bool:
        """Whether every row is read before step 1."""
        return self.survey is not None or sum(leaf.pool for leaf in leaves) <= EXACT_ROWS

    def rows(self, leaves: Sequence[OpenLeaf], exact: bool) -> list[np.ndarray]:
        """Rows to measure: all that are trained on, or a sample of each source."""
        if exact:
            return [leaf.rows(self.config.seed) for leaf in leaves]
        total = sum(leaf.pool for leaf in leaves)
        return [leaf.rows(self.config.seed, max(_MIN_SAMPLE, SAMPLE_ROWS * leaf.pool // total)) for leaf in leaves]

    def hashes(self, root: tree.Node) -> tuple[np.ndarray, tuple[str, ...]]:
        """Content hashes of every row of the held-out clusters, uint64 ascending; and the names of those not there."""
        opened, root, skipped = self.opener.find(root)
        leaves = self.opener.open(root, opened, fraction=0.0)
        keys = lengths.reader_keys([leaf.reader for leaf in leaves])
        found = lengths.cached_hashes(
            [leaf.reader for leaf in leaves], keys, self.cache_dir or hub.cache_dir(), progress=self.progress
        )
        return found, skipped

    def _found_wrong(self, problems: Sequence[str]) -> None:
        """Stops with all problems, or tells them to whoever surveys."""
        if self.survey is not None:
            self.survey.problems += problems
        elif problems:
            raise ValueError("\n".join(problems))

    def count(
        self,
        leaves: Sequence[OpenLeaf],
        wanted: Sequence[Wanted],
        rows: Sequence[np.ndarray],
        exact: bool,
        *,
        evaluation: bool,
    ) -> Counted:
        """Measures rows; raises ValueError with every reason not to start."""
        config = self.config
        tables = self.measure(leaves, wanted) if self.survey is None else self.survey.measure(leaves, wanted)
        found = [
            funnel.summarise(
                leaf.node.name,
                leaf.reader,
                table,
                rows=len(table.rows) if exact else leaf.pool,
                exact=exact or len(mine) == leaf.pool,
            )
            for leaf, mine, table in zip(leaves, rows, tables, strict=True)
        ]
        counted = Counted(tuple(tables), funnel.Funnel(tuple(found)))
        wrong = funnel.problems(
            counted.funnel,
            tables,
            on_bad_row=config.data.on_bad_row,
            max_lost=config.data.max_lost,
            held_out=evaluation and not config.data.eval,
        )
        self._found_wrong(wrong)
        bad = [
            (leaf.reader.source, row, message)
            for leaf, table in zip(leaves, tables, strict=True)
            for row, message in table.messages.items()
        ]
        if config.data.on_bad_row == "quarantine" and bad:
            quarantine(bad, self.output_dir, EVAL_QUARANTINE if evaluation else QUARANTINE, mode="w")
        return counted


def rows_to_measure(
    leaves: Sequence[OpenLeaf], rows: Sequence[np.ndarray], draws: mixture.Mixture, total: int | None
) -> list[Wanted]:
    """What to measure: rows, or for leaves that change from epoch to epoch the very draws of the run."""
    if total is None or not any(leaf.reader.varies for leaf in leaves):
        return [Wanted(r) for r in rows]
    every = draws.block(0, total)
    out = []
    for i, (leaf, mine) in enumerate(zip(leaves, rows, strict=True)):
        if not leaf.reader.varies:
            out.append(Wanted(mine))
            continue
        at = np.flatnonzero(every.source == i)
        if len(at):
            out.append(lengths.pairs(every.row[at], every.epoch[at]))
        else:  # never drawn in this run: a few rows, so that it is known to be of use
            few = mine[:_MIN_SAMPLE]
            out.append(lengths.pairs(few, np.zeros_like(few)))
    return out
