"""Files turned into others that have rows by index; each is written once, into the cache."""

import csv
import gzip
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxtune import hub
from jaxtune.data.files.line_index import BOM, CHUNK
from jaxtune.data.files.spool import file_digest

NUMBERS, TASK = ".numbers", ".task"  # endings of the files beside: lines that rows began on, what a task says
_TASK_KEYS = {
    "Definition": "definition",
    "Positive Examples": "positive_examples",
    "Negative Examples": "negative_examples",
}


def explode_array(path: str, out: str, shown_as: str) -> None:
    """Writes a JSON array as JSON lines, and beside it the line of the array's file that each item began on."""
    with open(path, "rb") as file:
        data = file.read().removeprefix(BOM)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = error.start - data.rfind(b"\n", 0, error.start)
        raise ValueError(
            f"{shown_as}:{line}: byte {byte} of the line is {data[error.start]:#04x}; expected UTF-8 text"
        ) from error
    decoder, lines, line, seen = json.JSONDecoder(), [], 1, 0
    position = text.index("[") + 1
    with open(out, "w", encoding="utf-8") as target:
        while True:
            while position < len(text) and text[position] in " \t\r\n":
                position += 1
            line, seen = line + text.count("\n", seen, position), position
            if text[position : position + 1] == "]":
                break
            try:
                item, end = decoder.raw_decode(text, position)
                while end < len(text) and text[end] in " \t\r\n":
                    end += 1
                if text[end : end + 1] not in (",", "]"):
                    raise json.JSONDecodeError("expected ',' or ']' after an item", text, end)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{shown_as}:{error.lineno}: column {error.colno}: {error.msg}; expected a JSON array of objects"
                ) from error
            target.write(json.dumps(item, ensure_ascii=True) + "\n")
            lines.append(line)
            position = end + 1 if text[end] == "," else end
    _save_numbers(out, lines)


class NotATask(Exception):
    """A file that looked like a NaturalInstructions task and is none."""


def explode_task(path: str, out: str, *, shown_as: str) -> None:
    """Writes the instances of a NaturalInstructions task as JSON lines, and beside it what the whole task says."""
    with open(path, "rb") as file:
        try:
            task = json.loads(file.read().removeprefix(BOM))
        except ValueError as error:
            raise NotATask(shown_as) from error
    if not isinstance(task, dict) or not {"Definition", "Instances"} <= set(task):
        raise NotATask(shown_as)
    instances = task.pop("Instances")
    if not isinstance(instances, list):
        raise ValueError(f"{shown_as}: Instances is no list; expected a list of {{id, input, output}} objects")
    shared = {_TASK_KEYS.get(key, key): value for key, value in task.items()}
    if isinstance(shared["definition"], list):
        shared["definition"] = "\n".join(map(str, shared["definition"]))
    name = os.path.basename(shown_as).removesuffix(".gz").removesuffix(".json")
    with open(out, "w", encoding="utf-8") as target:
        target.writelines(json.dumps(instance) + "\n" for instance in instances)
    with open(out + TASK, "w", encoding="utf-8") as target:
        json.dump({"task": name, **shared}, target)


def may_be_task(path: str) -> bool:
    """Whether a .json file's beginning is that of a NaturalInstructions task rather than of JSON lines."""
    with open(path, "rb") as file:
        head = file.read(1 << 14).removeprefix(BOM).lstrip()
    if b'"Definition"' not in head:
        return False
    try:
        first = json.loads(head.partition(b"\n")[0])
    except ValueError:  # written over many lines, or one longer than the beginning
        return True
    return isinstance(first, dict) and "Instances" in first


def csv_to_lines(path: str, out: str, shown_as: str) -> None:
    """Writes a CSV file with a header as JSON lines, and beside it the line that each row began on.

    A row with more or fewer cells than the header is no object but the list [header, cells].
    """
    numbers = []
    with open(path, encoding="utf-8-sig", newline="") as file, open(out, "w", encoding="utf-8") as target:
        try:
            rows = csv.reader(file, strict=True)
            header, line = next(rows, []), rows.line_num
            if len(set(header)) != len(header) or not all(header):
                raise ValueError(f"{shown_as}:1: found the header {header}; expected names, each once")
            for cells in rows:
                line, begun = rows.line_num, line + 1
                if not cells:
                    continue
                fits = len(cells) == len(header)
                row = dict(zip(header, cells, strict=True)) if fits else [header, cells]
                target.write(json.dumps(row) + "\n")
                numbers.append(begun)
        except csv.Error as error:
            raise ValueError(f"{shown_as}:{rows.line_num}: {error}; expected comma-separated columns") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{shown_as}: byte {error.start + 1} is not UTF-8; expected UTF-8 text") from error
    _save_numbers(out, numbers)


def _save_numbers(out: str, numbers: list[int]) -> None:
    with open(out + NUMBERS, "wb") as file:
        np.save(file, np.array(numbers, "<u8"))


def to_arrow(path: str, out: str, shown_as: str) -> None:
    """Writes a Parquet, Feather or Arrow IPC file as an Arrow file in small batches, without compression."""
    try:
        schema, batches = _batches(path, shown_as)
        with pa.OSFile(out, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in batches:
                for first in range(0, batch.num_rows, 4096):
                    writer.write_batch(batch.slice(first, 4096))
    except pa.ArrowInvalid as error:
        kind = "Parquet" if shown_as.endswith(".parquet") else "Arrow"
        raise ValueError(f"{shown_as}: not a readable {kind} file ({error})") from error


def _batches(path: str, shown_as: str) -> tuple[Any, Iterator[Any]]:
    if shown_as.endswith(".parquet"):
        parquet = pq.ParquetFile(path)
        return parquet.schema_arrow, parquet.iter_batches(batch_size=4096)
    try:
        reader = pa.ipc.open_file(pa.memory_map(path))
    except pa.ArrowInvalid:  # the form without an index at its end, as `datasets` writes
        stream = pa.ipc.open_stream(pa.memory_map(path))
        return stream.schema, iter(stream)
    return reader.schema, (reader.get_batch(k) for k in range(reader.num_record_batches))


def write_digest(path: str, out: str) -> None:
    """Writes a hash of the file, so that it is read only once."""
    with open(out, "w", encoding="utf-8") as target:
        target.write(file_digest(path))


def gunzip(path: str, out: str) -> None:
    """Writes what a gzip file holds."""
    try:
        with gzip.open(path, "rb") as packed, open(out, "wb") as target:
            shutil.copyfileobj(packed, target, CHUNK)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error}); fetch or compress it again") from error


def fetch(url: str, out: str) -> None:
    """Writes a remote file's bytes."""
    with hub.open_file(url) as remote, open(out, "wb") as target:
        shutil.copyfileobj(remote, target, CHUNK)
