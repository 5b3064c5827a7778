"""Writes what an audit found: into a folder of this machine or a bucket, whole or not at all."""

import contextlib
import os
import tempfile

from jaxtune import hub


def prepare_output(folder: str) -> None:
    """Makes a local folder, and sees whether files can be written there; raises ValueError where they cannot."""
    if hub.is_url(folder):
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output: {folder} cannot be written ({error.strerror}); expected a folder") from None


def joined(folder: str, name: str) -> str:
    """The path of a file in a folder or bucket."""
    return f"{folder.rstrip('/')}/{name}"


def write_text(path: str, text: str) -> None:
    """Writes a file aside first; an object of a bucket is whole or absent anyway. Lone surrogates become ?."""
    if hub.is_url(path):
        with hub.open_file(path, "wb") as file:
            file.write(text.encode("utf-8", "replace"))
        return
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):  # a device or a pipe is written to, never put aside
        with open(path, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        return
    aside = f"{path}.{os.getpid()}"
    try:
        with open(aside, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        os.replace(aside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(aside)
