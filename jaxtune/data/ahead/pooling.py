"""Shards made by a pool of processes on one machine, which shares the work with other preparers of the same folder.

The length pass is the pool's too; what it rendered is kept, so that windows are made without rendering it again.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np

from jaxtune.data import lengths
from jaxtune.data.ahead.claims import Claims
from jaxtune.data.ahead.prepared import Folder, Shard, Summary, read_summary, write_shard
from jaxtune.data.ahead.rendered import Block, Spool, keep, keys_of
from jaxtune.data.ahead.sharing import Shared, share
from jaxtune.data.examples import RowReader
from jaxtune.data.lengths import Progress, Wanted
from jaxtune.data.windows import WindowMaker
from jaxtune.data.workers import end_with

_LOOK_EVERY_SECONDS = 0.5  # for shards that others make
_FEW = 4096  # rows: read faster here than processes begin
_AGAIN = 1.5  # draws of each row on average, from which on it pays to render the rows beforehand


class Pool:
    """Processes that read rows and make shards; a context, at whose end they are gone.

    They begin when first needed, or with `begin`, while whoever needs them soon has other things to do.

    Rows that they read are kept as they were rendered, in `cache_dir` and until the end, for the windows.
    """

    def __init__(self, workers: int, *, cache_dir: str) -> None:
        self._workers, self._cache_dir = workers, cache_dir
        self._spool: Spool | None = None
        self._executor: concurrent.futures.ProcessPoolExecutor | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="jaxtune-pool-")
        self._shared = 0

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():  # ours: in the middle of a shard when this ends early
                process.terminate()
                process.join(timeout=5)
        if self._spool is not None:
            self._spool.close()
        self._folder.cleanup()

    def begin(self) -> None:
        """Has the processes begin now."""
        with self._running() as executor:
            for _ in range(self._workers):
                executor.submit(os.getpid)

    def make(
        self, maker: WindowMaker, folder: Folder, shards: Sequence[Shard], done: Callable[[Shard, Summary], None]
    ) -> None:
        """Makes shards, those that other preparers have claimed last; returns when all are there.

        Raises ValueError when a worker was killed, and whatever making a window raises.
        """
        self.render_once(maker, shards)
        job = self._share((self.of_kept(maker), folder))
        with self._running() as executor, Claims(folder) as claims:

            def submit(shard: Shard) -> concurrent.futures.Future[Summary]:
                return executor.submit(_make, job, shard)

            _Round(submit, self._workers, claims, folder, shards, done).run()

    def read_all(
        self,
        readers: Sequence[RowReader],
        wanted: Sequence[Wanted],
        progress: Progress | None,
        done: int,
        total: int,
    ) -> Iterator[lengths.RowTable]:
        """As `lengths.read_here`, block by block in all processes; what was rendered is kept."""
        found = self._read(readers, wanted)
        for reader, which in zip(readers, wanted, strict=True):
            tables = []
            for table in itertools.islice(found, sum(1 for _ in lengths.portions(which))):
                tables.append(table)
                done += len(table.rows)
                if progress is not None:
                    progress(done, total)
            yield lengths.joined(reader, which, tables)

    def _read(self, readers: Sequence[RowReader], wanted: Sequence[Wanted]) -> Iterator[lengths.RowTable]:
        """The tables of the blocks of each reader, in their order."""
        if self._spool is None:
            self._spool = Spool(self._cache_dir)
        folder, job = self._spool.folder, self._share(tuple(readers))
        portions = [(number, portion) for number, which in enumerate(wanted) for portion in lengths.portions(which)]
        few = sum(len(which.rows) for which in wanted) < _FEW
        with contextlib.nullcontext() if few else self._running() as executor:
            found: Iterator[tuple[lengths.RowTable, Block | None]]
            if executor is None:
                found = map(functools.partial(_read_here, readers, folder), portions)
            else:
                found = executor.map(functools.partial(_read, job, folder), portions)
            for (number, _), (table, block) in zip(portions, found, strict=True):
                self._spool.add(readers[number], job, number, block, rows=len(table.rows))
                yield table

    def of_kept(self, maker: WindowMaker) -> WindowMaker:
        """The same windows, made of the rows that were kept as far as these go."""
        if self._spool is None:
            return maker
        readers = tuple(cast(RowReader, self._spool.reading(reader)) for reader in maker.readers)
        return dataclasses.replace(maker, readers=readers)

    def render_once(self, maker: WindowMaker, shards: Sequence[Shard]) -> None:
        """Renders and keeps the rows that windows would render more than once: those of sources that were not read
        whole while the stream was opened, as they are too large to be counted, or were counted before."""
        if self._spool is not None and self._spool.is_full:
            return
        rows = {i: np.zeros(len(r.source), bool) for i, r in enumerate(maker.readers) if not r.varies}
        draws = collections.Counter[int]()
        for draw in (maker.draw(number) for shard in shards for number in range(*shard)):
            for i in rows.keys() & set(np.unique(draw.source).tolist()):
                mine = draw.row[draw.source == i]
                rows[i][mine] = True
                draws[i] += len(mine)
        again = []
        for i, drawn in rows.items():
            kept, different = 0 if self._spool is None else self._spool.rows_of(maker.readers[i]), int(drawn.sum())
            if kept < different and draws[i] >= _AGAIN * different:
                again.append(i)
        if again:
            found = self._read([maker.readers[i] for i in again], [Wanted(np.flatnonzero(rows[i])) for i in again])
            collections.deque(found, maxlen=0)

    def _share(self, thing: Any) -> Shared:
        """Puts something where the workers find it, each once."""
        self._shared += 1
        return share(thing, os.path.join(self._folder.name, str(self._shared)))

    @contextlib.contextmanager
    def _running(self) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
        if self._executor is None:
            spawn = multiprocessing.get_context("spawn")  # a forked tokenizer or file system may hang
            self._executor = concurrent.futures.ProcessPoolExecutor(self._workers, spawn, _begin, (os.getpid(),))
        try:
            yield self._executor
        except concurrent.futures.process.BrokenProcessPool:
            raise ValueError(
                "a process that prepares was killed (out of memory?); the same command goes on from here, with fewer "
                "--workers if memory is short"
            ) from None


class _Round:
    """Shards on their way through a pool."""

    def __init__(
        self,
        submit: Callable[[Shard], concurrent.futures.Future[Summary]],
        workers: int,
        claims: Claims,
        folder: Folder,
        shards: Sequence[Shard],
        done: Callable[[Shard, Summary], None],
    ) -> None:
        self.submit, self.claims, self.folder, self.done = submit, claims, folder, done
        self.room = workers + 1  # one waits, so that no process does
        self.waiting = collections.deque(shards)
        self.elsewhere: collections.deque[Shard] = collections.deque()
        self.running: dict[concurrent.futures.Future[Summary], Shard] = {}

    def run(self) -> None:
        while self.waiting or self.running or self.elsewhere:
            self._begin()
            if self.running:
                self._end()
            elif self.elsewhere:
                self._look_elsewhere()

    def _begin(self) -> None:
        while self.waiting and len(self.running) < self.room:
            shard = self.waiting.popleft()
            if self._appeared(shard):
                continue
            if not self.claims.take(shard):
                self.elsewhere.append(shard)
            elif self._appeared(shard):  # finished by another between the look and the claim
                self.claims.release(shard)
            else:
                self.running[self.submit(shard)] = shard

    def _end(self) -> None:
        finished, _ = concurrent.futures.wait(self.running, timeout=1.0, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in finished:
            shard = self.running.pop(future)
            summary = future.result()
            self.claims.release(shard)
            self.done(shard, summary)

    def _look_elsewhere(self) -> None:
        """Waits for what others make; claims that went stale come back to be made here."""
        time.sleep(_LOOK_EVERY_SECONDS)
        self.waiting.extend(self.elsewhere)
        self.elsewhere.clear()

    def _appeared(self, shard: Shard) -> bool:
        return read_summary(self.folder, shard) is not None


def _begin(parent: int) -> None:
    """What a worker begins with."""
    if os.getppid() != parent:  # killed meanwhile: nobody would ever tell this one to end
        os._exit(1)
    end_with(parent)
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all; only the parent has something to say
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def _make(job: Shared, shard: Shard) -> Summary:
    maker, folder = job.get()
    return write_shard(maker, folder, shard)


def _read(job: Shared, folder: str, portion: tuple[int, Wanted]) -> tuple[lengths.RowTable, Block | None]:
    """Reads rows of one of the readers shared, and keeps what was rendered of them in `folder`."""
    return _read_here(job.get(), folder, portion)


def _read_here(
    readers: Sequence[RowReader], folder: str, portion: tuple[int, Wanted]
) -> tuple[lengths.RowTable, Block | None]:
    number, wanted = portion
    reader = readers[number]
    results = reader.read(*lengths.numbers(wanted))
    block = keep(folder, keys_of(wanted.rows, wanted.epochs), results, sides=reader.sides)
    return lengths.tabulate(reader, wanted, results), block
