"""Tables of templates: placeholders, options, FLAN's exported form, the package's own tables on real rows."""

import json

import pytest

from jaxtune.config_data import SourceConfig
from jaxtune.data.files import sources
from jaxtune.data.layouts.formats import find_layout
from jaxtune.data.records import RowError
from jaxtune.data.wording import options, tasks, template_files, template_tables
from jaxtune.data.wording.fewshot import Exemplars
from jaxtune.data.wording.keyed import Keyed

NLI = {"premise": "It rains.", "hypothesis": "It is wet.", "answer": "yes", "options": ["yes", "no", "maybe"]}


def one(style="zero_shot", task="t", **row):
    """The only template of a table, settled for a prompt."""
    (wording,) = template_tables.fitting(template_tables.read([row], file="t.yaml"), style, task)
    return wording.settled(Keyed(0))


def rendered(fields, style="zero_shot", **row):
    return one(style, **row).render(fields, Keyed(0))


def lengths(texts):
    return [len(text) // 4 for text in texts]


def phrased(shared_file, templates, style, *, format="auto", rows=(0, 1, 2), **config):
    """Conversations of some rows of a real file in each of the templates, by template."""
    config = SourceConfig(path=str(shared_file), templates=templates, **config)
    source = sources.open_source(config)
    layout = find_layout([source.row(i) for i in range(5)], format=format)
    phrasing = tasks.load_phrasing(config, task="t", style=style, seed=0, layout=layout, count_tokens=lengths)
    phrasing.check([layout.fields(source.row(i)) for i in range(5)])
    pool = Exemplars(None, len(source), lambda i: layout.fields(source.row(i)), lambda hashes: False)
    out = {}
    for epoch in range(len(phrasing.wordings)):
        for row in rows:
            fields = layout.fields(source.row(row))
            (conversation,) = phrasing.conversations(fields, row=row, epoch=epoch, exemplars=pool)
            out.setdefault(conversation.meta["template"], []).append((fields, conversation))
    return out


def test_fields_stand_where_their_names_stand_and_doubled_braces_stay():
    fields = {"a": "x", "n": 3, "none": None, "several": ["p", "q"]}
    pair = rendered(fields, input="{a}{n} {{a}} {none}|{several}", target="{several} {{}}")
    assert pair == ("x3 {a} |p\nq", "p {}")


@pytest.mark.parametrize("text", ["{a!r}", "{a:>5}", "{a.b}", "{a[0]}", "{}", "{a", "a}"])
def test_what_is_no_field_in_braces_is_refused_by_file_and_template(text):
    with pytest.raises(ValueError, match=r"t\.yaml: template 'x': "):
        template_tables.read([{"name": "x", "input": text, "target": "{a}"}], file="t.yaml")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"input": "a"}, "expected both input and target"),
        ({"input": "a", "target": "b", "kinds": "cot"}, r"unknown key 'kinds' \(nearest: kind\)"),
        ({"input": "a", "target": "b", "kind": "zeroish"}, r"kind: found 'zeroish'.* expected zero-shot, few-shot"),
        ({"input": "a", "target": "b", "options": "roman"}, "options: found 'roman'; expected none, list, letters"),
        ({"input": ["a"], "target": "b"}, "input is a list; expected text"),
        ({"input": "a", "target": "b", "lists": {"x": 3}}, r"lists\.x: expected a text for one item"),
        ({"input": "a", "target": "b", "input_pattern": "no place"}, r"input_pattern has no \{inputs\}"),
    ],
)
def test_rows_that_are_no_template_are_refused_with_what_was_expected(row, told):
    with pytest.raises(ValueError, match=rf"t\.yaml: template .*: {told}"):
        template_tables.read([row], file="t.yaml")


