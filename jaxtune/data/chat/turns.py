"""Where each message stands in a rendered text, and what of it an answer trains.

Where contents are is known from a *skeleton*, the same conversation rendered with marks in place of its contents. The
text must then be, character for character, the skeleton filled with the contents; that proves each answer stands there
verbatim and gives its span. A skeleton depends on the roles alone, so it is made once for thousands of conversations,
and no `{% generation %}` tag is needed. Texts that differ, of templates that treat some contents specially (reasoning
blocks), and those with tools are read by rendering prefixes instead.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtune.data.reasoning import CLOSE, OPEN, spread
from jaxtune.data.records import Message, RowError
from jaxtune.data.tool_calls import pieces_of, written

LEARNT = ("assistant", "text")
EMPTY_BLOCK = f"{OPEN}\n\n{CLOSE}\n\n"
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"  # private-use characters: no template strips, splits or changes them
_MAX_SKELETONS = 4096


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message in a text: its content's first and last character (exclusive), and what else an answer trains.

    An answer is learnt from `start`, where the generation prompt ends, to `end`, past the end-of-turn token.
    """

    start: int
    content: int
    content_end: int
    end: int
    has_stop: bool


class TurnFinder:
    """Finds the messages in the texts of one template, `text_of(messages, add_generation_prompt=, tools=)`."""

    def __init__(self, text_of: Callable[..., str], *, name: str, end_of_turn: str) -> None:
        self._text_of, self._name, self._end_of_turn = text_of, name, end_of_turn
        self._skeletons: dict[Any, tuple[Any, ...]] = {}

    def find(self, text: str, messages: tuple[Message, ...]) -> list[Turn]:
        """One turn a message; raises RowError where an answer is not in the text verbatim, or a content is lost."""
        return self._fill(text, messages) or self._by_prefixes(text, messages)

    def find_with_tools(
        self, text: str, messages: tuple[Message, ...], tools: Sequence[Mapping[str, Any]]
    ) -> list[Turn]:
        """As `find`, for a template that writes tools, calls and results in its own way."""
        self._check_kept(text, messages, tools)
        return self._by_prefixes(text, messages, tools)

    def _fill(self, text: str, messages: tuple[Message, ...]) -> list[Turn] | None:
        """Turns of `text` by filling the skeleton of these roles with the contents; None when the two differ."""
        key = tuple(
            (m.role, bool(m.content.strip()), tuple(f for f, v in m.fields.items() if v.strip())) for m in messages
        )
        known = self._skeletons.get(key)
        if known is None:  # two threads may both make it: they make the same
            if len(self._skeletons) >= _MAX_SKELETONS:
                self._skeletons.clear()
            known = self._skeletons[key] = self._skeleton(messages)
        pieces, shape = known
        position = 0
        found: dict[int, list[tuple[int, int]]] = {}
        for n, (mark, literal) in enumerate(pieces):
            if mark is not None:
                content = _content_of(messages, mark)
                for variant in _variants(content):
                    after = position + len(variant)
                    fits = text.startswith(variant, position) and text.startswith(literal, after)
                    if fits and (n + 1 < len(pieces) or after + len(literal) == len(text)):
                        break
                else:
                    return None
                found.setdefault(mark[0], []).append((position, after))
                position = after
            elif not text.startswith(literal, position):
                return None
            position += len(literal)
        if position != len(text):
            return None
        turns = []
        for i, (lead, tail, has_stop) in enumerate(shape):
            # An empty content has no mark, and trains nothing.
            first, last = (found[i][0][0], found[i][-1][1]) if i in found else (0, 0)
            turns.append(Turn(first - lead, first, last, last + tail, has_stop))
        return turns

    def _skeleton(self, messages: tuple[Message, ...]) -> tuple[Any, ...]:
        """The text's fixed pieces, and for each message what it trains before and after its content.

        pieces: (mark, literal after it), the first with mark None; a mark is (message, field). shape: per message
        (characters before the content that belong to the answer, characters after it, ends with the stop token).
        """
        marked = [_with_marks(i, m) for i, m in enumerate(messages)]
        text = self._text_of(marked)
        head, *rest = text.split(_OPEN)
        pieces: list[tuple[tuple[int, str] | None, str]] = [(None, head)]
        ends, position = {}, len(head)
        for part in rest:
            name, _, literal = part.partition(_CLOSE)
            index, _, field = name.partition("/")
            begin = position
            position += len(_OPEN) + len(name) + len(_CLOSE)
            pieces.append(((int(index), field), literal))
            ends[int(index)] = (begin, position, literal)
            position += len(literal)
        shape = []
        for i, message in enumerate(messages):
            if i not in ends:
                if message.content.strip():
                    raise RowError(
                        "content lost by the template",
                        f"template {self._name} leaves out message {i + 1} ({message.role}); use another template, "
                        "or remove such messages",
                    )
                shape.append((0, 0, False))
                continue
            begin, _, literal = ends[i]
            if message.role not in LEARNT:
                shape.append((0, 0, False))
                continue
            prompt = self._prompt_end(text, marked[:i], begin)
            stop = literal.find(self._end_of_turn)
            shape.append((begin - prompt, stop + len(self._end_of_turn) if stop >= 0 else 0, stop >= 0))
        return pieces, shape

    def _prompt_end(self, text: str, before: list[dict[str, Any]], begin: int) -> int:
        """Where the generation prompt ends in a skeleton: from there on the model speaks itself."""
        if not before:
            return begin
        try:
            prompt = self._text_of(before, add_generation_prompt=True)
        except RowError:
            return begin
        return len(prompt) if len(prompt) <= begin and text.startswith(prompt) else begin

    def _by_prefixes(
        self, text: str, messages: tuple[Message, ...], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[Turn]:
        """Turns of a text whose template treats some content specially, from the rendered prefixes.

        Answers are located, each of which must follow its own prefix's generation prompt and stand there verbatim with
        its calls, and other messages with a weight of their own.
        """
        turns = []
        for i, message in enumerate(messages):
            if message.role in LEARNT and not message.is_blank:
                turns.append(self._answer(text, messages, i, tools))
            elif message.role not in LEARNT and message.content.strip() and message.weight is not None:
                first, last = self._by_marks(text, messages, i, tools)
                turns.append(Turn(first, first, last, last, False))
            else:
                turns.append(Turn(0, 0, 0, 0, False))
        return turns

    def _answer(self, text: str, messages: tuple[Message, ...], i: int, tools: Sequence[Mapping[str, Any]]) -> Turn:
        message = messages[i]
        prompt = self._text_of([m.as_dict() for m in messages[:i]], add_generation_prompt=True, tools=tools)
        begin = len(prompt) if text.startswith(prompt) else -1
        first, last = _stands_at(message.content, text, begin)
        if first < 0:
            raise RowError(
                "answer changed by the template",
                f"template {self._name} does not render message {i + 1} (assistant) verbatim: expected "
                f"{message.content[:60]!r} after its prompt, found {text[max(begin, 0) :][:60]!r}; where it is a "
                "<think> block that the template drops, set data.reasoning=last or drop; else use another template or "
                "change these rows",
            )
        if message.tool_calls:
            last = self._past_calls(text, last, message, i)
        stop = text.find(self._end_of_turn, last, self._next_begins(text, messages, i, tools))
        end = stop + len(self._end_of_turn) if stop >= 0 else last
        return Turn(begin, first, last, end, stop >= 0)

    def _next_begins(self, text: str, messages: tuple[Message, ...], i: int, tools: Sequence[Mapping[str, Any]]) -> int:
        """Where the content after message i begins; the text's end where there is none, or where it cannot be told."""
        if i + 1 == len(messages) or not messages[i + 1].content.strip():
            return len(text)
        try:
            return self._by_marks(text, messages, i + 1, tools)[0]
        except RowError:
            return len(text)

    def _past_calls(self, text: str, position: int, message: Message, i: int) -> int:
        """The end of the last call's last value; raises RowError when anything of the calls is not in the turn."""
        pieces = [forms for call in message.tool_calls for forms in pieces_of(call)]
        stop, end = position, position
        for _ in range(1 + sum(forms[0].count(self._end_of_turn) for forms in pieces)):  # which calls may hold too
            stop = text.find(self._end_of_turn, stop)
            stop = len(text) if stop < 0 else stop + len(self._end_of_turn)
        for forms in pieces:
            found = max(
                (text.find(form, position, stop) + len(form) for form in forms if text.find(form, position, stop) >= 0),
                default=-1,
            )
            if found < 0:
                raise RowError(
                    "tool call lost by the template",
                    f"template {self._name} does not render {forms[0][:60]!r}, part of a tool call of message {i + 1}; "
                    "use another template",
                )
            end = max(end, found)
        return end

    def _check_kept(self, text: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
        """Raises RowError where a tool, a result or what a user says is not in the text."""
        for i, message in enumerate(messages):
            said = message.content.strip()
            if message.role not in LEARNT and not any(form in text for form in written(said)):
                raise RowError(
                    "content lost by the template",
                    f"template {self._name} leaves out message {i + 1} ({message.role}); use another template",
                )
        for tool in tools:
            if tool["function"]["name"] not in text:
                raise RowError(
                    "content lost by the template",
                    f"template {self._name} leaves out the tool {tool['function']['name']}; use another template",
                )

    def _by_marks(
        self, text: str, messages: tuple[Message, ...], i: int, tools: Sequence[Mapping[str, Any]]
    ) -> tuple[int, int]:
        """First and last character (exclusive) of one message's content: where the text changes when it is marked."""
        shown = [_with_marks(i, m) if n == i else m.as_dict() for n, m in enumerate(messages)]
        marked = self._text_of(shown, tools=tools)
        first, last = marked.find(_OPEN), len(text) - (len(marked) - 1 - marked.rfind(_CLOSE))
        if first < 0 or not first < last or text[:first] != marked[:first] or not marked.endswith(text[last:]):
            raise RowError(
                "weight without a place",
                f"template {self._name} changes the text around message {i + 1} ({messages[i].role}) with its content, "
                f"so its weight {messages[i].weight} has no certain place; use another template, or remove the weight",
            )
        return first, last


def _mark(i: int, field: str) -> str:
    return f"{_OPEN}{i}/{field}{_CLOSE}"


def _with_marks(i: int, message: Message) -> dict[str, Any]:
    """The message's dict with marks for its contents; blank ones stay, since templates ask whether they are there."""
    shown = message.as_dict()
    return {k: v if k == "role" or not v.strip() else _mark(i, k) for k, v in shown.items()}


def _content_of(messages: Sequence[Message], mark: tuple[int, str]) -> str:
    message = messages[mark[0]]
    return message.content if mark[1] == "content" else message.fields[mark[1]]


def _variants(content: str) -> Sequence[str]:
    """The content, and what is left when a template strips white space around it: the longest that fits wins."""
    if content[:1].strip() and content[-1:].strip():
        return (content,)
    return (content, content.rstrip(), content.lstrip(), content.lstrip("\n"), content.strip("\n"), content.strip())


def _stands_at(content: str, text: str, begin: int) -> tuple[int, int]:
    """First and last character (exclusive) of an answer that begins there, or (-1, -1).

    A template may put an empty reasoning block before it, and a block's marks on lines of their own.
    """
    for lead in ("", EMPTY_BLOCK) if begin >= 0 else ():
        if text.startswith(lead, begin):
            first = begin + len(lead)
            for variant in (*_variants(content), spread(content)):
                if text.startswith(variant, first) and (variant or not content.strip()):
                    return first, first + len(variant)
    return -1, -1


def probe(role: str, i: int) -> dict[str, str]:
    """A message whose content is a mark: after_marks finds what a template puts behind the last of them."""
    return {"role": role, "content": _mark(i, "content")}


def after_marks(text: str) -> str:
    """The text behind the last mark."""
    return text[text.rfind(_CLOSE) + 1 :]
