"""A wording: one template of a task, that makes an input and a target of a row's fields."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from jaxtune.data.wording.keyed import Keyed

Fields = Mapping[str, Any]


class Pair(NamedTuple):
    """What is asked and what is to be answered."""

    input: str
    target: str


@dataclasses.dataclass(frozen=True)
class Frame:
    """How exemplars and the question are set one after another.

    Each is `inputs_prefix + input + x_y_delimiter + targets_prefix`, exemplars go on with `target +
    example_separator`; the whole then stands at {inputs} of `input_pattern`, `final_suffix` at {final_suffix}.
    """

    inputs_prefix: str = ""
    targets_prefix: str = ""
    x_y_delimiter: str = "\n\n"
    example_separator: str = "\n\n\n"
    final_suffix: str = ""
    input_pattern: str = "{inputs}{final_suffix}"

    def exemplar(self, pair: Pair) -> str:
        """An exemplar with the separator that follows it."""
        head = f"{self.inputs_prefix}{pair.input}{self.x_y_delimiter}{self.targets_prefix}"
        return f"{head}{pair.target}{self.example_separator}"

    def whole(self, exemplars: str, asked: str) -> str:
        """The prompt: exemplars, the question, and the answer's prefix without the white space at its end."""
        question = f"{self.inputs_prefix}{asked}{self.x_y_delimiter}{self.targets_prefix.rstrip()}"
        filled = {"{inputs}": f"{exemplars}{question}", "{final_suffix}": self.final_suffix}
        return re.sub(r"\{inputs\}|\{final_suffix\}", lambda found: filled[found[0]], self.input_pattern)


PLAIN_FRAME = Frame()


class Wording(Protocol):
    """A template of a task; travels to worker processes.

    `needs` are the fields it names, `random` says whether one row may read differently from epoch to epoch, `shots`
    is the most exemplars that it takes, `key` names everything that decides what it writes.
    """

    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> frozenset[str]: ...
    @property
    def random(self) -> bool: ...
    @property
    def frame(self) -> Frame: ...
    @property
    def shots(self) -> int | None: ...
    @property
    def key(self) -> str: ...

    def settled(self, keyed: Keyed) -> "Wording":
        """This wording with whatever a prompt's question and exemplars share (an options style) chosen."""

    def render(self, fields: Fields, keyed: Keyed) -> Pair | None:
        """Input and target; None when this template skips this row. Raises RowError for a row it cannot word."""


@dataclasses.dataclass(frozen=True)
class AsGiven:
    """The pair that a row's format gives, unchanged: few-shot prompts of sources without templates."""

    name: str = "as given"
    needs: frozenset[str] = frozenset()
    random: bool = False
    frame: Frame = PLAIN_FRAME
    shots: int | None = None
    key: str = "as given"

    def settled(self, keyed: Keyed) -> Wording:
        return self

    def render(self, fields: Fields, keyed: Keyed) -> Pair | None:
        return Pair(fields["inputs"], fields["targets"])