def test_options_are_written_in_the_templates_style_and_letters_answer():
    table = {"input": "{premise}\n{options_}", "target": "{answer}"}
    assert rendered(NLI, **table) == ("It rains.\nOPTIONS:\n- yes\n- no\n- maybe", "yes")
    assert rendered(NLI, **table, options="letters") == ("It rains.\nOptions:\n(A) yes\n(B) no\n(C) maybe", "(A)")
    assert rendered(NLI, **table, options="numbers") == ("It rains.\nOptions:\n1. yes\n2. no\n3. maybe", "yes")
    assert rendered(NLI, **table, options="line") == ("It rains.\nyes / no / maybe", "yes")
    assert rendered(NLI, **table, options="none") == ("It rains.", "yes")


def test_letters_answer_only_where_every_option_has_one_of_its_own():
    style = options.OptionsStyle("", "a)")
    assert style.answer(["x", "y"], 1) == "b"
    assert style.answer(["x", "x"], 1) == "x"
    many = [f"option {i}" for i in range(31)]
    assert style.answer(many, 29) == "option 29" and style.block(many).endswith("\n31) option 30")
    assert options.OptionsStyle("", "[A]").answer(["x", "y"], 1) == "[B]"


def test_any_style_draws_by_the_key_and_one_prompt_keeps_its_style():
    table = {"input": "{premise}\n{options_}", "target": "{answer}", "options": "any"}
    (wording,) = template_tables.fitting(template_tables.read([table], file="t"), "zero_shot", "t")
    texts = {wording.settled(Keyed(seed)).render(NLI, Keyed(0)) for seed in range(200)}
    assert len(texts) > 100 and {target for _, target in texts} >= {"yes", "A", "(a)", "[A]"}
    settled = wording.settled(Keyed(3))
    assert settled.render(NLI, Keyed(1)) == settled.render(NLI, Keyed(2))


def test_a_label_is_understood_as_text_as_place_and_as_the_rows_own_label():
    table = {"input": "{options_}", "target": "It is {answer}."}
    for answer in ("no", " no ", 1):
        assert rendered({**NLI, "answer": answer}, **table).target == "It is no."
    own = {"text": ["pearls", "beads"], "label": ["A", "B"]}
    assert rendered({"options": own, "answer": "B"}, **table) == ("OPTIONS:\n- pearls\n- beads", "It is beads.")
    fixed = {**table, "choices": ["bad", "good"]}
    assert one(**fixed).needs == {"answer"} and one(**table).needs == {"answer", "options"}
    assert rendered({"answer": 0}, **fixed) == ("OPTIONS:\n- bad\n- good", "It is bad.")
    assert rendered({"answer": 0, "n": 1}, **{**fixed, "input": "{answer} {n}"}).input == "bad 1"
    assert rendered({**NLI, "answer": "something else"}, **table).target == "It is something else."


@pytest.mark.parametrize(
    ("with_options", "without"),
    [
        ("{premise}\n\n{options_}\nSo?", "{premise}\n\nSo?"),
        ("{premise} So? {options_}", "{premise} So?"),
        ("{premise}\nChoose from: {options_}", "{premise}"),
        ("Is it ({options_}) that {premise}", "Is it that {premise}"),
        ("{{x}} {premise}\n{options_}", "{{x}} {premise}"),
    ],
)
def test_without_options_the_placeholder_goes_with_its_line(with_options, without):
    for style in ("zero_shot_no_options", "few_shot_no_options"):
        bare = rendered(NLI, style, input=with_options, target="{answer}")
        assert bare == rendered(NLI, input=without, target="{answer}")
        assert one(style, input=with_options, target="{answer}").needs == {"premise", "answer"}


def test_options_that_are_no_list_are_the_rows_fault():
    with pytest.raises(RowError, match="options is text; expected a list of texts"):
        rendered({**NLI, "options": "yes, no"}, input="{options_}", target="{answer}")


