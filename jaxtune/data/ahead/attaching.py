"""Streams and what was prepared of them: the folder found, what it lacks told, and why there is none."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxtune import hub
from jaxtune.config import Config
from jaxtune.data.ahead.prepared import Folder, Prepared, base_folder, folder_of, read_rows
from jaxtune.data.files.spool import digest_of
from jaxtune.data.stream import Stream
from jaxtune.data.windows import WindowMaker

ABOUT = "about.json"
_LOOKED_AT = 50  # other prepared folders, when there is none for a stream
_TOLD = 5
_DIGEST = 16


def attach(config: Config, stream: Stream, *, cache_dir: str | None = None) -> Stream:
    """The stream with the windows that were prepared of it, if any; the batches are the same.

    A complete folder also knows the rows of every window, by which a run of epochs over data too large to be counted
    knows its steps. Raises ValueError for a store out of reach.
    """
    folder = folder_of(config, stream.fingerprint, cache_dir=cache_dir)
    base = base_folder(config, cache_dir=cache_dir)
    if folder is None or base is None:
        return stream
    try:
        found = Prepared.of(folder, cache_dir or hub.cache_dir())
        if not found.pieces:
            why = why_none(base, stream)
            told = (
                f"prepared: nothing of this stream in {base.path}; {why}" if why and "nothing like" not in why else ""
            )
            return dataclasses.replace(stream, told_prepared=told)
        return _with(found, config, stream)
    except OSError as error:
        raise ValueError(
            f"data.prepared: {base.path} cannot be read ({type(error).__name__}: {error}); expected a folder, a URL, "
            "auto or off"
        ) from error


def _with(found: Prepared, config: Config, stream: Stream) -> Stream:
    maker, counts, fill = whole_run(config, stream), stream.rows_of_windows, stream.fill
    windows = maker.count
    if counts is None and windows is not None:
        known = read_rows(found.folder, windows)
        if known is None:
            maker = stream.maker
        else:
            counts = np.array([maker.rows_taken(w, n) for w, n in enumerate(known.rows.tolist())], np.int64)
            fill = tuple((known.tokens.sum(axis=0) / (max(1, known.rows.sum()) * np.array(maker.rows.room))).tolist())
    if windows is None:
        told = f"the first {found.covered(found.pieces[-1][1]):,} windows"
    else:
        covered = found.covered(windows)
        rest = "" if covered == windows else "; the rest is made while training"
        told = f"{covered:,} of {windows:,} windows{rest}"
    return dataclasses.replace(
        stream,
        maker=dataclasses.replace(maker, prepared=found),
        rows_of_windows=counts,
        fill=fill,
        told_prepared=f"prepared: {told} ({found.folder.path})",
    )


def whole_run(config: Config, stream: Stream) -> WindowMaker:
    """The maker of the run's windows, which end where the epochs do, also of data too large to be counted."""
    maker = stream.maker
    if maker.total is not None or config.train.steps is not None:
        return maker
    return dataclasses.replace(maker, total=max(1, round(maker.epoch_draws * config.train.epochs)))


def about(stream: Stream) -> dict[str, Any]:
    """What a stream is a function of, part by part, so that a person can be told what changed."""
    texts: dict[int, str] = {}

    def digest(*parts: str) -> str:
        return digest_of(*parts)[:_DIGEST]

    def of_text(thing: Any, text: str | Callable[[], str]) -> str:
        if id(thing) not in texts:  # hundreds of readers share one, and a tokenizer has megabytes
            texts[id(thing)] = digest(text if isinstance(text, str) else text())
        return texts[id(thing)]

    found = {}
    for name, reader in zip(stream.source_names, stream.maker.readers, strict=True):
        tokenizer, template, plain = reader.template.tokenizer, reader.template, reader.text_template
        found[name] = {
            "the data": digest(reader.source.fingerprint),
            "the layout": digest(repr(reader.layout)),
            "the template": digest(of_text(template, template.text), of_text(plain, plain.text)),
            "the tokenizer": of_text(tokenizer, tokenizer.backend_tokenizer.to_str),
            "the wording": digest(reader.key),
            "the share": digest(stream.identity[f"source {name}"].partition(":")[2]),
            **{f"the {key} ({_KEYS.get(key, key)})": value for key, value in _options(reader.options).items()},
        }
    options = {key: value for key, value in stream.identity.items() if not key.startswith("source ")}
    return {"sources": found, "options": options}


_KEYS = {"max_length": "data.max_length", "loss_weighting": "tuning.loss_weighting", "train_on": "data.train_on"}


def _options(options: Any) -> dict[str, str]:
    return {field.name: str(getattr(options, field.name)) for field in dataclasses.fields(options)}


def why_none(base: Folder, stream: Stream) -> str:
    """Why nothing is prepared of a stream: what has changed since the likest of those that are; "" if none is like."""
    mine = about(stream)
    own = stream.fingerprint
    others = [name for name in sorted(base.names()) if re.fullmatch(r"[0-9a-f]{32}-\d+", name)]
    if not others:
        return ""
    nearest: list[str] | None = None
    folder = ""
    for name in others[:_LOOKED_AT]:
        theirs = base.inside(name).read(ABOUT)
        if not isinstance(theirs, dict) or not {"sources", "options"} <= set(theirs):
            continue
        if name.startswith(own):
            return f"{base.file(name)} was written by another version of this program"
        if not set(mine["sources"]) & set(theirs["sources"]):
            continue
        found = differences(mine, theirs)
        if found and (nearest is None or len(found) < len(nearest)):
            nearest, folder = found, base.file(name)
    if nearest is None:
        return ""
    more = f" and {len(nearest) - _TOLD} more" if len(nearest) > _TOLD else ""
    return f"since {folder} was prepared {'; '.join(nearest[:_TOLD])}{more}"


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs in the first since the second, a phrase each; both are as `about` returns them."""
    told = []
    for name in [*one["sources"], *(name for name in other["sources"] if name not in one["sources"])]:
        mine, theirs = one["sources"].get(name), other["sources"].get(name)
        if mine is None or theirs is None:
            told.append(f"source {name} is {'new' if theirs is None else 'gone'}")
            continue
        for part in mine:
            if mine[part] != theirs.get(part):
                told.append(f"{part} of source {name} {_changed(theirs.get(part), mine[part])}")
    for key in one["options"]:
        if one["options"][key] != other["options"].get(key):
            told.append(f"{key} {_changed(other['options'].get(key), one['options'][key])}")
    return told


def _changed(before: Any, now: Any) -> str:
    """What is short is told; what is a digest, or long, has changed."""
    short = [str(value) for value in (before, now)]
    if before is None or max(map(len, short)) > 24 or any(re.fullmatch(r"[0-9a-f]{16}", value) for value in short):
        return "has changed"
    return f"has changed from {short[0]} to {short[1]}"
