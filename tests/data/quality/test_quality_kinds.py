"""Kinds go by whole words, the first that matches; diversity is known for known mixtures."""

import gzip
import json
import math

import pytest

from jaxtune.data.quality.kinds import KINDS, WORDS, better_kind_of, category_of, diversity, kind_of
from jaxtune.data.records import Conversation


def test_the_order_is_that_of_the_taxonomy():
    assert KINDS == (
        "classification",
        "generation",
        "qa",
        "summarization",
        "translation",
        "coding",
        "math",
        "other",
    )


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_every_word_of_a_kind_names_it_alone(kind):
    for word in WORDS[kind]:
        assert kind_of(f"Please {word.upper()}, it") == kind, word


@pytest.mark.parametrize(
    ("instruction", "kind"),
    [
        ("Write code to classify mails", "classification"),  # before generation and coding
        ("Write a function", "generation"),
        ("What is 2 + 2? Solve it", "qa"),
        ("Summarize and translate this", "summarization"),
        ("Translate this program", "translation"),
        ("Debug the equation", "coding"),
        ("Find x", "math"),
        ("Say hello in Spanish", "translation"),
        ("Name the Spanish king", "other"),
        ("Determine the weight, if you like", "other"),
        ("Rewritten codes whatever", "other"),  # no whole word
        ("What's this", "qa"),
        ("Who’s there", "qa"),
        ("my_function", "other"),
        ("", "other"),
    ],
)
def test_the_first_kind_wins_by_whole_words(instruction, kind):
    assert kind_of(instruction) == kind


@pytest.mark.parametrize(
    ("instruction", "kind"),
    [
        ("Write a function that adds two numbers.", "coding"),
        ("Create a SQL query for all users", "coding"),
        ("What is the dress code at the Ritz?", "qa"),
        ("Write a training program for runners", "generation"),
        ("How would you say 'thank you' in French?", "translation"),
        ("Name a dish in French cuisine", "qa"),
        ("Write a summary of the text", "summarization"),
        ("Write whether the sentiment is good", "classification"),
        ("How many apples are left if I eat 3 of 12?", "math"),
        ("How many planets are there?", "qa"),
        ("Solve this riddle", "math"),
        ("Find three synonyms of happy", "other"),
        ("Write what you know", "generation"),
        ("Add the word 'very'", "other"),
    ],
)
def test_the_better_order_lets_nothing_be_swallowed(instruction, kind):
    assert better_kind_of(instruction) == kind


def test_diversity_is_entropy_over_that_of_all_kinds():
    assert diversity({}) == 0.0 and diversity({"qa": 5}) == 0.0 and diversity({"qa": 5, "math": 0}) == 0.0
    assert diversity({"qa": 3, "math": 3}) == pytest.approx(1 / 3)  # 1 bit of the 3 that 8 kinds have
    assert diversity(dict.fromkeys(KINDS, 7)) == pytest.approx(1.0)
    skewed = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) / 3
    assert diversity({"qa": 3, "math": 1}) == pytest.approx(skewed)


def test_a_rows_own_category_is_told():
    assert category_of(Conversation((), {"category": "open_qa"})) == "open_qa"
    assert category_of(Conversation((), {"category": ""})) is category_of(Conversation(())) is None


def test_the_better_order_finds_real_coding_and_arithmetic(shared):
    with gzip.open(shared / "code" / "code_alpaca_2k.jsonl.gz", "rt", encoding="utf-8") as file:
        code = [json.loads(line)["instruction"] for line in file]
    with open(shared / "gsm8k" / "train.jsonl", encoding="utf-8") as file:
        sums = [json.loads(line)["question"] for line in file][:1000]

    def share(texts, of, kind):
        return sum(of(text) == kind for text in texts) / len(texts)

    assert share(code, kind_of, "coding") < 0.2 and share(code, better_kind_of, "coding") > 0.7
    assert share(sums, kind_of, "math") < 0.1 and share(sums, better_kind_of, "math") > 0.75
