"""How good an exchange looks from outside: five scores in [0, 1] with their mean, and three figures beside them.

Each is a formula of words (docs/data-quality.md); none understands what is said.
"""

import re
from typing import NamedTuple

from jaxtune.data.quality import word_lists
from jaxtune.data.quality.difficulty import reasoning_sentences
from jaxtune.data.quality.exchanges import Exchange, exchanges
from jaxtune.data.quality.words import Words, unfolded, words
from jaxtune.data.records import Conversation


class Scores(NamedTuple):
    """The scores of an exchange. `mean` is that of the first five; the rest are for information."""

    clarity: float
    length_fit: float
    format_match: float
    non_refusal: float
    topic_relevance: float
    length_ratio: float
    keyword_overlap: float
    harm: float

    @property
    def mean(self) -> float:
        """The mean of the five scores."""
        return (self.clarity + self.length_fit + self.format_match + self.non_refusal + self.topic_relevance) / 5


SCORED = Scores._fields[:5]


def score(exchange: Exchange) -> Scores:
    """The scores of one exchange."""
    instruction, context, answer = words(exchange.instruction), words(exchange.context), words(exchange.response)
    asked, content = instruction.number + context.number, content_words(instruction)
    return Scores(
        clarity=clarity(exchange.instruction),
        length_fit=length_fit(asked, answer.number),
        format_match=format_match(exchange.instruction, exchange.response),
        non_refusal=0.2 if is_refusal(exchange.response) else 1.0,
        topic_relevance=min(1.0, _shared(content, words(first_sentence(exchange.response))) / 0.3),
        length_ratio=answer.number / (asked + answer.number) if answer.number else 0.0,
        keyword_overlap=_shared(content, answer),
        harm=harm(instruction, context, answer),
    )


def score_conversation(conversation: Conversation) -> Scores | None:
    """The mean of each score over the exchanges; None where there is none."""
    scored = [score(exchange) for exchange in exchanges(conversation)]
    if len(scored) < 2:
        return scored[0] if scored else None
    return Scores(*(sum(values) / len(scored) for values in zip(*scored, strict=True)))


_VAGUE = re.compile(
    # "what kind of", "this kind of" name a kind; "some kind of" and "kind of late" do not.
    r"(?<!what )(?<!which )(?<!this )(?<!that )(?<!the )(?<!each )(?<!every )(?<!same )\b(?:"
    + "|".join(phrase for phrase in word_lists.VAGUE if " " in phrase)
    + r")\b|\b(?:"
    + "|".join(word for word in word_lists.VAGUE if " " not in word)
    + r")\b",
    re.IGNORECASE,
)


_MAY_BE_VAGUE = frozenset(phrase.split()[0] for phrase in word_lists.VAGUE)


def clarity(instruction: str) -> float:
    """1 - 0.2 for each vague word of the instruction, at least 0."""
    if _MAY_BE_VAGUE.isdisjoint(words(instruction).said):
        return 1.0
    return max(0.0, 1.0 - 0.2 * len(_VAGUE.findall(instruction)))


def length_fit(asked: int, answered: int) -> float:
    """Whether an answer of that many words fits a question of that many."""
    if asked < 10 and answered > 500:
        return 0.5
    if answered < 20:
        return 0.4
    return 1.0 if 50 <= answered <= 800 else 0.7


_MAY_ASK = re.compile(r"lists?\b|steps?\b|bullet|numbered", re.IGNORECASE)
# There a list is data, and a step the program's.
_IN_CODE = re.compile(
    r"\b(?:python|javascript|java|c\+\+|sql|mysql|html|code|program|script|function|query|algorithm|loop|json|"
    r"linked list|list comprehension|(?:two|these|existing) lists?|"
    r"list of (?:integers|numbers|strings|tuples|elements))\b",
    re.IGNORECASE,
)
_MAKE = "make|create|write|give|provide|generate|compile|produce|draft|prepare|suggest|develop|form|design|me|with"
_ASKS_FOR_LIST = re.compile(
    r"(?:\A|[.?!:;,\n]\s*|\b(?:please|then|and|also|can you|could you|should) )list\b(?! (?:is|has|was|contains))|"
    rf"\b(?:{_MAKE}) (?:(?!from|given|the|in|of|that)[\w'-]+ ){{0,3}}lists?\b|\b(?:as|into) an? (?:\w+ )?list\b|"
    r"\b(?:bullets|bulleted|bullet[ -]?points|numbered)\b|"
    r"(?<!number of )\bsteps (?:to|for|involved|needed|required|you|one)\b|\b(?:the|main|key) steps (?:of|in)\b|"
    r"(?<!think )(?<!it )\bstep[- ]by[- ]step\b",
    re.IGNORECASE,
)
_ITEM = re.compile(
    r"^\s*(?:[-*•◦▪–+]\s*|\(?\d{1,2}[.):]\s*|\(?[a-zA-Z][.)]\s+|step \d+|#+ )\S", re.MULTILINE | re.IGNORECASE
)
_INLINE_ITEM = re.compile(r"(?:^|\s)\(?(\d{1,2})[.)]\s")
_SEQUENCE = re.compile(
    r"\b(?:first(?:ly)?|second(?:ly)?|third(?:ly)?|then|next|after(?:wards| that)|finally|lastly)\b", re.I
)
_COMMA = re.compile(r"[,;،、，]\s*")


