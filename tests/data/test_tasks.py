"""Phrasings: which template words a row in which epoch, few-shot prompts, options, slots, and what is refused."""

import json
import os
import pathlib
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.config_data import SourceConfig
from jaxtune.data.chat import templates
from jaxtune.data.examples import ExampleOptions, RowReader
from jaxtune.data.files import sources
from jaxtune.data.layouts import formats
from jaxtune.data.records import Conversation, Message, NothingToLearn, RowError
from jaxtune.data.wording import tasks
from jaxtune.data.wording.content import content_hashes, fields_hash, normal
from jaxtune.data.wording.fewshot import Exemplars

ROOT = pathlib.Path(__file__).resolve().parents[2]
SUMS = [{"a": i, "b": i * i, "answer": str(i + i * i)} for i in range(40)]
PHRASES = (
    {"name": "sum", "input": "What is {a} + {b}?", "target": "{answer}"},
    {"name": "add", "input": "Add {a} to {b}.", "target": "It is {answer}."},
    {"name": "total", "input": "{a} and {b} make", "target": "{answer}"},
)


def words(texts):
    """Tokens are words here."""
    return [len(text.split()) for text in texts]


@pytest.fixture
def open_reader(byte_tokenizer, write_rows):
    """open_reader(rows, style=..., templates=...) -> RowReader."""
    plain = templates.load_template("plain", byte_tokenizer)
    chatml = templates.load_template("chatml", byte_tokenizer)
    count = iter(range(1000))

    def open_reader(rows, style="zero_shot", *, task="t", seed=0, only=None, format="auto", reader=None, **config):
        path = rows if isinstance(rows, str) else write_rows(f"{next(count)}.jsonl", rows)
        source = sources.open_source(SourceConfig(path=path))
        first = [source.row(i) for i in range(min(5, len(source)))]
        templated = config.get("templates") is not None
        layout = formats.find_layout(first, format="fields" if format == "auto" and templated else format)
        phrasing = tasks.load_phrasing(
            SourceConfig(id="src", path=path, **config),
            task=task,
            style=style,
            seed=seed,
            layout=layout,
            count_tokens=words,
            template_name=only,
        )
        if phrasing is not None:
            phrasing.check([layout.fields(row) for row in first])
        return RowReader(
            source,
            layout,
            chatml,
            text_template=plain,
            options=ExampleOptions(max_length=100_000),
            phrasing=phrasing,
            **(reader or {}),
        )

    return open_reader


def said(reader, row, epoch=0):
    """The question and the answer of a row."""
    (conversation,) = reader.conversations(row, epoch)
    user, assistant = conversation.messages[-2:]
    return user.content, assistant.content


def exemplars(reader, row, epoch=0):
    """The questions shown before the row's own, for prompts whose separator is three line breaks."""
    return said(reader, row, epoch)[0].split("\n\n\n")[:-1]


# Which template


def test_a_row_meets_every_template_once_before_it_meets_one_again(open_reader):
    reader = open_reader(SUMS, templates=PHRASES)
    for row in range(len(SUMS)):
        names = [reader.conversations(row, epoch)[0].meta["template"] for epoch in range(6)]
        assert sorted(names[:3]) == ["add", "sum", "total"] and names[:3] == names[3:]
        assert names == [reader.phrasing.chosen(row, epoch) for epoch in range(6)]


def test_all_templates_are_used_about_equally_in_one_epoch(open_reader):
    reader = open_reader(SUMS, templates=PHRASES)
    chosen = [reader.phrasing.chosen(row, 0) for row in range(3000)]
    assert all(900 < chosen.count(name) < 1100 for name in ("sum", "add", "total"))


def test_the_golden_wording_of_a_row(open_reader):
    """Known answers: a change of them changes every run that is resumed, and `tasks._VERSION` must say so."""
    reader = open_reader(SUMS, templates=PHRASES)
    assert [said(reader, row, 0) for row in range(4)] == [
        ("Add 0 to 0.", "It is 0."),
        ("1 and 1 make", "2"),
        ("What is 2 + 4?", "6"),
        ("Add 3 to 9.", "It is 12."),
    ]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), row=st.integers(0, 39), epoch=st.integers(0, 1000))
def test_the_same_key_gives_the_same_text_and_another_epoch_another(seed, row, epoch):
    fields = SUMS[row]
    phrasing = made(seed)
    first, again, later = (
        phrasing.conversations(fields, row=row, epoch=e, exemplars=None)[0].messages for e in (epoch, epoch, epoch + 1)
    )
    assert first == again and first != later
    assert pickle.loads(pickle.dumps(phrasing)).conversations(fields, row=row, epoch=epoch, exemplars=None)[0]


