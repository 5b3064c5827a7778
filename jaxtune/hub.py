"""Where things are: local folders, files of the package, hub ids and object stores.

Everything here answers "which files does this path mean?"; what is in them is read elsewhere.
"""

import difflib
import glob
import hashlib
import importlib.resources
import os
import pathlib
import re
from typing import IO, Any

import fsspec
import huggingface_hub
from huggingface_hub import errors as hub_errors

BUILTIN = "builtin:"
_TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_ARROW_SUFFIXES = (".parquet", ".arrow", ".feather")
DATA_SUFFIXES = (
    *_TEXT_SUFFIXES,
    *(f"{suffix}.gz" for suffix in _TEXT_SUFFIXES),
    *_ARROW_SUFFIXES,
    ".array_record",
    ".arrayrecord",
)
# Only what a model folder needs and what is safe to read: no pickled weights, no code.
MODEL_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class MissingSource(ValueError):
    """A path that matches nothing, or a hub id that does not exist; `data.missing: skip` passes over it."""


def cache_dir() -> str:
    """The folder for indexes and spooled files: $JAXTUNE_CACHE, else ~/.cache/jaxtune."""
    return os.environ.get("JAXTUNE_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "jaxtune")


def is_url(path: str) -> bool:
    """Whether `path` names an object store (gs://, s3://, ...) rather than a local file."""
    return "://" in path


def is_hub_id(path: str) -> bool:
    """Whether `path` could be a hub id: `name` or `owner/name`, and no data file's name."""
    return _HUB_ID.fullmatch(path) is not None and not path.endswith(DATA_SUFFIXES)


def open_file(path: str, mode: str = "rb") -> IO[Any]:
    """Opens a local or remote file; remote ones need the store's fsspec package (gcsfs, s3fs)."""
    if not is_url(path):
        return open(path, mode)
    try:
        return fsspec.open(path, mode).open()
    except ImportError as error:
        raise ValueError(f"{path}: {error}; install the package that reads this store (gcsfs for gs://)") from error


def file_system(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path in it.

    Raises ValueError where the store's package (gcsfs, s3fs) is not installed.
    """
    try:
        return fsspec.core.url_to_fs(path if is_url(path) else os.path.abspath(path))
    except ImportError as error:
        raise ValueError(f"{path}: {error}; install the package of this store (gcsfs for gs://)") from error


def resolve_folder(path: str, revision: str | None = None) -> str:
    """The folder that a model's path means: local, `builtin:NAME`, or a hub id fetched into the hub's cache.

    URLs (gs://, s3://) come back unchanged, to be read file by file. Raises ValueError, naming what to do, for a path
    that is neither a folder nor a hub id, for a hub id that does not exist and for one that needs a licence or token.
    """
    if path.startswith(BUILTIN):
        return _builtin_folder(path)
    if is_url(path):
        return path.rstrip("/")
    local = os.path.expanduser(path)
    if os.path.isdir(local):
        return local
    if os.path.exists(local):
        raise ValueError(f"{path}: found a file; expected a model folder (config.json, *.safetensors); name its folder")
    if not is_hub_id(path):
        raise ValueError(
            f"{path}: no such folder{_nearest(local)}, and it does not read as a hub id (owner/name); "
            "expected a Hugging Face model folder, a hub id, or a gs:// or s3:// folder"
        )
    try:
        return huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=list(MODEL_PATTERNS))
    except Exception as error:
        raise ValueError(hub_problem(path, error, kind="model", revision=revision)) from error


def resolve_config(path: str, revision: str | None = None) -> str:
    """The folder of a model's config.json, which alone is fetched of a hub id; else as `resolve_folder`."""
    if not is_hub_id(path) or os.path.exists(os.path.expanduser(path)):
        return resolve_folder(path, revision)
    try:
        return os.path.dirname(huggingface_hub.hf_hub_download(path, "config.json", revision=revision))
    except Exception as error:
        raise ValueError(hub_problem(path, error, kind="model", revision=revision)) from error


def local_companions(path: str) -> str:
    """The folder itself, or for a URL a local copy of its small files (tokenizer, configs), which libraries read.

    Weights stay where they are; they are read in ranges.
    """
    if not is_url(path):
        return path
    fs, root = fsspec.core.url_to_fs(path)
    local = os.path.join(cache_dir(), "models", hashlib.sha256(path.encode()).hexdigest()[:16])
    os.makedirs(local, exist_ok=True)
    for entry in fs.ls(root, detail=True):
        name = os.path.basename(entry["name"].rstrip("/"))
        if entry["type"] == "file" and not name.endswith((".safetensors", ".bin", ".pth", ".gguf")):
            fs.get_file(entry["name"], os.path.join(local, name))
    return local


def hub_problem(path: str, error: Exception, *, kind: str, revision: str | None = None) -> str:
    """One sentence about why a hub id could not be read, and what to do."""
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{path}"
    token = "found" if os.environ.get("HF_TOKEN") else "not set"
    here = f"{path}: no such local path{_nearest(path)}"
    response = getattr(error, "response", None)  # absent on errors that never reached the hub
    status = None if response is None else response.status_code
    if isinstance(error, hub_errors.GatedRepoError) or status in (401, 403):
        return (
            f"{here}; the hub refuses this {kind} ({status or 403}): accept its licence at {page} and put a token of "
            f"that account into HF_TOKEN (now {token}); a private or misspelt id is refused in the same way"
        )
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f"{path}: the hub has no revision {revision!r}; see {page}/tree/main for the branches and tags"
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return f"{here}, and the hub has no {kind} of this id (HF_TOKEN is {token}); check the spelling at {page}"
    return (
        f"{here}, and the {kind} could not be had from the hub ({type(error).__name__}); it is not in the local "
        f"cache, and offline mode (HF_HUB_OFFLINE) or the network keeps {page} away; give a local folder instead"
    )


def resolve_files(path: str) -> list[str]:
    """The data files that a path means, sorted: a file, a folder of data files, a glob, `builtin:...` or a URL.

    Raises ValueError with the nearest existing name when there is none.
    """
    if path.startswith(BUILTIN):
        root = _assets()
        files = sorted(glob.glob(os.path.join(root, path[len(BUILTIN) :])))
        if not files:
            raise MissingSource(
                f"{path}: no such file in the package{_nearest(os.path.join(root, path[len(BUILTIN) :]))}"
            )
        return files
    if is_url(path):
        return _remote_files(path)
    local = os.path.expanduser(path)
    if os.path.isfile(local):
        return [local]
    if os.path.isdir(local):
        files = sorted(str(f) for f in pathlib.Path(local).rglob("*") if f.is_file() and f.name.endswith(DATA_SUFFIXES))
        if not files:
            raise MissingSource(f"{path}: found a folder without data files; expected files ending {_suffixes()}")
        return files
    if any(c in local for c in "*?["):
        files = sorted(f for f in glob.glob(local, recursive=True) if os.path.isfile(f))
        if not files:
            raise MissingSource(f"{path}: no file matches this pattern{_nearest(local)}")
        return files
    raise MissingSource(f"{path}: no such file or folder{_nearest(local)}; expected a file ending {_suffixes()}")


def _remote_files(path: str) -> list[str]:
    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise ValueError(f"{path}: {error}; install the package that reads this store (gcsfs for gs://)") from error
    try:
        if any(c in inner for c in "*?["):
            found = filesystem.glob(inner)
        elif filesystem.info(inner)["type"] == "directory":  # `exists` would call a store out of reach an empty one
            found = [f for f in filesystem.find(inner) if f.endswith(DATA_SUFFIXES)]
        else:
            found = [inner]
    except FileNotFoundError:
        found = []
    except Exception as error:
        raise ValueError(
            f"{path}: the store cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}); check the "
            "network, the name, and the account's right to read it"
        ) from error
    if not found:
        raise MissingSource(f"{path}: no such file in this store; check the name and the account's right to read it")
    return sorted(filesystem.unstrip_protocol(f) for f in found)


def _assets() -> str:
    return str(importlib.resources.files("jaxtune") / "assets")


def _builtin_folder(path: str) -> str:
    folder = os.path.join(_assets(), path[len(BUILTIN) :])
    if not os.path.isdir(folder):
        raise ValueError(f"{path}: no such folder in the package{_nearest(folder)}")
    return folder


def _suffixes() -> str:
    return ", ".join(DATA_SUFFIXES)


def _nearest(path: str) -> str:
    """` (nearest: NAME)` when a neighbour in the same folder has a similar name, else which folder is missing."""
    folder, name = os.path.split(os.path.abspath(path))
    if not os.path.isdir(folder):
        return f" (the folder {folder} does not exist either)" if os.sep in path else ""
    near = difflib.get_close_matches(name, os.listdir(folder), n=1, cutoff=0.6)
    return f" (nearest: {os.path.join(os.path.dirname(path), near[0])})" if near else ""
