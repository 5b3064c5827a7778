"""Writes what an audit found: into a folder of this machine or a bucket, whole or not at all."""

import os

from jaxtune import hub
from jaxtune.asking import check_writable


def prepare_output(folder: str) -> None:
    """Makes a local folder, and sees whether files can be written there; raises ValueError where they cannot."""
    if not hub.is_url(folder):
        check_writable(os.path.join(folder, ".audit"), "output")


def joined(folder: str, name: str) -> str:
    """The path of a file in a folder or bucket."""
    return f"{folder.rstrip('/')}/{name}"


def write_text(path: str, text: str) -> None:
    """Writes a file aside first; an object of a bucket is whole or absent anyway. Lone surrogates become ?."""
    if hub.is_url(path):
        with hub.open_file(path, "wb") as file:
            file.write(text.encode("utf-8", "replace"))
        return
    aside = f"{path}.{os.getpid()}"
    with open(aside, "w", encoding="utf-8", errors="replace") as file:
        file.write(text)
    os.replace(aside, path)
