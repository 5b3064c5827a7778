"""Reasoning blocks of answers: `<think> ... </think>` before what the answer says."""

import dataclasses
import re

from jaxtune.data.records import Conversation

OPEN, CLOSE = "<think>", "</think>"
_BLOCK = re.compile(rf"\s*{OPEN}(.*?){CLOSE}\s*", re.DOTALL)


def apply_reasoning(conversation: Conversation, rule: str) -> tuple[Conversation, int]:
    """The conversation under `data.reasoning`, and how many blocks were removed.

    `keep` changes nothing; `drop` removes the block that an answer opens with; `last` removes it from all answers
    but the last one, which is what follows the last user message (with its tool calls, several messages).
    """
    if rule == "keep":
        return conversation, 0
    kept_from = _kept_from(conversation, rule)
    messages, removed = list(conversation.messages), 0
    for i, message in enumerate(messages[:kept_from]):
        block = _BLOCK.match(message.content) if message.role == "assistant" else None
        if block:
            messages[i] = dataclasses.replace(message, content=message.content[block.end() :])
            # An empty block, as templates write for answers without reasoning, is none lost.
            removed += bool(block[1].strip())
    return dataclasses.replace(conversation, messages=tuple(messages)), removed


def marked_answers(conversation: Conversation, rule: str) -> int:
    """How many answers still hold a mark of reasoning where the rule, which was applied, means to leave none.

    Such are an unclosed block, one in the middle of an answer, a second one. A kept answer's own block is none.
    """
    if rule == "keep":
        return 0
    kept_from, count = _kept_from(conversation, rule), 0
    for i, message in enumerate(conversation.messages):
        if message.role == "assistant":
            block = _BLOCK.match(message.content) if i >= kept_from else None
            rest = message.content[block.end() :] if block else message.content
            count += OPEN in rest or CLOSE in rest
    return count


def _kept_from(conversation: Conversation, rule: str) -> int:
    """The first message whose block is kept."""
    users = [i for i, message in enumerate(conversation.messages) if message.role == "user"]
    return users[-1] if rule == "last" and users else len(conversation.messages)


def spread(content: str) -> str:
    """The content with its block on lines of its own, as reasoning templates write it; without a block unchanged.

    `<think>so</think>Yes` -> `<think>\\nso\\n</think>\\n\\nYes`
    """
    block = _BLOCK.match(content)
    if not block:
        return content
    thought = block[1].strip("\n")
    return f"{OPEN}\n{thought}\n{CLOSE}\n\n{content[block.end() :]}"