def test_lists_are_written_item_by_item():
    fields = {"examples": [{"input": "1", "output": ["2", "3"]}, {"input": "4", "output": "5"}], "x": "6"}
    table = {"input": "{examples}{x}", "target": "7"}
    item = "{number}) {input} -> {output}\n"
    assert rendered(fields, **table, lists={"examples": item}).input == "1) 1 -> 2\n2) 4 -> 5\n6"
    assert rendered(fields, **table, lists={"examples": {"item": item, "take": 1}}).input == "1) 1 -> 2\n6"
    assert rendered({"examples": [], "x": "6"}, **table, lists={"examples": item}).input == "6"
    with pytest.raises(RowError, match="examples is a list; expected text, or an entry of the template's `lists`"):
        rendered(fields, **table)


def test_templates_of_other_tasks_stay_out_and_those_of_every_task_come_in():
    rows = [{"task": task, "name": task, "input": "x", "target": "y"} for task in ("a", "b", "*")]
    read = template_tables.read(rows, file="t")
    assert [w.name for w in template_tables.fitting(read, "zero_shot", "a")] == ["a", "*"]
    config = SourceConfig(path="x", id="src", templates=tuple(rows[:2]))
    with pytest.raises(ValueError, match=r"no template for style zero_shot of task 'c'; it has 2 .* for tasks a, b"):
        tasks.template_names(config, "c")


def test_few_shot_takes_templates_of_its_kind_and_zero_shot_ones_where_there_are_none():
    rows = [{"name": k, "kind": k, "input": "x", "target": "y"} for k in ("zero-shot", "few_shot", "COT", "inversion")]
    read = template_tables.read(rows, file="t")
    kinds = {
        "zero_shot": "zero-shot",
        "few_shot": "few_shot",
        "few_shot_no_options": "few_shot",
        "cot": "COT",
        "cot_few_shot": "COT",
        "inverted": "inversion",
        "inverted_few_shot": "inversion",
    }
    for style, name in kinds.items():
        assert [w.name for w in template_tables.fitting(read, style, "t")] == [name]
    assert [w.name for w in template_tables.fitting(read[:1], "few_shot", "t")] == ["zero-shot"]


FLAN = [
    {
        "family": "rte",
        "kind": "zero_shot",
        "idx": 0,
        "inputs": "{premise}\n\nDoes it follow that {hypothesis}\n{options_}",
        "targets": "{answer}",
    },
    {
        "family": "rte",
        "kind": "few_shot",
        "idx": 0,
        "inputs": "{premise} So {hypothesis}",
        "targets": "{answer}",
        "inputs_prefix": "P: ",
        "targets_prefix": "T: ",
        "x_y_delimiter": "\n",
        "example_separator": "\n\n",
        "final_suffix": "",
        "input_pattern": "{{inputs}}{final_suffix}",
        "in_template_mix": True,
    },
]


def test_flans_exported_tables_are_read_as_they_are(tmp_path):
    file = tmp_path / "flan.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in FLAN))
    zero, few = (
        template_files.load(str(file), task="rte", style=style, source="s")[0].settled(Keyed(0))
        for style in ("zero_shot", "few_shot")
    )
    asked = "It rains.\n\nDoes it follow that It is wet.\nOPTIONS:\n- yes\n- no\n- maybe"
    assert zero.render(NLI, Keyed(0)) == (asked, "yes")
    pair = few.render(NLI, Keyed(0))
    shown = few.frame.exemplar(pair)
    assert shown == "P: It rains. So It is wet.\nT: yes\n\n"
    assert few.frame.whole(shown, pair.input) == shown + "P: It rains. So It is wet.\nT:"


def test_answers_of_a_yaml_table_stay_text(tmp_path):
    file = tmp_path / "t.yaml"
    file.write_text("- {input: '{a} {options_}', target: '{b}', choices: [yes, no, 1], kind: zero-shot, shots: 2}\n")
    (wording,) = template_files.load(str(file), task="t", style="zero_shot", source="s")
    assert wording.choices == ("yes", "no", "1") and wording.shots == 2


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("t.txt", "x", "found a file of unknown kind; expected .yaml, .jsonl or .json"),
        ("t.jsonl", '{"input": "a", "target": "b"}\n{"input"', r"t\.jsonl:2: column 9: .*; expected JSON"),
        ("t.yaml", "a: [", r"t\.yaml: not readable as YAML"),
        ("t.yaml", "templates: 3", "expected a list of templates"),
        ("t.json", "[3]", r"t\.json: template 1: found the number 3; expected a mapping"),
    ],
)
def test_files_that_hold_no_templates_are_told_by_name(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"s: templates: .*{told}"):
        template_files.load(str(tmp_path / name), task="t", style="zero_shot", source="s")


