"""Words are counted alike in scripts with and without spaces."""

import pytest

from jaxtune.data.quality.words import words


@pytest.mark.parametrize(
    ("text", "said", "number"),
    [
        ("I'm 30, it’s late_night.", ("i'm", "30", "it’s", "late_night"), 4),
        ("", (), 0),
        ("... !?", (), 0),
        ("Ça va très bien", ("ça", "va", "très", "bien"), 4),
        ("हिन्दी में लिखो।", ("हिन्दी", "में", "लिखो"), 3),  # marks of vowels do not end a word
        ("我喜欢茶。", ("我喜", "喜欢", "欢茶"), 2),  # four characters are two words
        ("茶", ("茶",), 1),
        ("用Python写", ("用", "python", "写"), 3),
        ("ภาษาไทย", ("ภา", "าษ", "ษา", "าไ", "ไท", "ทย"), 2),  # seven characters, four a word
        ("안녕 세상", ("안녕", "세상"), 2),
    ],
)
def test_a_text_is_read_as_words(text, said, number):
    assert words(text) == (said, number)
