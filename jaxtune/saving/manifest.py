"""The manifest of a checkpoint: size and SHA-256 of every file, and its own.

A folder without one was never finished; a folder that does not match it was damaged. Where a run has several hosts,
each reads its share of the files: by name, so that nobody needs to tell who reads what.
"""

import hashlib
import json
import time
import zlib
from typing import Any, NamedTuple

from etils import epath

MANIFEST = "jaxtune_manifest.json"
CUT_OFF = "it has no manifest, so the save was cut off"
_LOOK_EVERY_SECONDS = 0.2


class Share(NamedTuple):
    """Host `host` of `hosts`: which files of a checkpoint are its own to read."""

    host: int = 0
    hosts: int = 1

    def has(self, name: str) -> bool:
        """Whether this host reads the file."""
        return zlib.crc32(name.encode()) % self.hosts == self.host


ALL = Share()


def write_share(folder: epath.Path, share: Share) -> None:
    """Writes what a host other than the first found in its files, for the first one to read."""
    found = {name: _fingerprint(path) for name, path in files_of(folder) if share.has(name)}
    write_aside(_share_file(folder, share.host), found)


def write_manifest(folder: epath.Path, share: Share = ALL, *, wait_seconds: float = 0.0) -> None:
    """Writes the manifest of a committed checkpoint, aside and then in place; host 0 alone calls it.

    Args:
        share: host 0's; the others' are read from the files that they write, for `wait_seconds` at most. Files that
            nobody has spoken of are read here.
    """
    files = files_of(folder)
    found = {name: _fingerprint(path) for name, path in files if share.has(name)}
    deadline = time.monotonic() + wait_seconds
    for host in range(1, share.hosts):
        told = _share_file(folder, host)
        while not told.exists() and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_SECONDS)
        if told.exists():
            found |= json.loads(told.read_text())
            told.unlink()
    run_file = folder / "run" / "metadata"
    run = json.loads(run_file.read_text()) if run_file.exists() else {}
    listed = {name: found[name] if name in found else _fingerprint(path) for name, path in files}
    manifest = {"files": listed, "eval_loss": run.get("eval_loss")}
    write_aside(folder / MANIFEST, {**manifest, "sha256": _digest_of(manifest)})


def check_manifest(folder: epath.Path, share: Share = ALL) -> str | None:
    """Returns what is wrong with (this host's share of) a checkpoint folder; None when all is what was written."""
    if not (folder / MANIFEST).exists():
        return CUT_OFF
    manifest = read_manifest(folder)
    if manifest is None:
        return "its manifest cannot be read"
    found = dict(files_of(folder))
    for name, want in manifest["files"].items():
        if not share.has(name):
            continue
        if name not in found:
            return f"{name} is missing"
        have = _fingerprint(found[name])
        if have["bytes"] != want["bytes"]:
            return f"{name} has {have['bytes']} bytes instead of {want['bytes']}"
        if have["sha256"] != want["sha256"]:
            return f"{name} has changed since it was written (its SHA-256 differs)"
    return None


def read_manifest(folder: epath.Path) -> dict[str, Any] | None:
    """Returns what the manifest says; None where there is none, or it is not as it was written."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return None
    try:
        content = json.loads(manifest.read_bytes())
        digest = content.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return content if digest == _digest_of(content) else None


def files_of(folder: epath.Path) -> list[tuple[str, epath.Path]]:
    """Returns (name from the folder on, path) of all files but manifests."""
    found: list[tuple[str, epath.Path]] = []
    for path in folder.iterdir():
        if path.is_dir():
            found += [(f"{path.name}/{name}", inner) for name, inner in files_of(path)]
        elif not path.name.startswith(MANIFEST):
            found.append((path.name, path))
    return sorted(found)


def _share_file(folder: epath.Path, host: int) -> epath.Path:
    return folder / f"{MANIFEST}.host{host}"


def write_aside(file: epath.Path, content: dict[str, Any]) -> None:
    """Writes JSON into another file and then in place, so that what is there is whole."""
    aside = file.parent / f"{file.name}.tmp"
    aside.write_text(json.dumps(content, indent=1, sort_keys=True))
    aside.replace(file)


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _fingerprint(path: epath.Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}
