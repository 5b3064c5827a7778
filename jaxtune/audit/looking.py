"""The pass over all rows: read as training reads them, in several processes, with what is noted of each."""

import concurrent.futures
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxtune.audit.facts import Facts, facts_of, joined
from jaxtune.data import lengths
from jaxtune.data.examples import RowReader
from jaxtune.data.leaves import OpenLeaf
from jaxtune.data.lengths import Progress, RowTable, Wanted
from jaxtune.data.quality.defects import DefectFinder
from jaxtune.data.workers import end_with

_BLOCK = 1024
_FEW = 4096  # rows that are read before a second process has started


class Portion(NamedTuple):
    """Rows of one reader, by its number."""

    reader: int
    wanted: Wanted


class Noted(NamedTuple):
    """How facts are noted: what looks for defects, and whether languages are told."""

    defects: DefectFinder
    with_languages: bool


class Look:
    """Reads rows for a survey, and keeps what was noted: `facts` of each leaf, in the order of its table.

    With more than one of `workers` that many processes read. The tables are left where the training command finds them.
    """

    def __init__(self, *, workers: int, noted: Noted, cache_dir: str, progress: Progress | None = None) -> None:
        self.workers, self.noted = workers, noted
        self.cache_dir, self.progress = cache_dir, progress
        self.leaves: Sequence[OpenLeaf] = ()
        self.tables: list[RowTable] = []
        self.facts: list[Facts] = []
        self.seconds = 0.0

    def measure(self, leaves: Sequence[OpenLeaf], wanted: Sequence[Wanted]) -> list[RowTable]:
        """What a survey asks for: a table for each leaf."""
        began = time.perf_counter()
        readers = [leaf.reader for leaf in leaves]
        portions = [
            Portion(i, lengths.portion(which, start, start + _BLOCK))
            for i, which in enumerate(wanted)
            for start in range(0, len(which.rows), _BLOCK)
        ]
        total, done = sum(len(which.rows) for which in wanted), 0
        tables: list[list[RowTable]] = [[] for _ in leaves]
        facts: list[list[Facts]] = [[] for _ in leaves]
        for portion, (table, noted) in zip(portions, self._read(readers, portions, total), strict=True):
            tables[portion.reader].append(table)
            facts[portion.reader].append(noted)
            done += len(portion.wanted.rows)
            if self.progress is not None:
                self.progress(done, total)
        self.leaves, self.facts = leaves, [joined(blocks) for blocks in facts]
        self.tables = [
            lengths.joined(reader, which, blocks) for reader, which, blocks in zip(readers, wanted, tables, strict=True)
        ]
        lengths.keep(readers, wanted, self.tables, cache_dir=self.cache_dir)
        self.seconds = time.perf_counter() - began
        return self.tables

    def _read(
        self, readers: Sequence[RowReader], portions: Sequence[Portion], total: int
    ) -> Iterator[tuple[RowTable, Facts]]:
        if self.workers < 2 or total < _FEW:
            for portion in portions:
                yield read_portion(readers[portion.reader], portion.wanted, self.noted)
            return
        context = warm_up(self.workers)
        begin = (tuple(readers), os.getpid())
        with concurrent.futures.ProcessPoolExecutor(self.workers, context, _begin, begin) as pool:
            yield from pool.map(_read_in_worker, portions, [self.noted] * len(portions))


def warm_up(workers: int) -> Any:
    """Has a server of worker processes import what they need, beside whatever else is done; returns its context."""
    context = multiprocessing.get_context("forkserver")
    if workers > 1:
        context.set_forkserver_preload([__name__])
        multiprocessing.forkserver.ensure_running()
    return context


def read_portion(reader: RowReader, wanted: Wanted, noted: Noted) -> tuple[RowTable, Facts]:
    """Table and facts of some rows of a reader."""
    examined = reader.examine(*lengths.numbers(wanted))
    table = lengths.tabulate(reader, wanted, [one.result for one in examined])
    return table, facts_of(examined, **noted._asdict())


_readers: tuple[RowReader, ...] = ()  # of a worker process


def _begin(readers: tuple[RowReader, ...], parent: int) -> None:
    global _readers
    _readers = readers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the audit, which ends its workers
    end_with(parent)


def _read_in_worker(portion: Portion, noted: Noted) -> tuple[RowTable, Facts]:
    return read_portion(_readers[portion.reader], portion.wanted, noted)
