"""What an instruction asks for, by its words; and how evenly a mixture asks."""

import itertools
import math
import re
from collections.abc import Mapping

from jaxtune.data.quality.words import words
from jaxtune.data.records import Conversation

OTHER = "other"
_LANGUAGES = (
    "french spanish german italian portuguese chinese mandarin japanese korean russian arabic hindi dutch polish "
    "turkish greek latin swedish hebrew vietnamese thai english ukrainian indonesian bengali urdu persian swahili"
)
# The first kind with one of its words in the instruction, as it is usually told.
WORDS: dict[str, tuple[str, ...]] = {
    "classification": ("classify", "categorize", "label", "sentiment", "determine if"),
    "generation": ("write", "generate", "create", "compose", "draft"),
    "qa": ("what", "why", "how", "who", "when", "where", "explain"),
    "summarization": ("summarize", "summary", "tldr", "condense"),
    "translation": ("translate", *(f"in {language}" for language in _LANGUAGES.split())),
    "coding": ("code", "function", "implement", "program", "debug"),
    "math": ("calculate", "solve", "compute", "find", "equation"),
}
KINDS: tuple[str, ...] = (*WORDS, OTHER)

_OF_WORD = {word: rank for rank, kind in enumerate(WORDS) for word in WORDS[kind] if " " not in word}
_PHRASES = {tuple(phrase.split()): rank for rank, kind in enumerate(WORDS) for phrase in WORDS[kind] if " " in phrase}
_FIRST_OF_PHRASE = frozenset(first for first, _ in _PHRASES)

_READ = 2000  # characters of an instruction that the better order reads: a passage that follows asks for nothing
_LANGUAGE = "|".join(_LANGUAGES.split())
_CODE = r"(?:functions?|methods?|class|programs?|scripts?|code|query|queries|regex)"
# Kinds whose words are rare elsewhere are asked for first; "write", "what" and "how" open instructions of every kind
# and come last: "Write a function", "What is the sum", "How would you say this in French".
_BETTER: tuple[tuple[str, str], ...] = (
    (
        "coding",
        r"python|javascript|typescript|java|c\+\+|c#|(?:my)?sql|html|css|php|bash|golang|kotlin|pseudo-?code|"
        r"regular expression|algorithms?|source code|code snippet|api|json|debug|refactor|unit tests?|"
        r"data structure|linked list|binary (?:search )?tree|for loop|while loop|recursive(?:ly)?|"
        rf"(?:write|create|implement|generate|develop|design|make|build|edit|modify|optimi[sz]e|complete|fix|following|"
        rf"this|given) (?:[\w-]+ ){{0,3}}{_CODE}(?! of conduct)(?!(?<=program) for\b)(?= (?:to|that|which|in|for|"
        rf"called|named|so|using|with|returns?|below|takes)\b|\s*[.:,?\n`]|\s*$)",
    ),
    (
        "translation",
        rf"translat(?:e|es|ed|ing|ion)|(?:in|into|to) (?:{_LANGUAGE})(?! (?:cuisine|food|history|culture|literature))",
    ),
    ("summarization", r"summari[sz](?:e|es|ed|ing)|summar(?:y|ies)|tl;?dr|condense|in a nutshell|main points?"),
    (
        "classification",
        r"classif(?:y|ies|ied|ication)|categori[sz]e|sentiment|label (?:the|this|these|each|it)|"
        r"(?:determine|decide|identify|tell me|predict|figure out) (?:if|whether|which)|true or false|"
        r"positive or negative|which of the following|"
        r"(?:what|which) (?:category|class|genre|topic|type)",
    ),
    (
        "math",
        r"calculate|solve|compute|equations?|arithmetic|algebra|multiply|divide|subtract|derivative|integral|"
        r"square root|greatest common|prime (?:number|factor)s?|perimeter|circumference",
    ),
    (
        "generation",
        r"write|generate|create|compose|draft|rewrite|re-write|rephrase|paraphrase|invent|brainstorm|design|imagine|"
        r"come up with|make up|poem|haiku|essay|slogan|tweet",
    ),
    (
        "qa",
        r"what|what's|why|how|who|whose|whom|when|where|which|explain|describe|define|name|tell me|"
        r"\A(?:is|are|was|were|do|does|did|can|could|should|will|would|has|have)",
    ),
)
_BETTER_RULES = tuple((kind, re.compile(rf"(?<!\w)(?:{pattern})(?!\w)")) for kind, pattern in _BETTER)
# What makes a question one of arithmetic: two numbers and a quantity asked for.
_NUMBERS = re.compile(r"\d.*?[^\d.,].*?\d", re.DOTALL)
_QUANTITY = re.compile(
    r"\b(?:how (?:many|much|long|far|old|fast|tall)|what (?:percent\w*|fraction|number)|"
    r"(?:sum|product|average|mean|median|area|volume|value|percentage|slope|ratio|total|difference) (?:of|between)|"
    r"find)\b"
)


def kind_of(instruction: str) -> str:
    """The first of `KINDS` one of whose words stands in the instruction, as a whole word and in any case."""
    said = words(instruction).said
    best = len(WORDS)
    for word in said:
        rank = _OF_WORD.get(word, best)
        if rank < best:
            best = rank
        elif "'" in word or "’" in word:  # what's, who're
            best = min(best, _OF_WORD.get(re.split("['’]", word)[0], best))
    if not _FIRST_OF_PHRASE.isdisjoint(said):
        best = min([best, *(_PHRASES.get(pair, best) for pair in itertools.pairwise(said))])
    return KINDS[best]


def better_kind_of(instruction: str) -> str:
    """The kind by an order in which generation and qa swallow nothing.

    `kind_of` calls "Write a function that adds two numbers" generation and "How many apples are left?" qa, for their
    words come first there. Here coding, translation, summarization, classification and math are asked for first, by
    more of their words; a question of how many with two numbers in it is math; "code" or "program" alone ("dress
    code", "a training program") are not coding.
    """
    text = instruction[:_READ].lower()
    for kind, rule in _BETTER_RULES:
        if rule.search(text) or (kind == "math" and _QUANTITY.search(text) and _NUMBERS.search(text)):
            return kind
    return OTHER


def diversity(counts: Mapping[str, int]) -> float:
    """How evenly the kinds are asked for: entropy in bits over log2 of `len(KINDS)`.

    The divisor is the taxonomy's number of kinds, not the number found: two mixtures are compared on one scale, and
    one of two kinds half and half is not as diverse as one of eight. 1 where all kinds are equally many, 0 for one
    kind or none.
    """
    total = sum(counts.values())
    shares = [count / total for count in counts.values() if count > 0]
    return max(0.0, -sum(share * math.log2(share) for share in shares)) / math.log2(len(KINDS))


def category_of(conversation: Conversation) -> str | None:
    """The category that the row itself names, as Dolly's rows do; None without one."""
    named = conversation.meta.get("category")
    return named if isinstance(named, str) and named else None
