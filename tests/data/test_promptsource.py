"""Templates of promptsource: the real rows become the real T0 texts, and nothing in a template reaches outside."""

import gzip
import json
import pickle
import re

import pytest

from jaxtune.data.records import RowError
from jaxtune.data.wording import promptsource
from jaxtune.data.wording.keyed import Keyed


def one(jinja, answer_choices=None, **more):
    """A template as a file's only one."""
    text = json.dumps({"x": {"name": "t", "jinja": jinja, "answer_choices": answer_choices, **more}})
    (wording,) = promptsource.read(f"templates: {text}", file="t.yaml")
    return wording


def rendered(jinja, fields, answer_choices=None, seed=0):
    return one(jinja, answer_choices).render(fields, Keyed(seed))


def published(shared):
    """(data set, its templates by their T0 names, raw rows, T0 records), for each data set here with raw rows."""
    for raw in sorted((shared / "promptsource").rglob("raw.jsonl")):
        name = "_".join(raw.parent.relative_to(shared / "promptsource").parts)
        file = raw.parent / "templates.yaml"
        wordings = promptsource.read(file.read_text(encoding="utf-8"), file=str(file))
        with gzip.open(shared / "t0" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as records:
            rows = [json.loads(line) for line in raw.open(encoding="utf-8")]
            yield name, {re.sub(r"\W+", "_", w.name): w for w in wordings}, rows, [json.loads(line) for line in records]


def test_every_raw_row_becomes_its_t0_text_under_every_template_without_a_choice(shared):
    pairs, templates, wrong = 0, set(), []
    for name, wordings, rows, records in published(shared):
        # T0 numbers the rows that a template did not skip.
        kept = {key: [row for row in rows if w.render(row, Keyed(0))] for key, w in wordings.items() if not w.random}
        for record in records:
            key = record["template"]
            if wordings[key].random:
                continue
            pair = wordings[key].render(kept[key][record["idx"]], Keyed(0))
            pairs += 1
            templates.add((name, key))
            if pair != (record["inputs"], record["targets"]):
                wrong.append((name, key, record["idx"]))
    assert wrong == []
    assert (pairs, len(templates)) == (16_291, 82)


def test_a_choice_gives_one_of_the_t0_texts_possible(shared):
    """Upstream drew without a seed; ours must be one of the draws that upstream could have made."""
    for name, wordings, rows, records in published(shared):
        if name != "common_gen":
            continue
        for record in records[:2000]:
            wording = wordings[record["template"]]
            if wording.random:
                drawn = {wording.render(rows[record["idx"]], Keyed(seed)) for seed in range(60)}
                assert (record["inputs"], record["targets"]) in drawn


def test_choice_and_random_follow_the_key():
    for use in ("{{ xs | choice }}", "{{ xs | random }}"):
        wording, fields = one(f"{use} ||| b"), {"xs": list("abcdefgh")}
        assert wording.random
        assert {wording.render(fields, Keyed(1)).input for _ in range(5)} == {wording.render(fields, Keyed(1)).input}
        assert len({wording.render(fields, Keyed(seed)).input for seed in range(50)}) == 8


def test_a_separator_in_the_data_is_no_separator():
    fields = {"text": "a ||| b", "inner": {"list": ["c ||| d"]}}
    assert rendered("{{ text }} {{ inner.list[0] }} ||| yes", fields) == ("a ||| b c ||| d", "yes")


def test_answer_choices_are_rendered_split_and_stripped():
    assert rendered("Q ||| {{ answer_choices[n] }}", {"n": 1}, "no ||| yes ") == ("Q", "yes")
    joined = '{{ options | join("|||") }}'
    assert rendered("{{ answer_choices | length }} ||| x", {"options": ["a", "b", "c"]}, joined) == ("3", "x")
    assert rendered("{{ answer_choices[0] }} ||| x", {"a": "p ||| q"}, "{{ a }} ||| r") == ("p ||| q", "x")
    with pytest.raises(RowError, match="the row has a field answer_choices"):
        rendered("Q ||| A", {"answer_choices": 1}, "no ||| yes")


def test_empty_renders_and_any_number_of_parts_but_two_skip_the_row():
    for jinja in ("{% if n > 1 %}Q ||| A{% endif %}", "Q ||| {{ '' }}", "{{ '' }} ||| A", "a ||| b ||| c"):
        assert rendered(jinja, {"n": 1}) is None


def test_the_filters_and_functions_of_promptsource_are_there():
    assert rendered("{{ 'a' | highlight }} ||| x", {}).input == "<span style='color: #F08080'>a</span>"
    assert rendered("{{ xs | most_frequent | join(',') }} ||| x", {"xs": ["b", "a", "c", "a", "b"]}).input == "b,a"
    assert rendered("{% for a, b in zip(xs, xs) %}{{ a }}{{ b }}{% endfor %} ||| x", {"xs": [1, 2]}).input == "1122"
    loop = "{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }} ||| x"
    assert rendered(loop, {}).input == "3"


def test_printed_expressions_are_cut_when_asked_and_only_then():
    text = "templates: " + json.dumps({"x": {"name": "t", "jinja": "{{ a }} and {{ b }} ||| {{ b }}"}})
    (cut,), (whole,) = promptsource.read(text, file="t", truncate=20), promptsource.read(text, file="t")
    fields = {"a": "one two three four five six", "b": "short"}
    assert cut.render(fields, Keyed(0)) == ("one two three... and short", "short")
    assert whole.render(fields, Keyed(0)).input == fields["a"] + " and short"
    leeway = {"a": "x" * 25, "b": "y"}
    assert cut.render(leeway, Keyed(0)).input == "x" * 25 + " and y"


@pytest.mark.parametrize(
    "jinja",
    [
        "{{ ''.__class__.__mro__ }} ||| x",
        "{{ cycler.__init__.__globals__ }} ||| x",
        "{{ xs.append(3) }} ||| x",
        "{{ missing.field }} ||| x",
        "{{ 1 / 0 }} ||| x",
    ],
)
def test_templates_reach_nothing_and_their_errors_are_the_rows(jinja):
    with pytest.raises(RowError):
        rendered(jinja, {"xs": [1]})


def test_a_field_that_the_row_lacks_is_told_by_name():
    assert one("{{ a }} {{ zip(b, b) }} ||| {{ answer_choices[0] }}", "{{ c }}").needs == {"a", "b", "c"}
    with pytest.raises(RowError, match="the row has no 'b'; it has a"):
        rendered("{{ a }} ||| {{ b }}", {"a": 1})


def test_a_broken_template_is_told_by_file_name_and_line():
    with pytest.raises(ValueError, match=r"t\.yaml: template 't', line 2: "):
        one("a\n{% if %} ||| b")
    with pytest.raises(ValueError, match=r"t\.yaml: expected a map `templates`"):
        promptsource.read("dataset: x", file="t.yaml")
    with pytest.raises(ValueError, match=r"t\.yaml: not readable as YAML"):
        promptsource.read("a: [", file="t.yaml")


def test_extra_metadata_is_borne_and_no_tag_makes_an_object():
    tagged = (
        "templates:\n  a: !Template\n    name: t\n    jinja: q ||| a\n    metadata: !TemplateMetadata\n"
        "      choices_in_prompt: true\n      original_task: false\n      surprising: 3\n"
    )
    (wording,) = promptsource.read(tagged, file="t.yaml")
    assert (wording.choices_in_prompt, wording.original_task) == (True, False)
    with pytest.raises(ValueError, match="could not determine a constructor"):
        promptsource.read(tagged.replace("!Template\n", "!!python/object:os.system\n"), file="t.yaml")


def test_a_template_travels_to_another_process():
    wording = one("{{ a }} {{ xs | choice }} ||| {{ answer_choices[0] }}", "yes ||| no")
    again = pickle.loads(pickle.dumps(wording))
    fields = {"a": "Q", "xs": [1, 2, 3]}
    assert again.render(fields, Keyed(3)) == wording.render(fields, Keyed(3)) and again.key == wording.key
