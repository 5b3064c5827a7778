"""The templates that a source names: a promptsource YAML, a table, a file of the package, or rows in the config."""

import functools
import gzip
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from jaxtune import hub
from jaxtune.data.row_values import kind
from jaxtune.data.wording import promptsource, template_tables
from jaxtune.data.wording.wordings import Wording

INLINE = "templates of the configuration"
_Wordings = tuple[promptsource.PromptsourceWording, ...] | tuple[template_tables.TableWording, ...]


def name_of(templates: str | Sequence[Mapping[str, Any]]) -> str:
    """What errors call the templates."""
    return templates if isinstance(templates, str) else INLINE


def load(templates: str | Sequence[Mapping[str, Any]], *, task: str, style: str, source: str) -> list[Wording]:
    """The templates that fit a task and a style; raises ValueError, saying what there is, when there are none."""
    try:
        parts = _parts(templates)
    except (ValueError, OSError) as error:
        raise ValueError(f"{source}: templates: {error}") from error
    found: list[Wording] = []
    for part in parts:
        if part and isinstance(part[0], promptsource.PromptsourceWording):
            found += promptsource.fitting(part, style)  # type: ignore[arg-type]
        else:
            found += template_tables.fitting(part, style, task)  # type: ignore[arg-type]
    if not found:
        raise ValueError(
            f"{source}: {name_of(templates)} has no template for style {style} of task {task!r}; {_told(parts)}"
        )
    return found


def fields_named(templates: str | Sequence[Mapping[str, Any]]) -> set[str]:
    """Every field that one of the templates names, whatever its task and kind."""
    return set().union(*(wording.needs for part in _parts(templates) for wording in part))


def _parts(templates: str | Sequence[Mapping[str, Any]]) -> list[_Wordings]:
    """Files and rows of a table one after another; a row `{promptsource: PATH}` stands for that file's templates."""
    if isinstance(templates, str):
        return [_file(templates)]
    parts = [_promptsource(row) for row in templates if "promptsource" in row]
    rows = [row for row in templates if "promptsource" not in row]
    return [*parts, tuple(template_tables.read(rows, file=INLINE))] if rows else parts


def _promptsource(row: Mapping[str, Any]) -> _Wordings:
    """`{promptsource: PATH, truncate: 2048, skip: [NAME, ...]}`."""
    unknown = set(row) - {"promptsource", "truncate", "skip"}
    path, truncate = row["promptsource"], row.get("truncate")
    skip = row.get("skip", ())
    if unknown or not isinstance(path, str) or not (truncate is None or (isinstance(truncate, int) and truncate > 3)):
        raise ValueError(f"found {dict(row)}; expected {{promptsource: PATH, truncate: 2048, skip: [NAME, ...]}}")
    wordings = _file(path, truncate)
    names = [wording.name for wording in wordings]
    for name in skip:
        if name not in names:
            raise ValueError(f"{path}: skip names {name!r}, and there is no such template; found {', '.join(names)}")
    return tuple(wording for wording in wordings if wording.name not in skip)  # type: ignore[return-value]


def _file(path: str, truncate: int | None = None) -> _Wordings:
    (file,) = hub.resolve_files(path)
    stamp = "" if hub.is_url(file) else str(os.stat(file).st_mtime_ns)
    wordings = _read(file, path, truncate, stamp)
    if truncate is not None and not (wordings and isinstance(wordings[0], promptsource.PromptsourceWording)):
        raise ValueError(f"{path}: found a table; expected a promptsource YAML, for `truncate` cuts what Jinja prints")
    return wordings


@functools.lru_cache(maxsize=512)
def _read(file: str, shown_as: str, truncate: int | None, stamp: str) -> _Wordings:
    """One file's templates, read once however many sources name it; `stamp` changes when the file does."""
    with hub.open_file(file) as opened:
        data = opened.read()
    text = (gzip.decompress(data) if file.endswith(".gz") else data).decode("utf-8")
    plain = file.removesuffix(".gz")
    if plain.endswith((".yaml", ".yml")):
        if promptsource.is_promptsource(text):
            return tuple(promptsource.read(text, file=shown_as, truncate=truncate))
        try:
            rows: Any = yaml.load(text, Loader=yaml.BaseLoader)  # every scalar is text: `no` is an answer, not False
        except yaml.YAMLError as error:
            raise ValueError(f"{shown_as}: not readable as YAML: {error}") from error
        rows = rows.get("templates") if isinstance(rows, Mapping) else rows
    elif plain.endswith((".jsonl", ".ndjson")):
        rows = [_json(line, f"{shown_as}:{n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    elif plain.endswith(".json"):
        rows = _json(text, shown_as)
    else:
        raise ValueError(f"{shown_as}: found a file of unknown kind; expected .yaml, .jsonl or .json")
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{shown_as}: found {kind(rows)}; expected a list of templates, each with input and target")
    return tuple(template_tables.read(rows, file=shown_as))


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: column {error.colno}: {error.msg}; expected JSON") from error


def _told(parts: Sequence[_Wordings]) -> str:
    """What there is instead: `it has 3 cot and 2 inverted templates for tasks *, gsm8k`."""
    listed = [wording for part in parts for wording in part]
    tables = [wording for wording in listed if isinstance(wording, template_tables.TableWording)]
    counts = {kind: sum(wording.kind == kind for wording in tables) for kind in template_tables.KINDS}
    told = [f"{count} {kind}" for kind, count in counts.items() if count]
    if len(listed) > len(tables):
        told.append(f"{len(listed) - len(tables)} promptsource (of any style but cot)")
    tasks = sorted({wording.task for wording in tables})
    many = ", ".join(tasks[:10]) + (", ..." if len(tasks) > 10 else "")
    return f"it has {', '.join(told)} templates" + (f" for tasks {many}" if tasks else "")