def asks_for_list(instruction: str) -> bool:
    """Whether a list, steps or bullets are asked for; a list that is the data ("sort the list") is none."""
    if not _MAY_ASK.search(instruction):
        return False
    return bool(_ASKS_FOR_LIST.search(instruction)) and not _IN_CODE.search(instruction)


def gives_list(response: str) -> bool:
    """Whether the answer is, or holds, a list: marks, short lines, commas, or words of order."""
    if len(_ITEM.findall(response)) >= 2 or len(_INLINE_ITEM.findall(response)) >= 2:
        return True
    lines = [line for line in response.splitlines() if line.strip()]
    if len(lines) >= 3 and sum(len(line) <= 120 for line in lines) >= 0.7 * len(lines):
        return True
    return len(_COMMA.findall(response[:400])) >= 2 or len(_SEQUENCE.findall(response)) >= 2


def format_match(instruction: str, response: str) -> float:
    """1 where a list was asked for and given, or not asked for; else 0.3."""
    return 0.3 if asks_for_list(instruction) and not gives_list(response) else 1.0


_REFUSAL = re.compile("|".join(f"(?:{form})" for form in word_lists.REFUSALS))
_OPENING = 240


def is_refusal(response: str) -> bool:
    """Whether the answer opens as one that declines; one that only contains or quotes such words is none."""
    opening = " ".join(unfolded(response[:_OPENING]).lower().split())
    return bool(_REFUSAL.match(opening))


_LEAST_COPIED = 5


def copies_instruction(exchange: Exchange) -> bool:
    """Whether the answer is the instruction, its context or both over again, or begins with all of an instruction of
    five words or more; white space does not count, case does ("Write this in capitals").
    """
    answer = " ".join(exchange.response.split())
    if not answer:
        return False
    question = " ".join(exchange.instruction.split())
    if answer in (question, " ".join(exchange.context.split()), " ".join(exchange.asked.split())):
        return True
    return answer.startswith(question) and words(exchange.instruction).number >= _LEAST_COPIED


_CONCLUDES = re.compile(
    r"####|\b(?:so|thus|therefore|hence),? (?:the )?(?:(?:final|correct) )?answer\b|"
    r"\bthe (?:final |correct )?answer is\b|\bstep by step\b"
)
_EQUATION = re.compile(r"\d\s?[-+*/x×÷%]\s?[$€£]?\d[^\n=]{0,40}=\s?(?:<<)?[$€£]?-?\d")


def shows_steps(response: str) -> bool:
    """Whether the answer shows its reasoning: it concludes after a sentence that led there, or two of its sentences
    reason and one holds an equation of numbers."""
    lower = response.lower()
    conclusion = _CONCLUDES.search(lower)
    if conclusion and _HAS_WORD.search(lower, 0, conclusion.start()):
        return True
    return "=" in response and bool(_EQUATION.search(response)) and reasoning_sentences(response) >= 2


def harm(*texts: Words) -> float:
    """0.25 for each different word of the crude list in the texts, at most 1."""
    found: set[str] = set()
    for text in texts:
        found.update(word_lists.HARM.intersection(text.said))
    return min(1.0, 0.25 * len(found))


def content_words(text: Words) -> frozenset[str]:
    """The words that say what a text is about: no stop words, no single letters, no numbers of one digit."""
    return frozenset(word for word in text.said if len(word) > 1) - word_lists.STOP_WORDS


_HAS_WORD = re.compile(r"[^\W\d_]{2}|[\u0e00-\u0eff\u3040-\u9fff]")
_END = re.compile(r"[.!?…]+[\"')\]]*(?=\s|$)|[。！？]|\n")


def first_sentence(response: str) -> str:
    """The answer up to its first full stop or line break after a word of at least two letters.

    "1. Mix flour. Then bake." -> "1. Mix flour."
    """
    head = response[:1000]
    for end in _END.finditer(head):
        if _HAS_WORD.search(head, 0, end.start()):
            return head[: end.end()]
    return head


def _shared(content: frozenset[str], text: Words) -> float:
    """The share of the content words that the text has; 1 of none."""
    if not content:
        return 1.0
    return len(content.intersection(text.said)) / len(content)
