"""Shards made by a pool of processes on one machine, which shares the work with other preparers of the same folder."""

import collections
import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxtune.data import lengths
from jaxtune.data.claims import Claims
from jaxtune.data.examples import RowReader
from jaxtune.data.lengths import Progress, Wanted
from jaxtune.data.prepared import Folder, Shard, Summary, read_summary, write_shard
from jaxtune.data.windows import WindowMaker
from jaxtune.data.workers import end_with

_LOOK_EVERY_SECONDS = 0.5  # for shards that others make
_FEW = 4096  # rows: read faster here than processes begin


class Pool:
    """Processes that read rows and make shards; a context, at whose end they are gone. They begin when first needed."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
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
        self._folder.cleanup()

    def make(
        self, maker: WindowMaker, folder: Folder, shards: Sequence[Shard], done: Callable[[Shard, Summary], None]
    ) -> None:
        """Makes shards, those that other preparers have claimed last; returns when all are there.

        Raises ValueError when a worker was killed, and whatever making a window raises.
        """
        job = self._share((maker, folder))
        with self._running() as executor, Claims(folder) as claims:

            def submit(shard: Shard) -> concurrent.futures.Future[Summary]:
                return executor.submit(_make, job, shard)

            _Round(submit, self._workers, claims, folder, shards, done).run()

    def read_all(
        self, reader: RowReader, wanted: Wanted, progress: Progress | None, done: int, total: int
    ) -> lengths.RowTable:
        """As `lengths.read_here`, block by block in all processes."""
        if len(wanted.rows) < _FEW:
            return lengths.read_here(reader, wanted, progress, done, total)
        job, tables = self._share(reader), []
        with self._running() as executor:
            for table in executor.map(functools.partial(_read, job), lengths.portions(wanted)):
                tables.append(table)
                done += len(table.rows)
                if progress is not None:
                    progress(done, total)
        return lengths.joined(reader, wanted, tables)

    def _share(self, thing: Any) -> str:
        """Puts something where the workers find it, each once; returns its name."""
        self._shared += 1
        path = os.path.join(self._folder.name, str(self._shared))
        with open(path, "wb") as file:
            pickle.dump(thing, file)
        return path

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
    end_with(parent)
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all; only the parent has something to say
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


@functools.lru_cache(maxsize=2)
def _loaded(job: str) -> Any:
    """What the parent shared: a file of its own, in a folder that only this user reads."""
    with open(job, "rb") as file:
        return pickle.load(file)


def _make(job: str, shard: Shard) -> Summary:
    maker, folder = _loaded(job)
    return write_shard(maker, folder, shard)


def _read(job: str, wanted: Wanted) -> lengths.RowTable:
    reader = _loaded(job)
    return lengths.tabulate(reader, wanted, reader.read(*lengths.numbers(wanted)))
