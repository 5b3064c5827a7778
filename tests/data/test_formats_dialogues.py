"""Dialogues of every layout become turns; tool calls are part of answers; web pages are cleaned by named rules."""

import pytest

from jaxtune.data.chat.templates import load_template
from jaxtune.data.layouts.formats import find_layout
from jaxtune.data.records import Conversation, Message, NothingToLearn, RowError

ADD = {"name": "add", "arguments": {"a": 1, "b": [2, "é"]}}


def convert(row, **keys):
    (conversation,) = find_layout([row], **keys).convert(row)
    return [(m.role, m.content) for m in conversation.messages]


def shared_gpt(*turns):
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


@pytest.mark.parametrize(
    ("row", "layout", "messages"),
    [
        (
            {"conversations": ["Hi", "Yes", "So?"], "source": "x"},
            "lima (turns <- conversations)",
            [("user", "Hi"), ("assistant", "Yes")],
        ),
        ({"id": 1, "data": ["Hi", "Yes"]}, "lima (turns <- data)", [("user", "Hi"), ("assistant", "Yes")]),
        (
            {"turns": [{"speaker": "USER", "utterance": "Hi"}, {"speaker": "SYSTEM", "utterance": "Yes"}]},
            "messages (messages <- turns)",
            [("user", "Hi"), ("assistant", "Yes")],
        ),
        (
            {
                "prompt": "Hi",
                "prompt_id": 1,
                "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Y"}],
            },
            "messages (messages)",
            [("user", "Hi"), ("assistant", "Y")],
        ),
        (
            {**shared_gpt(("human", "Hi"), ("gpt", "Y")), "system_prompt": "Be"},
            "sharegpt (messages <- conversations, system <- system_prompt)",
            [("system", "Be"), ("user", "Hi"), ("assistant", "Y")],
        ),
        (
            {"question": "Which?", "options": {"A": "one", "B": "two"}, "answer": "two", "answer_idx": "B"},
            "prompt_completion (prompt <- question, completion <- answer, options)",
            [("user", "Which?\nA. one\nB. two"), ("assistant", "two")],
        ),
        (
            {"problem": "Sort", "solution": "sorted"},
            "prompt_completion (prompt <- problem, completion <- solution)",
            [("user", "Sort"), ("assistant", "sorted")],
        ),
        (
            {"inputs": "Q", "targets": "A", "task": "t"},
            "prompt_completion (prompt <- inputs, completion <- targets)",
            [("user", "Q"), ("assistant", "A")],
        ),
    ],
)
def test_layouts_are_found_from_rows(row, layout, messages):
    assert find_layout([row]).describe() == layout
    assert convert(row) == messages


def test_questions_without_answers_teach_nothing():
    layout = find_layout([{"question_id": 81, "turns": ["Why?", "And then?"]}])
    with pytest.raises(NothingToLearn, match="questions without answers"):
        layout.convert({"turns": ["Why?", "And then?"]})


def test_the_sources_system_message_opens_what_has_none():
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Y"}]}
    assert convert(row, system="Be") == [("system", "Be"), ("user", "Hi"), ("assistant", "Y")]
    own = {"messages": [{"role": "system", "content": "Own"}, *row["messages"]]}
    assert convert(own, system="Be")[0] == ("system", "Own")
    assert convert({"text": "Once"}, system="Be") == [("text", "Once")]


def test_reasoning_in_a_key_of_its_own_becomes_a_block_of_the_answer():
    answer = {"role": "assistant", "content": "Yes", "reasoning_content": "well\n"}
    row = {"messages": [{"role": "user", "content": "Hi"}, answer]}
    assert convert(row)[1] == ("assistant", "<think>\nwell\n</think>\n\nYes")


# Tool calls


def call(**keys):
    return {"type": "function", "function": ADD, **keys}


