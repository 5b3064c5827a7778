"""Tasks in many phrasings: which template words a row in which epoch, in which style.

The choice is a function of (seed, task, row, epoch). Each row goes through its task's templates in an order of its
own, one an epoch, so that it meets all of them before it meets one again; a template that skips the row gives way to
the next in that order. Nothing is stored, so a run can be resumed, split over hosts or read from the middle.
"""

import contextlib
import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxtune.config_data import SourceConfig
from jaxtune.data.layouts.formats import Layout
from jaxtune.data.records import Conversation, Message, NothingToLearn, RowError
from jaxtune.data.row_values import near
from jaxtune.data.wording import fewshot, template_files
from jaxtune.data.wording.fewshot import CountTokens, Exemplars
from jaxtune.data.wording.keyed import Keyed
from jaxtune.data.wording.wordings import AsGiven, Fields, Pair, Wording

SKIPPED = "skipped by every template"
_SLOT = re.compile(r"\{(\w+)\}")
_NO_TURNS = ("fields", "text")  # formats without question and answer
_VERSION = "1"  # of everything between fields and text: raise it when the code's answer changes


@dataclasses.dataclass(frozen=True)
class Phrasing:
    """The templates of a task in one style; words fields into conversations. Travels to worker processes.

    `source` and `file` name it in errors. `slots` are values for {name} in templates, or in the rows themselves where
    there are no templates: `slots_in_rows` says that the rows name them as they stand in their files. `shots` exemplars
    are shown at most, 0 outside few-shot styles.
    """

    source: str
    file: str
    task: str
    style: str
    seed: int
    wordings: tuple[Wording, ...]
    slots: Mapping[str, tuple[str, ...]]
    slots_in_rows: bool
    system: str | None
    shots: int
    shot_tokens: int
    count_tokens: CountTokens

    @functools.cached_property
    def fills_slots_only(self) -> bool:
        """Whether rows stay the conversations that their format makes, but for their slots."""
        return not self.wordings

    @functools.cached_property
    def reads_fields(self) -> bool:
        """Whether templates word the rows' fields, rather than a single turn that the format gives."""
        return not any(isinstance(wording, AsGiven) for wording in self.wordings)

    @functools.cached_property
    def takes_exemplars(self) -> bool:
        """Whether other rows of the source are shown in prompts."""
        return any(self._shots_of(wording) for wording in self.wordings)

    @functools.cached_property
    def varies(self) -> bool:
        """Whether a row may read differently in another epoch."""
        slotted = any(len(values) > 1 for values in self.slots.values())
        return len(self.wordings) > 1 or slotted or self.takes_exemplars or any(w.random for w in self.wordings)

    @functools.cached_property
    def key(self) -> str:
        """Names everything that decides what a row becomes, but for the rows themselves."""
        parts = (
            *(_VERSION, self.task, self.style, str(self.seed), str(self.system), str(self.shots)),
            str(self.shot_tokens if self.takes_exemplars else 0),
            repr(sorted(self.slots.items())),
            *(f"{wording.name}\0{wording.key}\0{wording.frame}\0{wording.shots}" for wording in self.wordings),
        )
        return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def check(self, rows: Sequence[Fields]) -> None:
        """Raises ValueError for a template or a slot that these (first) rows have no field or place for."""
        found = list(dict.fromkeys(name for fields in rows for name in _with_plain_names(fields)))
        for wording in self.wordings:
            for field in sorted(wording.needs - set(self.slots) - set(found)):
                raise ValueError(
                    f"{self.source}: template {wording.name!r} of {self.file} names {field!r}, which its rows do not "
                    f"have{near(field, found)}; they have {', '.join(found) or 'nothing'}; map the "
                    f"column with columns.{field}=COLUMN, or choose other templates"
                )
        if rows and self.slots_in_rows:
            self._check_slots_of(rows)

    def _check_slots_of(self, rows: Sequence[Fields]) -> None:
        """Raises ValueError for a slot that stands in the text of none of these rows."""
        named = sorted({name for text in _texts([self.system, *rows]) for name in _SLOT.findall(text)})
        for slot in sorted(set(self.slots) - set(named)):
            raise ValueError(
                f"{self.source}: slots.{slot}: none of the first {len(rows)} rows names {{{slot}}}"
                f"{near(slot, named)}; they name {', '.join(named[:10]) or 'nothing'}; put it right, or remove it"
            )

    def check_count(self, rows: int) -> None:
        """Raises ValueError when there are too few rows to show exemplars from."""
        wanted = max((self._shots_of(wording) for wording in self.wordings), default=0)
        if wanted >= rows and wanted:
            raise ValueError(
                f"{self.source}: style {self.style} shows {wanted} exemplars beside each question, so it needs at "
                f"least {wanted + 1} rows, and it has {rows}; lower `shots`, or choose another style"
            )

    def order(self, row: int, epoch: int) -> list[int]:
        """Numbers of the templates in the order in which they are tried for a row in an epoch."""
        count = len(self.wordings)
        if count == 1:
            return [0]
        own = Keyed(self.seed, self.task, row).order(count)
        first = epoch % count
        return own[first:] + own[:first]

    def chosen(self, row: int, epoch: int) -> str:
        """The name of the template tried first."""
        return self.wordings[self.order(row, epoch)[0]].name

    def conversations(self, fields: Fields, *, row: int, epoch: int, exemplars: Exemplars) -> list[Conversation]:
        """The row's fields in this epoch's wording; raises RowError or NothingToLearn."""
        keyed = Keyed(self.seed, self.task, row, epoch)
        slots = self._slot_values(keyed)
        named = self._with_slots(fields, slots)
        wording, pair = self._pair(named, row=row, epoch=epoch, keyed=keyed)
        return [self._conversation(wording, pair, named, slots, row=row, keyed=keyed, exemplars=exemplars)]

    def questions(self, fields: Fields, *, row: int) -> list[str]:
        """What the row asks in each of as many epochs as there are templates, exemplars aside: in every wording."""
        out = []
        for epoch in range(len(self.wordings)):
            keyed = Keyed(self.seed, self.task, row, epoch)
            with contextlib.suppress(RowError, NothingToLearn):  # told of when the row's turn comes
                named = self._with_slots(fields, self._slot_values(keyed))
                out.append(self._pair(named, row=row, epoch=epoch, keyed=keyed)[1].input)
        return out

    def _pair(self, named: Fields, *, row: int, epoch: int, keyed: Keyed) -> tuple[Wording, Pair]:
        """The row's template in an epoch, and what it makes; raises RowError or NothingToLearn."""
        for at in self.order(row, epoch):
            wording = self.wordings[at].settled(keyed)
            try:
                pair = wording.render(named, keyed)
            except RowError as error:
                raise RowError(error.reason, f"template {wording.name!r} of {self.file}: {error}") from error
            if pair is not None and pair.input.strip() and pair.target.strip():
                return wording, pair
        raise NothingToLearn(SKIPPED)

    def fill(self, conversation: Conversation, *, row: int, epoch: int) -> Conversation:
        """The conversation with its {slots} filled, the same value wherever one stands."""
        values = self._slot_values(Keyed(self.seed, self.task, row, epoch))
        return dataclasses.replace(
            conversation,
            messages=tuple(dataclasses.replace(m, content=_filled(m.content, values)) for m in conversation.messages),
        )

    def _conversation(
        self,
        wording: Wording,
        pair: Pair,
        fields: Fields,
        slots: Mapping[str, str],
        *,
        row: int,
        keyed: Keyed,
        exemplars: Exemplars,
    ) -> Conversation:
        meta: dict[str, Any] = {"template": wording.name, "style": self.style}
        asked, shots = pair.input, self._shots_of(wording)
        if shots:
            shown = dataclasses.replace(
                exemplars, fields=lambda other: self._with_slots(exemplars.fields(other), slots)
            )
            pairs = fewshot.choose(shown, wording, fields, pair, row=row, shots=shots, keyed=keyed)
            asked = fewshot.framed(wording, pairs, asked, budget=self.shot_tokens, count_tokens=self.count_tokens)
            meta["query"] = pair.input
        system = fields.get("system") if "system" not in wording.needs else None
        system = system if isinstance(system, str) and system.strip() else self.system
        head = (Message("system", system),) if system else ()
        return Conversation((*head, Message("user", asked), Message("assistant", pair.target)), meta)

    def _with_slots(self, fields: Fields | None, slots: Mapping[str, str]) -> Any:
        """The fields as templates see them: slots among them, or filled where the rows' own texts have them."""
        if fields is None:
            return None
        if not self.reads_fields:
            return {name: _filled(value, slots) for name, value in fields.items()}
        plain = _with_plain_names(fields)
        return {**plain, **slots} if slots else plain

    def _shots_of(self, wording: Wording) -> int:
        return self.shots if wording.shots is None else min(self.shots, wording.shots)

    def _slot_values(self, keyed: Keyed) -> dict[str, str]:
        return {name: keyed.choice(values) for name, values in self.slots.items()}


