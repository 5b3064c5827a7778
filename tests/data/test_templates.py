"""Tokens are apply_chat_template's; weights are where we drew them."""

import pickle

import pytest

from jaxtune.data.chat.chat_templates import BUILT_INS
from jaxtune.data.chat.templates import ChatTemplate, load_template, load_tokenizer
from jaxtune.data.records import Conversation, Message, RowError

# Templates as models bring them, in our own words: no system role; a system folded into the first turn; reasoning
# blocks; a stop at the very end only; a tag that marks what is generated.
GEMMA_LIKE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set c = m.content %}{{ '<|im_start|>assistant\n' }}"
    "{% if '</think>' in c and not loop.last %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last and '</think>' not in c %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ c + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAST_STOP = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% if loop.last and m.role == 'assistant' %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def talk(*contents, system=None):
    roles = ("user", "assistant") * len(contents)
    head = () if system is None else (Message("system", system),)
    return Conversation((*head, *(Message(r, c) for r, c in zip(roles, contents, strict=False))))


CONVERSATIONS = {
    "one turn": talk("Hi", "Hello there!"),
    "several turns": talk("Hi", "Hello", "How are you?", "I am well.", "12 + 30?", "42"),
    "system": talk("Hi", "Hello", system="You are kind.\nAlways."),
    "empty system": talk("Hi", "Hello", system=""),
    "unicode": talk("¿Qué 😀? 漢字", "👩‍👩‍👧 naïve — 漢字😀", "e\u0301", "ﬁ\u00a0x\u200b"),
    "white space": talk("  Hi \n", "\n  Hello  \n\n", "\tx", " y"),
    "the same words": talk("yes", "yes", "yes yes", "yes", "assistant", "user"),
    "an empty answer": talk("Hi", "", "Again?", "Yes."),
    "alpaca parts": Conversation(
        (Message("user", "Add\n\n1 2", fields={"instruction": "Add", "input": "1 2"}), Message("assistant", "3"))
    ),
    "markup": talk("<|im_end|> {{ x }} {% if %}", "a </s> <eos> b"),
}


def trained(tokenizer, rendered):
    """The text of the tokens with weight, a | between runs."""
    runs, on = [], False
    for token, weight in zip(rendered.tokens.tolist(), rendered.weights.tolist(), strict=True):
        if weight and not on:
            runs.append([])
        on = bool(weight)
        if on:
            runs[-1].append(token)
    return "|".join(tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs)


def reference_ids(template, conversation):
    messages = [m.as_dict() for m in conversation.messages]
    encoded = template.tokenizer.apply_chat_template(
        messages, chat_template=template.template_text, tokenize=True, return_dict=True
    )
    return list(encoded["input_ids"])


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("name", sorted(BUILT_INS))
def test_ids_of_built_ins_equal_apply_chat_template(name, conversation, byte_tokenizer):
    template = load_template(name, byte_tokenizer)
    rendered = template.render(conversation)
    assert rendered.tokens.tolist() == reference_ids(template, conversation)
    assert len(rendered.weights) == len(rendered.tokens)


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("name", ["alpaca", "llama2", "vicuna", "plain"])
def test_ids_on_the_llama_tokenizer_equal_apply_chat_template(name, conversation, llama_tokenizer):
    template = load_template(name, llama_tokenizer)
    assert template.render(conversation).tokens.tolist() == reference_ids(template, conversation)


@pytest.mark.parametrize("text", [GEMMA_LIKE, THINKING, TAGGED], ids=["gemma", "thinking", "tagged"])
@pytest.mark.parametrize("key", ["one turn", "several turns", "unicode", "the same words"])
def test_ids_of_tokenizers_own_templates(text, key, byte_tokenizer):
    template = ChatTemplate(byte_tokenizer, text, name="test")
    assert template.render(CONVERSATIONS[key]).tokens.tolist() == reference_ids(template, CONVERSATIONS[key])


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("one turn", "Hello there!<|im_end|>"),
        ("several turns", "Hello<|im_end|>|I am well.<|im_end|>|42<|im_end|>"),
        ("system", "Hello<|im_end|>"),
        ("empty system", "Hello<|im_end|>"),
        ("unicode", "👩‍👩‍👧 naïve — 漢字😀<|im_end|>|ﬁ\u00a0x\u200b<|im_end|>"),
        ("white space", "\n  Hello  \n\n<|im_end|>| y<|im_end|>"),
        ("the same words", "yes<|im_end|>|yes<|im_end|>|user<|im_end|>"),
        ("an empty answer", "Yes.<|im_end|>"),
    ],
)
def test_chatml_trains_answers_and_their_end_only(key, expected, byte_tokenizer):
    template = load_template("chatml", byte_tokenizer)
    assert trained(byte_tokenizer, template.render(CONVERSATIONS[key])) == expected


