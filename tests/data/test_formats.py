"""Each format's rows become the conversation they mean; each wrong row is told what is wrong with it."""

import pytest

from jaxtune.data.layouts.formats import find_layout
from jaxtune.data.records import NothingToLearn, RowError

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}


def convert(row, **keys):
    (conversation,) = find_layout([row], **keys).convert(row)
    return [(m.role, m.content) for m in conversation.messages]


@pytest.mark.parametrize(
    ("row", "layout", "messages"),
    [
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            "alpaca (instruction, input, output)",
            [("user", "Add\n\n1 2"), ("assistant", "3")],
        ),
        (
            {"instruction": "Add", "context": "", "response": "3", "category": "x", "system": "Be"},
            "dolly (instruction, context, response, category, system)",
            [("system", "Be"), ("user", "Add"), ("assistant", "3")],
        ),
        ({"messages": [USER, ASSISTANT]}, "messages (messages)", [("user", "Hi"), ("assistant", "Yes")]),
        (
            {"conversations": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ASSISTANT], "id": 1},
            "messages (messages <- conversations)",
            [("user", "Hi"), ("assistant", "Yes")],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "S"},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Y"},
                ]
            },
            "sharegpt (messages <- conversations)",
            [("system", "S"), ("user", "Hi"), ("assistant", "Y")],
        ),
        (
            {"prompt": "Hi", "completion": "Y"},
            "prompt_completion (prompt, completion)",
            [("user", "Hi"), ("assistant", "Y")],
        ),
        (
            {"question": "Hi", "answer": "Y"},
            "prompt_completion (prompt <- question, completion <- answer)",
            [("user", "Hi"), ("assistant", "Y")],
        ),
        (
            {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
            "prompt_completion (prompt, completion)",
            [("user", "Hi"), ("assistant", "Yes")] * 2,
        ),
        ({"text": "Once"}, "text (text)", [("text", "Once")]),
    ],
)
def test_formats_are_found_from_rows(row, layout, messages):
    assert find_layout([row]).describe() == layout
    assert convert(row) == messages


def test_columns_map_other_names():
    row = {"frage": "Hi", "antwort": "Ja"}
    columns = {"prompt": "frage", "completion": "antwort"}
    assert convert(row, columns=columns) == [("user", "Hi"), ("assistant", "Ja")]
    with pytest.raises(
        ValueError, match=r"columns.prompt: no column 'frag' \(nearest: frage\); found columns frage, antwort"
    ):
        find_layout([row], columns={**columns, "prompt": "frag"})
    with pytest.raises(ValueError, match=r"format alpaca has no such field .*its fields are instruction, input"):
        find_layout([row], format="alpaca", columns={"outputs": "antwort"})


def test_optional_columns_are_looked_for_in_every_row():
    layout = find_layout([{"instruction": "Add", "output": "3"}])
    for name in ("input", "context"):
        (late,) = layout.convert({"instruction": "Add", name: "1 2", "output": "3", "system": "Be"})
        assert [m.content for m in late.messages] == ["Be", "Add\n\n1 2", "3"]
    mapped = find_layout([{"instruction": "Add", "more": "", "output": "3"}], columns={"input": "more"})
    (other,) = mapped.convert({"instruction": "Add", "input": "not this", "output": "3"})
    assert [m.content for m in other.messages] == ["Add", "3"]
    with pytest.raises(RowError, match=r"no column 'output' \(nearest: outputs\)"):
        layout.convert({"instruction": "Add", "outputs": "3"})


def test_no_format_fits():
    with pytest.raises(ValueError, match=r"no format fits the columns found: a, b .*columns.prompt=QUESTION"):
        find_layout([{"a": 1, "b": 2}])
    with pytest.raises(ValueError, match=r"format alpaca: no column 'output' \(nearest: outputs\); found columns"):
        find_layout([{"instruction": "x", "outputs": "y"}], format="alpaca")


def test_weights_and_train_flags():
    turns = [{**USER, "weight": None}, {**ASSISTANT, "train": False}, USER, {**ASSISTANT, "weight": 0.5, "train": True}]
    (conversation,) = find_layout([{"messages": turns}]).convert({"messages": turns})
    assert [m.weight for m in conversation.messages] == [None, 0.0, None, 0.5]


def test_a_system_column_may_repeat_the_system_message():
    row = {"messages": [{"role": "system", "content": "Be kind"}, USER, ASSISTANT], "system": "Be kind\n"}
    assert convert(row) == [("system", "Be kind"), ("user", "Hi"), ("assistant", "Yes")]
    with pytest.raises(RowError, match=r"the column system has 'Be rude' and message 1 has 'Be kind'; expected the"):
        convert({**row, "system": "Be rude"})


def chat(*turns):
    return {"messages": [{"role": r, "content": "x"} for r in turns]}


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"other": 1}, "missing column", r"no column 'messages'; found columns other"),
        ({"messages": "Hi"}, "wrong type", r"found text; expected a list of \{role, content\} objects"),
        ({"messages": [USER, "Yes"]}, "wrong type", r"message 2: found text; expected keys role and content"),
        ({"messages": [{"role": "user"}]}, "wrong type", r"message 1: found keys role; expected keys role and content"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "wrong type",
            r"message 1: content is the number 5; expected text",
        ),
        ({"messages": [{**USER, "weight": -1}]}, "wrong type", r"weight is -1; expected a number of at least 0"),
        ({"messages": [{**USER, "train": 1}]}, "wrong type", r"train is the number 1; expected true or false"),
        (
            chat("usr", "assistant"),
            "unknown role",
            r"message 1: found role 'usr' \(nearest: user\); expected one of system",
        ),
        (chat("user", "assistant", "assistant"), "roles out of order", r"message 3: found assistant after assistant"),
        (chat("assistant"), "roles out of order", r"message 1: found assistant first; expected user there"),
        (chat("system", "assistant"), "roles out of order", r"message 2: found assistant first; expected user"),
        (
            chat("user", "system", "assistant"),
            "roles out of order",
            r"message 2 is a system message; expected it first",
        ),
        (
            chat("user", "user", "assistant"),
            "roles out of order",
            r"message 2: found user after user; expected assistant",
        ),
    ],
)
def test_malformed_rows(row, reason, message):
    layout = find_layout([{"messages": [USER, ASSISTANT]}])
    with pytest.raises(RowError, match=message) as error:
        layout.convert(row)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "a", "output": " \n"}, "empty answer"),
        ({"instruction": "a", "output": None}, "empty answer"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": []}, "no assistant turn"),
        ({"text": "  "}, "empty text"),
    ],
)
def test_rows_that_teach_nothing(row, reason):
    format = {"instruction": "alpaca", "messages": "messages", "text": "text"}[next(iter(row))]
    with pytest.raises(NothingToLearn) as error:
        find_layout([row], format=format).convert(row)
    assert error.value.reason == reason


def test_wrong_types_in_flat_formats():
    good = {"instruction": "a", "output": "b"}
    with pytest.raises(RowError, match="output is a list; expected text"):
        find_layout([good]).convert({"instruction": "a", "output": ["b"]})
    with pytest.raises(RowError, match="instruction is null; expected text"):
        find_layout([good]).convert({"instruction": None, "output": "b"})
