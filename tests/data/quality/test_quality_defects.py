"""Defects that texts show on their face: found where they are, and nowhere else."""

import pickle

import pytest

from jaxtune.data.quality.defects import DEFECTS, SERIOUS, DefectFinder
from jaxtune.data.records import Conversation, Message

FINDER = DefectFinder(["<s>", "</s>", "<|im_end|>", "a"])


def of_answer(text):
    return FINDER.find(Conversation((Message("user", "What is it?"), Message("assistant", text))))


def of_question(text, **fields):
    return FINDER.find(Conversation((Message("user", text, fields=fields), Message("assistant", "A well."))))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("CafÃ© au lait", ["mojibake"]),
        ("Itâ€™s here", ["mojibake"]),
        ("10Â°C", ["mojibake"]),
        ("São Paulo, Âge, HÃ", []),
        ("50\ufffd", ["replacement characters"]),
        ("a\x00b", ["control characters"]),
        ("a\x1b[31mred", ["control characters"]),
        ("tab\there,\r\nnew line", []),
        ("a\u200bb", ["invisible characters"]),
        ("\ufeffHello", ["invisible characters"]),
        ("a family \U0001f468\u200d\U0001f469\u200d\U0001f467, e\u0301", ["letters not in NFC"]),
        ("é", []),
        ("Yes.<|im_end|>", ["marks of a chat template", "a special token in the text"]),
        ("Yes. [/INST]", ["marks of a chat template"]),
        ("Yes.\n### Response:\nNo.", ["marks of a chat template"]),
        ("As in ### Response: of a template", []),
        ("Human: Living\nCar: not", []),
        ("Yes.</s>", ["a special token in the text"]),
        ("fish &amp; chips", ["HTML entities"]),
        ("fish & chips; R&D;", []),
        ("```python\nx = 1\n", ["code fence left open"]),
        ("```python\nx = 1\n```", []),
    ],
)
def test_damage_and_marks_are_told(text, found):
    assert of_answer(text) == found


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("and so on " * 8, True),
        ("and so on " * 7, False),
        ("very " * 16, True),
        ("very " * 15, False),
        ("1 2 " * 30, False),
        ("| a | b |\n" * 4, False),
        (" ".join(f"word{i}" for i in range(200)), False),
        ("First of all, it begins well. " + "the end of the line " * 10, True),
        ("one two three four five six seven eight nine ten " * 8, True),
        ("", False),
    ],
)
def test_a_loop_is_the_same_words_eight_times_running(text, loops):
    assert ("repeats itself" in of_answer(text)) == loops


def test_loops_and_fences_are_looked_for_in_answers_alone():
    assert of_question("again and again " * 20) == [] and of_question("```python\nx") == []


@pytest.mark.parametrize(
    ("context", "found"),
    [
        ("<noinput>", ["placeholder for no input"]),
        ("No input required.", ["placeholder for no input"]),
        ("There is noise in the input", []),
        ("https://example.com/a", ["a link or picture that is not there"]),
        ("Article Link: https://example.com/a", ["a link or picture that is not there"]),
        ("See https://example.com for how the bridge over the river was built", []),
        ("[Image of a bridge]", ["a link or picture that is not there"]),
        ("![alt](x.png)", ["a link or picture that is not there"]),
        ("(Link to photo)", ["a link or picture that is not there"]),
        ("Identifying cats in images", []),
        ("", []),
    ],
)
def test_placeholders_and_what_is_not_there_are_told_of_the_context(context, found):
    assert of_question("Describe it.", input=context) == found


def test_questions_that_are_empty_or_asked_twice_are_told():
    answer = Message("assistant", "A well.")
    assert FINDER.find(Conversation((Message("user", " \n"), answer))) == ["empty question"]
    twice = (Message("user", "Why?"), answer, Message("user", " Why? "), answer)
    assert FINDER.find(Conversation(twice)) == ["the same question twice"]


def test_every_turn_is_looked_at():
    said = (Message("system", "fish &amp; chips"), Message("user", "x\x00"), Message("assistant", "50\ufffd"))
    assert FINDER.find(Conversation(said)) == ["replacement characters", "control characters", "HTML entities"]


def test_a_special_token_of_one_letter_is_a_letter():
    assert of_answer("a") == []


def test_names_are_unique_and_finders_travel():
    assert len(set(DEFECTS)) == len(DEFECTS) and set(SERIOUS) <= set(DEFECTS)
    copy = pickle.loads(pickle.dumps(FINDER))
    assert copy.find(Conversation((Message("user", "</s>"),))) == ["a special token in the text"]
