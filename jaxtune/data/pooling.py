"""Shards made by a pool of processes on one machine, which shares the work with other preparers of the same folder."""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Sequence

from jaxtune.data.claims import Claims
from jaxtune.data.prepared import Folder, Shard, Summary, read_summary, write_shard
from jaxtune.data.windows import WindowMaker
from jaxtune.data.workers import end_with

_LOOK_EVERY_SECONDS = 0.5  # for shards that others make
_job: tuple[WindowMaker, Folder] | None = None  # in a worker: what it makes, which comes to it once


class Pool:
    """Processes that make shards of one stream; a context, at whose end they are gone."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._executor: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        if self._executor is None:
            return
        self._executor.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():  # ours: in the middle of a shard when this ends early
            process.terminate()

    def make(
        self, maker: WindowMaker, folder: Folder, shards: Sequence[Shard], done: Callable[[Shard, Summary], None]
    ) -> None:
        """Makes shards, those that other preparers have claimed last; returns when all are there.

        Raises ValueError when a worker was killed, and whatever making a window raises.
        """
        if self._executor is None:
            self._executor = concurrent.futures.ProcessPoolExecutor(
                self._workers,
                multiprocessing.get_context("spawn"),  # a forked tokenizer or file system may hang
                _begin,
                (os.getpid(), pickle.dumps((maker, folder))),
            )
        try:
            with Claims(folder) as claims:
                _Round(self._executor, self._workers, claims, folder, shards, done).run()
        except concurrent.futures.process.BrokenProcessPool:
            raise ValueError(
                "a process that prepares was killed (out of memory?); the same command goes on from here, with fewer "
                "--workers if memory is short"
            ) from None


class _Round:
    """Shards on their way through a pool."""

    def __init__(
        self,
        executor: concurrent.futures.Executor,
        workers: int,
        claims: Claims,
        folder: Folder,
        shards: Sequence[Shard],
        done: Callable[[Shard, Summary], None],
    ) -> None:
        self.executor, self.claims, self.folder, self.done = executor, claims, folder, done
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
                self.running[self.executor.submit(_make, shard)] = shard

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


def _begin(parent: int, job: bytes) -> None:
    """What a worker begins with."""
    global _job
    end_with(parent)
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all; only the parent has something to say
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _job = pickle.loads(job)


def _make(shard: Shard) -> Summary:
    assert _job is not None
    return write_shard(*_job, shard)
