"""Shards made by Apache Beam, on any of its runners; Beam is imported only where it is asked for.

Elements are shards, and the function is the pool's own. Workers may be other machines: what they get names the sources
by their configuration, and each machine opens them for itself, in its own cache.
"""

import copy
import dataclasses
import functools
import pickle
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from jaxtune import hub
from jaxtune.config import Config
from jaxtune.config_data import SourceConfig
from jaxtune.data.ahead.prepared import Folder, Shard, Summary, write_shard
from jaxtune.data.files.readers import Source
from jaxtune.data.files.sources import open_source
from jaxtune.data.planning import training_tree
from jaxtune.data.stream import Stream
from jaxtune.data.windows import WindowMaker

_ELSEWHERE = ("Dataflow",)  # whose workers share no disk with whoever starts them


class Reopened:
    """A source that is opened where it is needed; raises ValueError there for one with other bytes."""

    def __init__(self, config: SourceConfig, source: Source) -> None:
        self.config, self.fingerprint, self._size = config, source.fingerprint, len(source)
        self._opened: Source | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _source(self) -> Source:
        if self._opened is None:
            opened = open_source(self.config)
            if opened.fingerprint != self.fingerprint:
                raise ValueError(
                    f"{self.config.path}: found other bytes here than where the work was started; expected the same "
                    "files on every worker, e.g. behind gs://"
                )
            self._opened = opened
        return self._opened

    def __len__(self) -> int:
        return self._size

    def row(self, i: int) -> dict[str, Any]:
        return self._source().row(i)

    def where(self, i: int) -> str:
        return self._source().where(i)

    def raw(self, i: int) -> str:
        return self._source().raw(i)


class Beam:
    """Makes shards by one runner of Beam. Raises ValueError where Beam is not installed, or files are out of reach."""

    def __init__(self, config: Config, stream: Stream, runner: str, options: Sequence[str]) -> None:
        try:
            import apache_beam
        except ImportError as error:
            raise ValueError(f"--runner: {error}; expected Apache Beam: pip install 'jaxtune[beam]'") from error
        self._beam, self._runner, self._options = apache_beam, runner, options
        leaves = {leaf.name: leaf.config for leaf in training_tree(config)[0].leaves()}
        self._sources = [leaves[name] for name in stream.source_names]
        local = [source.path for source in self._sources if source.path and not _is_everywhere(source.path)]
        if runner in _ELSEWHERE and local:
            raise ValueError(
                f"--runner: workers of {runner} cannot read {local[0]} on this machine; expected sources behind gs:// "
                "or s3://, or hub ids"
            )

    def make(
        self, maker: WindowMaker, folder: Folder, shards: Sequence[Shard], done: Callable[[Shard, Summary], None]
    ) -> None:
        """Runs a pipeline that makes these shards; `done` hears of nothing, for the runner tells how far it is."""
        if self._runner in _ELSEWHERE and not folder.is_remote:
            raise ValueError(
                f"data.prepared: workers of {self._runner} cannot write {folder.path} on this machine; expected gs:// "
                "or s3://"
            )
        readers = []
        for reader, source in zip(maker.readers, self._sources, strict=True):
            readers.append(copy.copy(reader))
            readers[-1].source = Reopened(source, reader.source)
        elsewhere = dataclasses.replace(maker, readers=tuple(readers))
        job = zlib.compress(pickle.dumps((elsewhere, folder)))  # a tokenizer has megabytes; Dataflow takes ten
        beam = self._beam
        options = beam.options.pipeline_options.PipelineOptions([f"--runner={self._runner}Runner", *self._options])
        with beam.Pipeline(options=options) as pipeline:
            numbers = [tuple(shard) for shard in shards]
            _ = pipeline | beam.Create(numbers) | beam.Reshuffle() | beam.Map(make_shard, job)


def make_shard(numbers: tuple[int, int], job: bytes) -> int:
    """What Beam runs for each element: makes a shard, and returns its rows."""
    return sum(write_shard(*_unpacked(job), Shard(*numbers)).rows)


@functools.lru_cache(maxsize=1)
def _unpacked(job: bytes) -> tuple[WindowMaker, Folder]:
    """The maker, once for each process; Beam itself sends code as pickles."""
    return pickle.loads(zlib.decompress(job))


def _is_everywhere(path: str) -> bool:
    return hub.is_url(path) or path.startswith(hub.BUILTIN) or hub.is_hub_id(path)