def test_promptsource_styles_go_by_the_metadata(shared):
    file = str(shared / "promptsource" / "qasc" / "templates.yaml")
    counts = {
        style: len(tasks.template_names(SourceConfig(path="x", templates=file, styles={style: 1.0}), "qasc"))
        for style in ("zero_shot", "few_shot", "zero_shot_no_options", "inverted")
    }
    assert counts == {"zero_shot": 8, "few_shot": 8, "zero_shot_no_options": 4, "inverted": 3}
    with pytest.raises(ValueError, match="has no template for style cot of task 'qasc'; it has 8 promptsource"):
        template_files.load(file, task="qasc", style="cot", source="s")


def test_a_promptsource_file_without_its_tags_is_one_all_the_same(tmp_path):
    file = tmp_path / "t.yaml"
    file.write_text("dataset: d\ntemplates:\n  1-2:\n    name: n\n    jinja: '{{ a }} ||| {{ b }}'\n")
    (wording,) = template_files.load(str(file), task="t", style="zero_shot", source="s")
    assert wording.render({"a": "q", "b": 1}, Keyed(0)) == ("q", "1")


def test_a_promptsource_file_in_the_configuration_may_skip_and_truncate(shared):
    file = str(shared / "promptsource" / "imdb" / "templates.yaml")
    row = {"promptsource": file, "truncate": 50, "skip": ["Movie Expressed Sentiment"]}
    found = template_files.load((row,), task="imdb", style="zero_shot", source="s")
    assert len(found) == 10 and "Movie Expressed Sentiment" not in [wording.name for wording in found]
    assert len(found[0].render({"text": "word " * 100, "label": 1}, Keyed(0)).input) < 150
    with pytest.raises(ValueError, match="skip names 'Movie', and there is no such template"):
        template_files.load(({"promptsource": file, "skip": ["Movie"]},), task="imdb", style="zero_shot", source="s")
    with pytest.raises(ValueError, match=r"expected \{promptsource: PATH, truncate: 2048, skip"):
        template_files.load(({"promptsource": file, "cut": 3},), task="imdb", style="zero_shot", source="s")


def test_chain_of_thought_wordings_keep_the_real_rationale_and_end_with_the_answer(shared):
    found = phrased(shared / "cot" / "gsm8k.tsv", "builtin:templates/cot.yaml", "cot", format="cot")
    assert len(found) >= 10
    for rows in found.values():
        for fields, conversation in rows:
            asked, said = (message.content for message in conversation.messages)
            assert fields["question"] in asked and fields["answer"] not in asked.replace(fields["question"], "")
            thought = said.index(fields["chain_of_thought"])
            assert said.rindex(fields["answer"]) > thought + len(fields["chain_of_thought"])


def test_inverted_wordings_ask_for_what_the_direct_ones_give(shared):
    found = phrased(shared / "cot" / "qasc.tsv", "builtin:templates/cot.yaml", "inverted", format="cot")
    assert len(found) >= 6
    for rows in found.values():
        for fields, conversation in rows:
            asked, said = (message.content for message in conversation.messages)
            given = [name for name in ("question", "chain_of_thought") if fields[name] in asked]
            asked_for = [name for name in ("question", "chain_of_thought") if fields[name] in said]
            assert not set(given) & set(asked_for) and (asked_for or said == fields["answer"])


