"""Opens sources: rows by index, wherever they are stored.

Nothing above a `Source` knows a file format. JSON and tab-separated lines are
indexed once by a newline search; compressed, remote, array, CSV, Arrow and Parquet files are first spooled into the
cache in a form with random access.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

import datasets
import pyarrow as pa
from huggingface_hub import errors as hub_errors

from jaxtune import hub
from jaxtune.config_data import SourceConfig
from jaxtune.data.files import readers, spooling, streams
from jaxtune.data.files.line_index import BOM
from jaxtune.data.files.readers import Concatenated, Source
from jaxtune.data.files.spool import digest_of, forget, remote_stamp, spooled, stamp_of

MissingSource = hub.MissingSource


def open_source(config: SourceConfig, *, cache_dir: str | None = None) -> Source:
    """Opens what `config.path` names: files, a folder, a glob, a URL, a saved dataset or a hub dataset.

    Raises MissingSource, a ValueError, for a path that matches nothing or a hub id that does not exist.
    """
    if config.path is None:
        raise ValueError(f"source {config.id!r} has no path of its own; a group is opened member by member")
    cache = cache_dir or hub.cache_dir()
    if config.streaming:
        return streams.open_stream_of_rows(config, cache)
    path = os.path.expanduser(config.path)
    if os.path.isdir(path) and any(os.path.exists(os.path.join(path, f)) for f in ("state.json", "dataset_dict.json")):
        return HubDataset(*_choose_split(datasets.load_from_disk(path), config), path=config.path)
    local = config.path.startswith(hub.BUILTIN) or hub.is_url(path) or os.path.exists(path)
    if not local and hub.is_hub_id(config.path):
        return HubDataset(*_load_hub_dataset(config), path=config.path)
    for key, value in (("name", config.name), ("split", config.split), ("revision", config.revision)):
        if value is not None:
            raise ValueError(f"{config.path}: found {key}, but plain files have none; it is for datasets of the hub")
    parts = [_open_file(file, cache) for file in hub.resolve_files(config.path)]
    return parts[0] if len(parts) == 1 else Concatenated(parts)


class HubDataset:
    """Rows of a `datasets.Dataset`, saved on disk or from the hub."""

    def __init__(self, dataset: Any, split: str | None, *, path: str) -> None:
        self.dataset = dataset
        self.name = path if split is None else f"{path}[{split}]"
        self.fingerprint = digest_of(self.name, str(len(dataset)), str(dataset.features), _rows_digest(dataset))

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, i: int) -> dict[str, Any]:
        return dict(self.dataset[int(i)])

    def where(self, i: int) -> str:
        return f"{self.name}:row {i + 1}"

    def raw(self, i: int) -> str:
        return json.dumps(self.row(i), ensure_ascii=False, default=str)


def _rows_digest(dataset: Any) -> str:
    """A hash of all rows, block by block: the library's own fingerprint depends on how its cache was made."""
    digest = hashlib.blake2b(digest_size=16)
    for block in dataset.with_format("arrow").iter(batch_size=4096):
        for batch in block.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


def _load_hub_dataset(config: SourceConfig) -> tuple[Any, str | None]:
    assert config.path is not None
    try:
        return _choose_split(datasets.load_dataset(config.path, config.name, revision=config.revision), config)
    except ValueError:
        raise  # a wrong name or split: the library lists the right ones
    except Exception as error:
        told = hub.hub_problem(config.path, error, kind="dataset", revision=config.revision)
        refused = isinstance(error, hub_errors.GatedRepoError | hub_errors.RevisionNotFoundError)
        raise (ValueError if refused else MissingSource)(told) from error


def _choose_split(loaded: Any, config: SourceConfig) -> tuple[Any, str | None]:
    """The split asked for, `train`, or the only one; with its name where there is one."""
    if not isinstance(loaded, dict):
        only = None if loaded.split is None else str(loaded.split)
        if config.split not in (None, only):
            raise ValueError(
                f"{config.path}: found {only or 'a dataset without splits'}; expected split {config.split!r}"
            )
        return loaded, only
    split = config.split or ("train" if "train" in loaded else next(iter(loaded)) if len(loaded) == 1 else None)
    if split not in loaded:
        found = ", ".join(loaded)
        raise ValueError(f"{config.path}: split {split!r} is not there; found {found}; set `split` to one of these")
    return loaded[split], split


