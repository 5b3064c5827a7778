"""Templates of promptsource: Jinja with `|||` between input and target, one YAML file a data set.

Read as promptsource reads them, with two differences: they run in an immutable sandbox, and the filters `choice` and
`random` draw from a key of (seed, task, row, epoch), so that data can be made again.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.filters
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox
import yaml

from jaxtune.data.records import RowError
from jaxtune.data.wording.keyed import Keyed
from jaxtune.data.wording.wordings import PLAIN_FRAME, Fields, Frame, Pair, Wording

SEPARATOR = "|||"
_PROTECTED = "\ue0f2\ue0f2\ue0f2"  # stands for the separator inside data; private-use, so no data has it
_DRAWING = {"choice", "random"}
_KEYED = "_keyed"  # the variable that filters draw from


class _Loader(yaml.SafeLoader):
    """The safe loader with promptsource's two tags, each a mapping."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("!Template", _mapping)
_Loader.add_constructor("!TemplateMetadata", _mapping)


def is_promptsource(text: str) -> bool:
    """Whether a YAML text is promptsource's: its tags tell, or templates in Jinja where a program dropped the tags."""
    return "!Template" in text or re.search(r"^\s+jinja:", text, re.MULTILINE) is not None


def read(text: str, *, file: str, truncate: int | None = None) -> "list[PromptsourceWording]":
    """The file's templates, sorted by name; `truncate` cuts each printed expression, as P3 was made with 2,048.

    Raises ValueError naming file and template for what is no template.
    """
    try:
        loaded = yaml.load(text, Loader=_Loader)  # a SafeLoader with two more tags
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not readable as YAML: {error}") from error
    templates = loaded.get("templates") if isinstance(loaded, Mapping) else None
    if not isinstance(templates, Mapping) or not templates:
        raise ValueError(f"{file}: expected a map `templates` of promptsource templates; found none")
    wordings = []
    for key, entry in templates.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("jinja"), str):
            raise ValueError(f"{file}: template {key}: expected a mapping with `name` and `jinja`")
        wordings.append(_read_entry(entry, str(entry.get("name") or key), file, truncate))
    return sorted(wordings, key=lambda wording: wording.name)


def _read_entry(entry: Mapping[str, Any], name: str, file: str, truncate: int | None) -> "PromptsourceWording":
    choices, metadata = entry.get("answer_choices") or None, entry.get("metadata") or {}
    environment = _environment(truncate)
    try:
        trees = [environment.parse(text) for text in (entry["jinja"], choices) if text is not None]
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{file}: template {name!r}, line {error.lineno}: {error.message}") from error
    given = {"answer_choices"} if choices is not None else set()
    return PromptsourceWording(
        name=name,
        jinja=entry["jinja"],
        answer_choices=choices,
        choices_in_prompt=bool(metadata.get("choices_in_prompt")),
        original_task=bool(metadata.get("original_task")),
        truncate=truncate,
        needs=frozenset(set().union(*map(jinja2.meta.find_undeclared_variables, trees)) - given),
        random=any(map(_draws, trees)),
    )


def fitting(wordings: "Sequence[PromptsourceWording]", style: str) -> "list[Wording]":
    """Those of a style: without options, no choices in the prompt; inverted, not the data set's original task."""
    if style.startswith("cot"):
        return []
    paired = [w for w in wordings if w.is_pair]
    if style.endswith("no_options"):
        return [w for w in paired if not w.choices_in_prompt]
    if style.startswith("inverted"):
        return [w for w in paired if not w.original_task]
    return list(paired)


@dataclasses.dataclass(frozen=True)
class PromptsourceWording:
    """One template; it is compiled where it is first used, since thousands travel and few may be drawn."""

    name: str
    jinja: str
    answer_choices: str | None
    choices_in_prompt: bool
    original_task: bool
    truncate: int | None
    needs: frozenset[str]
    random: bool
    frame: Frame = PLAIN_FRAME
    shots: int | None = None

    @property
    def key(self) -> str:
        return f"{self.jinja}\0{self.answer_choices}\0{self.truncate}"

    @property
    def is_pair(self) -> bool:
        """Whether the template has a separator, so that there is a target to learn."""
        return SEPARATOR in self.jinja

    def settled(self, keyed: Keyed) -> Wording:
        return self

    def render(self, fields: Fields, keyed: Keyed) -> Pair | None:
        """Input and target; None when the template skips this row. Raises RowError for one it cannot word."""
        if "answer_choices" in fields:
            raise RowError(
                "field answer_choices", "the row has a field answer_choices, which templates make themselves"
            )
        missing = self.needs - fields.keys()
        if missing:
            raise RowError("missing field", f"the row has no {sorted(missing)[0]!r}; it has {', '.join(fields)}")
        values = {name: _protected(value) for name, value in fields.items()}
        values[_KEYED] = keyed
        try:
            if self.answer_choices is not None:
                choices = _compiled(self.answer_choices, self.truncate).render(values).split(SEPARATOR)
                values["answer_choices"] = [choice.strip() for choice in choices]
            text = _compiled(self.jinja, self.truncate).render(values)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise RowError("refused by the template", f"{type(error).__name__}: {error}") from error
        parts = [_restored(part.strip()) for part in text.split(SEPARATOR)]
        return Pair(parts[0], parts[1]) if len(parts) == 2 and parts[0] and parts[1] else None


def _draws(tree: jinja2.nodes.Template) -> bool:
    """Whether a template uses a filter that draws, also as `map("choice")`."""
    named = {found.name for found in tree.find_all(jinja2.nodes.Filter)}
    mapped = {found.value for found in tree.find_all(jinja2.nodes.Const)} if "map" in named else set()
    return bool((named | mapped) & _DRAWING)


@functools.lru_cache(maxsize=8192)
def _compiled(text: str, truncate: int | None) -> jinja2.Template:
    return _environment(truncate).from_string(text)


@functools.cache
def _environment(truncate: int | None) -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        finalize=None if truncate is None else lambda value: _cut(value, truncate)
    )
    environment.globals["zip"] = zip
    environment.filters.update(
        highlight=lambda text: f"<span style='color: #F08080'>{text}</span>",
        most_frequent=_most_frequent,
        choice=_choice,
        random=_choice,
    )
    return environment


def _cut(value: Any, length: int) -> Any:
    """What is printed of a value: at most `length` characters, cut at a word, as Jinja's `truncate` does."""
    text = value if isinstance(value, str) else str(value)
    if len(text) <= length + 5:  # the filter's leeway
        return value
    return text[: length - 3].rsplit(" ", 1)[0] + "..."


@jinja2.pass_context
def _choice(context: jinja2.runtime.Context, items: Any) -> Any:
    found = list(items)
    if not found:
        raise jinja2.TemplateError("choice and random need at least one item")
    return context[_KEYED].choice(found)


def _most_frequent(items: Sequence[Any]) -> list[Any]:
    """The items that stand there most often, in the order of their first places."""
    counts = collections.Counter(items)
    most = max(counts.values(), default=0)
    return [item for item, count in counts.items() if count == most]


def _protected(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(SEPARATOR, _PROTECTED) if SEPARATOR in value else value
    if isinstance(value, Mapping):
        return {key: _protected(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_protected(inner) for inner in value]
    return value


def _restored(text: str) -> str:
    return text.replace(_PROTECTED, SEPARATOR) if _PROTECTED in text else text
