"""Values of a row as the types they must have, and the words of errors about them."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.data.records import RowError

Row = Mapping[str, Any]


def text_of(row: Row, field: str, *, none: str | None = None) -> str:
    """The field's text; `none` stands for null or an absent column. Raises RowError for anything else."""
    value = row.get(field)
    if value is None and none is not None:
        return none
    if not isinstance(value, str):
        raise RowError("wrong type", f"{field} is {kind(value)}; expected text")
    return value


def kind(value: Any) -> str:
    """What a value is, for errors: `text`, `a list`, `the number 5`."""
    names = {type(None): "null", str: "text", list: "a list", dict: "an object", bool: "true or false"}
    return names.get(type(value), f"the number {value!r}" if isinstance(value, int | float) else type(value).__name__)


def missing(column: str, found: Sequence[str]) -> str:
    """Words about a column that is not there, with the nearest that is."""
    return f"no column {column!r}{near(column, found)}; found columns {', '.join(found) or 'none'}"


def near(name: str, known: Sequence[str]) -> str:
    """` (nearest: NAME)`, or nothing where no known name is like it."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (nearest: {found[0]})" if found else ""