def load_phrasing(
    config: SourceConfig,
    *,
    task: str,
    style: str,
    seed: int,
    layout: Layout,
    count_tokens: CountTokens,
    template_name: str | None = None,
) -> Phrasing | None:
    """The source's templates in a style (one of them alone when named); None when rows stay as their format has them.

    Raises ValueError, naming source, file and template, for whatever cannot be.
    """
    source = config.id or config.path or task
    if config.templates is None and not config.slots and style == "zero_shot":
        return None
    file = "the rows" if config.templates is None else template_files.name_of(config.templates)
    _check_slots(config, source, file)
    wordings = _wordings(config, source, layout, task=task, style=style)
    if template_name is not None:
        wordings = _named(wordings, template_name, f"{source}: {file}")
    return Phrasing(
        source=source,
        file=file,
        task=task,
        style=style,
        seed=seed,
        wordings=tuple(wordings),
        slots=config.slots,
        slots_in_rows=config.templates is None and ":" not in layout.format,  # a function may write them itself
        system=config.system,
        shots=config.shots if "few_shot" in style else 0,
        shot_tokens=config.shot_tokens,
        count_tokens=count_tokens,
    )


def _check_slots(config: SourceConfig, source: str, file: str) -> None:
    """Raises ValueError for a slot without values, or without a place in any template."""
    for name, values in config.slots.items():
        if not values:
            raise ValueError(f"{source}: slots.{name} has no value; expected at least one")
    if config.slots and config.templates is not None:
        named = template_files.fields_named(config.templates)
        for name in sorted(set(config.slots) - named):
            raise ValueError(
                f"{source}: slots.{name}: no template of {file} names {{{name}}}{near(name, sorted(named))}; they name "
                f"{', '.join(sorted(named)) or 'nothing'}"
            )


