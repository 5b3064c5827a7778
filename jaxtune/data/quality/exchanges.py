"""What was asked and what was answered: the pairs that scores, kinds and statistics speak of."""

import re
from typing import NamedTuple

from jaxtune.data.reasoning import CLOSE, OPEN
from jaxtune.data.records import Conversation, Message

_BLOCKS = re.compile(rf"{OPEN}.*?(?:{CLOSE}|\Z)\s*", re.DOTALL)


class Exchange(NamedTuple):
    """A question and its answer; `context` is the passage that came with it, where it has a field of its own."""

    instruction: str
    context: str
    response: str

    @property
    def asked(self) -> str:
        """The whole question, as messages without such a field hold it."""
        return f"{self.instruction}\n\n{self.context}" if self.context else self.instruction


def exchanges(conversation: Conversation) -> tuple[Exchange, ...]:
    """Each question with its answer.

    A question is what users say before an answer begins, an answer what assistants say before the next question:
    several messages are joined by blank lines. What tools gave back is no one's words, and what an answer thought
    (`<think>`, closed or not) is not what it said. A question that is not answered, an answer to none and raw text are
    no exchange; an answer that only calls tools says nothing.

        user A, assistant "<think>t</think>B", tool "4", assistant C, user D -> (Exchange(A, "", "B\\n\\nC"),)
    """
    found: list[Exchange] = []
    asked: list[Message] = []
    answered: list[Message] = []
    for message in conversation.messages:
        if message.role == "user":
            if answered:
                found += _exchange(asked, answered)
                asked, answered = [], []
            asked.append(message)
        elif message.role == "assistant":
            answered.append(message)
    return (*found, *_exchange(asked, answered))


def _exchange(asked: list[Message], answered: list[Message]) -> list[Exchange]:
    if not asked or not answered:
        return []
    said = (without_reasoning(message.content) for message in answered)
    response = "\n\n".join(text for text in said if text.strip())
    if len(asked) == 1:
        fields = asked[0].fields
        return [Exchange(fields.get("instruction", asked[0].content), fields.get("input", ""), response)]
    return [Exchange("\n\n".join(message.content for message in asked), "", response)]


def without_reasoning(answer: str) -> str:
    """The answer without its blocks of reasoning; one that never closes takes the rest with it."""
    return _BLOCKS.sub("", answer) if OPEN in answer else answer
