"""On real records the audit finds the faults and figures that are known of them, and no more."""

import json

import audits
import pytest


@pytest.fixture
def audited(shared, tmp_path):
    """audited(FILE, ...) -> the document of an audit of files of ../shared/data, and its exit code."""

    def audited(*files, more=()):
        base = shared / "models" / "stories260K"
        sources = [f"data.train.{i}.path={shared / file}" for i, file in enumerate(files)]
        words = [*sources, "data.template=plain", "data.overlong=split", "--skip", "languages", *more]
        code, document = audits.run(base, tmp_path / "out", *words)
        return document, code

    return audited


def flagged(document, flag):
    return [row["where"] for row in document["flagged_rows"] if flag in row["flags"]]


def errors(document):
    return [finding["text"] for finding in document["findings"] if finding["level"] == "error"]


def test_alpaca_has_127_placeholders_4_empty_answers_and_some_fifty_links_and_pictures(audited):
    document, _ = audited("alpaca/alpaca_random_9k.jsonl.gz", more=("--skip", "near"))
    assert document["funnel"]["total"]["rows"] == 9229
    assert len(flagged(document, "placeholder for no input")) == 127
    assert document["funnel"]["total"]["lost"]["empty answer"]["rows"] == 4
    assert document["statistics"]["responses"]["empty_rows"] == 4
    assert 45 <= len(flagged(document, "a link or picture that is not there")) <= 60
    assert len(document["lost_rows"]) == 4 and not errors(document)


def test_all_of_trecs_targets_are_empty_so_training_would_stop(audited):
    document, code = audited("t0/trec.jsonl.gz")
    [error] = errors(document)
    assert code == 1 and "none of its 1,200 rows can be trained on (1,200 empty answer" in error
    assert document["funnel"]["total"]["lost"] == {
        "empty answer": {**document["funnel"]["total"]["lost"]["empty answer"], "rows": 1200}
    }


def test_strategyqa_has_one_line_twice(audited):
    document, _ = audited("cot/strategyqa.tsv")
    exact = document["duplicates"]["exact"]
    assert exact["count"] == 1 and not document["lost_rows"]
    lines = (audits.line(exact["rows"][0][key]) for key in ("where", "of"))
    again, first = lines
    assert first < again


def test_tool_calls_have_twenty_exact_duplicates(audited):
    document, _ = audited("multiturn/glaive_toolcall.jsonl.gz", more=("--skip", "near"))
    assert document["funnel"]["total"]["rows"] == 220 and document["duplicates"]["exact"]["count"] == 20


@pytest.mark.long
def test_every_question_of_gsm8k_stands_in_the_chains_of_thought_too(audited, shared):
    """5,657 of 7,473 are the same to the letter once newlines are alike, all of them but for white space."""
    path = shared / "gsm8k" / "train.jsonl"
    asked = [json.loads(line)["question"] for line in path.read_text(encoding="utf-8").splitlines()]
    lines = (shared / "cot" / "gsm8k.tsv").read_text(encoding="utf-8").split("\n")
    told = [line.split("\t")[0].replace("\\n", "\n") for line in lines if line]
    same, alike = set(asked), {" ".join(question.split()) for question in asked}
    assert sum(question in same for question in told) == 5657
    assert sum(" ".join(question.split()) in alike for question in told) == len(told) == 7473
    document, _ = audited("cot/gsm8k.tsv", more=("--skip", "near", f"data.eval.0.path={path}"))
    overlap = document["evaluation"]["overlap"]
    assert overlap["instructions"]["count"] == 7473
    assert overlap["rows"]["count"] == 0, "the answers differ"


def test_unanswered_questions_of_message_trees_are_told(audited, shared):
    document, _ = audited("multiturn/oasst_trees_en.jsonl.gz", more=("--skip", "near"))
    total = document["funnel"]["total"]
    assert total["rows"] == 70 and total["stages"]["parsed"] == 70 and not errors(document)
    assert document["statistics"]["responses"]["unanswered_questions"] == 140, "of 416 leaves of the trees"


@pytest.mark.long
def test_a_benchmark_is_found_in_the_data(audited, shared):
    path = shared / "gsm8k" / "train.jsonl"
    document, _ = audited("cot/gsm8k.tsv", more=("--skip", "near", f"data.decontaminate.paths=[{path}]"))
    found = document["contamination"]
    assert len(found) >= 5657 * 0.98
    assert all(row["benchmark"].startswith(str(path)) and len(row["words"].split()) >= 5 for row in found)


def test_dollys_own_categories_are_told(audited, shared):
    document, _ = audited("dolly/dolly_filtered.jsonl.gz", more=("--skip", "near"))
    categories = document["statistics"]["categories"]
    assert sum(categories.values()) == 2388 and len(categories) == 8 and "brainstorming" in categories


def test_clean_multiturn_data_has_nothing_to_tell(audited):
    document, code = audited("multiturn/sgd_dialogues.jsonl.gz", more=("--skip", "near"))
    assert code == 0 and document["lost_rows"] == [] and json.dumps(document["contamination"]) == "[]"
