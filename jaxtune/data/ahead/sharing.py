"""Things that a process gives to its workers: pickled once into a file, read once by each of them."""

import functools
import pickle
from typing import Any, NamedTuple


class Shared(NamedTuple):
    """A thing that was put into a file of its own; travels to worker processes."""

    path: str

    def get(self) -> Any:
        """The thing, read when first asked for."""
        return _loaded(self.path)


def share(thing: Any, path: str) -> Shared:
    """Puts a thing into a file, in a folder that only this user reads."""
    with open(path, "wb") as file:
        pickle.dump(thing, file)
    return Shared(path)


@functools.lru_cache(maxsize=2)
def _loaded(path: str) -> Any:
    with open(path, "rb") as file:
        return pickle.load(file)
