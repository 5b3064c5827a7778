"""Languages are told where there is enough to tell."""

import pytest

from jaxtune.data.quality.languages import languages, spoken
from jaxtune.data.records import Conversation, Message


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The weather is lovely today and we went for a walk.", "en"),
        ("Bonjour, comment ça va aujourd'hui ?", "fr"),
        ("Das Wetter ist heute schön und wir gehen spazieren.", "de"),
        ("今日はとても暑いです。", "ja"),
        ("你好，你今天怎么样？", "zh"),
        ("", "und"),
        ("42 + 1 = 43 !!! 12345678901234567890", "und"),
        ("Positive", "und"),
        ("Question", "und"),  # the model takes its eight letters for Italian
        ("https://www.example.org/the-weather-is-lovely-today-and-we-walk Il fait beau aujourd'hui, sortons.", "fr"),
        ("https://example.org/the-weather-is-lovely-today", "und"),
        ("SELECT COUNT(*) FROM tableName;", "und"),
    ],
)
def test_a_language_is_told_or_undetermined(text, language):
    assert languages([text, text]) == [language] * 2


def test_no_texts_have_no_languages():
    assert languages([]) == []


def test_a_conversation_speaks_with_its_answers():
    def talk(answer):
        return spoken(
            Conversation((Message("system", "S"), Message("user", "Who is it?"), Message("assistant", answer)))
        )

    long = "Il fait très beau aujourd'hui, alors nous sommes sortis."
    assert talk(f"<think>in English</think>{long}") == long
    assert talk("Oui") == "Who is it? Oui"
    assert spoken(Conversation((Message("text", long),))) == long
