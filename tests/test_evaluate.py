"""Scores count what the model really answers: right, wrong, too long, by group and by file."""

import json

import asking_helpers
import pytest
from asking_helpers import write_jsonl

from jaxtune.asking import Sampling
from jaxtune.evaluate import __main__ as command
from jaxtune.evaluate.cases import read_cases
from jaxtune.evaluate.generated import evaluate
from jaxtune.evaluate.scores import Score, exact_match

LENGTH = 6  # new tokens; a random model seldom stops by itself


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return asking_helpers.folder(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def model(folder):
    return asking_helpers.answerer(folder)


@pytest.fixture(scope="module")
def rows(model):
    """Six questions with the model's own answers, all of them different questions."""
    questions = [f"the rain {n}" for n in range(6)]
    answers = model.answer([[{"role": "user", "content": question}] for question in questions], Sampling(LENGTH))
    return [{"prompt": q, "completion": a.text} for q, a in zip(questions, answers, strict=True)]


def test_right_and_wrong_answers_are_counted_by_group(folder, rows, tmp_path, capsys):
    tasks = ["a", "a", "b", "b", "b", "c"]
    data = [{**row, "task": task} for row, task in zip(rows, tasks, strict=True)]
    data[1] = {**data[1], "completion": "no such answer"}
    data[5] = {**data[5], "completion": data[5]["completion"] + "."}
    data[2] = {**data[2], "completion": f"\n {data[2]['completion']} "}  # white space around is forgiven
    path, out = write_jsonl(tmp_path / "d.jsonl", data), tmp_path / "out" / "s.json"
    assert command.main([folder, "--data", path, "--json", str(out), "--max-new-tokens", str(LENGTH)]) == 0
    report = json.loads(out.read_text())
    file = report["files"][path]
    assert {group: (score["total"], score["count"]) for group, score in file["groups"].items()} == {
        "a": (1, 2),
        "b": (3, 3),
        "c": (0, 1),
    }
    assert report["overall"] == file["overall"] == {"exact_match": 4 / 6, "total": 4, "count": 6}
    assert [wrong["where"] for wrong in file["wrong"]] == [f"{path}:2", f"{path}:6"]
    assert file["wrong"][0]["answer"] == rows[1]["completion"] and file["wrong"][0]["expected"] == "no such answer"
    printed = capsys.readouterr().out
    assert "66.7%" in printed and "100.0%" in printed and f"wrong ({path}:2)" in printed


def test_several_files_are_scored_apart_and_together(model, rows, tmp_path):
    wrong = [{**row, "completion": "nothing of the kind"} for row in rows[:2]]
    paths = [write_jsonl(tmp_path / "right.jsonl", rows), write_jsonl(tmp_path / "wrong.jsonl", wrong)]
    report = evaluate(model, [read_cases(path) for path in paths], max_new_tokens=LENGTH)
    assert [report["files"][path]["overall"]["exact_match"] for path in paths] == [1.0, 0.0]
    assert report["overall"]["exact_match"] == 6 / 8
    assert not report["files"][paths[0]]["groups"]


def test_the_question_is_all_before_the_last_answer(tmp_path):
    turns = [("system", "S"), ("user", "1"), ("assistant", "one"), ("user", "2"), ("assistant", "two"), ("user", "3")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns], "kind": "x"}
    cases = read_cases(write_jsonl(tmp_path / "m.jsonl", [row]), by="kind").cases
    assert [(m.role, m.content) for m in cases[0].messages] == turns[:4]
    assert (cases[0].reference, cases[0].group) == ("two", "x")


def test_rows_without_a_question_are_skipped_and_counted(model, rows, tmp_path):
    data = [rows[0], {"prompt": "x", "completion": ""}, {"prompt": "the rain " * 200, "completion": "y"}]
    cases = read_cases(write_jsonl(tmp_path / "d.jsonl", data))
    assert cases.skipped == {"empty answer": 1} and len(cases.cases) == 2
    report = evaluate(model, [cases], max_new_tokens=LENGTH)
    assert report["overall"]["count"] == 2 and report["overall"]["total"] == 1
    assert report["files"][cases.path]["stopped"]["prompt too long"] == 1


def test_a_limit_takes_rows_from_the_whole_file(tmp_path):
    data = [{"prompt": str(n), "completion": "x"} for n in range(10)]
    cases = read_cases(write_jsonl(tmp_path / "d.jsonl", data), limit=5).cases
    assert [case.messages[0].content for case in cases] == ["0", "2", "4", "6", "8"]


def test_bad_data_is_told_with_its_line(folder, tmp_path, capsys):
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "x", "completion": "y"}] * 2)
    with open(path, "a") as file:
        file.write('{"prompt": "x", "completion": 3}\n')
    assert command.main([folder, "--data", path]) == 1
    assert f"{path}:3: completion is the number 3; expected text" in capsys.readouterr().err
    assert command.main([folder, "--data", path, "--by", "kind"]) == 1
    assert "no column 'kind' to group by; found columns prompt, completion" in capsys.readouterr().err
    assert command.main([folder, "--data", path, "--columns", "prompt"]) == 2
    assert "expected FIELD=COLUMN" in capsys.readouterr().err
    text = write_jsonl(tmp_path / "t.jsonl", [{"text": "once"}])
    assert command.main([folder, "--data", text]) == 1
    assert "found no question with an answer" in capsys.readouterr().err


def test_scores_are_added_before_they_are_divided():
    assert (Score(1, 2) + Score(3, 3)).as_dict("m") == {"m": 0.8, "total": 4, "count": 5}
    assert exact_match(" a b\n", "a b") == 1 and exact_match("a  b", "a b") == 0 and exact_match("A b", "a b") == 0


def test_a_question_keeps_the_tools_that_it_may_call(tmp_path):
    tool = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": turns, "tools": [tool]}) + "\n")
    (case,) = read_cases(str(file)).cases
    assert [tool["function"]["name"] for tool in case.tools] == ["add"]
