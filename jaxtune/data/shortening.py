"""Rendered conversations cut to length: into pieces, or to their newest turns."""

import dataclasses

from jaxtune.data.chat.rendering import Rendered
from jaxtune.data.records import Conversation, Message


def rounds_of(conversation: Conversation) -> tuple[tuple[Message, ...], list[tuple[Message, ...]]]:
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


def pieces(rendered: Rendered, longest: int) -> list[Rendered]:
    """Pieces of at most `longest` tokens, neighbours sharing one: the last target of one is the next's first input."""
    return [cut(rendered, first, first + longest) for first in range(0, len(rendered.tokens) - 1, longest - 1)]


def cut(rendered: Rendered, first: int, last: int) -> Rendered:
    """Tokens first .. last - 1, and the answers that end among their targets."""
    ends = tuple((i - first, stops) for i, stops in rendered.ends if first < i < last)
    return dataclasses.replace(
        rendered, tokens=rendered.tokens[first:last], weights=rendered.weights[first:last], ends=ends
    )


def without_end(rendered: Rendered) -> Rendered:
    """Counts the answer that a cut left without its end, so that the funnel shows it."""
    last = len(rendered.tokens) - 1
    if rendered.weights[last] == 0 or any(i == last for i, _ in rendered.ends):
        return rendered
    return dataclasses.replace(rendered, ends=(*rendered.ends, (last, False)))
