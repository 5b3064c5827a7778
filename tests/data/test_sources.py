"""Rows by index from every kind of file, and errors that name the line."""

import gzip
import json
import pickle

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxtune import hub
from jaxtune.config_data import SourceConfig
from jaxtune.data.files import line_index, sources
from jaxtune.data.records import RowError

ROWS = [{"text": f"row {i} 漢字\u2028 {{}}", "n": i, "deep": {"a": [i, None]}} for i in range(50)]


def open_path(path, **keys):
    return sources.open_source(SourceConfig(path=str(path), **keys))


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.fixture(params=["jsonl", "no last newline", "jsonl.gz", "json", "indented json", "json.gz", "parquet", "url"])
def file(request, tmp_path):
    kind = request.param
    path = tmp_path / ("rows." + {"no last newline": "jsonl", "indented json": "json", "url": "jsonl"}.get(kind, kind))
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    else:
        data = {"json": json.dumps(ROWS).encode(), "indented json": json.dumps(ROWS, indent=2).encode()}.get(kind)
        data = json.dumps(ROWS).encode() if kind == "json.gz" else data or as_lines(ROWS)
        data = data.rstrip(b"\n") if kind == "no last newline" else data
        path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    return f"file://{path}" if kind == "url" else str(path)


def test_every_file_kind_gives_every_row_at_random(file):
    source = open_path(file)
    assert len(source) == 50
    for _ in range(2):  # the second time from the cache
        source = pickle.loads(pickle.dumps(source))
        assert [source.row(i) for i in reversed(range(50))] == ROWS[::-1]
        assert source.where(3).startswith(file) and json.loads(source.raw(3)) == ROWS[3]
        again = open_path(file)
        assert again.fingerprint == source.fingerprint
        source = again


def test_json_array_rows_are_told_by_their_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n {"a": 1},\n\n {"a": 2}, {"a":\n3}\n]\n')
    source = open_path(path)
    assert [source.where(i).rsplit(":", 1)[1] for i in range(3)] == ["2", "4", "4"]
    path.write_text('[\n {"a": 1},\n {"a" 2}\n]')
    with pytest.raises(ValueError, match=rf"{path}:3: column 7: .*expected a JSON array of objects"):
        open_path(path)


def test_blank_lines_bom_and_crlf(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \n{"a": 2}\n\t\n {"a": 3}\n\n')
    source = open_path(path)
    assert [source.row(i)["a"] for i in range(len(source))] == [1, 2, 3]
    assert [source.where(i) for i in range(3)] == [f"{path}:1", f"{path}:4", f"{path}:6"]


def test_lines_across_the_search_chunks(tmp_path, monkeypatch):
    for size in (1, 7, 64, 4096):
        monkeypatch.setattr(line_index, "CHUNK", size)
        path = tmp_path / f"{size}.jsonl"
        path.write_bytes(as_lines(ROWS) + b"\n\n" + as_lines(ROWS[:2]))
        source = open_path(path)
        assert [source.row(i) for i in range(len(source))] == ROWS + ROWS[:2]
        assert source.where(50) == f"{path}:53"


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (b'{"a": 1,', "invalid JSON", r"column 9: .*expected one complete JSON object a line"),
        (b'{"a": nul}', "invalid JSON", r"column 7: Expecting value, near '\{\"a\": nul\}'"),
        (b'{"a": "\xff"}', "not UTF-8", r"byte 8 of the line is 0xff; expected UTF-8 text"),
        (rb'{"a": "x \ud83d y"}', "not Unicode", r"found \\ud83d, half of a surrogate pair, after '.*x '"),
        (b"[1, 2]", "not an object", r"found a JSON list; expected an object"),
    ],
)
def test_bad_lines(tmp_path, line, reason, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 0}\n' + line + b'\n{"a": 2}\n')
    source = open_path(path)
    with pytest.raises(RowError, match=message) as error:
        source.row(1)
    str(error.value).encode()
    assert error.value.reason == reason and source.where(1) == f"{path}:2"
    assert source.row(2) == {"a": 2}


def test_several_files_are_one_source(tmp_path):
    for name, part in (("b.jsonl", ROWS[20:]), ("a.jsonl", ROWS[:20])):
        (tmp_path / name).write_bytes(as_lines(part))
    for path in (tmp_path, tmp_path / "*.jsonl"):
        source = open_path(path)
        assert [source.row(i) for i in range(50)] == ROWS
        assert source.where(20) == f"{tmp_path / 'b.jsonl'}:1"


