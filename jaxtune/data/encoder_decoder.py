"""Rows to pairs for an encoder-decoder: everything before an answer is read, the answer is written.

Each trained answer of a conversation is a pair of its own. The encoder's input ends with EOS as T5's does; the targets
are the answer up to its end-of-turn token, which is EOS for the templates that suit such models (plain, alpaca,
vicuna). Both are tokenised by themselves, as they are when the model is asked.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtune.data.chat.rendering import Answer
from jaxtune.data.chat.turns import LEARNT
from jaxtune.data.examples import RowReader
from jaxtune.data.packing import Pair
from jaxtune.data.records import Conversation, RowError
from jaxtune.data.row_results import NOT_TRAINED, OVERLONG, RowResult, Waiting, fail
from jaxtune.data.shortening import rounds_of

RAW_TEXT = "raw text, which has no input for an encoder; expected questions with answers, e.g. prompt and completion"


class PairReader(RowReader):
    """As RowReader, whose `options.encoder_length` it needs, with a `Pair` for each trained answer.

    The tokens of earlier turns are read again for each later answer, and counted each time. Under train_on `all` the
    answers are trained, since a decoder writes nothing else. Raises ValueError for a tokenizer without EOS.
    """

    sides = 2
    remedy = "raise the encoder's length or data.max_length, or choose data.overlong=truncate_turns or truncate_right"

    def __init__(self, *args: Any, **keys: Any) -> None:
        super().__init__(*args, **keys)
        assert self.options.encoder_length is not None
        self.encoder_length: int = self.options.encoder_length
        if self.template.tokenizer.eos_token_id is None:
            raise ValueError("this tokenizer has no EOS token, with which the input of an encoder-decoder ends")

    def _learn(self, waiting: Sequence[Waiting]) -> None:
        found = []
        for result, row, conversation in waiting:
            if conversation.messages[0].role == "text":
                result.lose(RAW_TEXT, "valid")
                result.lost_tokens += len(self._encode([conversation.messages[0].content])[0])
                continue
            try:
                answers = self.template.answers(conversation, train_on=self.options.train_on)
                if not answers:
                    result.lose(NOT_TRAINED, "valid")
                    result.lost_tokens += len(self.render(conversation).tokens)
            except RowError as error:
                fail(result, error, self.source.where(row))
                continue
            found.append((result, row, conversation, answers))
        encoded = iter(self._encode([text for *_, answers in found for a in answers for text in (a.prompt, a.text)]))
        for result, row, conversation, answers in found:
            first = len(result.examples)
            for answer in answers:
                self._add_pair(result, row, conversation, answer, self._ended(next(encoded)), next(encoded))
            if self.options.loss_weighting == "example":
                result.examples[first:] = _weighing_one(result.examples[first:])

    def shown(self, row: int) -> str:
        """What the encoder reads of the row's first answer and, between « », what the decoder writes."""
        chats = [chat for chat in self.conversations(row) if chat.messages[0].role != "text"]
        answer = next(a for chat in chats for a in self.template.answers(chat, train_on=self.options.train_on))
        return f"{answer.prompt}{self.template.tokenizer.eos_token} -> «{answer.text}»"

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        """int32 token ids of each text."""
        encoded = self.template.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    def _ended(self, tokens: np.ndarray) -> np.ndarray:
        return np.append(tokens, np.int32(self.template.tokenizer.eos_token_id))

    def _add_pair(
        self,
        result: RowResult,
        row: int,
        conversation: Conversation,
        answer: Answer,
        encoder: np.ndarray,
        targets: np.ndarray,
    ) -> None:
        """Appends the pair, shortened by the rule where it is over length, unless the rule leaves nothing of it."""
        total = len(encoder) + len(targets)
        if len(encoder) > self.encoder_length or len(targets) > self.options.max_length:
            if self.options.overlong == "error":
                message = (
                    f"an answer of {len(targets)} positions to an input of {len(encoder)}; expected at most "
                    f"{self.options.max_length} and {self.encoder_length}; raise them or set data.overlong"
                )
                return fail(result, RowError(OVERLONG, message), self.source.where(row), stage="fits")
            encoder, targets = self._shortened(conversation, answer, encoder, targets)
            result.lose(OVERLONG, "fits")
            result.lost_tokens += total - len(encoder) - len(targets)
            if not len(targets):
                return None
        result.examples.append(Pair(encoder, targets, np.full(len(targets), answer.weight, np.float32)))
        result.tokens += len(encoder) + len(targets)
        result.trained += len(targets)
        result.turns += 1
        result.stops += int(targets[-1] == self.template.end_id)
        return None

    def _shortened(
        self, conversation: Conversation, answer: Answer, encoder: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the rule leaves of a pair; both empty when nothing."""
        nothing = np.zeros(0, np.int32), np.zeros(0, np.int32)
        if self.options.overlong == "truncate_right":
            if len(encoder) > self.encoder_length:
                encoder = self._ended(encoder[: self.encoder_length - 1])
            return encoder, targets[: self.options.max_length]
        if self.options.overlong == "drop" or len(targets) > self.options.max_length:
            return nothing
        newest = self._newest_input(conversation, answer)
        return nothing if newest is None else (newest, targets)

    def _newest_input(self, conversation: Conversation, answer: Answer) -> np.ndarray | None:
        """The system message with the newest whole turns that fit before an answer; None when its own does not."""
        spoken = [i for i, message in enumerate(conversation.messages) if message.role in LEARNT]
        until = Conversation(conversation.messages[: spoken[answer.number] + 1], conversation.meta)
        system, rounds = rounds_of(until)
        for first in range(1, len(rounds)):
            shorter = Conversation((*system, *sum(rounds[first:], ())), conversation.meta)
            asked = self.template.answers(shorter, train_on="assistant")[-1]
            encoder = self._ended(self._encode([asked.prompt])[0])
            if len(encoder) <= self.encoder_length:
                return encoder
        return None


def _weighing_one(pairs: list[Any]) -> list[Any]:
    """The pairs of one conversation, whose weights together sum to 1: each of its trained tokens counts the same, times
    its message's own weight."""
    total = sum(float(pair.weights.sum(dtype=np.float64)) for pair in pairs)
    return [pair._replace(weights=pair.weights * np.float32(1 / total)) for pair in pairs]
