"""A chat template bound to a tokenizer: conversations rendered once into tokens with one weight each.

Every template, a tokenizer's own or ours, is Jinja text run in an immutable sandbox set up as transformers sets up its
own, and the token ids are those of `tokenizer.apply_chat_template`. Weights come from characters (`turns.py` knows
where each message stands in the text), never from token values.

Tools, their calls and results are given as they are to a template that names `tools` and `tool_calls`; for all others
they are written as text first (`tool_calls.py`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
import numpy as np

from jaxtune.data.chat.jinja_sandbox import chat_environment
from jaxtune.data.chat.offsets import Encoded, Encoder
from jaxtune.data.chat.turns import LEARNT, Turn, TurnFinder, after_marks, probe
from jaxtune.data.records import Conversation, Message, RowError
from jaxtune.data.tool_calls import as_text, uses_tools, with_ids


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as the model sees it.

    `tokens` int32 [n] and `weights` float32 [n], aligned: how much predicting this token counts. `spans` are
    (start, end, weight) in `text`. `ends` has, for each trained answer, the number of its last token and whether that
    is the end-of-turn token, trained.
    """

    tokens: np.ndarray
    weights: np.ndarray
    text: str
    spans: tuple[tuple[int, int, float], ...]
    ends: tuple[tuple[int, bool], ...]

    @property
    def turns(self) -> int:
        """Trained answers."""
        return len(self.ends)

    @property
    def stops(self) -> int:
        """Trained answers whose end-of-turn token is trained too."""
        return sum(stops for _, stops in self.ends)


class _Layout(NamedTuple):
    """A rendered text, and its `spans`: first character, the one past the last, weight, and whether it is a trained
    answer. `everything`: what is outside all spans counts too.
    """

    text: str
    spans: list[tuple[int, int, float, bool]]
    everything: bool


class _Carried(NamedTuple):
    """What worker processes need of a tokenizer: they need not import transformers, which takes as long as to read
    thousands of rows.
    """

    backend_tokenizer: Any
    special_tokens_map: Mapping[str, str]
    eos_token: str | None
    eos_token_id: int | None


class Answer(NamedTuple):
    """One answer by itself: the text that the model is asked with, and what it says up to its end of turn.

    `number` counts the answers of its conversation from 0, trained or not; `weight` is that of each of its tokens.
    """

    number: int
    prompt: str
    text: str
    weight: float


@dataclasses.dataclass(frozen=True)
class TemplateChecks:
    """What the start-up checks found; the fatal ones have raised ValueError instead."""

    end_of_turn: str
    stops_with_eos: bool
    adding_turns_keeps_tokens: bool
    prompt_tokens_are_prefix: bool

    def describe(self) -> str:
        """One line for the start of a run."""
        kept = "unchanged" if self.adding_turns_keeps_tokens else "CHANGED"
        prefix = "is" if self.prompt_tokens_are_prefix else "is NOT"
        return (
            f"answers end with {self.end_of_turn!r} (trained); adding a turn leaves earlier tokens {kept}; "
            f"the prompt's tokens {prefix} a prefix of the conversation's"
        )


