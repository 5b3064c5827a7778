"""Tab-separated, comma-separated, Arrow and ArrayRecord files and NaturalInstructions tasks, row by row."""

import gzip
import json
import pickle

import pyarrow as pa
import pyarrow.feather
import pytest

from jaxtune.config_data import SourceConfig
from jaxtune.data.files import sources, spooling
from jaxtune.data.layouts.formats import find_layout
from jaxtune.data.records import RowError

ROWS = [{"text": f"row {i} 漢字", "n": i, "deep": {"a": [i, None]}} for i in range(10_000)]


def open_path(path, **keys):
    return sources.open_source(SourceConfig(path=str(path), **keys))


def array_record(path, records):
    array_record_module = pytest.importorskip("array_record.python.array_record_module")
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def write_stream(path):
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "rows.array_record": lambda path: array_record(path, [json.dumps(row).encode() for row in ROWS]),
    "rows.arrayrecord": lambda path: array_record(path, [json.dumps(row).encode() for row in ROWS]),
    "rows.feather": lambda path: pyarrow.feather.write_feather(pa.Table.from_pylist(ROWS), path, compression="lz4"),
    "rows.arrow": write_stream,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_row_is_there_at_random_and_travels(name, tmp_path):
    path = tmp_path / name
    WRITERS[name](path)
    first = open_path(path)
    for source in (first, open_path(path), pickle.loads(pickle.dumps(first))):
        assert len(source) == len(ROWS)
        assert [source.row(i) for i in (9_999, 0, 4_096, 4_095)] == [ROWS[i] for i in (9_999, 0, 4_096, 4_095)]
        assert source.fingerprint == first.fingerprint and json.loads(source.raw(3)) == ROWS[3]
        assert source.where(3).startswith(str(path)) and source.where(3).endswith(("row 4", "record 4"))


def test_records_that_are_no_json_objects_are_told(tmp_path):
    array_record(tmp_path / "a.array_record", [b'{"a": 1}', b"\n\x05\n\x03abc", b"[1]"])
    source = open_path(tmp_path / "a.array_record")
    assert source.row(0) == {"a": 1}
    with pytest.raises(RowError, match=r"the record begins .*expected the bytes of a JSON object.*tf.Example"):
        source.row(1)
    with pytest.raises(RowError, match="found a JSON list; expected an object"):
        source.row(2)
    for name, told in (("b.array_record", "not a readable ArrayRecord file"), ("b.arrow", "not a readable Arrow file")):
        (tmp_path / name).write_bytes(b"x" * 100)
        with pytest.raises(ValueError, match=told):
            open_path(tmp_path / name)


@pytest.mark.parametrize("packed", [False, True])
def test_tabs_with_a_header_keep_every_character(packed, tmp_path):
    data = b'prompt\tcompletion\na "quoted\\nabla\tb\n\nc\td\r\n'
    path = tmp_path / ("a.tsv.gz" if packed else "a.tsv")
    path.write_bytes(gzip.compress(data) if packed else data)
    source = pickle.loads(pickle.dumps(open_path(path)))
    assert len(source) == 2 and source.row(0) == {"prompt": 'a "quoted\\nabla', "completion": "b"}
    assert source.row(1) == {"prompt": "c", "completion": "d"} and source.where(1) == f"{path}:4"
    assert find_layout([source.row(0)]).format == "prompt_completion"


def test_three_columns_without_a_header_are_a_chain_of_thought(tmp_path):
    path = tmp_path / "cot.tsv"
    path.write_text("Is it?\\nYes or no\tyes\tBecause so.\nWhy?\tno\n")
    source = open_path(path)
    assert source.row(0) == {"question": "Is it?\nYes or no", "answer": "yes", "chain_of_thought": "Because so."}
    with pytest.raises(RowError, match="found 2 columns; expected 3: question, answer, chain_of_thought"):
        source.row(1)
    assert source.where(1) == f"{path}:2"
    (tmp_path / "two.tsv").write_text("What is it?\tA thing\n")
    with pytest.raises(
        ValueError, match=r"two.tsv: found 2 columns and no header; expected a first line of column names"
    ):
        open_path(tmp_path / "two.tsv")
    (tmp_path / "bad.tsv").write_bytes(b"prompt\tcompletion\na\t\xff\n")
    with pytest.raises(RowError, match="byte 3 of the line is 0xff; expected UTF-8 text"):
        open_path(tmp_path / "bad.tsv").row(0)