def _open_file(file: str, cache: str) -> Source:
    """Opens one file by what its name and first bytes say."""
    if not file.endswith(hub.DATA_SUFFIXES):
        expected = ", ".join(hub.DATA_SUFFIXES)
        raise ValueError(f"{file}: found a file of unknown kind; expected a name ending {expected}")
    local = file
    if hub.is_url(file):
        local = spooled(file, remote_stamp(file), _suffix(file), cache, lambda out: spooling.fetch(file, out))
    if file.endswith(".gz"):
        packed = local
        local = spooled("gz", stamp_of(packed), _suffix(file[:-3]), cache, lambda out: spooling.gunzip(packed, out))
    return _OPENERS[_suffix(file.removesuffix(".gz"))](local, file, cache)


def _open_lines(local: str, file: str, cache: str) -> Source:
    return readers.JsonLines(local, cache_dir=cache, shown_as=file)


def _open_json(local: str, file: str, cache: str) -> Source:
    """JSON lines, an array, or a NaturalInstructions task."""
    stamp = stamp_of(local)
    if _first_character(local) == b"[":
        rows = spooled(f"array:{file}", stamp, ".jsonl", cache, lambda out: spooling.explode_array(local, out, file))
        return readers.JsonLines(rows, cache_dir=cache, shown_as=file, numbers=rows + spooling.NUMBERS)
    if spooling.may_be_task(local):
        # The task is named by its file, which a copy may change.
        write = functools.partial(spooling.explode_task, local, shown_as=file)
        try:
            rows = spooled(f"task:{file}", stamp, ".jsonl", cache, write)
        except spooling.NotATask:
            return _open_lines(local, file, cache)
        return readers.TaskInstances(rows, cache_dir=cache, shown_as=file, task=rows + spooling.TASK)
    return _open_lines(local, file, cache)


def _open_csv(local: str, file: str, cache: str) -> Source:
    rows = spooled("csv", stamp_of(local), ".jsonl", cache, lambda out: spooling.csv_to_lines(local, out, file))
    return readers.CommaSeparated(rows, cache_dir=cache, shown_as=file, numbers=rows + spooling.NUMBERS)


def _open_tabbed(local: str, file: str, cache: str) -> Source:
    return readers.Tabbed(local, cache_dir=cache, shown_as=file)


def _open_arrow(local: str, file: str, cache: str) -> Source:
    fingerprint = _known_digest(local, cache)

    def opened() -> Source:
        rows = spooled("arrow", stamp_of(local), ".arrow", cache, lambda out: spooling.to_arrow(local, out, file))
        try:
            return readers.ArrowRows(rows, shown_as=file, fingerprint=fingerprint)
        except pa.ArrowInvalid:
            forget(rows)
            raise

    try:
        return opened()
    except pa.ArrowInvalid:  # damaged in the cache
        return opened()


def _open_array_record(local: str, file: str, cache: str) -> Source:
    return readers.ArrayRecords(local, shown_as=file, fingerprint=_known_digest(local, cache))


_OPENERS: dict[str, Callable[[str, str, str], Source]] = {
    ".jsonl": _open_lines,
    ".ndjson": _open_lines,
    ".json": _open_json,
    ".csv": _open_csv,
    ".tsv": _open_tabbed,
    ".parquet": _open_arrow,
    ".arrow": _open_arrow,
    ".feather": _open_arrow,
    ".array_record": _open_array_record,
    ".arrayrecord": _open_array_record,
}


def _known_digest(path: str, cache: str) -> str:
    with open(
        spooled("digest", stamp_of(path), ".digest", cache, lambda out: spooling.write_digest(path, out)),
        encoding="utf-8",
    ) as file:
        return file.read()


def _suffix(file: str) -> str:
    return max((s for s in hub.DATA_SUFFIXES if file.endswith(s)), key=len, default="")


def _first_character(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(4096).removeprefix(BOM).lstrip()[:1]