class ChatTemplate:
    """A template bound to a tokenizer; raises ValueError when it cannot teach a model to stop, or loses answers."""

    def __init__(self, tokenizer: Any, text: str, *, name: str) -> None:
        self.tokenizer, self.text, self.name = tokenizer, text, name
        self._compile()
        self.end_of_turn = self._find_end_of_turn()
        self._finder = TurnFinder(self.text_of, name=name, end_of_turn=self.end_of_turn)
        self.end_id = tokenizer.convert_tokens_to_ids(self.end_of_turn)
        self.checks = self._check()

    def _compile(self) -> None:
        try:
            environment = chat_environment()
            self._jinja = environment.from_string(self.text)
            names = jinja2.meta.find_undeclared_variables(environment.parse(self.text))
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"template {self.name}, line {error.lineno}: {error.message}") from error
        self._jinja.globals = dict(self._jinja.globals)  # gathered once: jinja's chain of maps takes longer than a text
        self._names = dict(self.tokenizer.special_tokens_map)  # bos_token, eos_token, ...: what templates may name
        self.knows_tools = "tools" in names and "tool_calls" in self.text
        self._encoder = Encoder(self.tokenizer.backend_tokenizer)

    def __getstate__(self) -> dict[str, Any]:
        kept = {key: value for key, value in self.__dict__.items() if key not in ("_jinja", "_finder", "_encoder")}
        return {**kept, "tokenizer": _Carried(*(getattr(self.tokenizer, name) for name in _Carried._fields))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._compile()
        self._finder = TurnFinder(self.text_of, name=self.name, end_of_turn=self.end_of_turn)

    @property
    def template_text(self) -> str:
        """The Jinja text to store as the exported folder's chat template."""
        return self.text

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer: the end-of-turn token first, then EOS where it is another."""
        eos = self.tokenizer.eos_token_id
        return (self.end_id,) if eos is None or eos == self.end_id else (self.end_id, eos)

    def text_of(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The rendered text; raises RowError with the template's own words when it refuses the messages."""
        try:
            return self._jinja.render(
                messages=list(messages),
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._names,
            )
        except jinja2.TemplateError as error:
            raise RowError("refused by the template", f"template {self.name}: {error}") from error
        except TypeError as error:
            raise RowError("refused by the template", f"template {self.name}: {error} (is a field missing?)") from error

    def prompt_tokens(
        self, messages: Sequence[Message | Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Token ids of the messages with the generation prompt after them: what a model answers to."""
        given = [m for m in messages if isinstance(m, Message)]
        if given and uses_tools(Conversation(tuple(given), {"tools": tools})):
            messages, tools = (with_ids(given), tools) if self.knows_tools else (as_text(given, tools), ())
        plain = [m.as_dict() if isinstance(m, Message) else m for m in messages]
        text = self.text_of(plain, add_generation_prompt=True, tools=tools)
        return self._encoder.encode([text]).ids.tolist()

    def render(self, conversation: Conversation, *, train_on: str = "assistant") -> Rendered:
        """Tokens and weights of one conversation; raises RowError where an answer is not in the text verbatim."""
        result = self.render_many([conversation], train_on=train_on)[0]
        if isinstance(result, RowError):
            raise result
        return result

    def render_many(
        self, conversations: Sequence[Conversation], *, train_on: str = "assistant"
    ) -> list[Rendered | RowError]:
        """As `render`, many at once (one call of the tokenizer); a conversation's error stands in its place."""
        results: list[Any] = []
        for conversation in conversations:
            try:
                results.append(self._layout(conversation, train_on))
            except RowError as error:
                results.append(error)
        good = [result for result in results if isinstance(result, _Layout)]
        finished = iter(self._weigh(good, self._encoder.encode([layout.text for layout in good])) if good else ())
        return [next(finished) if isinstance(result, _Layout) else result for result in results]

    def _turns(self, conversation: Conversation) -> tuple[str, tuple[Message, ...], list[Turn]]:
        """(text, the messages as they were rendered, where they are)."""
        messages = conversation.messages
        tools = conversation.meta.get("tools", ())
        if uses_tools(conversation):
            if self.knows_tools:
                messages = tuple(with_ids(messages))
                text = self.text_of([m.as_dict() for m in messages], tools=tools)
                return text, messages, self._finder.find_with_tools(text, messages, tools)
            messages = as_text(messages, tools)
        text = self.text_of([m.as_dict() for m in messages])
        return text, messages, self._finder.find(text, messages)

    def _layout(self, conversation: Conversation, train_on: str) -> _Layout:
        text, messages, turns = self._turns(conversation)
        last = max((i for i, m in enumerate(messages) if m.role in LEARNT), default=-1)
        spans = []
        for i, (message, turn) in enumerate(zip(messages, turns, strict=True)):
            weight = _weight_of(message, train_on, last=i == last)
            if message.role in LEARNT:  # an empty answer has no place
                spans.append((turn.start, turn.end, weight, weight > 0 and turn.end > turn.start))
            else:
                spans.append((turn.content, turn.content_end, weight, False))
        return _Layout(text, spans, train_on == "all")

    def _weigh(self, layouts: Sequence[_Layout], encoded: Encoded) -> list[Rendered]:
        """Gives each token the weight of the span it reaches into; all texts at once, as they were encoded."""
        written: list[tuple[int, int, float, bool]] = []
        counts = []
        for t, (text, spans, everything) in enumerate(layouts):
            if everything:  # but not what follows the last answer's end
                spans = [(0, max((span[1] for span in spans), default=0), 1.0, False), *spans]
            else:
                spans = [span for span in spans if span[2]]
            written += [(encoded.place(t, text, a), encoded.place(t, text, b), w, learnt) for a, b, w, learnt in spans]
            counts.append(len(spans))
        first = encoded.first([span[0] for span in written]).tolist()
        until = encoded.until([span[1] for span in written]).tolist()
        weights = np.zeros(len(encoded.ids), np.float32)
        for a, b, span in zip(first, until, written, strict=True):
            weights[a:b] = span[2]
        stops = (encoded.ids == self.end_id) & (weights > 0)
        out, k = [], 0
        for t, ((text, spans, _), count) in enumerate(zip(layouts, counts, strict=True)):
            begin, end = encoded.splits[t : t + 2]
            answers = [until[i] for i in range(k, k + count) if written[i][3]]
            out.append(
                Rendered(
                    encoded.ids[begin:end],
                    weights[begin:end],
                    text,
                    tuple(span[:3] for span in spans if span[2] > 0 and span[1] > span[0]),
                    tuple((after - 1 - begin, after > begin and bool(stops[after - 1])) for after in answers),
                )
            )
            k += count
        return out

    def answers(self, conversation: Conversation, *, train_on: str = "assistant") -> list[Answer]:
        """The trained answers of a conversation as pairs; raises RowError as `render`."""
        text, messages, turns = self._turns(conversation)
        tools = conversation.meta.get("tools", ()) if self.knows_tools and uses_tools(conversation) else ()
        spoken = [i for i, message in enumerate(messages) if message.role in LEARNT]
        out = []
        for number, i in enumerate(spoken):
            weight = _weight_of(messages[i], train_on, last=i == spoken[-1])
            if weight > 0 and turns[i].end > turns[i].start:
                prompt = self.text_of([m.as_dict() for m in messages[:i]], add_generation_prompt=True, tools=tools)
                out.append(Answer(number, prompt, text[turns[i].start : turns[i].end], weight))
        return out

    def _find_end_of_turn(self) -> str:
        """The first special token after an answer that ends a conversation."""
        tail = after_marks(self.text_of([probe("user", 0), probe("assistant", 1)]))
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(self.tokenizer.all_special_tokens)
        found = [(tail.find(token), token) for token in special if token and token in tail]
        if not found:
            raise ValueError(
                f"template {self.name}: an answer ends with {tail!r}, which holds no special token of this tokenizer, "
                "so a tuned model would never learn to stop; end assistant turns with the EOS token, or use "
                "data.template=alpaca or vicuna"
            )
        return min(found, key=lambda pair: (pair[0], -len(pair[1])))[1]

    def _check(self) -> TemplateChecks:
        """Questions to every template at start-up, on a two-turn conversation."""
        turns = [
            Message(r, c) for r, c in zip(("user", "assistant") * 2, ("Hi there", "Hello!", "Why?", "So."), strict=True)
        ]
        short, long = Conversation(tuple(turns[:2])), Conversation(tuple(turns))
        try:
            one, two = self.render(short), self.render(long)
        except RowError as error:
            raise ValueError(f"template {self.name} failed its start-up check: {error}") from error
        if one.stops != 1:
            raise ValueError(f"template {self.name}: the end-of-turn token {self.end_of_turn!r} would not be trained")
        for rendered, conversation in ((one, short), (two, long)):
            plain = [m.as_dict() for m in conversation.messages]
            theirs = self.tokenizer.apply_chat_template(plain, chat_template=self.text, tokenize=True, return_dict=True)
            if rendered.tokens.tolist() != list(theirs["input_ids"]):
                raise ValueError(
                    f"template {self.name}: our tokens differ from apply_chat_template's; please report it"
                )
        bos = self.tokenizer.bos_token_id
        if bos is not None and one.tokens[:2].tolist() == [bos, bos]:
            raise ValueError(
                f"template {self.name}: a conversation begins with two BOS tokens; remove one from the template"
            )
        stop = int(np.flatnonzero(one.tokens == self.end_id)[-1]) + 1
        prompt = self.prompt_tokens(turns[:1])
        return TemplateChecks(
            end_of_turn=self.end_of_turn,
            stops_with_eos=self.end_id == self.tokenizer.eos_token_id,
            adding_turns_keeps_tokens=one.tokens[:stop].tolist() == two.tokens[:stop].tolist(),
            prompt_tokens_are_prefix=one.tokens[: len(prompt)].tolist() == prompt,
        )


def _weight_of(message: Message, train_on: str, *, last: bool) -> float:
    """How much a message's tokens count; `last`: it is the conversation's last answer."""
    if message.weight is not None:
        return message.weight
    if message.role not in LEARNT:
        return float(train_on == "all")
    # An empty answer among others would teach to stop at once.
    return float(not message.is_blank and (train_on != "last" or last))
