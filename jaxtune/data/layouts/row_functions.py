"""The format of last resort: a function of the user's own, named `module:function`, that is given each row."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from jaxtune.data.layouts import dialogues
from jaxtune.data.records import Conversation, NothingToLearn, RowError
from jaxtune.data.row_values import Row, kind, near


@functools.cache
def load_function(name: str, key: str = "format") -> Callable[[Any], Any]:
    """What `module:function` names under a key; raises ValueError when it cannot be imported or is not callable."""
    module, _, attribute = name.partition(":")
    try:
        names = vars(importlib.import_module(module))
    except Exception as error:
        raise ValueError(
            f"{key} {name}: module {module} cannot be imported ({type(error).__name__}: {error}); is its folder on "
            "PYTHONPATH?"
        ) from error
    found = names.get(attribute)
    if not callable(found):
        raise ValueError(f"{key} {name}: module {module} has no function {attribute}{near(attribute, list(names))}")
    return found


def convert_by_function(name: str, row: Row) -> list[Conversation]:
    """What the function makes of the row: messages or a Conversation, or a list of such; else raises RowError."""
    try:
        made = load_function(name)(dict(row))
    except (RowError, NothingToLearn):
        raise
    except Exception as error:
        raise RowError("refused by its format", f"{name} raised {type(error).__name__}: {error}") from error
    several = isinstance(made, list) and bool(made) and isinstance(made[0], list | Conversation)
    out = []
    for one in made if several else [made]:
        if isinstance(one, Conversation):
            out.append(one)
        elif isinstance(one, list):
            out += dialogues.messages({"messages": one}, None)
        else:
            raise RowError(
                "wrong type",
                f"{name} gave {kind(one)}; expected a list of {{role, content}} objects, or a list of such",
            )
    return out
