"""Rows to training examples: parse, convert or word, render, shift, and keep within the length.

`RowReader` is the one path from a source's row to what is packed; the length pass, the stream and the audit use it
alike. Shifting comes before packing: of n tokens the first n - 1 are inputs and the last n - 1 are targets, so an
example takes n - 1 positions and its last token is a target only.
"""

import copy
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.data.chat.rendering import ChatTemplate, Rendered
from jaxtune.data.files.readers import Source
from jaxtune.data.gate import Gate
from jaxtune.data.layouts.formats import Layout
from jaxtune.data.packing import Example
from jaxtune.data.reasoning import apply_reasoning, marked_answers
from jaxtune.data.records import Conversation, Message, NothingToLearn, RowError
from jaxtune.data.row_results import HELD_OUT, NOT_TRAINED, OVERLONG, Examined, Hashes, RowResult, Waiting, fail
from jaxtune.data.shortening import cut, pieces, rounds_of, without_end
from jaxtune.data.wording.content import content_hashes, fields_hash, question_hash, text_hashes
from jaxtune.data.wording.fewshot import Exemplars
from jaxtune.data.wording.tasks import Phrasing


@dataclasses.dataclass(frozen=True)
class ExampleOptions:
    """How rows become examples; fields as in the configuration.

    With an `encoder_length` examples are pairs for an encoder-decoder, whose decoder has `max_length`. Raises
    ValueError for options that make no sense together.
    """

    max_length: int
    train_on: str = "assistant"
    overlong: str = "drop"
    loss_weighting: str = "token"
    reasoning: str = "keep"
    encoder_length: int | None = None

    def __post_init__(self) -> None:
        if self.encoder_length is not None and self.overlong == "split":
            raise ValueError(
                "data.overlong: found split; expected drop, error, truncate_turns or truncate_right for an "
                "encoder-decoder: each answer of a conversation is a pair of its own already, and an answer cut in two "
                "has no question for its second half"
            )


