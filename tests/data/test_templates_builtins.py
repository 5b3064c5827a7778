"""Each built-in writes what its model was trained on; reasoning follows the named rule."""

import pytest

from jaxtune.data.chat.chat_templates import BUILT_INS
from jaxtune.data.chat.templates import load_template
from jaxtune.data.reasoning import apply_reasoning
from jaxtune.data.records import Conversation, Message, RowError


def talk(*contents, system=None):
    roles = ("user", "assistant") * len(contents)
    head = () if system is None else (Message("system", system),)
    return Conversation((*head, *(Message(r, c) for r, c in zip(roles, contents, strict=False))))


def learnt(rendered):
    return [rendered.text[first:last] for first, last, _ in rendered.spans]


TALK = talk("Hi ", "Yes", "So", "No", system="Be")
EXPECTED = {
    "gemma": (
        "<start_of_turn>user\nBe\n\nHi<end_of_turn>\n<start_of_turn>model\nYes<end_of_turn>\n"
        "<start_of_turn>user\nSo<end_of_turn>\n<start_of_turn>model\nNo<end_of_turn>\n",
        "<start_of_turn>model\n",
        ["Yes<end_of_turn>", "No<end_of_turn>"],
    ),
    "mistral": ("[INST] Be\n\nHi [/INST] Yes<eos>[INST] So[/INST] No<eos>", "", [" Yes<eos>", " No<eos>"]),
    "zephyr": (
        "<|system|>\nBe<eos>\n<|user|>\nHi <eos>\n<|assistant|>\nYes<eos>\n<|user|>\nSo<eos>\n<|assistant|>\nNo<eos>\n",
        "<|assistant|>\n",
        ["Yes<eos>", "No<eos>"],
    ),
    "phi": (
        "<|system|>\nBe<|end|>\n<|user|>\nHi <|end|>\n<|assistant|>\nYes<|end|>\n<|user|>\nSo<|end|>\n"
        "<|assistant|>\nNo<|end|>\n<eos>",
        "<|assistant|>\n",
        ["Yes<|end|>", "No<|end|>"],
    ),
    "qwen3": (
        "<|im_start|>system\nBe<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
        "<|im_start|>user\nSo<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nNo<|im_end|>\n",
        "<|im_start|>assistant\n",
        ["Yes<|im_end|>", "<think>\n\n</think>\n\nNo<|im_end|>"],
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_built_in_writes_its_models_own_form(name, byte_tokenizer):
    text, prompt, answers = EXPECTED[name]
    template = load_template(name, byte_tokenizer)
    rendered = template.render(TALK)
    assert rendered.text == text and learnt(rendered) == answers
    assert (rendered.turns, rendered.stops) == (2, 2)
    asked = [m.as_dict() for m in TALK.messages[:-1]]
    assert template.text_of(asked, add_generation_prompt=True).endswith(prompt)
    assert text.startswith(template.text_of(asked, add_generation_prompt=True))


@pytest.mark.parametrize("name", sorted(BUILT_INS))
def test_adding_a_turn_changes_earlier_tokens_of_qwen3_alone_and_it_says_so(name, byte_tokenizer):
    checks = load_template(name, byte_tokenizer).checks
    assert checks.adding_turns_keeps_tokens == (name != "qwen3")
    assert ("CHANGED" in checks.describe()) == (name == "qwen3")


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("gemma", "<start_of_turn>, <end_of_turn>"),
        ("mistral", r"\[INST\], \[/INST\]"),
        ("phi", r"<\|system\|>, <\|user\|>"),
        ("qwen3", r"<\|im_start\|>, <\|im_end\|>"),
    ],
)
def test_a_built_in_without_its_markers_is_refused_naming_them(name, missing, llama_tokenizer):
    with pytest.raises(ValueError, match=f"data.template: {name} needs {missing}.* as single tokens"):
        load_template(name, llama_tokenizer)


def test_bos_opens_gemma_and_mistral_where_the_tokenizer_adds_one(llama_tokenizer, byte_tokenizer):
    for name in ("gemma", "mistral"):
        assert BUILT_INS[name].text.startswith("{{ bos_token }}")
        assert not load_template(name, byte_tokenizer).text.startswith("{{ bos_token }}")
    assert (
        load_template("zephyr", llama_tokenizer).render(talk("Hi", "Yes")).text
        == "<|user|>\nHi</s>\n<|assistant|>\nYes</s>\n"
    )


THOUGHT = "<think>\nwell\n</think>\n\n"
TWICE = talk("Hi", THOUGHT + "Yes", "So", THOUGHT + "No")


def test_keep_is_refused_where_the_template_drops_a_block_and_says_what_to_do(byte_tokenizer):
    template = load_template("qwen3", byte_tokenizer)
    once = talk("Hi", THOUGHT + "Yes")
    assert learnt(template.render(apply_reasoning(once, "keep")[0])) == [THOUGHT + "Yes<|im_end|>"]
    with pytest.raises(RowError, match=r"message 2 .*a <think> block that the template drops, set data.reasoning=last"):
        template.render(apply_reasoning(TWICE, "keep")[0])


@pytest.mark.parametrize(
    ("rule", "removed", "answers"),
    [
        ("last", 1, ["Yes<|im_end|>", THOUGHT + "No<|im_end|>"]),
        ("drop", 2, ["Yes<|im_end|>", "<think>\n\n</think>\n\nNo<|im_end|>"]),
    ],
)
def test_qwen3_trains_what_the_rule_leaves(rule, removed, answers, byte_tokenizer):
    conversation, count = apply_reasoning(TWICE, rule)
    assert count == removed
    assert learnt(load_template("qwen3", byte_tokenizer).render(conversation)) == answers


def test_a_block_on_one_line_is_found_where_the_template_spreads_it(byte_tokenizer):
    rendered = load_template("qwen3", byte_tokenizer).render(talk("Hi", "<think>well</think>Yes"))
    assert learnt(rendered) == [THOUGHT + "Yes<|im_end|>"]
    kept = load_template("chatml", byte_tokenizer).render(TWICE)
    assert learnt(kept) == [THOUGHT + "Yes<|im_end|>", THOUGHT + "No<|im_end|>"]


@pytest.mark.parametrize("word", ["end", "m", "hi im", "t", "o"])
def test_a_next_question_that_reads_like_a_marker_hides_no_stop(word, byte_tokenizer):
    rendered = load_template("qwen3", byte_tokenizer).render(talk("Hi", "Yes", word, THOUGHT + "No"))
    assert learnt(rendered) == ["Yes<|im_end|>", THOUGHT + "No<|im_end|>"] and rendered.stops == 2