def made(seed, style="zero_shot", **config):
    """A phrasing of the sums without any reader."""
    config = SourceConfig(path="x.jsonl", **{"templates": PHRASES, **config})
    return tasks.load_phrasing(config, task="t", style=style, seed=seed, layout=None, count_tokens=words)


def test_another_process_makes_the_same_texts(open_reader):
    table = ({**PHRASES[0], "input": "{tone}: {a} + {b}?"}, PHRASES[1])
    reader = open_reader(SUMS, "few_shot", templates=table, shots=3, slots={"tone": ("a", "b")})
    asked = [(row, epoch) for row in range(5) for epoch in (0, 7)]
    script = (
        "import json, pickle, sys\n"
        "reader, asked = pickle.load(sys.stdin.buffer)\n"
        "print(json.dumps([[m.content for m in reader.conversations(*at)[0].messages] for at in asked]))"
    )
    found = f"{ROOT}{os.pathsep}{pathlib.Path(__file__).parent}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=pickle.dumps((reader, asked)),
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": found},
    )
    assert json.loads(done.stdout) == [list(said(reader, *at)) for at in asked]


def test_the_key_names_what_decides_the_text_and_varies_says_whether_epochs_differ():
    keys = [
        made(0).key,
        made(1).key,
        made(0, templates=PHRASES[:2]).key,
        made(0, "few_shot").key,
        made(0, "few_shot", shots=2).key,
        made(0, slots={"a": ("1", "2")}).key,
    ]
    assert len(set(keys)) == len(keys) and made(0).key == keys[0]
    assert made(0).varies and not made(0, templates=PHRASES[:1]).varies
    assert made(0, "few_shot", templates=PHRASES[:1]).varies
    assert made(0, templates=PHRASES[:1], slots={"a": ("1", "2")}).varies
    options = {"input": "{a}\n{options_}", "target": "x", "options": "any", "choices": ["x", "y"]}
    assert made(0, templates=(options,)).varies and not made(0, templates=({**options, "options": "list"},)).varies


def test_a_template_that_skips_a_row_gives_way_to_the_next(open_reader, tmp_path):
    entry = {"x": {"name": "odd", "jinja": "{% if a % 2 %}odd {{ a }} ||| x{% endif %}"}}
    entry["y"] = {"name": "few", "jinja": "{% if a < 3 %}few {{ a }} ||| x{% endif %}"}
    file = tmp_path / "odd.yaml"
    # Written as promptsource writes it, with its tags.
    body = "templates:\n" + "".join(f"  {k}: !Template {json.dumps(v)}\n" for k, v in entry.items())
    file.write_text(body)
    reader = open_reader(SUMS, templates=str(file))
    assert {reader.conversations(5, epoch)[0].meta["template"] for epoch in range(4)} == {"odd"}
    assert {reader.conversations(1, epoch)[0].meta["template"] for epoch in range(4)} == {"odd", "few"}
    (result,) = reader.read([4])
    assert (result.reason, result.bad, result.examples) == ("skipped by every template", False, [])


def test_each_template_names_those_that_fit_every_style(tmp_path):
    mixed = (*PHRASES, {"name": "back", "kind": "inverted", "input": "{answer}", "target": "{a}"})
    config = SourceConfig(path="x", templates=mixed)
    assert tasks.template_names(config, "t") == ["sum", "add", "total"]
    inverted = SourceConfig(path="x", templates=mixed, styles={"inverted": 1.0})
    assert tasks.template_names(inverted, "t") == ["back"]
    both = SourceConfig(path="x", templates=mixed, styles={"inverted": 0.5, "zero_shot": 0.5})
    with pytest.raises(ValueError, match="no template that fits all of the styles inverted, zero_shot"):
        tasks.template_names(both, "t")


def test_one_template_alone_words_every_row(open_reader):
    reader = open_reader(SUMS, templates=PHRASES, only="add")
    assert {reader.conversations(row, 3)[0].meta["template"] for row in range(10)} == {"add"} and not reader.varies
    with pytest.raises(ValueError, match=r"no template 'ad' \(nearest: add\); found sum, add, total"):
        open_reader(SUMS, templates=PHRASES, only="ad")


# Few-shot


