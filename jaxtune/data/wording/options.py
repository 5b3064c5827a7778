"""Blocks that list the answers to choose from, in many styles."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.data.records import RowError
from jaxtune.data.row_values import kind
from jaxtune.data.wording.keyed import Keyed

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclasses.dataclass(frozen=True)
class OptionsStyle:
    """How a block is written: a line that opens it, then each option after its label.

    `label` has `A` where letters stand, `a` for small ones, `1` for numbers; without any of them it is a mark such as
    a dash. Lettered options are answered by their letter: `(A) cat` by `(A)`, `A. cat` by `A`.
    """

    opening: str
    label: str
    ending: str = "\n"

    def block(self, options: Sequence[str]) -> str:
        """The block's text."""
        lines = [f"{self._label(i)} {option}" if self.label else option for i, option in enumerate(options)]
        return f"{self.opening}\n{self.ending.join(lines)}" if self.opening else self.ending.join(lines)

    def answer(self, options: Sequence[str], i: int) -> str:
        """What option i is answered by."""
        lettered = "a" in self.label.lower() and len(options) <= len(_LETTERS) and len(set(options)) == len(options)
        if not lettered:
            return options[i]
        label = self._label(i)
        return label if label[:1] in "([" else label.rstrip(".):")

    def _label(self, i: int) -> str:
        number = str(i + 1)
        letter = _LETTERS[i] if i < len(_LETTERS) else number  # past Z, numbers go on where letters end
        written = {"A": letter, "a": letter.lower(), "1": number}
        return re.sub("[Aa1]", lambda found: written[found[0]], self.label)


STYLES: dict[str, OptionsStyle] = {
    "list": OptionsStyle("OPTIONS:", "-"),
    "letters": OptionsStyle("Options:", "(A)"),
    "numbers": OptionsStyle("Options:", "1."),
    "line": OptionsStyle("", "", " / "),
}
_OPENINGS = (
    "",
    "Options:",
    "OPTIONS:",
    "Choices:",
    "Answer choices:",
    "Possible answers:",
    "Choose one of these:",
    "Pick from:",
    "The candidates are:",
    "Available answers:",
    "One of the following is right:",
    "Select an answer:",
)
_LABELS = ("-", "*", "+", "•", "A.", "A)", "(A)", "[A]", "A:", "a.", "a)", "(a)", "[a]", "1.", "1)", "(1)", "[1]", "1:")
_ENDINGS = ("\n", ";\n", "\n\n")
ANY = tuple(OptionsStyle(*parts) for parts in itertools.product(_OPENINGS, _LABELS, _ENDINGS))


def drawn(name: str, keyed: Keyed) -> OptionsStyle | None:
    """The style of a name: `any` draws one, `none` is None."""
    if name == "any":
        return keyed.choice(ANY)
    return None if name == "none" else STYLES[name]


def options_of(value: Any) -> tuple[list[str], list[str]]:
    """Texts and labels of a row's options; raises RowError for what is none.

    They are a list, `{text: [...], label: [...]}`, or `{A: text, B: text}`.
    """
    labels: Any = []
    if isinstance(value, Mapping) and isinstance(value.get("text"), list | tuple):
        value, labels = value["text"], value.get("label") or []
    elif isinstance(value, Mapping) and all(isinstance(text, str) for text in value.values()):
        value, labels = list(value.values()), list(value)
    if not isinstance(value, list | tuple) or not value:
        raise RowError("wrong type", f"options is {kind(value)}; expected a list of texts that is not empty")
    return [str(option) for option in value], [str(label) for label in labels]


def option_meant(value: Any, options: Sequence[str], labels: Sequence[str]) -> int | None:
    """Which option a value is: its text, its label or (a number) its place from 0; None for none of them."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if 0 <= value < len(options) and not labels else _place(str(value), labels)
    if not isinstance(value, str):
        return None
    found = _place(value.strip(), [option.strip() for option in options])
    return _place(value.strip(), labels) if found is None else found


def _place(value: str, known: Sequence[str]) -> int | None:
    return list(known).index(value) if value in known else None