def test_csv_rows_keep_quoted_line_breaks_and_the_line_they_began_on(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufeffprompt,completion\n"a, ""b""\nc",1\n\nd,2\n', encoding="utf-8")
    source = open_path(path)
    assert [source.row(i) for i in range(2)] == [
        {"prompt": 'a, "b"\nc', "completion": "1"},
        {"prompt": "d", "completion": "2"},
    ]
    assert [source.where(i) for i in range(2)] == [f"{path}:2", f"{path}:5"]
    for text, told in (
        ("a,a\n1,2\n", r"b.csv:1: found the header \['a', 'a'\]; expected names, each once"),
        ('a,b\n"1,2\n', r"b.csv:2: unexpected end of data"),
    ):
        (tmp_path / "b.csv").write_text(text)
        with pytest.raises(ValueError, match=told):
            open_path(tmp_path / "b.csv")


def test_a_row_that_does_not_fit_the_header_is_an_error_of_that_row(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('a,b\n1,2\n"x, y",2,3\n4\n5,6\n')
    source = open_path(path)
    assert len(source) == 4 and source.row(3) == {"a": "5", "b": "6"}
    for i, cells in ((1, 3), (2, 1)):
        with pytest.raises(RowError, match=f"found {cells} columns; expected 2: a, b") as found:
            source.row(i)
        assert found.value.reason == "wrong number of columns"
    assert source.where(1) == f"{path}:3" and source.raw(1) == '"x, y",2,3'


def test_a_first_line_that_does_not_fit_the_others_is_an_error_of_that_row(tmp_path):
    path = tmp_path / "cot.tsv"
    path.write_bytes(b"What is it?\tno\n" + b"Why is it?\tyes\tSo it is.\n" * 3)
    source = open_path(path)
    assert len(source) == 4 and source.row(1)["answer"] == "yes"
    with pytest.raises(RowError, match="found 2 columns; expected 3"):
        source.row(0)
    path.write_bytes(b"\xff?\tno\tx\n" + b"Why is it?\tyes\tSo it is.\n" * 3)
    with pytest.raises(RowError, match="expected UTF-8 text"):
        open_path(path).row(0)


TASK = {
    "Contributors": ["x"],
    "Source": ["quoref"],
    "Categories": ["Question Generation"],
    "Definition": ["Ask a question."],
    "Positive Examples": [{"input": "p", "output": "q", "explanation": "e"}],
    "Negative Examples": [],
    "Instances": [
        {"id": "t-1", "input": "Passage 1", "output": ["One?", "Two?"]},
        {"id": "t-2", "input": "é", "output": ["3"]},
    ],
}


@pytest.mark.parametrize("indent", [4, None])
def test_a_natural_instructions_task_has_a_row_for_each_instance(indent, tmp_path):
    path = tmp_path / "task001_quoref.json"
    path.write_text(json.dumps(TASK, indent=indent))
    source = pickle.loads(pickle.dumps(open_path(path)))
    assert len(source) == 2 and source.where(1) == f"{path}:instance 2"
    row = source.row(0)
    assert row["task"] == "task001_quoref" and row["positive_examples"] == TASK["Positive Examples"]
    layout = find_layout([row])
    assert layout.format == "natural_instructions" and layout.fields(row)["output"] == ["One?", "Two?"]
    (conversation,) = layout.convert(source.row(0))
    assert [m.content for m in conversation.messages] == ["Ask a question.\n\nPassage 1", "One?"]
    made = list((tmp_path.parent / "jaxtune-cache" / "sources").glob("*.jsonl"))
    assert any("Passage 1" in f.read_text() and "Ask a question" not in f.read_text() for f in made)


def test_json_lines_that_look_like_a_task_are_json_lines(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(
        '{"Definition": "Add", "input": "1", "output": "2"}\n{"Definition": "Add", "input": "2", "output": "3"}\n'
    )
    assert len(open_path(path)) == 2
    path.write_text('{"Definition": "Add",\n')
    with pytest.raises(RowError, match="expected one complete JSON object a line"):
        open_path(path).row(0)
    path.write_text(json.dumps({**TASK, "Instances": {}}))
    with pytest.raises(ValueError, match=r"rows.json: Instances is no list"):
        open_path(path)
    assert spooling.may_be_task(str(path))