def test_changed_bytes_change_the_fingerprint(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_lines(ROWS))
    first = open_path(path).fingerprint
    path.write_bytes(as_lines(ROWS).replace(b"row 7", b"row 8"))
    assert open_path(path).fingerprint != first


def test_saved_datasets(tmp_path):
    both = datasets.DatasetDict({k: datasets.Dataset.from_list(r) for k, r in (("train", ROWS), ("test", ROWS[:3]))})
    both.save_to_disk(str(tmp_path / "both"))
    both["test"].save_to_disk(str(tmp_path / "one"))
    assert open_path(tmp_path / "both").row(7) == ROWS[7]
    source = open_path(tmp_path / "both", split="test")
    assert len(source) == 3 and source.where(2).endswith("both[test]:row 3")
    assert len(open_path(tmp_path / "one")) == 3
    with pytest.raises(ValueError, match=r"split 'valid' is not there; found train, test"):
        open_path(tmp_path / "both", split="valid")


def test_any_changed_row_changes_a_saved_datasets_fingerprint(tmp_path):
    def fingerprint(name, rows):
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / name))
        (tmp_path / "now").unlink(missing_ok=True)
        (tmp_path / "now").symlink_to(tmp_path / name)
        return open_path(tmp_path / "now").fingerprint

    rows = [{"text": f"row {i}"} for i in range(5000)]
    first = fingerprint("first", rows)
    assert fingerprint("same", rows) == first
    for changed in (1, 4097, 4999):
        other = [{"text": "other"} if i == changed else row for i, row in enumerate(rows)]
        assert fingerprint(f"other{changed}", other) != first


def test_paths_that_are_not_there(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(as_lines(ROWS))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no such file or folder \(nearest: .*train\.jsonl\); expected a file ending"):
        open_path(tmp_path / "trian.jsonl")
    with pytest.raises(ValueError, match=r"no file matches this pattern"):
        open_path(tmp_path / "*.parquet")
    with pytest.raises(ValueError, match=r"found a folder without data files"):
        open_path(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"found split, but plain files have none"):
        open_path(tmp_path / "train.jsonl", split="test")
    with pytest.raises(ValueError, match=r"dataset could not be had from the hub"):
        open_path("nobody/nothing-here")
    (tmp_path / "a.xml").write_text("x")
    with pytest.raises(ValueError, match=r"a\.xml: found a file of unknown kind"):
        open_path(tmp_path / "a.xml")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(as_lines(ROWS))[:-20])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: not a complete gzip file"):
        open_path(tmp_path / "a.jsonl.gz")
    packed = bytearray(gzip.compress(as_lines(ROWS)))
    packed[10:14] = b"\xff" * 4
    (tmp_path / "b.jsonl.gz").write_bytes(packed)
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz: not a complete gzip file .*invalid"):
        open_path(tmp_path / "b.jsonl.gz")
    (tmp_path / "latin.json").write_bytes('[\n {"a": "caf\u00e9"}]'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.json:2: byte 12 of the line is 0xe9; expected UTF-8 text"):
        open_path(tmp_path / "latin.json")


def test_model_folders(tmp_path, monkeypatch):
    assert hub.resolve_folder(str(tmp_path)) == str(tmp_path)
    assert hub.resolve_folder("gs://bucket/model/") == "gs://bucket/model"
    (tmp_path / "llama").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"no such folder \(nearest: .*llama\), and it does not read as a hub id"):
        hub.resolve_folder(str(tmp_path / "lama"))
    with pytest.raises(ValueError, match=r"found a file; expected a model folder"):
        hub.resolve_folder(str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"the model could not be had from the hub .*give a local folder instead"):
        hub.resolve_folder("nobody/nothing-here")
    with pytest.raises(ValueError, match=r"builtin:nothing: no such folder in the package"):
        hub.resolve_folder("builtin:nothing")


@pytest.mark.parametrize("status", [401, 403])
def test_refused_by_the_hub_names_token_and_licence_page(status, monkeypatch):
    class Refused(Exception):
        response = type("Response", (), {"status_code": status})

    def refuse(*_, **__):
        raise Refused("no")

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", refuse)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ValueError, match=rf"\({status}\): accept its licence at https://huggingface.co/a/b .*HF_TOKEN"):
        hub.resolve_folder("a/b")


def test_a_store_out_of_reach_is_not_an_empty_one(monkeypatch):
    """data.missing=skip leaves out what is not there, never what cannot be asked for."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="the store cannot be read") as caught:
        sources.open_source(SourceConfig(path="hf://datasets/nobody/nothing/rows.jsonl"))
    assert not isinstance(caught.value, sources.MissingSource)