def test_a_few_shot_prompt_frames_exemplars_as_seqio_does(open_reader):
    frame = {"inputs_prefix": "Q: ", "targets_prefix": "A: ", "x_y_delimiter": "\n", "example_separator": "\n--\n"}
    table = ({**PHRASES[0], **frame, "final_suffix": "!", "input_pattern": "Look:\n{{inputs}}{final_suffix}"},)
    reader = open_reader(SUMS[:3], "few_shot", templates=table, shots=2)
    asked, answered = said(reader, 1)
    ways = ["Q: What is 0 + 0?\nA: 0\n--\n", "Q: What is 2 + 4?\nA: 6\n--\n"]
    assert asked in [f"Look:\n{a}{b}Q: What is 1 + 1?\nA:!" for a, b in (ways, ways[::-1])]
    assert answered == "2"


def test_exemplars_have_the_questions_own_wording_and_change_with_the_epoch(open_reader):
    reader = open_reader(SUMS, "few_shot", templates=PHRASES[:2], shots=4)
    shown = [exemplars(reader, 7, epoch) for epoch in range(4)]
    for texts in shown:
        starts = {text[:4] for text in texts}
        assert len(texts) == 4 and len(starts) == 1
    assert len({tuple(texts) for texts in shown}) == 4


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_few_shot_prompt_never_shows_its_own_example_nor_a_copy_of_it(data):
    """Copies differ in id, case and white space; whatever the seed, row and epoch, none is shown."""
    texts = data.draw(st.lists(st.sampled_from(["red", "Red ", "green", "GREEN", "blue", "pink", "grey"]), min_size=8))
    rows = [{"id": i, "text": text, "label": "x"} for i, text in enumerate(texts)]
    table = ({"input": "Say {text}", "target": "{label}"},)
    config = SourceConfig(path="x", templates=table, shots=5)
    phrasing = tasks.load_phrasing(
        config, task="t", style="few_shot", seed=data.draw(st.integers(0, 99)), layout=None, count_tokens=words
    )
    pool = Exemplars(None, len(rows), rows.__getitem__, lambda hashes: False)
    row, epoch = data.draw(st.integers(0, len(rows) - 1)), data.draw(st.integers(0, 9))
    others = {normal(text) for text in texts} - {normal(texts[row])}
    if not others:
        with pytest.raises(NothingToLearn, match="no other row to show"):
            phrasing.conversations(rows[row], row=row, epoch=epoch, exemplars=pool)
        return
    (conversation,) = phrasing.conversations(rows[row], row=row, epoch=epoch, exemplars=pool)
    *shown, asked = conversation.messages[0].content.split("\n\n\n")
    shown = [normal(text.split("\n\n")[0].removeprefix("Say ")) for text in shown]
    assert normal(texts[row]) not in shown
    assert len(set(shown)) == len(shown) and len(shown) <= min(5, len(others)) and shown
    assert asked.strip() == f"Say {texts[row]}".strip()


def test_exemplars_come_from_the_given_rows_alone(open_reader):
    allowed = np.array([3, 5, 8, 13, 21, 34], np.int64)
    reader = open_reader(SUMS, "few_shot", templates=PHRASES[:1], shots=4, reader={"exemplar_rows": allowed})
    seen = {int(re.search(r"What is (\d+)", text)[1]) for row in range(40) for text in exemplars(reader, row)}
    assert seen == set(allowed.tolist())


def test_exemplars_are_pruned_to_the_budget_that_the_question_shares(open_reader):
    reader = open_reader(SUMS, "few_shot", templates=PHRASES[:1], shots=5, shot_tokens=23)
    # A question has five words, an exemplar six: three fit beside the question in 23.
    assert [len(exemplars(reader, row)) for row in range(20)] == [3] * 20
    none = open_reader(SUMS, "few_shot", templates=PHRASES[:1], shots=5, shot_tokens=10)
    assert none.read([0])[0].reason == "no exemplar fits shot_tokens"


def test_too_few_rows_for_few_shot_name_the_source_and_both_numbers(open_reader):
    with pytest.raises(ValueError, match=r"src: style few_shot shows 5 exemplars .* at least 6 rows, and it has 4"):
        open_reader(SUMS[:4], "few_shot", templates=PHRASES)
    with pytest.raises(ValueError, match="at least 6 rows, and it has 5"):
        open_reader(SUMS, "few_shot", templates=PHRASES, reader={"exemplar_rows": np.arange(5)})


