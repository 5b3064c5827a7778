"""Conversations in, answers out: batches of prompts and streams of text, over one opened model."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import adapters, sharding
from jaxtune.asking import Sampling
from jaxtune.data.records import Message, RowError
from jaxtune.decoding import Rows, bucket, cache_bytes, make_decoding
from jaxtune.opening import Opened, open_model

BATCH_BYTES = 1 << 30  # of one batch's cache and attention scores, where the number of rows is left to us
MOST_ROWS = 256
Messages = Sequence[Message | Mapping[str, Any]]


class Answer(NamedTuple):
    """What a model said: the text without white space around it, and its token ids, the stop token included.

    `stopped` says why: `stop` (a stop token), `length` (max_new_tokens) or `positions` (the model has no more).
    """

    text: str
    tokens: tuple[int, ...]
    stopped: str


class Answerer:
    """Answers conversations with one opened model; compiled functions are kept between calls."""

    def __init__(self, opened: Opened, *, batch: int | None = None) -> None:
        """Compiles nothing yet.

        Args:
            batch: rows answered at once; None takes as many (up to 256) as 1 GiB of cache and scores holds.
        """
        if batch is not None and batch < 1:
            raise ValueError(f"--batch: found {batch}; expected at least 1")
        self.opened, self._batch = opened, batch
        self._decoding = make_decoding(opened.graph, opened.config, stop_ids=opened.stop_ids, dtype=opened.dtype)
        self._tokenizer = opened.template.tokenizer

    def encode(self, messages: Messages, *, tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Returns the tokens of a conversation up to where the model answers; `tools` are what it may call.

        Raises:
            ValueError: the template refuses the messages, or they leave the model no position to answer in.
        """
        try:
            tokens = self.opened.template.prompt_tokens(messages, tools=tools)
        except RowError as error:
            raise ValueError(str(error)) from error
        if self.opened.config.is_encoder_decoder:
            tokens = [*tokens, self._tokenizer.eos_token_id]  # as its encoder was trained
        positions = self.opened.config.max_positions
        if len(tokens) >= positions:
            raise ValueError(
                f"found {len(tokens)} tokens; expected fewer than the model's {positions} positions, "
                "so that an answer fits behind them. Shorten the prompt"
            )
        return tokens

    def fits(self, messages: Messages, *, room: int, tools: Sequence[Mapping[str, Any]] = ()) -> bool:
        """Tells whether a conversation leaves the model `room` positions to answer in."""
        try:
            return len(self.encode(messages, tools=tools)) + room <= self.opened.config.max_positions
        except ValueError:
            return False

    def answer(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Answer]:
        """Answers each conversation, in order; see `answer_prompts`."""
        prompts = []
        for number, messages in enumerate(conversations, 1):
            try:
                prompts.append(self.encode(messages))
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from error
        return self.answer_prompts(prompts, sampling, progress=progress)

    def answer_prompts(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Answer]:
        """Answers prompts given as tokens, in order; an answer depends on its prompt and number, not on its batch.

        Args:
            progress: called with (answered, in all) after each batch.
        """
        sampling.check()
        if not prompts:
            return []
        answers: dict[int, Answer] = {}
        for numbers in self._batches(prompts, sampling):
            answers |= zip(numbers, self._answer_batch(prompts, numbers, sampling), strict=True)
            if progress is not None:
                progress(len(answers), len(prompts))
        return [answers[i] for i in range(len(prompts))]

    def _batches(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[list[int]]:
        """Yields numbers of prompts of like length, as many as are answered at once."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        while order:
            size = self._rows_at_once(len(prompts[order[0]]), sampling)
            while (fit := self._rows_at_once(len(prompts[order[:size][-1]]), sampling)) < size:
                size = max(fit, size // 2)
            yield order[:size]
            order = order[size:]

    def _rows_at_once(self, longest: int, sampling: Sampling) -> int:
        if self._batch is not None:
            return self._batch
        config, width = self.opened.config, self._width(longest)
        capacity = width + self._room(sampling)
        scores = 2 * 4 * config.num_heads * width * capacity  # float32, before and after the softmax
        row = scores + cache_bytes(config, capacity=capacity, dtype=self.opened.dtype)
        return min(MOST_ROWS, 1 << (max(BATCH_BYTES // row, 1).bit_length() - 1))

    def _width(self, longest: int) -> int:
        """The length that prompts are padded to."""
        return min(bucket(longest), self.opened.config.max_positions)

    def _room(self, sampling: Sampling) -> int:
        """The slots of the cache for new tokens, of which each row uses as many as its limit allows."""
        return bucket(min(sampling.max_new_tokens, self.opened.config.max_positions))

    def _answer_batch(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int], sampling: Sampling
    ) -> list[Answer]:
        chosen = [prompts[i] for i in numbers]
        size = bucket(len(chosen), smallest=1)
        if self._batch is not None:
            size = min(size, self._batch)
        arrays, rows = self._rows(chosen, numbers, size, sampling)
        with self._on_mesh():
            tokens, counts = self._decoding.batch(
                self.opened.state, arrays, rows, new_tokens=self._room(sampling), draw=sampling.draw
            )
        tokens, counts = np.asarray(tokens), np.asarray(counts)
        return [self._finish(tokens[row, : counts[row]], sampling) for row in range(len(chosen))]

    def _rows(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int], size: int, sampling: Sampling
    ) -> tuple[np.ndarray, Rows]:
        """Pads prompts to `[size T]`, T a power of two; rows without a prompt have length 0."""
        positions = self.opened.config.max_positions
        tokens = np.zeros((size, self._width(max(map(len, prompts)))), np.int32)
        lengths, limits = np.zeros(size, np.int32), np.zeros(size, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
            limits[row] = min(sampling.max_new_tokens, positions - len(prompt))
        drawn_by = np.zeros(size, np.uint32)
        drawn_by[: len(numbers)] = numbers
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(sampling.seed), jnp.asarray(drawn_by))
        return tokens, Rows(lengths, limits, keys, np.float32(sampling.temperature), np.float32(sampling.top_p))

    def _finish(self, tokens: np.ndarray, sampling: Sampling) -> Answer:
        ids = tuple(int(token) for token in tokens)
        ended = ids[-1] in self.opened.stop_ids
        text = decode_text(self._tokenizer, ids[:-1] if ended else ids).strip()
        if ended:
            return Answer(text, ids, "stop")
        return Answer(text, ids, "length" if len(ids) >= sampling.max_new_tokens else "positions")

    def stream(self, messages: Messages, sampling: Sampling) -> Iterator[str]:
        """Yields an answer's text as it grows; the pieces make the text that `answer` gives for a first prompt.

        No piece ends inside a character, and white space around the answer is left out.
        """
        sampling.check()
        prompt = self.encode(messages)
        text = TextStream(self._tokenizer)
        for token in self._stream_tokens(prompt, sampling):
            if token not in self.opened.stop_ids and (piece := text.push(token)):
                yield piece
        if piece := text.finish():
            yield piece

    def _stream_tokens(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        arrays, rows = self._rows([prompt], [0], 1, sampling)
        state, decoding = self.opened.state, self._decoding
        with self._on_mesh():
            progress = decoding.begin(state, arrays, rows, new_tokens=self._room(sampling))
        for step in range(int(rows.limits[0])):
            with self._on_mesh():
                progress = decoding.advance(state, progress, rows, draw=sampling.draw)
                tokens, done = jax.device_get((progress.tokens, progress.done))
            yield int(tokens[0, step])
            if done[0]:
                return

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return jax.set_mesh(self.opened.mesh)


class TextStream:
    """Turns tokens into text one at a time, never giving half a character or white space at either end.

    Some tokens are only bytes of a character, and a decoder may drop the space before its first token. So a few
    tokens before the new one are decoded with it, and what is new of that text is given once it ends a character.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = self._read = 0  # the window, and how much of it has been given
        self._space = ""  # white space seen, given when something follows it
        self._begun = False

    def push(self, token: int) -> str:
        """Takes a token, and returns the text that is now certain, often empty."""
        self._tokens.append(token)
        before, now = self._window()
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return self._trimmed(now[len(before) :])

    def finish(self) -> str:
        """Returns what was held back: a character that never became whole."""
        before, now = self._window()
        return self._trimmed(now[len(before) :])

    def _window(self) -> tuple[str, str]:
        tokens = self._tokens[self._start :]
        given = tokens[: self._read - self._start]
        return decode_text(self._tokenizer, given), decode_text(self._tokenizer, tokens)

    def _trimmed(self, piece: str) -> str:
        piece = self._space + piece
        if not self._begun:
            piece = piece.lstrip()
        kept = piece.rstrip()
        self._space = piece[len(kept) :] if self._begun or kept else ""
        self._begun = self._begun or bool(kept)
        return kept


def decode_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Returns the text of tokens as the model meant it: no special tokens, no spaces tidied away."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def open_answerer(
    path: str, *, batch: int | None = None, say: Callable[[str], None] | None = None, **options: Any
) -> Answerer:
    """Opens what a path names and returns what answers for it; see `opening.open_model` for the options.

    Args:
        batch: as in `Answerer`.
        say: told what was opened, in a line.
    """
    sharding.use_compilation_cache()
    opened = open_model(path, **options)
    if say is not None:
        say(f"{opened.name}: {adapters.count(opened.state):,} parameters; template: {opened.template.name}")
    return Answerer(opened, batch=batch)
