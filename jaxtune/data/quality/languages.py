"""Which language a text is in, by py3langid's model: byte n-grams and naive Bayes, no network."""

import functools
import re
from collections.abc import Sequence
from typing import Any

from py3langid import langid

from jaxtune.data.quality.exchanges import without_reasoning
from jaxtune.data.records import Conversation

UNDETERMINED = "und"
READ = 200  # characters of a text that are looked at
LEAST_LETTERS = 12  # fewer say little in an alphabet; a third of it does where a character is a syllable
LEAST_CONFIDENCE = 0.5
_ENOUGH_LETTERS = 30

_LETTERS = re.compile(r"[^\W\d_]")
_SYLLABLES = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_LINKS = re.compile(r"https?://\S+|\S+@\S+")


def languages(texts: Sequence[str]) -> list[str]:
    """An ISO 639-1 code for each text; `und` where it is too short, has no letters, or nothing is likely enough.

    The first 200 characters decide, without links. The model is loaded, in half a second, when first asked.
    """
    identify = _identifier().classify
    return [_language(text, identify) for text in texts]


def spoken(conversation: Conversation) -> str:
    """The text that says which language a conversation teaches: its answers, or raw text.

    Where these have too few letters to tell (a label, a number), what the user said stands before them.
    """
    said = " ".join(
        without_reasoning(message.content)[:READ]
        for message in conversation.messages
        if message.role in ("assistant", "text")
    )[:READ]
    if _letters(said) >= _ENOUGH_LETTERS:
        return said
    asked = " ".join(message.content[:READ] for message in conversation.messages if message.role == "user")
    return f"{asked[:READ]} {said}"


def _language(text: str, identify: Any) -> str:
    head = _LINKS.sub(" ", text[:READ])
    if _letters(head) < LEAST_LETTERS:
        return UNDETERMINED
    language, confidence = identify(head)
    return str(language) if confidence >= LEAST_CONFIDENCE and len(language) == 2 else UNDETERMINED


def _letters(text: str) -> int:
    return len(_LETTERS.findall(text)) + (0 if text.isascii() else 2 * len(_SYLLABLES.findall(text)))


@functools.cache
def _identifier() -> Any:
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
