"""The command: exit codes, what it writes, and that it reads what training reads."""

import json
import os
import pathlib
import subprocess
import sys

import audits
import gcs_server
import numpy as np
import planted
import pytest
import t5_folders
import tiny_runs

from jaxtune.audit.__main__ import main
from jaxtune.data import lengths, loader
from jaxtune.data.examples import RowReader
from jaxtune.decode import decode
from jaxtune.inputs import open_reading
from jaxtune.train import main as train_main


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return audits.write_base(tmp_path_factory.mktemp("base") / "base")


def kinds_of_rows(count, start=0):
    """Clean rows of several kinds, with which an audit finds nothing wrong."""
    asks = ("Write about", "Classify", "Translate", "Why not", "Summarize", "Calculate")
    return [
        {"instruction": f"{asks[i % 6]} {planted.question(i).removeprefix('Where is')}", "output": planted.answer(i)}
        for i in range(start, start + count)
    ]


@pytest.fixture
def data(tmp_path):
    return tiny_runs.write_rows(tmp_path / "rows.jsonl", kinds_of_rows(60))


def words(data, *more):
    return [f"data.train.0.path={data}", "data.template=alpaca", "train.epochs=1", "train.batch_rows=8", *more]


def test_clean_data_has_nothing_to_warn_of_even_when_strict(base, data, tmp_path, capsys):
    code, document = audits.run(base, tmp_path / "out", *words(data), "--strict")
    assert code == 0 and document["findings"] == [] and document["flagged_rows"] == [] == document["lost_rows"]
    printed = capsys.readouterr().out
    assert "60 rows read -> 60 parsed" in printed and "nothing to warn of" in printed
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["audit.html", "audit.json"]


def test_a_warning_fails_only_when_strict(base, tmp_path):
    rows = tiny_runs.write_rows(
        tmp_path / "few.jsonl", [{"instruction": f"Say {i}", "output": "Yes."} for i in range(9)]
    )
    assert audits.run(base, tmp_path / "a", *words(rows))[0] == 0
    code, document = audits.run(base, tmp_path / "b", *words(rows), "--strict")
    assert code == 1 and "very short answers" in {finding["code"] for finding in document["findings"]}


@pytest.mark.parametrize(
    "bad",
    [
        {"instruction": "Say", "output": 5},
        '{"instruction": "Say", "output": "it',
    ],
)
@pytest.mark.parametrize("rule", ["error", "skip", "quarantine"])
def test_the_audit_stops_where_training_stops_and_reads_to_the_end(base, tmp_path, capsys, bad, rule):
    rows = kinds_of_rows(40)
    rows[7] = rows[31] = bad
    path = tiny_runs.write_rows(tmp_path / "rows.jsonl", rows)
    code, document = audits.run(base, tmp_path / "out", *words(path, f"data.on_bad_row={rule}"))
    assert [audits.line(row["where"]) for row in document["lost_rows"]] == [8, 32]
    errors = [finding["text"] for finding in document["findings"] if finding["level"] == "error"]
    assert code == (rule == "error") == len(errors)
    assert not (tmp_path / "out" / "quarantine.jsonl").exists()
    if rule == "error":
        capsys.readouterr()
        run = [f"model.path={base}", f"output={tmp_path / 'run'}", *words(path), "train.steps=1"]
        assert train_main(run) == 1 and errors[0] in capsys.readouterr().err


def test_audited_rows_are_exactly_those_that_training_draws(base, tmp_path):
    rows = kinds_of_rows(40)
    rows[3] = rows[2]
    rows[5] = {"instruction": "Say it", "output": ""}
    rows[9] = {"instruction": "Say it", "output": "too few"}
    path = tiny_runs.write_rows(tmp_path / "rows.jsonl", rows)
    more = words(path, "data.dedup=exact", "data.quality.response_words=[5,null]")
    _, document = audits.run(base, tmp_path / "out", *more)
    reading, config = open_reading(
        decode([f"model.path={base}", f"output={tmp_path / 'run'}", *more]), needs_weights=False
    )
    stream = loader.open_stream(config, **reading.options)
    drawn = {e.row + 1 for batch, _ in stream.batches(stream.initial_state()) for row in batch.examples for e in row}
    assert (
        drawn
        == set(range(1, 41)) - {audits.line(row["where"]) for row in document["lost_rows"]}
        == set(range(1, 41)) - {4, 6, 10}
    )
    assert document["packing"]["steps"] == stream.steps_per_run
    assert document["packing"]["fill"] == list(stream.fill)
    assert document["funnel"]["total"]["tokens"] == stream.funnel.total("tokens")


