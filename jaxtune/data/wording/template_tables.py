"""Tables of templates: plain texts with {field} placeholders, ours and those exported from FLAN.

A row of a table is a mapping; `_KEYS` says what it may hold. {options_} stands for the block of answers to choose
from, literal braces are doubled.
"""

import dataclasses
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxtune.data.records import RowError
from jaxtune.data.row_values import kind, near
from jaxtune.data.wording.keyed import Keyed
from jaxtune.data.wording.options import STYLES, OptionsStyle, drawn, option_meant, options_of
from jaxtune.data.wording.wordings import PLAIN_FRAME, Fields, Frame, Pair, Wording

OPTIONS = "options_"
_ANSWERS = ("answer", "label", "output", "target")  # the fields whose numbers are options
KINDS = ("zero-shot", "few-shot", "inverted", "cot")
_FRAME_KEYS = tuple(field.name for field in dataclasses.fields(Frame))
_ALIASES = {"family": "task", "inputs": "input", "targets": "target"}  # FLAN's names
_IGNORED = ("idx", "in_template_mix")  # FLAN's, of no use here: idx names a template, every template may be shown
_KEYS = ("name", "task", "kind", "input", "target", "options", "choices", "lists", "shots", *_FRAME_KEYS)

Segments = tuple[tuple[str, str | None], ...]  # literal text, and the field after it


@dataclasses.dataclass(frozen=True)
class TableWording:
    """One template of a table."""

    name: str
    task: str
    kind: str
    input: Segments
    target: Segments
    options: str = "list"
    choices: tuple[str, ...] = ()
    lists: tuple[tuple[str, Segments, int | None], ...] = ()
    frame: Frame = PLAIN_FRAME
    shots: int | None = None
    style: OptionsStyle | None = None

    @property
    def needs(self) -> frozenset[str]:
        named = {field for _, field in (*self.input, *self.target) if field is not None}
        if OPTIONS in named and not self.choices:
            named.add("options")
        return frozenset(named - {OPTIONS})

    @property
    def random(self) -> bool:
        return self.options == "any" and any(field == OPTIONS for _, field in self.input)

    @property
    def key(self) -> str:
        return repr((self.input, self.target, self.options, self.choices, self.lists))

    def settled(self, keyed: Keyed) -> Wording:
        if not any(field == OPTIONS for _, field in self.input):
            return self
        return dataclasses.replace(self, style=drawn(self.options, keyed))

    def render(self, fields: Fields, keyed: Keyed) -> Pair | None:
        """Input and target; raises RowError where the row lacks a field."""
        texts, labels = self._options(fields)
        target = [literal + self._answer(fields, name, texts, labels) for literal, name in self.target]
        asked = []
        for literal, name in self.input:
            asked.append(literal)
            if name == OPTIONS:
                asked.append(self.style.block(texts) if self.style is not None else "")
            elif name is not None:
                meant = option_meant(_value(fields, name), texts, labels) if _is_place(fields, name) else None
                asked.append(self._text(fields, name) if meant is None else texts[meant])
        return Pair("".join(asked), "".join(target))

    def without_options(self) -> "TableWording":
        """The same template with the options' placeholder taken out, and its line where it stands alone."""
        if not any(field == OPTIONS for _, field in self.input):
            return self
        text = "".join(_escaped(literal) + ("" if field is None else f"{{{field}}}") for literal, field in self.input)
        text = re.sub(r"(?m)^[^{}\n]*\{options_\}[ \t]*(\n|\Z)", "", text)  # a line with no other field
        text = re.sub(r"[ \t]*(\(\{options_\}\)|\[\{options_\}\]|\{options_\})", "", text)
        return dataclasses.replace(self, input=segments(text.rstrip("\n")), options="none")

    def _options(self, fields: Fields) -> tuple[Sequence[str], Sequence[str]]:
        if self.choices:
            return self.choices, ()
        if fields.get("options") is None:
            return (), ()
        return options_of(fields["options"])

    def _answer(self, fields: Fields, name: str | None, texts: Sequence[str], labels: Sequence[str]) -> str:
        """A field of the target: an option as its style answers it, of several right answers the first."""
        if name is None:
            return ""
        value = _value(fields, name)
        if isinstance(value, list | tuple) and value and all(isinstance(part, str) for part in value):
            value = value[0]
        asked_for = isinstance(value, str) or _is_place(fields, name)
        meant = option_meant(value, texts, labels) if texts and asked_for else None
        if meant is not None:
            return texts[meant] if self.style is None else self.style.answer(texts, meant)
        return self._text({name: value}, name)

    def _text(self, fields: Fields, name: str) -> str:
        value = _value(fields, name)
        if isinstance(value, str):
            return value
        for listed, item, most in self.lists:
            if listed == name:
                return "".join(_item(item, part, n) for n, part in enumerate(_listed(name, value)[:most], 1))
        if value is None:
            return ""
        if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
            return "\n".join(value)
        if isinstance(value, Mapping | list | tuple):
            raise RowError(
                "wrong type", f"{name} is {kind(value)}; expected text, or an entry of the template's `lists`"
            )
        return str(value)


