"""Arrays kept in the cache under a key of everything that decides them."""

import os
import tempfile
import zipfile
from collections.abc import Mapping

import numpy as np

# What reading a damaged file raises: the archive's errors, and those of what is not in it.
DAMAGED = (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, NotImplementedError, zipfile.BadZipFile)


def write_arrays(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays, aside first, so that no half file is ever found."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), delete=False) as aside:
        np.savez(aside, **arrays)  # type: ignore[arg-type]
    os.replace(aside.name, path)


def read_arrays(path: str) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None when it is not there or damaged, as its checksums tell."""
    if not os.path.exists(path):
        return None
    try:
        with np.load(path) as saved:
            return {key: saved[key] for key in saved.files}
    except (*DAMAGED, AttributeError):  # AttributeError: a single array, which has no names
        return None