def test_training_does_not_read_again_what_was_audited(base, data, tmp_path, monkeypatch):
    audits.run(base, tmp_path / "out", *words(data))
    reading, config = open_reading(
        decode([f"model.path={base}", f"output={tmp_path / 'run'}", *words(data)]), needs_weights=False
    )
    read = []
    original = RowReader.examine
    monkeypatch.setattr(
        RowReader, "examine", lambda self, rows, epochs=None: read.append(len(rows)) or original(self, rows, epochs)
    )
    loader.open_stream(config, **reading.options)
    assert sum(read) <= 10, "but for the few rows that choose the window"


def test_two_processes_find_what_one_finds(base, tmp_path):
    rows = kinds_of_rows(300) * 16
    rows[4100] = "{"
    path = tiny_runs.write_rows(tmp_path / "rows.jsonl", rows)
    documents = []
    for workers in ("1", "2"):
        patched = pytest.MonkeyPatch()
        patched.setenv("JAXTUNE_CACHE", str(tmp_path / f"cache{workers}"))
        arguments = ("--skip", "near", "--workers", workers)
        documents.append(audits.run(base, tmp_path / f"out{workers}", *words(path), *arguments)[1])
        patched.undo()
    one, two = ({key: value for key, value in d.items() if key != "seconds"} for d in documents)
    assert json.dumps(one) == json.dumps(two) and one["duplicates"]["exact"]["count"] == 15 * 300 - 1


def test_rows_worded_anew_in_each_epoch_are_audited_as_they_are_drawn(base, tmp_path):
    rows = [{"q": planted.question(i), "a": planted.answer(i)} for i in range(20)]
    template = {"task": "*", "kind": "zero-shot", "target": "{a}"}
    source = {
        "path": str(tiny_runs.write_rows(tmp_path / "rows.jsonl", rows)),
        "templates": [{**template, "name": "a", "input": "{q}"}, {**template, "name": "b", "input": "Answer: {q}"}],
    }
    (tmp_path / "c.yaml").write_text(json.dumps({"data": {"train": [source], "template": "plain"}}))
    code, document = audits.run(base, tmp_path / "out", str(tmp_path / "c.yaml"), "train.epochs=2", "--skip", "near")
    assert code == 0 and document["funnel"]["total"]["rows"] == 40, "each row in each of two epochs"
    assert document["duplicates"]["exact"]["count"] == 0 == document["statistics"]["duplicate_instructions"]
    page = (tmp_path / "out" / "audit.html").read_text()
    assert '"epoch":1' in page


def test_encoder_decoders_are_audited_too(tmp_path):
    base = t5_folders.tiny_base(tmp_path / "t5")
    data = tiny_runs.write_rows(tmp_path / "rows.jsonl", kinds_of_rows(30))
    more = (f"data.train.0.path={data}", "data.max_length=256", "data.encoder_length=256", "train.epochs=1")
    code, document = audits.run(base, tmp_path / "out", *more)
    assert code == 0 and len(document["packing"]["row_length"]) == len(document["packing"]["fill"]) == 2
    page = (tmp_path / "out" / "audit.html").read_text()
    assert '"side":"encoder"' in page and '"side":"decoder"' in page