def read(rows: Iterable[Mapping[str, Any]], *, file: str) -> list[TableWording]:
    """The table's templates; raises ValueError naming file and template for what is none."""
    found = []
    for n, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise ValueError(f"{file}: template {n}: found {kind(row)}; expected a mapping with input and target")
        name = str(row.get("name") or f"{row.get('task', row.get('family', '*'))}/{row.get('idx', n)}")
        try:
            found.append(_read_row(row, name))
        except ValueError as error:
            raise ValueError(f"{file}: template {name!r}: {error}") from error
    names = [wording.name for wording in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    return found if twice is None else [dataclasses.replace(w, name=f"{w.name}#{i}") for i, w in enumerate(found)]


def fitting(wordings: Sequence[TableWording], style: str, task: str) -> list[Wording]:
    """Those of a task (or of every task) and of the kind that a style asks for; few-shot ones where there are any."""
    mine = [wording for wording in wordings if wording.task in (task, "*")]
    kinds = {"zero": "zero-shot", "few_": "few-shot", "inve": "inverted", "cot": "cot", "cot_": "cot"}
    wanted = kinds[style[:4]]
    chosen = [wording for wording in mine if wording.kind == wanted]
    if wanted == "few-shot" and not chosen:
        chosen = [wording for wording in mine if wording.kind == "zero-shot"]
    return [wording.without_options() for wording in chosen] if style.endswith("no_options") else list(chosen)


def segments(text: str) -> Segments:
    """`Is {a} {{so}}?` -> (("Is ", "a"), (" {so}?", None)); raises ValueError for broken braces."""
    out: list[tuple[str, str | None]] = []
    before = ""
    for literal, field, layout, conversion in string.Formatter().parse(text):
        before += literal
        if field is None:  # a doubled brace ends a piece without a field
            continue
        if not re.fullmatch(r"\w+", field) or layout or conversion:
            shown = field + (f"!{conversion}" if conversion else "") + (f":{layout}" if layout else "")
            raise ValueError(f"{{{shown}}} is no field; expected a name in braces, and literal braces doubled")
        out.append((before, field))
        before = ""
    return (*out, (before, None)) if before or not out else tuple(out)


def _read_row(row: Mapping[str, Any], name: str) -> TableWording:
    given = {_ALIASES.get(key, key): value for key, value in row.items() if key not in _IGNORED}
    for key in given:
        if key not in _KEYS:
            raise ValueError(f"unknown key {key!r}{near(key, _KEYS)}; expected {', '.join(_KEYS)}")
    for key in ("input", "target", "task", "kind", *_FRAME_KEYS):
        if key in given and not isinstance(given[key], str):
            raise ValueError(f"{key} is {kind(given[key])}; expected text")
    if not given.get("input") or not given.get("target"):
        raise ValueError("expected both input and target")
    style = given.get("options", "list")
    if style not in ("none", "any", *STYLES):
        raise ValueError(f"options: found {style!r}; expected none, {', '.join(STYLES)} or any")
    choices = given.get("choices", ())
    if not isinstance(choices, list | tuple):
        raise ValueError(f"choices is {kind(choices)}; expected a list of answers")
    wording = TableWording(
        name=name,
        task=given.get("task", "*"),
        kind=_kind(given.get("kind", "zero-shot")),
        input=segments(given["input"]),
        target=segments(given["target"]),
        options=style,
        choices=tuple(map(str, choices)),
        lists=_lists(given.get("lists", {})),
        frame=_frame({key: given[key] for key in _FRAME_KEYS if key in given}),
        shots=None if given.get("shots") is None else int(given["shots"]),
    )
    return wording.without_options() if style == "none" else wording


def _kind(text: str) -> str:
    plain = text.lower().replace("_", "-").replace("zeroshot", "zero-shot").replace("fewshot", "few-shot")
    plain = {"inversion": "inverted", "chain-of-thought": "cot"}.get(plain, plain)
    if plain not in KINDS:
        raise ValueError(f"kind: found {text!r}{near(text, KINDS)}; expected {', '.join(KINDS)}")
    return plain


def _frame(given: dict[str, str]) -> Frame:
    if "input_pattern" in given:
        given["input_pattern"] = given["input_pattern"].replace("{{inputs}}", "{inputs}")  # FLAN fills it twice
        if "{inputs}" not in given["input_pattern"]:
            raise ValueError("input_pattern has no {inputs}, where exemplars and question are to stand")
    return Frame(**given)


def _lists(given: Any) -> tuple[tuple[str, Segments, int | None], ...]:
    """`{field: text for one item}` or `{field: {item: text, take: most}}`."""
    if not isinstance(given, Mapping):
        raise ValueError(f"lists is {kind(given)}; expected a mapping from a field to the text of one item")
    out = []
    for field, item in given.items():
        item = {"item": item} if isinstance(item, str) else item
        if not isinstance(item, Mapping) or not isinstance(item.get("item"), str) or set(item) - {"item", "take"}:
            raise ValueError(f"lists.{field}: expected a text for one item, or {{item: TEXT, take: NUMBER}}")
        out.append((field, segments(item["item"]), None if item.get("take") is None else int(item["take"])))
    return tuple(out)


def _item(item: Segments, part: Any, number: int) -> str:
    values = {**(part if isinstance(part, Mapping) else {"item": part}), "number": number}
    return "".join(literal + ("" if name is None else _plain(_value(values, name))) for literal, name in item)


def _listed(name: str, value: Any) -> Sequence[Any]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise RowError("wrong type", f"{name} is {kind(value)}; expected a list")
    return value


def _value(fields: Fields, name: str) -> Any:
    if name not in fields:
        raise RowError(
            "missing field", f"the row has no {name!r}{near(name, list(fields))}; it has {', '.join(fields)}"
        )
    return fields[name]


def _is_place(fields: Fields, name: str) -> bool:
    """Whether a field may hold the number of an option, rather than a number of its own."""
    return name in _ANSWERS and isinstance(_value(fields, name), int)


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        value = value[0] if value else ""
    return "" if value is None else str(value)


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