def test_few_shot_without_templates_shows_single_turns_as_they_are(open_reader):
    rows = [{"prompt": f"Question {i}?", "completion": f"Answer {i}"} for i in range(9)]
    reader = open_reader(rows, "few_shot", shots=2)
    asked, answered = said(reader, 4)
    assert re.fullmatch(r"(Question \d\?\n\nAnswer \d\n\n\n){2}Question 4\?\n\n", asked) and answered == "Answer 4"
    long = {"messages": [{"role": r, "content": r} for r in ("user", "assistant") * 2]}
    several = open_reader([long] * 9, "few_shot", shots=2)
    with pytest.raises(RowError, match="found user, assistant, user, assistant; a few-shot prompt"):
        several.conversations(0)


# Slots


def test_slots_fill_templates_and_rows_with_one_value_each(open_reader):
    slots = {"concept": ("gravity", "tides"), "age_group": ("five-year-olds", "adults")}
    table = ({"input": "Explain {concept} to {age_group}. {concept}!", "target": "{answer}"},)
    for reader in (
        open_reader(SUMS, templates=table, slots=slots),
        open_reader([{"prompt": table[0]["input"], "completion": "{x} about {concept}"}] * 40, slots=slots),
    ):
        texts = [said(reader, row) for row in range(40)]
        found = [re.fullmatch(r"Explain (\S+) to (\S+)\. (\S+)!", asked) for asked, _ in texts]
        assert all(match and match[1] == match[3] for match in found)
        assert {match.group(1, 2) for match in found} == {(c, a) for c in slots["concept"] for a in slots["age_group"]}
        assert said(reader, 3, 0) == said(reader, 3, 0) and reader.varies
    assert all(answer == f"{{x}} about {match[1]}" for (_, answer), match in zip(texts, found, strict=True))


def test_a_slot_without_a_place_or_a_value_is_refused_by_name(open_reader):
    with pytest.raises(ValueError, match=r"src: slots\.concept has no value"):
        open_reader(SUMS, templates=PHRASES, slots={"concept": ()})
    with pytest.raises(ValueError, match=r"src: slots\.bb: no template of .* names \{bb\} \(nearest: b\)"):
        open_reader(SUMS, templates=PHRASES, slots={"bb": ("1",)})


def test_a_slot_that_no_row_names_is_refused_where_rows_are_their_own_wording(open_reader):
    rows = [{"prompt": "Explain {concept} to {whom}.", "completion": "{x}"}] * 8
    for style in ("zero_shot", "few_shot"):
        told = (
            r"src: slots\.concpet: none of the first 5 rows names \{concpet\} \(nearest: concept\); they name concept"
        )
        with pytest.raises(ValueError, match=told):
            open_reader(rows, style, slots={"concpet": ("tides",), "whom": ("us",)})
        assert open_reader(rows, style, slots={"concept": ("tides",)}) is not None
    chats = [{"messages": [{"role": "user", "content": "{who}?"}, {"role": "assistant", "content": "Me."}]}] * 2
    assert said(open_reader(chats, slots={"who": ("You",)}), 0) == ("You?", "Me.")
    with pytest.raises(ValueError, match=r"slots\.tone: none of the first 2 rows"):
        open_reader(chats, slots={"tone": ("calm",)})
    open_reader(chats, slots={"tone": ("calm",)}, system="Be {tone}.")


# Refused


def test_a_field_that_no_row_has_is_refused_by_source_template_and_name(open_reader):
    table = ({"name": "t1", "input": "{a} {anser}", "target": "{answer}"},)
    with pytest.raises(
        ValueError, match=r"src: template 't1' of templates of the configuration names 'anser'.*\(nearest: answer\)"
    ):
        open_reader(SUMS, templates=table)


def test_a_row_without_a_field_is_a_bad_row_that_names_line_and_template(open_reader):
    reader = open_reader([*SUMS[:3], {"a": 1, "answer": "2"}], templates=PHRASES[:1])
    (result,) = reader.read([3])
    assert result.bad and result.reason == "missing field"
    assert re.search(r"\.jsonl:4: template 'sum' of .*: the row has no 'b'", result.message)


def test_a_style_without_a_template_says_what_there_is(open_reader):
    with pytest.raises(ValueError, match=r"src: builtin:templates/cot\.yaml has no template for style zero_shot of"):
        open_reader(SUMS, templates="builtin:templates/cot.yaml")
    with pytest.raises(ValueError, match="it has 8 inverted, 12 cot templates for tasks"):
        open_reader(SUMS, templates="builtin:templates/cot.yaml")
    with pytest.raises(ValueError, match="src: style cot is made by templates, and this source has none"):
        open_reader(SUMS, "cot", format="fields")
    with pytest.raises(ValueError, match=r"src: style few_shot shows questions .* format text has none"):
        open_reader([{"text": "Once."}] * 9, "few_shot")
    with pytest.raises(ValueError, match=r"src: templates: .*nowhere\.yaml: no such file"):
        open_reader(SUMS, templates="nowhere.yaml")
    with pytest.raises(ValueError, match=r"no such file in the package \(nearest: .*cot\.yaml"):
        open_reader(SUMS, templates="builtin:templates/cott.yaml")


