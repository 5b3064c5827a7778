"""What stands for difficulty is counted, hand-checked."""

import pytest

from jaxtune.data.quality.difficulty import constraints, difficulty, steps
from jaxtune.data.quality.exchanges import Exchange


def test_difficulty_counts_the_question_with_its_context():
    exchange = Exchange("Use exactly 5 words.", "A long text", "1. So.\n2. Then.\n3. Done.")
    assert difficulty(exchange) == (7, 3, 3)


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("", 0),
        ("Paris.", 0),
        ("1. Mix.\n2) Bake.\nStep 3: eat.", 3),
        ("It rains, so I stay, because it is wet. I read.", 1),  # sentences, not words
        ("It rains so much. Hence I stay. Thus: 2 + 2 = 4.", 3),
        ("It follows that x is 2.", 1),
        ("茶 = 1。水 = 2。", 2),
        ("Soon the sofa thence went.", 0),
    ],
)
def test_steps_are_numbered_lines_or_sentences_that_reason(response, number):
    assert steps(response) == number


@pytest.mark.parametrize(
    ("instruction", "number"),
    [
        ("Write a poem", 0),
        ("You must use rhyme, and do not exceed it", 3),
        ("At least 3 sentences, no more than 50 words, without the letter e", 5),
        ("More than ever", 1),
        ("An 80-word text in the style of Poe, ending with a question", 3),
        ("It contained useful users", 0),
    ],
)
def test_constraints_are_words_that_bind(instruction, number):
    assert constraints(instruction) == number