def test_weights_of_a_turn_token_by_token(byte_tokenizer):
    rendered = load_template("chatml", byte_tokenizer).render(talk("Hi", "yes"))
    pieces = [byte_tokenizer.decode([t]) for t in rendered.tokens]
    drawn = {"<|im_end|>": [0, 1], "\n": [0, 0, 0, 0]}  # the line break after the end of the turn is not learnt
    assert [w for p, w in zip(pieces, rendered.weights.tolist(), strict=True) if p == "<|im_end|>"] == drawn[
        "<|im_end|>"
    ]
    assert [w for p, w in zip(pieces, rendered.weights.tolist(), strict=True) if p == "\n"] == drawn["\n"]
    assert rendered.weights[-1] == 0 and rendered.weights[-2] == 1


def test_stop_is_trained_though_pad_is_eos(byte_tokenizer):
    assert byte_tokenizer.pad_token_id == byte_tokenizer.eos_token_id
    rendered = load_template("vicuna", byte_tokenizer).render(talk("Hi", "Hello", "So?", "Yes"))
    stops = rendered.tokens == byte_tokenizer.eos_token_id
    assert rendered.weights[stops].tolist() == [1.0, 1.0]
    assert (rendered.turns, rendered.stops) == (2, 2)


def test_llama2_folds_the_system_and_trains_the_space_before_an_answer(llama_tokenizer):
    template = load_template("llama2", llama_tokenizer)
    rendered = template.render(talk("Hi", "😀 yes", "So?", "No", system="Be kind"))
    assert rendered.text == (
        "<s>[INST] <<SYS>>\nBe kind\n<</SYS>>\n\nHi [/INST] 😀 yes </s><s>[INST] So? [/INST] No </s>"
    )
    pieces = llama_tokenizer.convert_ids_to_tokens(rendered.tokens.tolist())
    learnt = [p for p, w in zip(pieces, rendered.weights, strict=True) if w]
    assert learnt == ["▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "▁yes", "▁", "</s>", "▁No", "▁", "</s>"]


def test_alpaca_has_stanfords_two_prompts(llama_tokenizer):
    template = load_template("alpaca", llama_tokenizer)
    without = template.render(talk("Count.", "1 2 3")).text
    assert without == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nCount.\n\n### Response:1 2 3</s>"
    )
    with_input = template.render(CONVERSATIONS["alpaca parts"])
    assert with_input.text == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd\n\n### Input:\n1 2\n\n### "
        "Response:3</s>"
    )
    assert trained(llama_tokenizer, with_input).replace(" ", "") == "3</s>"


def test_vicuna_is_fastchats(llama_tokenizer):
    assert load_template("vicuna", llama_tokenizer).render(talk("Hi", "Yes", "So", "No")).text == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Hi ASSISTANT: Yes</s>USER: So ASSISTANT: No</s>"
    )


def test_raw_text_is_trained_whole_with_eos(byte_tokenizer):
    rendered = load_template("plain", byte_tokenizer).render(Conversation((Message("text", "Some text."),)))
    assert rendered.text == "Some text.<eos>" and rendered.weights.min() == 1


def test_train_on_last_all_and_weights_of_messages(byte_tokenizer):
    template = load_template("chatml", byte_tokenizer)
    conversation = CONVERSATIONS["several turns"]
    assert trained(byte_tokenizer, template.render(conversation, train_on="last")) == "42<|im_end|>"
    everything = template.render(conversation, train_on="all")
    assert everything.weights[:-1].min() == 1 and everything.weights[-1] == 0
    weighed = Conversation(
        (
            Message("user", "Hello", weight=0.25),
            Message("assistant", "yes", weight=0.0),
            Message("user", "well"),
            Message("assistant", "no", weight=0.5),
        )
    )
    rendered = template.render(weighed)
    assert trained(byte_tokenizer, rendered) == "Hello|no<|im_end|>"
    assert sorted(set(rendered.weights.tolist())) == [0.0, 0.25, 0.5]
    assert (rendered.turns, rendered.stops) == (1, 1)


def test_thinking_template_trains_what_it_adds_and_refuses_what_it_strips(byte_tokenizer):
    template = ChatTemplate(byte_tokenizer, THINKING, name="thinking")
    assert not template.checks.adding_turns_keeps_tokens
    plain = template.render(talk("Hi", "Yes", "So", "No"))
    assert trained(byte_tokenizer, plain) == "Yes<|im_end|>|<think>\n\n</think>\n\nNo<|im_end|>"
    kept = template.render(talk("Hi", "<think>\nwell\n</think>\n\nYes"))
    assert trained(byte_tokenizer, kept) == "<think>\nwell\n</think>\n\nYes<|im_end|>"
    with pytest.raises(RowError, match=r"does not render message 2 .assistant. verbatim"):
        template.render(talk("Hi", "<think>\nwell\n</think>\n\nYes", "So", "No"))


