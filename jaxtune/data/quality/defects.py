"""Faults that a text shows on its face: damaged characters, marks of templates, placeholders, loops.

Each is a rule with a name; rules look for what is almost never meant, so that what they flag is worth a look. They flag
and never drop: `data.quality.drop` takes patterns for that.
"""

import re
import unicodedata
from collections.abc import Callable, Collection, Mapping

import numpy as np

from jaxtune.data.records import Conversation, Message

# UTF-8 read as Windows-1252 or Latin-1: é as Ã©, ’ as â€™, a no-break space as Â before it.
_MOJIBAKE = re.compile(
    r"Ã[\u0080-\u00bf\u0152-\u0178\u0192\u2013-\u2122]|â€[\u0080-\u00bf\u0152-\u2122]|Â[\u00a0-\u00bf]"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_ZERO_WIDTH = re.compile(r"[\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069]")
_CHAT_MARKS = re.compile(
    r"<\|(?:im_start|im_end|eot_id|start_header_id|end_header_id|begin_of_text|end_of_text|endoftext|user|assistant|"
    r"system|end)\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|^### (?:Instruction|Response|Human|Assistant):",
    re.MULTILINE,
)
_NO_INPUT = re.compile(r"\bno ?input", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:amp|lt|gt|quot|nbsp|#\d{2,5}|#x[0-9a-fA-F]{2,4});")
_LINK = re.compile(r"https?:\S|\bwww\.\w", re.IGNORECASE)
_PICTURE = re.compile(
    r"!\[[^\]]*\]|<img\b|[\[(<](?:attached |link to |an? )?(?:image|photo|picture|painting|video)s?\b[^\])>]{0,80}"
    r"[\])>]|[\[(<](?:image|photo|picture) attached[\])>]",
    re.IGNORECASE,
)
# What a text with one of the marks above must hold: looking for these is many times faster.
_IN_CHAT_MARKS = ("<|", "INST]", "SYS>>", "_of_turn>", "### ")
_LONGEST_LOOP, _TIMES = 20, 8  # words that are said again, and how often running


def _is_damaged(text: str) -> bool:
    return "\ufffd" in text


def _is_mojibake(text: str) -> bool:
    return not text.isascii() and _MOJIBAKE.search(text) is not None


def _holds_control(text: str) -> bool:
    return _CONTROL.search(text) is not None


def _holds_zero_width(text: str) -> bool:
    return not text.isascii() and _ZERO_WIDTH.search(text) is not None


def _is_unfolded(text: str) -> bool:
    """Letters and accents as separate characters, which tokenizers cut otherwise than the usual form."""
    return not text.isascii() and not unicodedata.is_normalized("NFC", text)


def _holds_chat_marks(text: str) -> bool:
    return any(mark in text for mark in _IN_CHAT_MARKS) and _CHAT_MARKS.search(text) is not None


def _holds_entities(text: str) -> bool:
    return "&" in text and _ENTITY.search(text) is not None


def _repeats_itself(text: str) -> bool:
    """Up to twenty words eight times running, letters among them, or one word 16 times: an answer caught in a loop."""
    said = text.split()
    if len(said) < 2 * _TIMES or len(set(said)) > 0.6 * len(said):  # a cheap first look: loops have few words
        return False
    numbers = np.unique(said, return_inverse=True)[1]
    for length in range(1, min(_LONGEST_LOOP, len(said) // _TIMES) + 1):
        again = np.concatenate([[False], numbers[length:] == numbers[:-length], [False]])
        edges = np.flatnonzero(again[1:] != again[:-1])
        needed = length * (_TIMES - 1) if length > 1 else 2 * _TIMES - 1
        for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            if end - start >= needed and any(c.isalpha() for word in said[start : start + length] for c in word):
                return True
    return False


def _leaves_fence_open(text: str) -> bool:
    return sum(line.lstrip().startswith("```") for line in text.split("\n")) % 2 == 1 if "```" in text else False


# Of every text of a conversation.
OF_TEXTS: Mapping[str, Callable[[str], bool]] = {
    "replacement characters": _is_damaged,
    "mojibake": _is_mojibake,
    "control characters": _holds_control,
    "invisible characters": _holds_zero_width,
    "letters not in NFC": _is_unfolded,
    "marks of a chat template": _holds_chat_marks,
    "HTML entities": _holds_entities,
}
# Of answers alone.
OF_ANSWERS: Mapping[str, Callable[[str], bool]] = {
    "repeats itself": _repeats_itself,
    "code fence left open": _leaves_fence_open,
}
SPECIAL = "a special token in the text"
NO_INPUT = "placeholder for no input"
NOT_THERE = "a link or picture that is not there"
EMPTY_QUESTION = "empty question"
SAME_QUESTION = "the same question twice"
DEFECTS = (*OF_TEXTS, *OF_ANSWERS, SPECIAL, NO_INPUT, NOT_THERE, EMPTY_QUESTION, SAME_QUESTION)
# Those that spoil what is learnt, rather than what is said.
SERIOUS = ("replacement characters", "mojibake", "control characters", "marks of a chat template", SPECIAL)


class DefectFinder:
    """Looks for all defects; `special_tokens` are the tokenizer's. Travels to worker processes."""

    def __init__(self, special_tokens: Collection[str]) -> None:
        self.special = tuple(sorted({token for token in special_tokens if len(token) > 1}))

    def find(self, conversation: Conversation) -> list[str]:
        """The names of the defects of a conversation, in the order of DEFECTS."""
        found: set[str] = set()
        asked: list[Message] = []
        for message in conversation.messages:
            text = message.content
            found.update([name for name, rule in OF_TEXTS.items() if rule(text)])
            for token in self.special:
                if token in text:
                    found.add(SPECIAL)
            if message.role == "assistant":
                found.update([name for name, rule in OF_ANSWERS.items() if rule(text)])
            elif message.role == "user":
                asked.append(message)
        for message in asked:
            if message.is_blank:
                found.add(EMPTY_QUESTION)
            context = message.fields.get("input")
            if context and _NO_INPUT.search(context):
                found.add(NO_INPUT)
            if context and _is_not_there(context):
                found.add(NOT_THERE)
        if len(asked) > 1 and len({" ".join(m.content.split()) for m in asked}) < len(asked):
            found.add(SAME_QUESTION)
        return [name for name in DEFECTS if name in found] if found else []


def _is_not_there(context: str) -> bool:
    """Whether a question's passage is but a link or a picture, which no model reads."""
    if len(context) > 400:
        return False
    if _PICTURE.search(context):
        return True
    rest = _LINK.search(context)
    words_left = len(re.sub(r"(?:https?:|www\.)\S*", "", context).split())
    return rest is not None and words_left <= 4
