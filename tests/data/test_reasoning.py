"""Reasoning blocks go by the rule that was named, and are counted."""

import pytest

from jaxtune.data.reasoning import apply_reasoning, marked_answers, spread
from jaxtune.data.records import Conversation, Message

FIRST, LAST = "<think>\none\n</think>\n\nYes", "<think>two</think>No <think>said</think>"


def talk(*turns):
    return Conversation(tuple(Message(role, content) for role, content in turns), {"id": 7})


@pytest.mark.parametrize(
    ("rule", "contents", "removed"),
    [
        ("keep", [FIRST, LAST], 0),
        ("drop", ["Yes", "No <think>said</think>"], 2),
        ("last", ["Yes", LAST], 1),
    ],
)
def test_a_rule_removes_the_blocks_it_names_and_counts_them(rule, contents, removed):
    before = talk(("user", "<think>mine</think>"), ("assistant", FIRST), ("user", "So?"), ("assistant", LAST))
    after, count = apply_reasoning(before, rule)
    assert [m.content for m in after.messages if m.role == "assistant"] == contents and count == removed
    assert after.messages[0] == before.messages[0] and after.meta == {"id": 7}


def test_the_steps_of_the_last_answer_with_tools_belong_to_it():
    steps = talk(("user", "Hi"), ("assistant", FIRST), ("tool", "4"), ("assistant", LAST))
    assert apply_reasoning(steps, "last") == (steps, 0)


def test_an_empty_block_is_removed_but_not_counted_as_lost():
    after, count = apply_reasoning(talk(("user", "Hi"), ("assistant", "<think>\n\n</think>\n\nYes")), "drop")
    assert (after.messages[1].content, count) == ("Yes", 0)


def test_an_unclosed_block_is_left_as_it_is():
    before = talk(("user", "Hi"), ("assistant", "<think>so"))
    assert apply_reasoning(before, "drop") == (before, 0)


@pytest.mark.parametrize(("rule", "count"), [("keep", 0), ("drop", 3), ("last", 3)])
def test_answers_that_still_hold_marks_of_reasoning_are_counted(rule, count):
    said = ["<think>a</think><think>b</think>Yes", "Yes</think>", "Yes", "<think>a</think>Yes"]
    turns = [turn for answer in said for turn in (("user", "<think>?"), ("assistant", answer))]
    before = talk(*turns[:-1], ("assistant", "<think>a</think>Yes <think>so"))
    assert marked_answers(apply_reasoning(before, rule)[0], rule) == count
    assert marked_answers(apply_reasoning(talk(*turns[-2:]), rule)[0], rule) == 0


def test_spread_writes_a_block_on_lines_of_its_own():
    assert (
        spread("<think>so</think>Yes\n")
        == spread("\n<think>\nso\n</think>\n\nYes\n")
        == "<think>\nso\n</think>\n\nYes\n"
    )
    assert spread("Yes <think>so</think>") == "Yes <think>so</think>"