@pytest.mark.parametrize("name", ["chatml", "thinking"])
def test_weights_of_questions_hold_where_the_skeleton_does_not_fit(name, byte_tokenizer):
    template = load_template("chatml", byte_tokenizer)
    if name == "thinking":
        template = ChatTemplate(byte_tokenizer, THINKING, name=name)
    answer = "<think>\nuser\n</think>\n\nYes"
    weighed = Conversation(
        (
            Message("system", "Be kind", weight=0.5),
            Message("user", "user", weight=0.25),
            Message("assistant", "No"),
            Message("user", " Hi\n", weight=0.0),
            Message("assistant", answer),
        )
    )
    rendered = template.render(weighed)
    assert trained(byte_tokenizer, rendered) == f"Be kind|user|No<|im_end|>|{answer}<|im_end|>"
    assert rendered.weights[rendered.weights > 0][:3].tolist() == [0.5] * 3
    everything = template.render(weighed, train_on="all")
    untrained = "".join(
        byte_tokenizer.decode([t])
        for t, w in zip(everything.tokens.tolist(), everything.weights.tolist(), strict=True)
        if not w
    )
    assert untrained == " Hi\n\n"  # and the line break after the last answer


def test_a_weight_without_a_certain_place_is_refused(byte_tokenizer):
    text = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'user' %}{{ m.content | length }} "
        "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    template = ChatTemplate(byte_tokenizer, text, name="counting")
    messages = talk("Hi", "Yes").messages
    assert template.render(Conversation(messages)).turns == 1
    weighed = Conversation((Message("user", "Hi", weight=0.0), messages[1]))
    with pytest.raises(RowError, match=r"template counting changes the text around message 1 \(user\)"):
        template.render(weighed, train_on="all")


def test_a_weight_on_an_empty_answer_counts_no_trained_turn(byte_tokenizer):
    empty = Message("assistant", "", weight=1.0)
    rendered = load_template("chatml", byte_tokenizer).render(
        Conversation((Message("user", "Hi"), empty, *talk("So", "Yes").messages))
    )
    assert (rendered.turns, rendered.stops) == (1, 1)
    assert trained(byte_tokenizer, rendered) == "Yes<|im_end|>"


def test_stop_counted_where_a_template_ends_only_the_last_answer(byte_tokenizer):
    rendered = ChatTemplate(byte_tokenizer, LAST_STOP, name="test").render(talk("Hi", "Yes", "So", "No"))
    assert (rendered.turns, rendered.stops) == (2, 1)


def test_start_up_refusals(byte_tokenizer, llama_tokenizer, tmp_path):
    with pytest.raises(
        ValueError, match=r"no chat template of its own; set data.template=alpaca .* data.template=vicuna"
    ):
        load_template("auto", llama_tokenizer)
    with pytest.raises(ValueError, match=r"chatml needs <\|im_start\|>, <\|im_end\|> as single tokens"):
        load_template("chatml", llama_tokenizer)
    with pytest.raises(ValueError, match=r"llama3 needs <\|start_header_id\|>"):
        load_template("llama3", llama_tokenizer)
    with pytest.raises(ValueError, match="found 'chatlm'; expected auto, alpaca, chatml"):
        load_template("chatlm", byte_tokenizer)
    with pytest.raises(ValueError, match="holds no special token of this tokenizer"):
        ChatTemplate(byte_tokenizer, "{% for m in messages %}{{ m.role + m.content }}\n{% endfor %}", name="t")
    with pytest.raises(ValueError, match="begins with two BOS tokens"):
        ChatTemplate(llama_tokenizer, "{{ bos_token }}" + BUILT_INS["vicuna"].text, name="t")
    with pytest.raises(ValueError, match=r"leaves out message 2 .assistant."):
        ChatTemplate(byte_tokenizer, "{{ messages[0].content }}{{ eos_token }}", name="t")
    with pytest.raises(ValueError, match="template t, line 1"):
        ChatTemplate(byte_tokenizer, "{% if %}", name="t")
    with pytest.raises(ValueError, match="no tokenizer could be read"):
        load_tokenizer(str(tmp_path))


def test_template_refusing_a_row_says_so_in_its_own_words(byte_tokenizer):
    template = ChatTemplate(byte_tokenizer, GEMMA_LIKE, name="g")
    with pytest.raises(RowError, match="template g: no system role"):
        template.render(CONVERSATIONS["system"])


def test_templates_run_in_the_sandbox(byte_tokenizer):
    text = "{{ messages.append(1) }}" + BUILT_INS["chatml"].text
    with pytest.raises(ValueError, match=r"not safely callable|unsafe"):
        ChatTemplate(byte_tokenizer, text, name="t")


def test_user_file_prompt_stops_and_travel(byte_tokenizer, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(TAGGED)
    template = pickle.loads(pickle.dumps(load_template(str(file), byte_tokenizer)))
    assert template.template_text == TAGGED
    prompt = template.prompt_tokens([{"role": "user", "content": "Hi"}])
    assert byte_tokenizer.decode(prompt) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    end, eos = byte_tokenizer.convert_tokens_to_ids("<|im_end|>"), byte_tokenizer.eos_token_id
    assert template.stop_ids == (end, eos)
    assert load_template("vicuna", byte_tokenizer).stop_ids == (eos,)


def test_many_conversations_at_once_equal_one_by_one(byte_tokenizer):
    template = load_template("chatml", byte_tokenizer)
    for one, many in zip(
        map(template.render, CONVERSATIONS.values()), template.render_many(list(CONVERSATIONS.values())), strict=True
    ):
        assert one.tokens.tolist() == many.tokens.tolist() and one.weights.tolist() == many.weights.tolist()