# Held out


def test_rows_that_say_what_is_held_out_give_no_example_under_any_wording(open_reader):
    held = open_reader(SUMS[5:7], templates=PHRASES[:1])
    excluded = np.unique(np.array([h for row in (0, 1) for h in held.hashes(row).whole], np.uint64))
    other = [{**row, "id": i} for i, row in enumerate(SUMS)]
    reader = open_reader(other, templates=PHRASES[1:], reader={"excluded": excluded})
    results = reader.read(range(40), [3] * 40)
    assert [i for i, r in enumerate(results) if r.reason == "also held out"] == [5, 6]
    assert all(r.examples for i, r in enumerate(results) if i not in (5, 6))
    few = open_reader(other, "few_shot", templates=PHRASES[:1], shots=8, reader={"excluded": excluded})
    results = few.read(range(40))
    assert [i for i, r in enumerate(results) if r.reason == "also held out"] == [5, 6]
    shown = {text.split("\n")[0] for row in range(40) if row not in (5, 6) for text in exemplars(few, row)}
    assert "What is 4 + 16?" in shown and not shown & {"What is 5 + 25?", "What is 6 + 36?"}


def test_one_held_out_conversation_of_a_row_leaves_the_others_and_is_told_of(open_reader):
    row = {"instruction": "Say", "instances": [{"input": i, "output": "x"} for i in ("one", "two", "three")]}
    held = open_reader([{"prompt": "Say\n\nTWO", "completion": "y"}])
    reader = open_reader([row], reader={"excluded": np.array(sorted(held.hashes(0).whole), np.uint64)})
    (result,) = reader.read([0])
    assert (len(result.examples), result.reason, result.bad) == (2, "also held out", False)


def test_a_text_is_held_out_whatever_its_case_form_and_white_space(open_reader):
    def hashes(text):
        return content_hashes(Conversation((Message("user", text), Message("assistant", "a"))))

    assert hashes("Caf\u00e9  au\nlait") == hashes("cafe\u0301 AU lait ") != hashes("Cafe au lait")
    held = open_reader([{"prompt": "Why  so?", "completion": "a"}])
    excluded = np.array(sorted(held.hashes(0).whole), np.uint64)
    reader = open_reader(
        [{"prompt": p, "completion": "b"} for p in ("why so?", "Why not?")], reader={"excluded": excluded}
    )
    assert [r.reason for r in reader.read([0, 1])] == ["also held out", None]
    assert reader.key != open_reader([{"prompt": "Why not?", "completion": "b"}]).key


def test_the_hash_of_fields_passes_over_names_of_rows_and_of_columns():
    row = {"id": 7, "question_id": "q7", "question": "Is it?", "choices": {"text": ["yes", "no"]}, "n": 3}
    assert fields_hash(row) == fields_hash({"id": 8, "q": "is  IT?", "choices": {"text": ["no", "yes"]}, "n": 3})
    assert fields_hash(row) != fields_hash({**row, "n": 4})
    assert fields_hash(row) != fields_hash({**row, "question": "Was it?"})


# The documentation


def test_the_worked_example_of_the_documentation_is_what_comes_out(open_reader, tmp_path):
    text = (ROOT / "docs" / "task-templates.md").read_text(encoding="utf-8").split("## Tables")[0]
    blocks = re.findall(r"```(\w+)\n(.*?)\n```", text, re.DOTALL)
    (rows,) = [[json.loads(line) for line in body.splitlines()] for kind, body in blocks if kind == "json"]
    table = tmp_path / "reviews.yaml"
    table.write_text(next(body for kind, body in blocks if kind == "yaml" and body.startswith("- name")))
    shown = [body for kind, body in blocks if kind == "text"]
    made = [
        said(open_reader(rows, style, task="reviews", templates=str(table), shots=2), 0, epoch)
        for style, epoch in (("zero_shot", 0), ("zero_shot", 1), ("few_shot", 0))
    ]
    assert [asked for asked, _ in made] == shown
    assert [answer for _, answer in made] == ["(B)", "good", "good"]