def test_the_golden_chain_of_thought_prompt_with_exemplars(shared):
    templates = "builtin:templates/cot.yaml"
    found = phrased(shared / "cot" / "strategyqa.tsv", templates, "cot_few_shot", format="cot", rows=(3,), shots=2)
    ((fields, conversation),) = found["Q and A"]
    asked, said = (message.content for message in conversation.messages)
    first, second, question = asked.split("\n\nQ: ")
    assert first.startswith("Q: ") and question == f"{fields['question']}\nA:"
    assert all("\nA: Reasoning: " in shown and "\nFinal answer: " in shown for shown in (first, second))
    assert said == f"Reasoning: {fields['chain_of_thought']}\nFinal answer: {fields['answer']}"


def test_natural_instructions_tables_word_the_real_task_table(shared):
    templates = "builtin:templates/natural_instructions.yaml"
    found = phrased(
        shared / "flan" / "niv2_tasks.jsonl.gz", templates, "zero_shot", format="natural_instructions", rows=(0, 9)
    )
    assert len(found) == 6
    for rows in found.values():
        for fields, conversation in rows:
            asked, said = (message.content for message in conversation.messages)
            assert fields["definition"] in asked and fields["example_input"] in asked
            assert said == fields["example_output"]


def test_natural_instructions_show_the_tasks_own_examples_and_need_no_other_rows():
    row = {"definition": "Add.", "input": "1 2", "output": ["3"], "negative_examples": []}
    row["positive_examples"] = [{"input": f"{i} 1", "output": f"{i + 1}", "explanation": "so"} for i in range(4)]
    config = SourceConfig(path="x", templates="builtin:templates/natural_instructions.yaml", shots=5)
    phrasing = tasks.load_phrasing(config, task="t", style="few_shot", seed=0, layout=None, count_tokens=lengths)
    phrasing.check_count(1)
    assert not phrasing.takes_exemplars
    texts = {}
    for epoch in range(4):
        (conversation,) = phrasing.conversations(row, row=0, epoch=epoch, exemplars=None)
        texts[conversation.meta["template"]] = [message.content for message in conversation.messages]
    golden = "Add.\n\nInput: 0 1\nOutput: 1\n\nInput: 1 1\nOutput: 2\n\nInput: 1 2\nOutput:"
    assert texts["two solved cases"] == [golden, "3"] and len(texts) == 4


@pytest.mark.parametrize("style", ["zero_shot", "zero_shot_no_options", "few_shot", "inverted"])
def test_every_classification_wording_shows_text_and_gives_the_label(style):
    config = SourceConfig(path="x", templates="builtin:templates/classification.yaml", shots=2)
    phrasing = tasks.load_phrasing(config, task="t", style=style, seed=0, layout=None, count_tokens=lengths)
    rows = [{"text": f"text {i}", "label": i % 3, "options": ["red", "green", "blue"]} for i in range(9)]
    pool = Exemplars(None, 9, rows.__getitem__, lambda hashes: False)
    for epoch in range(len(phrasing.wordings)):
        (conversation,) = phrasing.conversations(rows[4], row=4, epoch=epoch, exemplars=pool)
        asked, said = (message.content for message in conversation.messages)
        if style == "inverted":
            assert "green" in asked and said == "text 4"
            continue
        assert "text 4" in asked and "{" not in asked and "()" not in asked
        assert ("blue" in asked) == (style != "zero_shot_no_options")
        assert said.endswith("green") or said.strip("()[]").upper() == "B"


@pytest.mark.parametrize("task", ["qa", "reading", "multiple_choice"])
def test_every_question_wording_takes_the_fields_of_its_task(task):
    fields = {"question": "Which?", "answer": "that", "passage": "Long ago.", "options": ["this", "that"]}
    for style in ("zero_shot", "few_shot", "inverted"):
        if (task, style) == ("multiple_choice", "inverted"):
            continue
        for wording in template_files.load("builtin:templates/qa.yaml", task=task, style=style, source="s"):
            assert wording.settled(Keyed(0)).render(fields, Keyed(0)) is not None
            assert ("passage" in wording.needs) == (task == "reading")
            assert ("options" in wording.needs) == (task == "multiple_choice")
