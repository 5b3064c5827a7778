"""How hard an exchange looks: its length, the steps of its answer, the constraints of its question."""

import re
from typing import NamedTuple

from jaxtune.data.quality.exchanges import Exchange
from jaxtune.data.quality.words import words


class Difficulty(NamedTuple):
    """Words of the question (with its context), steps of the answer, constraints of the instruction."""

    words: int
    steps: int
    constraints: int


_NUMBERED = re.compile(r"^[ \t]*(?:\(?\d{1,2}[.):]|[Ss]tep \d+)[ \t]*\S", re.MULTILINE)
_HAS_DIGIT = re.compile(r"\d")
_END = re.compile(r"[.!?]+(?=\s|$)|[。！？]|\n")
_REASONING = """
    so thus therefore hence because since then if implies implying means first firstly second secondly next finally
    consequently let's suppose altogether
"""
_REASON_WORDS = frozenset(_REASONING.split())
_REASONS = re.compile(rf"\b(?:{'|'.join(sorted(_REASON_WORDS))}|it follows|given that|as a result|in total)\b|=")
_REASON_PHRASES = ("it follows", "given that", "as a result", "in total")

_BINDING = """
    must should shouldn't ensure exactly only without avoid don't never maximum minimum limit limited include includes
    including contain contains containing using use
"""
_CONSTRAINT_WORDS = frozenset(_BINDING.split())
_CONSTRAINT_PHRASES = re.compile(
    r"\b(?:needs? to|has to|have to|make sure|at least|at most|no (?:more|less|longer|fewer) than|not exceed|up to|"
    r"do not|between \d+ and|(?<!no )(?:fewer|less|more|longer) than|in the (?:style|form|voice) of|"
    r"(?:starting|ending|begin|start|end) with|\d+[- ](?:words?|sentences?|paragraphs?|lines?|characters?|letters?|"
    r"syllables?|items?|bullet points?|steps?|examples?))\b"
)


def difficulty(exchange: Exchange) -> Difficulty:
    """Counts that stand for difficulty; each grows with it, none measures it."""
    return Difficulty(
        words=words(exchange.instruction).number + words(exchange.context).number,
        steps=steps(exchange.response),
        constraints=constraints(exchange.instruction),
    )


def constraints(instruction: str) -> int:
    """How many words and phrases of the instruction bind its answer: must, only, at least, 50 words."""
    single = sum(word in _CONSTRAINT_WORDS for word in words(instruction).said)
    return single + len(_CONSTRAINT_PHRASES.findall(instruction.lower()))


def steps(response: str) -> int:
    """The larger of: numbered lines, sentences that reason (so, because, first, an equation)."""
    numbered = len(_NUMBERED.findall(response)) if _HAS_DIGIT.search(response) else 0
    return max(numbered, reasoning_sentences(response))


def reasoning_sentences(text: str) -> int:
    """How many sentences hold a word of reasoning or an equals sign; crude about full stops ("Dr. Who")."""
    lower = text.lower()
    if (
        "=" not in text
        and _REASON_WORDS.isdisjoint(words(text).said)
        and not any(phrase in lower for phrase in _REASON_PHRASES)
    ):
        return 0
    count, at = 0, 0
    while reason := _REASONS.search(lower, at):
        count += 1
        end = _END.search(lower, reason.end())
        if end is None:
            break
        at = end.end()
    return count
