"""Chat templates: a conversation rendered once into tokens with one weight each.

Every template, a tokenizer's own or ours, is Jinja text run in an immutable sandbox set up as transformers sets up its
own, and the token ids are those of `tokenizer.apply_chat_template`. Weights come from characters, never from token
values: where each message stands in the text is known from a *skeleton*, the same conversation rendered with marks in
place of its contents. The text must then be, character for character, the skeleton filled with the contents; that
proves each answer stands there verbatim and gives its span. A skeleton depends on the roles alone, so it is made
once for thousands of conversations, and no `{% generation %}` tag is needed. Templates that treat some contents
specially (reasoning blocks) are read by rendering prefixes instead.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
import transformers

from jaxtune import hub
from jaxtune.data.chat_templates import BOS, BUILT_INS
from jaxtune.data.jinja_sandbox import chat_environment
from jaxtune.data.records import Conversation, Message, RowError

_OPEN, _CLOSE = "\ue0f0", "\ue0f1"  # private-use characters: no template strips, splits or changes them
_MAX_SKELETONS = 4096
_LEARNT = ("assistant", "text")


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


def load_tokenizer(folder: str) -> Any:
    """The folder's fast tokenizer (local path or URL); code in the folder never runs."""
    try:
        here = hub.local_companions(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(here, trust_remote_code=False)
    except Exception as error:
        raise ValueError(
            f"{folder}: no tokenizer could be read ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "expected tokenizer.json or tokenizer.model with tokenizer_config.json"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"{folder}: {type(tokenizer).__name__} is a slow tokenizer and gives no character offsets, which the "
            "weights need; load it with use_fast=True and save it beside the model"
        )
    return tokenizer


def load_template(name: str, tokenizer: Any) -> "ChatTemplate":
    """The template that `data.template` names, checked on this tokenizer: auto, a built-in, or a Jinja file."""
    if name == "auto":
        text = tokenizer.chat_template
        if isinstance(text, Mapping):
            text = text.get("default")
        if not text:
            raise ValueError(
                "data.template: this tokenizer has no chat template of its own; set data.template=alpaca (single "
                "turns) or data.template=vicuna (conversations), which need no new tokens"
            )
        return ChatTemplate(tokenizer, text, name="the tokenizer's own")
    if name not in BUILT_INS:
        if not os.path.isfile(name):
            raise ValueError(
                f"data.template: found {name!r}; expected auto, {', '.join(BUILT_INS)}, or an existing Jinja file"
            )
        with open(name, encoding="utf-8") as file:
            return ChatTemplate(tokenizer, file.read(), name=name)
    text, markers = BUILT_INS[name]
    missing = [m for m in markers if len(tokenizer(m, add_special_tokens=False)["input_ids"]) != 1]
    if missing:
        raise ValueError(
            f"data.template: {name} needs {', '.join(missing)} as single tokens, and this tokenizer would cut them to "
            "pieces; use data.template=auto, alpaca or vicuna, which need no new tokens"
        )
    if tokenizer.eos_token is None:
        raise ValueError(f"data.template: {name} ends answers with the EOS token, and this tokenizer has none")
    if tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id] or tokenizer.bos_token is None:
        text = text.removeprefix(BOS)
    return ChatTemplate(tokenizer, text, name=name)