@pytest.mark.parametrize(
    "row",
    [
        shared_gpt(
            ("human", "Hi"),
            ("gpt", "Wait"),
            ("function_call", '{"name": "add", "arguments": {"a": 1, "b": [2, "é"]}}'),
            ("observation", "3"),
            ("gpt", "It is 3."),
        ),
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {
                    "role": "assistant",
                    "content": "Wait",
                    "tool_calls": [
                        {"type": "function", "function": {"name": "add", "arguments": '{"a":1,"b":[2,"é"]}'}}
                    ],
                },
                {"role": "tool", "content": "<tool_response>\n3\n</tool_response>"},
                {"role": "assistant", "content": "It is 3."},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Wait", "function_call": ADD},
                {"role": "function", "name": "add", "content": "3"},
                {"role": "assistant", "content": "It is 3."},
            ]
        },
    ],
    ids=["sharegpt", "openai", "openai of old"],
)
def test_calls_are_part_of_the_answer_before_their_results(row):
    tools = '[{"name": "add", "parameters": {"type": "object"}}]'
    for given in (tools, [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]):
        (conversation,) = find_layout([{**row, "tools": given}]).convert({**row, "tools": given})
        _, asks, result, says = conversation.messages
        assert (asks.role, asks.content, asks.tool_calls) == ("assistant", "Wait", (call(),))
        assert (result.role, result.content, says.content) == ("tool", "3", "It is 3.")
        assert conversation.meta["tools"] == (
            {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
        )


def test_several_calls_and_results_and_a_call_at_the_end():
    one, two = ("function_call", '{"name": "a", "arguments": {}}'), ("function_call", '[{"name": "b"}, {"name": "c"}]')
    row = shared_gpt(("human", "Hi"), one, two, ("observation", "1"), ("observation", "2"), ("gpt", "So"))
    (conversation,) = find_layout([row]).convert(row)
    assert [c["function"]["name"] for c in conversation.messages[1].tool_calls] == ["a", "b", "c"]
    assert [m.role for m in conversation.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    last = shared_gpt(("human", "Hi"), one)
    assert find_layout([last]).convert(last)[0].messages[1].tool_calls  # no answer in words, and something to learn


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        ([("human", "Hi"), ("observation", "3")], "message 2: found tool after user; expected assistant there"),
        (
            [("human", "Hi"), ("function_call", '{"name": "a"}'), ("human", "So?")],
            "message 3: found user after assistant with a tool call; expected tool there",
        ),
        (
            [("human", "Hi"), ("function_call", '{"name": "a"}'), ("observation", "3"), ("human", "So?")],
            "message 4: found user after tool; expected assistant or tool there",
        ),
        (
            [("human", "Hi"), ("function_call", "add(1)")],
            r"message 2: the tool call is not JSON \(column 1.*'add\(1\)'",
        ),
        (
            [("human", "Hi"), ("function_call", '{"tool": 1}')],
            "message 2: a tool call has keys tool; expected keys name",
        ),
        (
            [("human", "Hi"), ("function_call", '{"name": "a", "arguments": [1]}')],
            "message 2: the arguments of a are a list; expected an object",
        ),
    ],
)
def test_malformed_calls_are_told_by_their_message(turns, told):
    row = shared_gpt(*turns)
    with pytest.raises(RowError, match=told):
        find_layout([row]).convert(row)


def test_tools_that_cannot_be_read_are_told():
    row = shared_gpt(("human", "Hi"), ("gpt", "Yes"))
    for tools, told in (
        ("add", "the column tools is not JSON"),
        ([{"type": "function"}], "tools: found an object without"),
    ):
        with pytest.raises(RowError, match=told):
            find_layout([{**row, "tools": tools}]).convert({**row, "tools": tools})


def test_rows_in_the_text_form_already_are_not_told_of_their_tools_twice(byte_tokenizer):
    called = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    row = {
        **shared_gpt(
            ("system", "Call these: <tools>[...]</tools>"),
            ("human", "Hi"),
            ("gpt", called),
            ("tool", "<tool_response>\n3\n</tool_response>"),
            ("gpt", "3"),
        ),
        "tools": '[{"name": "add"}]',
    }
    (conversation,) = find_layout([row]).convert(row)
    for name in ("chatml", "qwen3"):
        text = load_template(name, byte_tokenizer).render(conversation).text
        assert text.count("<tools>") == text.count("<tool_response>") == text.count("<tool_call>") == 1


# Cleaning


def test_cleaning_trims_what_surrounds_a_conversation():
    turns = [("gpt", "Hello"), ("human", "Hi there"), ("gpt", "Good morning"), ("human", "And?")]
    assert convert(shared_gpt(*turns), options={"clean": True}) == [("user", "Hi there"), ("assistant", "Good morning")]
    with pytest.raises(RowError, match="message 1: found assistant first"):
        convert(shared_gpt(*turns))
    for stop in ("", "\x00x"):
        cut = shared_gpt(
            ("human", "Hi there"), ("gpt", "Good morning"), ("human", "And?"), ("gpt", stop), ("human", "?")
        )
        assert len(convert(cut, options={"clean": True})) == 2