def _wordings(config: SourceConfig, source: str, layout: Layout, *, task: str, style: str) -> list[Wording]:
    if config.templates is not None:
        return template_files.load(config.templates, task=task, style=style, source=source)
    if style == "zero_shot":
        return []  # rows stay conversations, with their slots filled
    if style != "few_shot":
        raise ValueError(
            f"{source}: style {style} is made by templates, and this source has none; name a file with `templates` "
            "(builtin:templates/cot.yaml has cot and inverted ones), or choose zero_shot or few_shot"
        )
    if layout.format in _NO_TURNS:
        raise ValueError(
            f"{source}: style few_shot shows questions with their answers, and format {layout.format} has none of its "
            "own; name phrasings with `templates`, or remove few_shot from its styles"
        )
    return [AsGiven()]


def template_names(config: SourceConfig, task: str) -> list[str]:
    """Names of the task's templates that fit every one of the source's styles; reads no data."""
    source = config.id or config.path or task
    if config.templates is None:
        raise ValueError(f"{source}: each_template makes a source of each template, and `templates` names none")
    styles = list(config.styles) or ["zero_shot"]
    found = [
        [wording.name for wording in template_files.load(config.templates, task=task, style=style, source=source)]
        for style in styles
    ]
    shared = [name for name in found[0] if all(name in names for names in found)]
    if not shared:
        raise ValueError(f"{source}: each_template finds no template that fits all of the styles {', '.join(styles)}")
    return shared


def _named(wordings: list[Wording], name: str, where: str) -> list[Wording]:
    found = [wording for wording in wordings if wording.name == name]
    if not found:
        names = [wording.name for wording in wordings]
        raise ValueError(f"{where}: no template {name!r}{near(name, names)}; found {', '.join(names)}")
    return found


def _with_plain_names(fields: Fields) -> Fields:
    """The fields, those with hyphens under a name with underscores too, since templates cannot write hyphens."""
    renamed = {name.replace("-", "_"): value for name, value in fields.items() if "-" in name}
    return {**renamed, **fields} if renamed else fields


def _texts(value: Any) -> Iterator[str]:
    """Every text in a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item)


def _filled(text: str, values: Mapping[str, str]) -> str:
    return _SLOT.sub(lambda found: values.get(found[1], found[0]), text) if "{" in text else text