class RowReader:
    """One source with its layout, template and options: rows in, examples out. Travels to worker processes.

    `phrasing` words rows by the templates of a task; a few-shot one takes exemplars from `exemplar_rows` (int64; None:
    all rows). `excluded` are sorted uint64 content hashes of held-out examples: rows that say the same give none.
    `gate` says what else is left out.

    `sides` is how many lengths an example has. `remedy` says what to do about lost tokens.
    """

    sides = 1
    remedy = "raise data.max_length or choose data.overlong=split (loses nothing), truncate_turns or truncate_right"

    def __init__(
        self,
        source: Source,
        layout: Layout,
        template: ChatTemplate,
        *,
        text_template: ChatTemplate,
        options: ExampleOptions,
        phrasing: Phrasing | None = None,
        exemplar_rows: np.ndarray | None = None,
        excluded: np.ndarray | None = None,
        gate: Gate | None = None,
    ) -> None:
        self.source, self.layout, self.template = source, layout, template
        self.text_template, self.options = text_template, options
        self.phrasing, self.exemplar_rows, self.excluded = phrasing, exemplar_rows, excluded
        self.gate = Gate() if gate is None else gate
        if phrasing is not None:
            phrasing.check_count(len(source) if exemplar_rows is None else len(exemplar_rows))

    def gated(self, gate: Gate) -> "RowReader":
        """The same reader with another gate."""
        other = copy.copy(self)
        other.gate = gate
        return other

    @property
    def varies(self) -> bool:
        """Whether what a row becomes depends on the epoch."""
        return self.phrasing is not None and self.phrasing.varies

    @property
    def key(self) -> str:
        """Names everything that decides how rows are worded and which are left out."""
        wording = "" if self.phrasing is None else self.phrasing.key
        parts = wording.encode(), *map(_bytes, self._chosen_rows()), self.gate.key.encode()
        return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()

    def _chosen_rows(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        shown = self.phrasing is not None and self.phrasing.takes_exemplars
        return self.exemplar_rows if shown else None, self.excluded

    def read(self, rows: Sequence[int], epochs: Sequence[int] | None = None) -> list[RowResult]:
        """What becomes of each row in its epoch (default 0); never raises for a row, whose error is in its result."""
        return [one.result for one in self.examine(rows, epochs)]

    def examine(self, rows: Sequence[int], epochs: Sequence[int] | None = None) -> list[Examined]:
        """As `read`, with what each row says."""
        found: list[Examined] = []
        kept: list[Waiting] = []
        left_out: list[Waiting] = []
        for row, epoch in zip(rows, [0] * len(rows) if epochs is None else epochs, strict=True):
            one = Examined(RowResult([]), [])
            found.append(one)
            try:
                self._sort(one, row, epoch, kept, left_out)
            except RowError as error:
                fail(one.result, error, self.source.where(row))
            except NothingToLearn as nothing:
                one.result.lose(nothing.reason, "valid")
        self._learn(kept)
        for (result, *_), rendered in zip(left_out, self._render([w.conversation for w in left_out]), strict=True):
            result.left_out_tokens += 0 if isinstance(rendered, RowError) else len(rendered.tokens)
        return found

    def _sort(self, one: Examined, row: int, epoch: int, kept: list[Waiting], left_out: list[Waiting]) -> None:
        """Puts the row's conversations among those that are kept or left out; raises RowError or NothingToLearn."""
        result = one.result
        try:
            raw = self.source.row(row)
        except RowError as error:
            return fail(result, error, self.source.where(row), stage="parsed")
        of_row = self.gate.why_row(row)
        for conversation, held_out in self._told(raw, row, epoch):
            thinned, removed = apply_reasoning(conversation, self.options.reasoning)
            one.conversations.append(thinned)
            reason = HELD_OUT if held_out else of_row or self.gate.why(thinned)
            if reason is not None:
                result.lose(reason, "kept")
                left_out.append(Waiting(result, row, thinned))
                continue
            result.reasoning_removed += removed
            result.reasoning_left += marked_answers(thinned, self.options.reasoning)
            kept.append(Waiting(result, row, thinned))
        return None

    def _learn(self, waiting: Sequence[Waiting]) -> None:
        """Appends to each (result, row, conversation)'s result what the conversation gives."""
        for (result, row, conversation), rendered in zip(waiting, self._render([c for *_, c in waiting]), strict=True):
            if isinstance(rendered, RowError):
                fail(result, rendered, self.source.where(row))
            elif not rendered.weights[1:].any():
                result.lose(NOT_TRAINED, "valid")
                result.lost_tokens += len(rendered.tokens)
            else:
                self._add(result, row, conversation, rendered)

    def shown(self, row: int) -> str:
        """The row's first example as the model sees it, with « » around what is trained; raises RowError."""
        rendered = self.render(self.conversations(row)[0])
        pieces, at = [], 0
        for start, end, _ in sorted(rendered.spans):
            pieces += [rendered.text[at:start], "«", rendered.text[start:end], "»"]
            at = end
        return "".join([*pieces, rendered.text[at:]])

    def conversations(self, row: int, epoch: int = 0) -> list[Conversation]:
        """The row's conversations in an epoch; raises RowError or NothingToLearn, as for a row that is held out."""
        kept = [conversation for conversation, held_out in self._told(self.source.row(row), row, epoch) if not held_out]
        if not kept:
            raise NothingToLearn(HELD_OUT)
        return kept

    def hashes(self, row: int) -> Hashes:
        """What the row says, for other readers to leave out; raises RowError or NothingToLearn."""
        raw = self.source.row(row)
        whole: set[int] = set()
        asked: list[str] = []
        if self.phrasing is None or self.phrasing.fills_slots_only:
            for conversation, _ in self._worded(raw, row, 0):
                whole.update(content_hashes(conversation))
                asked += _questions(conversation)
        else:
            for fields in self._fields(raw):
                asked += self.phrasing.questions(fields, row=row)
                whole.add(fields_hash(fields))
            whole.update(map(question_hash, asked))
        return Hashes(frozenset(whole), frozenset(text_hashes([raw, *asked])), fields_hash(raw))

    def _told(self, raw: Mapping[str, Any], row: int, epoch: int) -> list[tuple[Conversation, bool]]:
        """The conversations of row `row`, which is `raw`, and whether each says what is held out."""
        worded = self._worded(raw, row, epoch)
        if self.excluded is None or not len(self.excluded):
            return [(conversation, False) for conversation, _ in worded]
        rest = [raw] if len(worded) == 1 else []  # one conversation of several has nothing to do with another's texts
        return [(c, self._says_held_out(c, fields, rest)) for c, fields in worded]

    def _says_held_out(self, conversation: Conversation, fields: Mapping[str, Any] | None, rest: Sequence[Any]) -> bool:
        if self._is_held_out(content_hashes(conversation, fields)):
            return True
        answers = [m.content for m in conversation.messages if m.role in ("assistant", "system")]
        return self._is_held_out([*text_hashes([*_questions(conversation), *rest], answers)])

    def _worded(
        self, raw: Mapping[str, Any], row: int, epoch: int
    ) -> list[tuple[Conversation, Mapping[str, Any] | None]]:
        """The conversations of row `row`, which is `raw`, each with the fields that templates worded, if any."""
        if row in self.gate.corrected:
            return [(Conversation(self.gate.corrected[row]), None)]
        if self.phrasing is None:
            return [(conversation, None) for conversation in self.layout.convert(raw)]
        if self.phrasing.fills_slots_only:
            converted = self.layout.convert(raw)
            return [(self.phrasing.fill(conversation, row=row, epoch=epoch), None) for conversation in converted]
        return [
            (conversation, fields)
            for fields in self._fields(raw)
            for conversation in self.phrasing.conversations(fields, row=row, epoch=epoch, exemplars=self._exemplars())
        ]

    def _fields(self, raw: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """What is worded of a row: its fields, or without templates each of its single turns."""
        if self.phrasing is not None and self.phrasing.reads_fields:
            return [self.layout.fields(raw)]
        return [_single_turn(conversation) for conversation in self.layout.convert(raw)]

    def _exemplars(self) -> Exemplars:
        return Exemplars(self.exemplar_rows, len(self.source), self._exemplar, self._is_held_out)

    def _exemplar(self, row: int) -> Mapping[str, Any] | None:
        """The fields of a row that is to be shown to others; None when it cannot be read, teaches nothing or is left
        out."""
        if self.gate.why_row(row) is not None:
            return None
        try:
            raw = self.source.row(row)
            fields = self._fields(raw)[0]
        except (RowError, NothingToLearn):
            return None
        if self.excluded is None or not len(self.excluded):
            return fields
        return None if self._is_held_out([fields_hash(fields), *text_hashes([raw])]) else fields

    def _is_held_out(self, hashes: Sequence[int]) -> bool:
        if self.excluded is None or not len(self.excluded):
            return False
        wanted = np.array(hashes, np.uint64)  # none where no text is long
        at = np.minimum(np.searchsorted(self.excluded, wanted), len(self.excluded) - 1)
        return bool((self.excluded[at] == wanted).any())

    def render(self, conversation: Conversation) -> Rendered:
        """One conversation with this source's template; raises RowError."""
        return self._template(conversation).render(conversation, train_on=self.options.train_on)

    def _template(self, conversation: Conversation) -> ChatTemplate:
        return self.text_template if conversation.messages[0].role == "text" else self.template

    def _render(self, conversations: list[Conversation]) -> list[Rendered | RowError]:
        out: list[Any] = [None] * len(conversations)
        for template in {id(t): t for t in (self.template, self.text_template)}.values():
            mine = [i for i, c in enumerate(conversations) if self._template(c) is template]
            rendered = template.render_many([conversations[i] for i in mine], train_on=self.options.train_on)
            for i, result in zip(mine, rendered, strict=True):
                out[i] = result
        return out

    def _add(self, result: RowResult, row: int, conversation: Conversation, rendered: Rendered) -> None:
        """Shortens what is over length by the rule, and appends the examples that remain."""
        longest = self.options.max_length + 1
        total = len(rendered.tokens)
        if total <= longest:
            parts = [rendered]
        elif self.options.overlong == "error":
            message = f"{total - 1} positions are more than max_length {longest - 1}; raise it or set data.overlong"
            return fail(result, RowError(OVERLONG, message), self.source.where(row), stage="fits")
        elif self.options.overlong == "drop":
            parts = []
        elif self.options.overlong == "truncate_right":
            parts = [without_end(cut(rendered, 0, longest))]
        elif self.options.overlong == "truncate_turns":
            parts = self._newest_turns(conversation, longest)
        else:
            parts = self._split(conversation, rendered, longest)
        kept = [piece for piece in parts if piece.weights[1:].any()]
        if total > longest and self.options.overlong != "split":
            result.lose(OVERLONG, "fits")
            result.lost_tokens += total - sum(len(piece.tokens) for piece in kept)
        scale = 1.0
        if self.options.loss_weighting == "example" and kept:  # the pieces of one example together weigh 1
            scale /= sum(float(piece.weights[1:].sum(dtype=np.float64)) for piece in kept)
        for piece in kept:
            result.examples.append(shifted(piece, scale))
            result.tokens += len(piece.tokens)
            result.trained += int(np.count_nonzero(piece.weights[1:]))
            result.turns += piece.turns
            result.stops += piece.stops
        return None

    def _newest_turns(self, conversation: Conversation, longest: int) -> list[Rendered]:
        """The system message with the newest whole turns that fit; none when the last turn alone does not."""
        system, rounds = rounds_of(conversation)

        def fits(first: int) -> Rendered | None:
            rendered = self.render(Conversation((*system, *sum(rounds[first:], ())), conversation.meta))
            return rendered if len(rendered.tokens) <= longest else None

        low, high = 1, len(rounds)  # fewer turns are shorter: the first that fits is between these
        found: list[Rendered] = []
        while low < high:
            middle = (low + high) // 2
            rendered = fits(middle)
            if rendered is None:
                low = middle + 1
            else:
                high, found = middle, [rendered]
        return found

    def _split(self, conversation: Conversation, whole: Rendered, longest: int) -> list[Rendered]:
        """Groups of whole turns, each group after the system message; a turn too long alone is cut into pieces.

        Every trained token is kept once: a repeated system message has weight 0 after the first time, and pieces
        of one turn share one token, the last target of one being the first input of the next.
        """
        system, rounds = rounds_of(conversation)
        if len(rounds) < 2:
            return pieces(whole, longest)
        out: list[Rendered] = []
        group: list[tuple[Message, ...]] = []
        done: Rendered | None = None
        for turn in [*rounds, None]:
            tried = None
            if turn is not None:
                head = system if not out else tuple(dataclasses.replace(m, weight=0.0) for m in system)
                tried = self.render(Conversation((*head, *sum([*group, turn], ())), conversation.meta))
            if turn is not None and tried is not None and (not group or len(tried.tokens) <= longest):
                group, done = [*group, turn], tried
                continue
            if done is not None:
                out += [done] if len(done.tokens) <= longest else pieces(done, longest)
            if turn is not None:
                quiet = tuple(dataclasses.replace(m, weight=0.0) for m in system)
                group, done = [turn], self.render(Conversation((*quiet, *turn), conversation.meta))
        return out


def shifted(rendered: Rendered, scale: float = 1.0) -> Example:
    """Inputs, targets and the targets' weights times `scale`."""
    weights = rendered.weights[1:] if scale == 1.0 else rendered.weights[1:] * np.float32(scale)
    return Example(rendered.tokens[:-1], rendered.tokens[1:], weights)


def _single_turn(conversation: Conversation) -> dict[str, str]:
    """Question and answer as fields; raises RowError for anything but one of each."""
    messages = conversation.messages
    system = messages[0].content if messages[0].role == "system" else ""
    turns = messages[1:] if messages[0].role == "system" else messages
    if [m.role for m in turns] != ["user", "assistant"]:
        raise RowError(
            "not a single turn",
            f"found {', '.join(m.role for m in turns)}; a few-shot prompt is made of rows with one question and one "
            "answer; remove few_shot from this source's styles, or choose rows with a single turn",
        )
    return {"system": system, "inputs": turns[0].content, "targets": turns[1].content}


def _questions(conversation: Conversation) -> list[str]:
    return [m.content for m in conversation.messages if m.role in ("user", "text")]


def _bytes(array: np.ndarray | None) -> bytes:
    return b"" if array is None else array.tobytes()
