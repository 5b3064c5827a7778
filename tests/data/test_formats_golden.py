"""Every real record of each format, rendered: what stands there is written out by hand, and the answers are trained."""

import csv
import gzip
import json

import pytest

from jaxtune.config_data import SourceConfig
from jaxtune.data.chat.templates import load_template
from jaxtune.data.files import sources
from jaxtune.data.layouts.formats import find_layout
from jaxtune.data.records import NothingToLearn


def chatml(*turns):
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


def task(instruction, given, answer):
    return [chatml(("user", f"{instruction}\n\n{given}" if given.strip() else instruction), ("assistant", answer))]


def spoken(row, key, role, text, roles):
    return [chatml(*((roles[turn[role]], turn[text]) for turn in row[key]))]


def cot(row):
    thought, answer = row["chain_of_thought"].rstrip(), row["answer"].strip()
    said = f"{thought}\nSo the answer is {answer}" + ("" if answer[-1] in ".!?" else ".")
    return [chatml(("user", row["question"]), ("assistant", said))]


# file -> (layout, what its records must be rendered as, or None for those that teach nothing)
RECORDS = {
    "alpaca/alpaca_gpt4_demo.jsonl.gz": (
        "alpaca (instruction, input, output)",
        lambda r: task(r["instruction"], r["input"], r["output"]) if r["output"].strip() else None,
    ),
    "dolly/dolly_filtered.jsonl.gz": (
        "dolly (instruction, context <- input, response <- output, category)",
        lambda r: task(r["instruction"], r["input"], r["output"]),
    ),
    "self_instruct/seed_tasks.jsonl": (
        "self_instruct (instruction, instances)",
        lambda r: [task(r["instruction"], i["input"], i["output"])[0] for i in r["instances"]],
    ),
    "self_instruct/user_oriented_instructions.jsonl": (
        "self_instruct (instruction, instances)",
        lambda r: [task(r["instruction"], i["input"], i["output"])[0] for i in r["instances"]],
    ),
    "flan/niv2_tasks.jsonl.gz": (
        "natural_instructions (definition, input <- example_input, output <- example_output, explanation <- "
        "example_explanation)",
        lambda r: task(r["definition"], r["example_input"], r["example_output"]),
    ),
    "cot/qasc.tsv": ("cot (question, answer, chain_of_thought)", cot),
    "cot/strategyqa.tsv": ("cot (question, answer, chain_of_thought)", cot),
    "multiturn/dummy_conversation.json": (
        "sharegpt (messages <- conversations)",
        lambda r: spoken(r, "conversations", "from", "value", {"human": "user", "gpt": "assistant"}),
    ),
    "multiturn/sgd_dialogues.jsonl.gz": (
        "messages (messages <- turns)",
        lambda r: spoken(r, "turns", "speaker", "utterance", {"USER": "user", "SYSTEM": "assistant"}),
    ),
    "mt_bench/question.jsonl": ("questions (turns)", lambda r: None),
}


@pytest.mark.parametrize("path", RECORDS)
def test_every_record_is_rendered_as_its_authors_mean_it(path, shared, byte_tokenizer):
    layout_text, expected = RECORDS[path]
    source = sources.open_source(SourceConfig(path=str(shared / path)))
    layout = find_layout([source.row(i) for i in range(20)])
    assert layout.describe() == layout_text
    template = load_template("chatml", byte_tokenizer)
    for i in range(len(source)):
        row = source.row(i)
        if expected(row) is None:
            with pytest.raises(NothingToLearn):
                layout.convert(row)
            continue
        conversations = layout.convert(row)
        rendered = template.render_many(conversations)
        assert [r.text for r in rendered] == expected(row), source.where(i)
        for conversation, r in zip(conversations, rendered, strict=True):
            answers = [m.content + "<|im_end|>" for m in conversation.messages if m.role == "assistant"]
            # An empty answer among others is not trained.
            assert [r.text[first:last] for first, last, _ in r.spans] == [a for a in answers if a != "<|im_end|>"]


def test_a_chain_of_thought_reads_as_flan_wrote_it(shared, byte_tokenizer):
    source = sources.open_source(SourceConfig(path=str(shared / "cot" / "gsm8k.tsv")))
    (conversation,) = find_layout([source.row(0)]).convert(source.row(0))
    assert load_template("chatml", byte_tokenizer).render(conversation).text == (
        "<|im_start|>user\nNatalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
        "May. How many clips did Natalia sell altogether in April and May?<|im_end|>\n<|im_start|>assistant\nNatalia "
        "sold 48 / 2 = 24 clips in May. Natalia sold 48 + 24 = 72 clips altogether in April and May.\n"
        "So the answer is 72.<|im_end|>\n"
    )
    with open(shared / "cot" / "aqua.tsv", encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    source = sources.open_source(SourceConfig(path=str(shared / "cot" / "aqua.tsv")))
    assert len(source) == len(lines) == 2443
    assert source.row(1)["question"] == lines[1][0].replace("\\n", "\n") and "\n" in source.row(1)["question"]


CALL = (
    "<tool_call>\n"
    '{"name": "search_recipes", "arguments": {"ingredients": ["chicken", "bell peppers", "rice"]}}\n'
    "</tool_call>"
)


@pytest.mark.parametrize("name", ["qwen3", "chatml", "gemma", "vicuna"])
def test_every_real_tool_call_is_trained_and_no_result_is(name, shared, byte_tokenizer):
    with gzip.open(shared / "multiturn" / "glaive_toolcall.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    layout, template = find_layout(rows[:20]), load_template(name, byte_tokenizer)
    rendered = [template.render(layout.convert(row)[0]) for row in rows]
    calls = results = 0
    for row, r in zip(rows, rendered, strict=True):
        learnt = [r.text[first:last] for first, last, _ in r.spans]
        for turn in row["conversations"]:
            if turn["from"] == "function_call":
                written = json.dumps(json.loads(turn["value"]), ensure_ascii=False)
                assert any(f"<tool_call>\n{written}\n</tool_call>" in text for text in learnt)
                calls += 1
            elif turn["from"] == "observation":
                result = f"<tool_response>\n{turn['value']}\n</tool_response>"
                assert result in r.text and not any(turn["value"] in text for text in learnt)
                results += 1
        assert r.turns == r.stops == sum(turn["from"] in ("gpt", "function_call") for turn in row["conversations"])
    assert (calls, results) == (149, 149)
    assert CALL in rendered[0].text


def test_tools_are_listed_and_results_come_back_in_a_user_turn(shared, byte_tokenizer):
    with gzip.open(shared / "multiturn" / "glaive_toolcall.jsonl.gz", "rt") as file:
        row = json.loads(file.readline())
    row["conversations"] = row["conversations"][2:6]
    tool = json.dumps(json.loads(row["tools"])[0], ensure_ascii=False)
    system = (
        f"You can call these functions:\n<tools>\n{tool}\n</tools>\n"
        "To call one, write its name and arguments as JSON:\n"
        '<tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>'
    )
    asked, _, result, said = (turn["value"] for turn in row["conversations"])
    (conversation,) = find_layout([row]).convert(row)
    assert load_template("chatml", byte_tokenizer).render(conversation).text == chatml(
        ("system", system),
        ("user", asked),
        ("assistant", CALL),
        ("user", f"<tool_response>\n{result}\n</tool_response>"),
        ("assistant", said),
    )