@pytest.mark.parametrize(
    ("turns", "options", "reason"),
    [
        ([("human", "Hi"), ("gpt", "Yes")], {"clean": True}, "fewer than 16 characters"),
        ([("human", "Hi"), ("gpt", "Yes")], {"min_chars": 6}, "fewer than 6 characters"),
        ([("human", "Hi, it is me"), ("human", "again"), ("gpt", "Yes")], {"clean": True}, "turns do not alternate"),
        (
            [("human", "Hi"), ("gpt", "As an AI, no")],
            {"drop_listed": ["as an ai"]},
            r"a word of drop_listed \(as an ai\)",
        ),
        ([("gpt", "Hello, what is it?")], {"clean": True}, "no assistant turn|fewer than"),
    ],
)
def test_cleaning_rejects_whole_conversations_with_a_reason(turns, options, reason):
    row = shared_gpt(*turns)
    with pytest.raises(NothingToLearn, match=reason):
        find_layout([row], options=options).convert(row)


HTML = (
    '<div class="markdown"><p>Use <code>x &lt; 1</code> or <strong>this</strong>:</p><ol><li>one</li><li>two'
    "<ul><li>deep</li></ul></li></ol><pre><div>python<button>Copy code</button></div>"
    '<code class="hljs language-python">if x &lt; 1:\n\n\n    y()  # &amp;\n</code></pre>'
    "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>"
    '<p>See <a href="u">it</a>.<br>End</p></div>'
)
MARKDOWN = (
    "Use `x < 1` or **this**:\n\n1. one\n2. two\n  - deep\n\n```python\nif x < 1:\n\n\n    y()  # &\n```\n\n"
    "| a | b |\n| --- | --- |\n| 1 | 2 |\n\nSee [it](u).\nEnd"
)


def test_html_becomes_markdown_with_its_code_and_tables():
    row = shared_gpt(("human", "Write <div> for x < 1"), ("gpt", HTML))
    said = convert(row, options={"html_to_markdown": True})
    assert said == [("user", "Write <div> for x < 1"), ("assistant", MARKDOWN)]
    assert convert(row)[1] == ("assistant", HTML)


# module:function


def test_a_function_of_ones_own_makes_the_conversations(tmp_path, monkeypatch):
    (tmp_path / "my_rows.py").write_text(
        "from jaxtune.data.records import Conversation, Message\n"
        "def one(row): return [{'role': 'user', 'content': row['q']}, {'role': 'assistant', 'content': row['a']}]\n"
        "def two(row): return [one(row), one(row)]\n"
        "def own(row): return Conversation((Message('user', row['q']), Message('assistant', row['a'])), {'n': 1})\n"
        "def wrong(row): return 'Hi'\n"
        "def fails(row): return row['b']\n"
        "value = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    row = {"q": "Hi", "a": "Yes"}
    expected = [("user", "Hi"), ("assistant", "Yes")]
    assert convert(row, format="my_rows:one") == expected == convert(row, format="my_rows:own")
    assert len(find_layout([row], format="my_rows:two").convert(row)) == 2
    assert find_layout([row], format="my_rows:one", system="Be").convert(row)[0].messages[0] == Message("system", "Be")
    assert find_layout([row], format="my_rows:own").convert(row) == [
        Conversation((Message("user", "Hi"), Message("assistant", "Yes")), {"n": 1})
    ]
    with pytest.raises(RowError, match=r"my_rows:wrong gave text; expected a list of \{role, content\} objects"):
        convert(row, format="my_rows:wrong")
    with pytest.raises(RowError, match=r"my_rows:fails raised KeyError: 'b'"):
        convert(row, format="my_rows:fails")
    with pytest.raises(ValueError, match=r"my_rows has no function fail \(nearest: fails\)"):
        find_layout([row], format="my_rows:fail")
    with pytest.raises(ValueError, match=r"module my_row cannot be imported \(ModuleNotFoundError"):
        find_layout([row], format="my_row:one")
    with pytest.raises(ValueError, match="columns: found beside format my_rows:one, which is given the row as it is"):
        find_layout([row], format="my_rows:one", columns={"prompt": "q"})
