"""Rows of one task and its answer, under the names of each data set; what they carry is carried on."""

import pytest

from jaxtune.data.layouts.formats import find_layout
from jaxtune.data.records import NothingToLearn, RowError


def convert(row, **keys):
    (conversation,) = find_layout([row], **keys).convert(row)
    return [m.content for m in conversation.messages], dict(conversation.meta)


def test_dolly_carries_its_category_and_keeps_alpacas_two_parts():
    row = {"instruction": "Sum up", "context": "A text", "response": "Short", "category": "summarization"}
    assert convert(row) == (["Sum up\n\nA text", "Short"], {"category": "summarization"})
    (conversation,) = find_layout([row]).convert(row)
    assert conversation.messages[0].fields == {"instruction": "Sum up", "input": "A text"}


@pytest.mark.parametrize(
    ("key", "source"), [("niv.242684", "niv"), ("flan.1", "flan"), ("t0.2", "t0"), ("cot.3", "cot")]
)
def test_orca_carries_system_source_teacher_and_stage(key, source):
    row = {"id": key, "system_prompt": "Be", "question": "Hi", "response": "Y", "teacher": "gpt4", "stage": 2}
    assert find_layout([row]).format == "orca"
    assert convert(row) == (["Be", "Hi", "Y"], {"system": "Be", "source": source, "teacher": "gpt4", "stage": 2})


def test_orca_without_a_system_message_has_none():
    row = {"id": "7", "system_prompt": "", "question": "Hi", "response": "Y"}
    assert convert(row) == (["Hi", "Y"], {})
    assert convert({"question": "Hi", "response": "Y"}, format="orca")[0] == ["Hi", "Y"]
    assert find_layout([{"question": "Hi", "response": "Y"}]).format == "prompt_completion"


def test_each_instance_of_a_self_instruct_task_is_a_conversation_and_empty_ones_take_none_along():
    row = {
        "instruction": "Add",
        "instances": [{"input": "1 2", "output": "3"}, {"input": "", "output": " "}, {"input": "", "output": "0"}],
    }
    made = find_layout([row]).convert(row)
    assert [[m.content for m in c.messages] for c in made] == [["Add\n\n1 2", "3"], ["Add", "0"]]
    with pytest.raises(RowError, match="instance 2: output is the number 3; expected text"):
        find_layout([row]).convert({**row, "instances": [row["instances"][0], {"input": "", "output": 3}]})
    with pytest.raises(RowError, match="instance 1: found keys input; expected keys input and output"):
        find_layout([row]).convert({**row, "instances": [{"input": ""}]})
    with pytest.raises(NothingToLearn, match="no instances"):
        find_layout([row]).convert({**row, "instances": []})


def test_a_chain_of_thought_ends_with_the_answer():
    row = {"question": "1 + 1?", "answer": "2", "rationale": "One and one."}
    assert find_layout([row]).describe() == "cot (question, answer, chain_of_thought <- rationale)"
    assert convert(row)[0][1] == "One and one.\nSo the answer is 2."
    assert convert({**row, "answer": "Two.", "rationale": ""})[0][1] == "So the answer is Two."
    with pytest.raises(NothingToLearn, match="empty answer"):
        find_layout([row]).convert({**row, "answer": " "})


def test_natural_instructions_take_the_first_of_several_outputs():
    row = {"definition": ["Add.", "Well."], "input": "1 2", "output": ["3", "three"], "positive_examples": []}
    assert convert(row)[0] == ["Add.\nWell.\n\n1 2", "3"]
    with pytest.raises(NothingToLearn, match="empty answer"):
        find_layout([row]).convert({**row, "output": []})


def test_fields_are_the_rows_columns_and_the_formats_own_names():
    row = {"frage": "Hi", "response": "Y", "level": 3}
    layout = find_layout([row], format="prompt_completion", columns={"prompt": "frage"})
    assert layout.fields(row) == {**row, "prompt": "Hi", "completion": "Y"}
    raw = find_layout([row], format="fields")
    assert raw.fields(row) == row and raw.describe() == "fields"
    named = find_layout([row], format="fields", columns={"question": "frage"})
    assert named.fields(row) == {**row, "question": "Hi"} and named.describe() == "fields (question <- frage)"
    with pytest.raises(RowError, match=r"format fields has no conversation of its own; .* data.train.N.templates"):
        raw.convert(row)


def test_an_option_that_a_format_does_not_have_is_told():
    row = {"instruction": "Add", "output": "3"}
    with pytest.raises(ValueError, match=r"options.clean: format alpaca has no such option; its options are none"):
        find_layout([row], options={"clean": True})
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Y"}]}
    with pytest.raises(
        ValueError, match=r"options.min_char: format sharegpt has no such option \(nearest: min_chars\)"
    ):
        find_layout([row], options={"min_char": 3})
    with pytest.raises(ValueError, match=r"options.clean: found 'yes'; input should be a valid boolean"):
        find_layout([row], options={"clean": "yes"})
