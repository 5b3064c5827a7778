"""Rows to training examples: parse, convert, render, shift, and keep within the length.

`RowReader` is the one path from a source's row to what is packed; the length pass, the stream and the audit use it
alike. Shifting comes before packing: of n tokens the first n - 1 are inputs and the last n - 1 are targets, so an
example takes n - 1 positions and its last token is a target only.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtune.data.formats import Layout
from jaxtune.data.packing import Example
from jaxtune.data.records import Conversation, Message, NothingToLearn, RowError
from jaxtune.data.sources import Source
from jaxtune.data.templates import ChatTemplate, Rendered

OVERLONG = "over length"
NOT_TRAINED = "no trained token"


@dataclasses.dataclass(frozen=True)
class ExampleOptions:
    """How rows become examples; fields as in the configuration."""

    max_length: int
    train_on: str = "assistant"
    overlong: str = "drop"
    loss_weighting: str = "token"


@dataclasses.dataclass
class RowResult:
    """What became of one row.

    `reason` says why (part of) it gives nothing; `bad` rows are those that cannot be read, with `message` in full.
    Tokens are counted before shifting. Of `turns` trained answers kept, `stops` train their end-of-turn token.
    """

    examples: list[Example]
    tokens: int = 0
    trained: int = 0
    lost_tokens: int = 0
    turns: int = 0
    stops: int = 0
    reason: str | None = None
    message: str = ""
    bad: bool = False


class RowReader:
    """One source with its layout, template and options: rows in, examples out. Travels to worker processes."""

    def __init__(
        self,
        source: Source,
        layout: Layout,
        template: ChatTemplate,
        *,
        text_template: ChatTemplate,
        options: ExampleOptions,
    ) -> None:
        self.source, self.layout, self.template = source, layout, template
        self.text_template, self.options = text_template, options

    def read(self, rows: Sequence[int]) -> list[RowResult]:
        """What becomes of each row; never raises for a row, whose error is in its result."""
        results, waiting = [], []
        for row in rows:
            result = RowResult([])
            results.append(result)
            try:
                conversations = self.conversations(row)
            except RowError as error:
                _fail(result, error, self.source.where(row))
            except NothingToLearn as nothing:
                result.reason = nothing.reason
            else:
                waiting += [(result, row, conversation) for conversation in conversations]
        for (result, row, conversation), rendered in zip(waiting, self._render([c for *_, c in waiting]), strict=True):
            if isinstance(rendered, RowError):
                _fail(result, rendered, self.source.where(row))
            elif not rendered.weights[1:].any():
                result.reason = NOT_TRAINED
            else:
                self._add(result, row, conversation, rendered)
        return results

    def conversations(self, row: int) -> list[Conversation]:
        """The row's conversations; raises RowError or NothingToLearn."""
        return self.layout.convert(self.source.row(row))

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
            pieces = [rendered]
        elif self.options.overlong == "error":
            message = f"{total - 1} positions are more than max_length {longest - 1}; raise it or set data.overlong"
            return _fail(result, RowError(OVERLONG, message), self.source.where(row))
        elif self.options.overlong == "drop":
            pieces = []
        elif self.options.overlong == "truncate_right":
            pieces = [_without_end(_cut(rendered, 0, longest))]
        elif self.options.overlong == "truncate_turns":
            pieces = self._newest_turns(conversation, longest)
        else:
            pieces = self._split(conversation, rendered, longest)
        kept = [piece for piece in pieces if piece.weights[1:].any()]
        if total > longest and self.options.overlong != "split":
            result.reason = OVERLONG
            result.lost_tokens += total - sum(len(piece.tokens) for piece in kept)
        for piece in kept:
            result.examples.append(shifted(piece, self.options.loss_weighting))
            result.tokens += len(piece.tokens)
            result.trained += int(np.count_nonzero(piece.weights[1:]))
            result.turns += piece.turns
            result.stops += piece.stops
        return None

    def _newest_turns(self, conversation: Conversation, longest: int) -> list[Rendered]:
        """The system message with the newest whole turns that fit; none when the last turn alone does not."""
        system, rounds = _rounds(conversation)
        for first in range(1, len(rounds)):
            rendered = self.render(Conversation((*system, *sum(rounds[first:], ())), conversation.meta))
            if len(rendered.tokens) <= longest:
                return [rendered]
        return []

    def _split(self, conversation: Conversation, whole: Rendered, longest: int) -> list[Rendered]:
        """Groups of whole turns, each group after the system message; a turn too long alone is cut into pieces.

        Every trained token is kept once: a repeated system message has weight 0 after the first time, and pieces
        of one turn share one token, the last target of one being the first input of the next.
        """
        system, rounds = _rounds(conversation)
        if len(rounds) < 2:
            return _pieces(whole, longest)
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
                out += [done] if len(done.tokens) <= longest else _pieces(done, longest)
            if turn is not None:
                quiet = tuple(dataclasses.replace(m, weight=0.0) for m in system)
                group, done = [turn], self.render(Conversation((*quiet, *turn), conversation.meta))
        return out


def shifted(rendered: Rendered, loss_weighting: str) -> Example:
    """Inputs, targets and the targets' weights; under `example` weighting these sum to 1."""
    weights = rendered.weights[1:]
    if loss_weighting == "example":
        weights = weights / max(float(weights.sum()), 1e-30)
    return Example(rendered.tokens[:-1], rendered.tokens[1:], weights)


def _fail(result: RowResult, error: RowError, where: str) -> None:
    result.reason, result.message, result.bad = error.reason, f"{where}: {error}", True


def _rounds(conversation: Conversation) -> tuple[tuple[Message, ...], list[tuple[Message, ...]]]:
    """The system message (or nothing), and the turns: each a user message with what answers it."""
    messages = conversation.messages
    system = messages[:1] if messages[0].role == "system" else ()
    rounds: list[tuple[Message, ...]] = []
    for message in messages[len(system) :]:
        if message.role == "user" or not rounds:
            rounds.append((message,))
        else:
            rounds[-1] = (*rounds[-1], message)
    return system, rounds


def _pieces(rendered: Rendered, longest: int) -> list[Rendered]:
    return [_cut(rendered, first, first + longest) for first in range(0, len(rendered.tokens) - 1, longest - 1)]


def _cut(rendered: Rendered, first: int, last: int) -> Rendered:
    """Tokens first .. last - 1, and the answers that end among their targets."""
    ends = tuple((i - first, stops) for i, stops in rendered.ends if first < i < last)
    return dataclasses.replace(
        rendered, tokens=rendered.tokens[first:last], weights=rendered.weights[first:last], ends=ends
    )


def _without_end(rendered: Rendered) -> Rendered:
    """Counts the answer that a cut left without its end, so that the funnel shows it."""
    last = len(rendered.tokens) - 1
    if rendered.weights[last] == 0 or any(i == last for i, _ in rendered.ends):
        return rendered
    return dataclasses.replace(rendered, ends=(*rendered.ends, (last, False)))