def test_rows_of_the_evaluation_in_training_are_told(base, tmp_path):
    train, held = kinds_of_rows(30), kinds_of_rows(10, start=100)
    train[4], train[9] = held[3], {**held[5], "output": planted.answer(900)}
    paths = tiny_runs.write_rows(tmp_path / "a.jsonl", train), tiny_runs.write_rows(tmp_path / "b.jsonl", held)
    _, document = audits.run(base, tmp_path / "out", *words(paths[0], f"data.eval.0.path={paths[1]}"))
    overlap = document["evaluation"]["overlap"]
    assert [audits.line(where) for where in overlap["rows"]["rows"]] == [5]
    assert [audits.line(where) for where in overlap["instructions"]["rows"]] == [5, 10]


def test_a_template_that_never_trains_its_stop_is_an_error(base, data, tmp_path):
    code, document = audits.run(
        base, tmp_path / "out", *words(data, "data.max_length=330", "data.overlong=truncate_right")
    )
    errors = [finding["text"] for finding in document["findings"] if finding["level"] == "error"]
    assert code == 1 and "the end-of-turn token is trained in 0 of" in errors[0]


def test_the_facts_alone_can_be_printed(base, data, tmp_path, capsys):
    assert main([f"model.path={base}", f"output={tmp_path / 'o'}", *words(data), "--json", "-", "--workers", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == 1
    assert [file.name for file in (tmp_path / "o").iterdir()] == ["audit.html"]


@pytest.mark.parametrize(
    ("more", "code", "told"),
    [
        (("data.trian.0.path=x",), 2, "data.trian"),
        (("--workers", "0"), 2, "--workers: found 0; expected at least 1"),
        (("--examples", "-1"), 2, "--examples: found -1"),
        (("data.quality.min=2",), 2, "data.quality.min"),
        (("data.quality.drop=['(']",), 2, "is no regular expression"),
        (("data.quality.languages=[english]",), 2, "found 'english'; expected a code of two letters"),
        (("data.quality.response_words=[9,3]",), 2, "expected [least, most]"),
        (("data.train.0.path=nowhere.jsonl",), 1, "nowhere.jsonl"),
        (("data.verdicts=nowhere.json",), 1, "data.verdicts: nowhere.json cannot be read"),
        (("model.path=nowhere",), 1, "nowhere"),
        (("data.quality.custom=nomodule:f",), 1, "nomodule"),
    ],
)
def test_bad_input_is_told_in_words(base, data, tmp_path, capsys, more, code, told):
    assert main([f"model.path={base}", f"output={tmp_path / 'o'}", *words(data), *more]) == code
    printed = capsys.readouterr().err
    assert told in printed and "Traceback" not in printed


def test_an_output_that_cannot_be_written_is_told_before_the_work(base, data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([f"model.path={base}", f"output={tmp_path / 'file'}", *words(data)]) == 1
    assert "file" in capsys.readouterr().err


def test_portions_joined_are_the_table_of_the_whole(base, data, tmp_path):
    reading, config = open_reading(
        decode([f"model.path={base}", f"output={tmp_path / 'run'}", *words(data)]), needs_weights=False
    )
    reader = loader.open_stream(config, **reading.options).maker.readers[0]
    whole = lengths.Wanted(np.arange(60))
    tables = [
        lengths.tabulate(reader, part, reader.read(*lengths.numbers(part)))
        for part in (lengths.portion(whole, 0, 25), lengths.portion(whole, 25, 60))
    ]
    joined = lengths.joined(reader, whole, tables)
    [expected] = lengths.measure([reader], [whole], cache_dir=str(tmp_path / "cache"))
    assert all(np.array_equal(joined.columns[key], expected.columns[key]) for key in expected.columns)
    assert np.array_equal(joined.lengths, expected.lengths) and joined.messages == expected.messages


def test_a_run_of_so_many_steps_is_told_how_full_an_epochs_rows_are(base, data, tmp_path):
    by_epochs = audits.run(base, tmp_path / "a", *words(data))[1]["packing"]
    by_steps = audits.run(base, tmp_path / "b", *words(data, "train.steps=7"))[1]["packing"]
    assert by_steps["steps"] == 7 and by_epochs["steps"] != 7
    assert by_steps["fill"] == by_epochs["fill"] and by_steps["rows"] == by_epochs["rows"]


@pytest.mark.long
def test_an_output_may_be_a_bucket(base, data, tmp_path):
    with gcs_server.serve() as (objects, variables):
        out = f"gs://{gcs_server.BUCKET}/runs/mine"
        arguments = [f"model.path={base}", f"output={out}", *words(data), "--workers", "1"]
        done = subprocess.run(
            [sys.executable, "-m", "jaxtune.audit", *arguments],
            env={**os.environ, **variables, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        stored = {name: objects.by_name[name].content for name in ("runs/mine/audit.json", "runs/mine/audit.html")}
    assert json.loads(stored["runs/mine/audit.json"])["version"] == 1
    assert stored["runs/mine/audit.html"].startswith(b"<!DOCTYPE html>")
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"], "and nothing here"


def test_a_device_or_a_link_is_written_to_and_stays_what_it_is(base, data, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE)
    arguments = [f"model.path={base}", f"output={tmp_path / 'o'}", *words(data), "--workers", "1"]
    assert main([*arguments, "--json", str(tmp_path / "pipe")]) == 0
    assert json.loads(reader.communicate()[0])["version"] == 1 and (tmp_path / "pipe").is_fifo()
    assert main([*arguments, "--json", str(tmp_path / "link.json")]) == 0
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "real.json").read_text())["version"] == 1


def test_the_first_row_of_a_defect_is_the_first_in_the_file(base, tmp_path):
    rows = kinds_of_rows(20)
    rows[6]["output"] += " \x07 &amp;"
    rows[2]["output"] += " &amp;"
    path = tiny_runs.write_rows(tmp_path / "rows.jsonl", rows)
    _, document = audits.run(base, tmp_path / "out", *words(path))
    told = [finding["text"] for finding in document["findings"] if finding["code"] == "HTML entities"]
    assert told == [f"HTML entities in 2 rows, the first at {path}:3"]
    assert [audits.line(row["where"]) for row in document["flagged_rows"]] == [3, 7]


def test_the_audit_leaves_nothing_in_the_cache_that_training_would_take_for_more(base, tmp_path):
    """Some rows are held out and not read: which are near duplicates is still found of all."""
    rows = kinds_of_rows(40)
    near = [{**row, "output": row["output"].replace("That opens", "It opens")} for row in rows]
    path = tiny_runs.write_rows(tmp_path / "rows.jsonl", rows + near)
    counts = []
    for cache, audited in (("a", True), ("b", False)):
        patched = pytest.MonkeyPatch()
        patched.setenv("JAXTUNE_CACHE", str(tmp_path / cache))
        more = words(path, "data.eval_fraction=0.3")
        if audited:
            audits.run(base, tmp_path / "out", *more)
        given = [f"model.path={base}", f"output={tmp_path / 'run'}", *more, "data.dedup=near"]
        reading, config = open_reading(decode(given), needs_weights=False)
        stream = loader.open_stream(config, **reading.options)
        counts.append((stream.funnel.sources[0].lost["near duplicate"].rows, stream.fingerprint))
        patched.undo()
    assert counts[0] == counts[1]


def test_rows_of_the_evaluation_in_training_are_a_warning(base, data, tmp_path):
    code, document = audits.run(base, tmp_path / "out", *words(data, f"data.eval.0.path={data}"), "--strict")
    told = [finding["text"] for finding in document["findings"] if finding["level"] == "warning"]
    assert code == 1 and told == [f"60 training rows stand in the evaluation too, the first at {data}:1"]


def test_a_file_that_begins_with_rows_that_cannot_be_read_is_audited_too(base, tmp_path):
    path = tiny_runs.write_rows(tmp_path / "rows.jsonl", ["{bad"] * 300 + kinds_of_rows(20))
    code, document = audits.run(base, tmp_path / "out", *words(path))
    funnel = document["funnel"]["total"]
    assert code == 1 and (funnel["rows"], funnel["stages"]["parsed"], funnel["kept"]) == (320, 20, 20)
    assert [audits.line(row["where"]) for row in document["lost_rows"]] == list(range(1, 301))
    assert audits.run(base, tmp_path / "skip", *words(path, "data.on_bad_row=skip"))[0] == 0