class ChatTemplate:
    """A template bound to a tokenizer; raises ValueError when it cannot teach a model to stop, or loses answers."""

    def __init__(self, tokenizer: Any, text: str, *, name: str) -> None:
        self.tokenizer, self.text, self.name = tokenizer, text, name
        self._skeletons: dict[Any, tuple[Any, ...]] = {}
        self._compile()
        self.end_of_turn = self._find_end_of_turn()
        self.end_id = tokenizer.convert_tokens_to_ids(self.end_of_turn)
        self.checks = self._check()

    def _compile(self) -> None:
        try:
            self._jinja = chat_environment().from_string(self.text)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"template {self.name}, line {error.lineno}: {error.message}") from error
        self._names = dict(self.tokenizer.special_tokens_map)  # bos_token, eos_token, ...: what templates may name
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        self._special = sorted(special | set(self.tokenizer.all_special_tokens), key=len, reverse=True)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_jinja", "_skeletons")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._skeletons = {}
        self._compile()

    @property
    def template_text(self) -> str:
        """The Jinja text to store as the exported folder's chat template."""
        return self.text

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer: the end-of-turn token first, then EOS where it is another."""
        eos = self.tokenizer.eos_token_id
        return (self.end_id,) if eos is None or eos == self.end_id else (self.end_id, eos)

    def text_of(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """The rendered text; raises RowError with the template's own words when it refuses the messages."""
        try:
            return self._jinja.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._names,
            )
        except jinja2.TemplateError as error:
            raise RowError("refused by the template", f"template {self.name}: {error}") from error
        except TypeError as error:
            raise RowError("refused by the template", f"template {self.name}: {error} (is a field missing?)") from error

    def prompt_tokens(self, messages: Sequence[Message | Mapping[str, Any]]) -> list[int]:
        """Token ids of the messages with the generation prompt after them: what a model answers to."""
        plain = [m.as_dict() if isinstance(m, Message) else m for m in messages]
        text = self.text_of(plain, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

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
                results.append(self._layout(conversation.messages, train_on))
            except RowError as error:
                results.append(error)
        good = [result for result in results if not isinstance(result, RowError)]
        encodings = self._encode([text for text, *_ in good])
        finished = iter([self._weigh(layout, encoding) for layout, encoding in zip(good, encodings, strict=True)])
        return [result if isinstance(result, RowError) else next(finished) for result in results]

    def _encode(self, texts: list[str]) -> list[Any]:
        # The backend's own batch call is what the tokenizer's __call__ ends in, without building lists of lists.
        return self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False) if texts else []

    def _layout(self, messages: tuple[Message, ...], train_on: str) -> tuple[Any, ...]:
        """(text, spans with weights, trained answers' spans, whether everything else counts too)."""
        text = self.text_of([m.as_dict() for m in messages])
        turns = self._fill(text, messages) or self._by_prefixes(text, messages)
        last = max((i for i, m in enumerate(messages) if m.role in _LEARNT), default=-1)
        spans, answers = [], []
        for i, (message, turn) in enumerate(zip(messages, turns, strict=True)):
            learnt = message.role in _LEARNT
            weight = message.weight
            if weight is None:
                weight = float(train_on == "all" or (learnt and (train_on == "assistant" or i == last)))
                # An empty answer among others would teach to stop at once.
                weight = 0.0 if learnt and not message.content.strip() else weight
            span = (turn.start, turn.end, weight) if learnt else (turn.content, turn.content_end, weight)
            spans.append(span)
            if learnt and weight > 0 and turn.end > turn.start:  # an empty answer has no place
                answers.append(turn)
        return text, spans, answers, train_on == "all"

    def _weigh(self, layout: tuple[Any, ...], encoding: Any) -> Rendered:
        """Gives each token the weight of the span it reaches into."""
        text, spans, answers, everything = layout
        ids = np.array(encoding.ids, np.int32)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        start, end = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
        weights = np.zeros(len(ids), np.float32)
        if everything:  # but not what follows the last answer's end
            weights[start < max((span[1] for span in spans), default=0)] = 1.0
        for first, stop, weight in spans:
            weights[(start < stop) & (end > first)] = weight
        last = [int(np.searchsorted(start, turn.end)) - 1 for turn in answers]
        ends = tuple((i, bool(ids[i] == self.end_id and weights[i] > 0)) for i in last)
        return Rendered(ids, weights, text, tuple(s for s in spans if s[2] > 0 and s[1] > s[0]), ends)

    def _fill(self, text: str, messages: tuple[Message, ...]) -> list[Turn] | None:
        """Turns of `text` by filling the skeleton of these roles with the contents; None when the two differ."""
        key = tuple(
            (m.role, bool(m.content.strip()), tuple(f for f, v in m.fields.items() if v.strip())) for m in messages
        )
        if key not in self._skeletons:
            if len(self._skeletons) >= _MAX_SKELETONS:
                self._skeletons.clear()
            self._skeletons[key] = self._skeleton(messages)
        pieces, shape = self._skeletons[key]
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
        text = self.text_of(marked)
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
                        f"template {self.name} leaves out message {i + 1} ({message.role}); use another template, "
                        "or remove such messages",
                    )
                shape.append((0, 0, False))
                continue
            begin, _, literal = ends[i]
            if message.role not in _LEARNT:
                shape.append((0, 0, False))
                continue
            prompt = self._prompt_end(text, marked[:i], begin)
            stop = literal.find(self.end_of_turn)
            shape.append((begin - prompt, stop + len(self.end_of_turn) if stop >= 0 else 0, stop >= 0))
        return pieces, shape

    def _prompt_end(self, text: str, before: list[dict[str, Any]], begin: int) -> int:
        """Where the generation prompt ends in a skeleton: from there on the model speaks itself."""
        if not before:
            return begin
        try:
            prompt = self.text_of(before, add_generation_prompt=True)
        except RowError:
            return begin
        return len(prompt) if len(prompt) <= begin and text.startswith(prompt) else begin

    def _by_prefixes(self, text: str, messages: tuple[Message, ...]) -> list[Turn]:
        """Turns of a text whose template treats some content specially, from the rendered prefixes.

        Answers are located, each of which must follow its own prefix's generation prompt and stand there verbatim, and
        other messages with a weight of their own.
        """
        turns = []
        for i, message in enumerate(messages):
            if message.role not in _LEARNT and message.content.strip() and message.weight is not None:
                first, last = self._by_marks(text, messages, i)
                turns.append(Turn(first, first, last, last, False))
                continue
            if message.role not in _LEARNT or not message.content.strip():
                turns.append(Turn(0, 0, 0, 0, False))
                continue
            prompt = self.text_of([m.as_dict() for m in messages[:i]], add_generation_prompt=True)
            begin = len(prompt) if text.startswith(prompt) else -1
            content = next((v for v in _variants(message.content) if begin >= 0 and text.startswith(v, begin)), None)
            if content is None:
                raise RowError(
                    "answer changed by the template",
                    f"template {self.name} does not render message {i + 1} (assistant) verbatim: expected "
                    f"{message.content[:60]!r} after its prompt, found {text[max(begin, 0) :][:60]!r}; reasoning "
                    "templates drop or add think blocks; use another template or change these rows",
                )
            last = begin + len(content)
            until = text.find(_next_content(messages, i), last) if i + 1 < len(messages) else len(text)
            stop = text.find(self.end_of_turn, last, until if until >= 0 else len(text))
            end = stop + len(self.end_of_turn) if stop >= 0 else last
            turns.append(Turn(begin, begin, last, end, stop >= 0))
        return turns

    def _by_marks(self, text: str, messages: tuple[Message, ...], i: int) -> tuple[int, int]:
        """First and last character (exclusive) of one message's content: where the text changes when it is marked."""
        shown = [_with_marks(i, m) if n == i else m.as_dict() for n, m in enumerate(messages)]
        marked = self.text_of(shown)
        first, last = marked.find(_OPEN), len(text) - (len(marked) - 1 - marked.rfind(_CLOSE))
        if first < 0 or not first < last or text[:first] != marked[:first] or not marked.endswith(text[last:]):
            raise RowError(
                "weight without a place",
                f"template {self.name} changes the text around message {i + 1} ({messages[i].role}) with its content, "
                f"so its weight {messages[i].weight} has no certain place; use another template, or remove the weight",
            )
        return first, last

    def _find_end_of_turn(self) -> str:
        """The first special token after an answer that ends a conversation."""
        text = self.text_of([_probe("user", 0), _probe("assistant", 1)])
        tail = text[text.rfind(_CLOSE) + 1 :]
        found = [(tail.find(token), token) for token in self._special if token and token in tail]
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


def _next_content(messages: Sequence[Message], i: int) -> str:
    return messages[i + 1].content.strip()


def _probe(role: str, i: int) -> dict[str, str]:
    return {"role": role, "content": _mark(i, "content")}
