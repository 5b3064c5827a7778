"""Datasets that are streamed: written into the cache once, by `prepare`, and from then on rows by index.

A stream has no rows by number, and its end may be out of sight; `take` says how many are wanted. What is kept is JSON
lines, found again by path, name, split, revision and `take`.
"""

import functools
import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import datasets
from huggingface_hub import errors as hub_errors

from jaxtune import hub
from jaxtune.config_data import SourceConfig
from jaxtune.data.files import readers
from jaxtune.data.files.spool import digest_of, spooled

_BUILDERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_TOLD_EVERY = 1000

Progress = Callable[[int, int], None]


class NotThere(ValueError):
    """A stream whose rows are not in the cache yet."""


def open_stream_of_rows(config: SourceConfig, cache: str) -> readers.Source:
    """The rows that `fetch` wrote; raises ValueError naming the command where they are not there."""

    def absent(_: str) -> None:
        raise NotThere(
            f"{config.path}: its rows are streamed and are not in the cache {cache} yet; "
            "`python -m jaxtune.prepare` with the same words writes them there"
        )

    return readers.JsonLines(_spooled(config, cache, absent), cache_dir=cache, shown_as=_name(config))


def fetch_all(sources: Iterable[SourceConfig], cache: str, *, progress: Progress | None = None) -> Iterator[str]:
    """Writes the rows of every streaming source that is not in the cache yet; yields a sentence for each."""
    for source in sources:
        if source.streaming:
            written: list[int] = []
            _spooled(source, cache, functools.partial(_write, source, progress, written))
            told = f"{written[0]:,} rows written into the cache" if written else "its rows are in the cache"
            yield f"{_name(source)}: {told}"


def _spooled(config: SourceConfig, cache: str, write: Callable[[str], None]) -> str:
    path = os.path.abspath(os.path.expanduser(config.path or ""))
    place = path if os.path.exists(path) else str(config.path)
    key = digest_of(place, *map(str, (config.name, config.split, config.revision, config.take)))
    return spooled("streamed", key, ".jsonl", cache, write)


def _name(config: SourceConfig) -> str:
    return f"{config.path}[{config.split}]" if config.split else str(config.path)


def _write(config: SourceConfig, progress: Progress | None, written: list[int], out: str) -> None:
    """Writes the stream's rows, `take` of them at most."""
    count = 0
    with open(out, "w", encoding="utf-8") as file:
        for row in _rows(config):
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            count += 1
            if progress is not None and count % _TOLD_EVERY == 0:
                progress(count, config.take or count)
    if not count:
        raise ValueError(f"{_name(config)}: the stream has no rows; expected at least one")
    written.append(count)


def _rows(config: SourceConfig) -> Iterator[dict[str, Any]]:
    try:
        stream = _opened(config)
        yield from stream if config.take is None else stream.take(config.take)
    except ValueError:
        raise  # a wrong name or split: the library lists the right ones
    except Exception as error:
        told = hub.hub_problem(str(config.path), error, kind="dataset", revision=config.revision)
        refused = isinstance(error, hub_errors.GatedRepoError | hub_errors.RevisionNotFoundError)
        raise (ValueError if refused else hub.MissingSource)(told) from error


def _opened(config: SourceConfig) -> Any:
    """The library's stream of a hub dataset, a folder of one, or files."""
    assert config.path is not None
    path, split = os.path.expanduser(config.path), config.split or "train"
    if hub.is_url(path) or os.path.isfile(path) or glob.has_magic(path):
        builder = next((name for suffix, name in _BUILDERS.items() if path.removesuffix(".gz").endswith(suffix)), None)
        if builder is None:
            raise ValueError(f"{path}: found a file of unknown kind; expected a name ending {', '.join(_BUILDERS)}")
        return datasets.load_dataset(builder, data_files={split: path}, split=split, streaming=True)
    return datasets.load_dataset(path, config.name, split=split, revision=config.revision, streaming=True)
