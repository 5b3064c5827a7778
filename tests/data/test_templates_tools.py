"""Calls are trained and never lost, in a template's own form or as text; results and tools are there and untrained."""

import pickle

import pytest

from jaxtune.data.chat.templates import ChatTemplate, load_template
from jaxtune.data.records import Conversation, Message, RowError

TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}


def call(name="add", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


ONE = (call(a=1, b="é"),)


def asking(*more, said="", calls=ONE, tools=(TOOL,)):
    steps = (Message("user", "1 + é?"), Message("assistant", said, tool_calls=calls))
    return Conversation((*steps, *more), {"tools": tools} if tools else {})


FULL = asking(
    Message("tool", '{"sum": 2}'),
    Message("tool", "and"),
    Message("assistant", "It is 2."),
    said="Wait",
    calls=(call(a=1), call(a=2)),
)

# As models bring them: ids of nine characters and arguments as JSON; a form that says only one call and no words.
WITH_IDS = (
    "{% if tools %}{{ '[TOOLS]' + tools | tojson + '\n' }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' and m.tool_calls %}{{ '<|im_start|>assistant\n' + m.content + '[CALLS]' }}"
    "{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
    "{{ c.function.name + c.function.arguments | tojson + c.id }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}{{ '[RESULT]' + m.name + m.tool_call_id + m.content | tojson + '\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FIRST_CALL_ONLY = WITH_IDS.replace("in m.tool_calls %}{% if", "in m.tool_calls[:1] %}{% if")
NO_WORDS = WITH_IDS.replace("m.content + '[CALLS]'", "'[CALLS]'")
NO_RESULTS = WITH_IDS.replace("+ m.content | tojson", "")
NO_TOOLS = WITH_IDS.replace("tools | tojson", "tools | length | string")


def own(tokenizer, text):
    return ChatTemplate(tokenizer, text, name="own")


def learnt(rendered):
    return [rendered.text[first:last] for first, last, _ in rendered.spans]


def test_a_template_that_knows_tools_is_given_them_as_they_are(byte_tokenizer):
    template = own(byte_tokenizer, WITH_IDS)
    assert template.knows_tools
    rendered = template.render(FULL)
    assert learnt(rendered) == [
        'Wait[CALLS]add{"a": 1}call00000add{"a": 2}call00001<|im_end|>',
        "It is 2.<|im_end|>",
    ]
    assert '[RESULT]addcall00000"{\\"sum\\": 2}"' in rendered.text and '[RESULT]addcall00001"and"' in rendered.text
    assert rendered.stops == 2
    ids = byte_tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
    assert rendered.tokens.tolist() == ids
    again = pickle.loads(pickle.dumps(template)).render(FULL)
    assert (again.text, again.spans) == (rendered.text, rendered.spans)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (FIRST_CALL_ONLY, "template own does not render '2', part of a tool call of message 2; use another template"),
        (NO_WORDS, r"does not render message 2 \(assistant\) verbatim: expected 'Wait'"),
        (NO_RESULTS, r"leaves out message 3 \(tool\)"),
        (NO_TOOLS, "leaves out the tool plus"),
    ],
)
def test_what_a_template_loses_of_tools_is_an_error_and_never_silent(text, told, byte_tokenizer):
    other = {"type": "function", "function": {"name": "plus"}}
    conversation = Conversation(FULL.messages, {"tools": (TOOL, other)})
    with pytest.raises(RowError, match=told):
        own(byte_tokenizer, text).render(conversation)


def test_qwen3_writes_calls_and_results_in_its_own_form(byte_tokenizer):
    rendered = load_template("qwen3", byte_tokenizer).render(FULL)
    assert learnt(rendered) == [
        'Wait\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n{"name": "add", '
        '"arguments": {"a": 2}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\nIt is 2.<|im_end|>",
    ]
    assert (
        '<|im_start|>user\n<tool_response>\n{"sum": 2}\n</tool_response>\n'
        "<tool_response>\nand\n</tool_response><|im_end|>"
    ) in rendered.text


def test_other_templates_are_given_text(byte_tokenizer):
    template = load_template("chatml", byte_tokenizer)
    assert not template.knows_tools
    rendered = template.render(asking(Message("tool", "2"), Message("assistant", "So 2."), said="Wait"))
    assert learnt(rendered) == [
        'Wait\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call><|im_end|>',
        "So 2.<|im_end|>",
    ]
    assert "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>" in rendered.text
    assert rendered.text.count("<tools>") == 1
    opened = Conversation((Message("system", "Be"), *asking().messages), {"tools": (TOOL,)})
    assert template.render(opened).text.startswith("<|im_start|>system\nBe\n\nYou can call these functions:\n<tools>\n")


def test_a_call_that_ends_a_conversation_is_trained_with_its_stop(byte_tokenizer):
    for name in ("qwen3", "chatml", "mistral"):
        rendered = load_template(name, byte_tokenizer).render(asking(tools=()))
        assert (rendered.turns, rendered.stops) == (1, 1)
        assert '{"name": "add", "arguments": {"a": 1, "b": "é"}}' in learnt(rendered)[0]


def test_prompts_with_tools_are_the_beginning_of_what_is_trained(byte_tokenizer):
    for name in ("qwen3", "gemma"):
        template = load_template(name, byte_tokenizer)
        prompt = byte_tokenizer.decode(template.prompt_tokens(FULL.messages[:4], tools=(TOOL,)))
        assert template.render(FULL).text.startswith(prompt)
        assert "<tools>" in prompt and prompt.count("<tool_response>") == 2
