"""Rows kept as they were rendered: the same windows bit for bit, each row rendered once, and nothing left behind."""

import collections
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import make_config, pairs
from prepared_folders import TEMPLATES, serially

from jaxtune.data import lengths, loader, measuring
from jaxtune.data.ahead import pooling, preparing, rendered
from jaxtune.data.ahead.prepared import Folder
from jaxtune.data.examples import RowReader


@pytest.fixture
def open_(byte_tokenizer, tmp_path):
    def open_(config, cache, **keys):
        options = {"tokenizer": byte_tokenizer, "max_length": 64, "cache_dir": str(tmp_path / cache), **keys}
        return loader.open_stream(config, **options)

    return open_


@pytest.fixture
def pool(tmp_path):
    with pooling.Pool(2, cache_dir=str(tmp_path / "kept")) as pool:
        yield pool


def shards_of(config, stream, path, make=serially):
    """name -> bytes of everything that is prepared of a stream."""
    folder = Folder(str(path))
    preparing.prepare(config, stream, folder, make, say=str, progress=lambda done, total: None)
    return {name: pathlib.Path(folder.file(name)).read_bytes() for name in folder.names()}


def conversations(count):
    """Rows of several turns with weights of their own, some long, one of several kilobytes."""
    rows = []
    for i in range(count):
        turns = [
            ("user", f"ask {i} é"),
            ("assistant", f"say {i}"),
            ("user", "more?" * (i % 5)),
            ("assistant", "so " * i),
        ]
        messages = [{"role": role, "content": text} for role, text in turns]
        messages[1]["weight"] = [0, 1][i % 2]
        rows.append({"messages": messages})
    return rows


def with_bad(rows):
    return [*rows[:7], {"prompt": 3}, *rows[7:], {"prompt": "p", "completion": ""}]


CASES = [
    ({}, {}, pairs(60)),
    ({"packing": False, "train_on": "all"}, {}, pairs(60)),
    ({"overlong": "split"}, {}, conversations(40)),
    ({"overlong": "truncate_turns", "train_on": "last"}, {"loss_weighting": "example"}, conversations(40)),
    ({"overlong": "truncate_right", "on_bad_row": "skip"}, {}, with_bad(pairs(50))),
    ({"dedup": "exact", "quality": {"drop": ("7",)}}, {}, [*pairs(40), *pairs(20)]),
    ({"template": "plain"}, {"encoder_length": 48}, pairs(60)),
    (
        {"template": "plain", "overlong": "truncate_right", "on_bad_row": "skip"},
        {"encoder_length": 24, "loss_weighting": "example"},
        with_bad(pairs(50)),
    ),
]


@pytest.mark.parametrize(("data", "more", "rows"), CASES)
def test_windows_are_the_same_bit_for_bit(open_, pool, write_rows, tmp_path, monkeypatch, data, more, rows):
    """A source that is always worded alike, and one whose words change from epoch to epoch."""
    tuning = {"loss_weighting": more["loss_weighting"]} if "loss_weighting" in more else {}
    keys = {key: value for key, value in more.items() if key != "loss_weighting"}
    monkeypatch.setattr(lengths, "_BLOCK", 8)
    sources = [write_rows("a.jsonl", rows)]
    if "messages" not in rows[0]:
        sources.append({"path": write_rows("b.jsonl", pairs(31, start=100)), "templates": TEMPLATES})
    config = make_config(*sources, train={"epochs": 3.0}, tuning=tuning, window=8, **data)
    plain = open_(config, "plain", **keys)
    expected = shards_of(config, plain, tmp_path / "without")
    stream = open_(config, "kept", read_all=pool.read_all, **keys)
    assert stream.funnel == plain.funnel and stream.fingerprint == plain.fingerprint

    def read(self, rows, epochs=None):
        raise AssertionError(f"rows {rows} were rendered again")

    monkeypatch.setattr(RowReader, "read", read)
    assert prepare_here(pool, config, stream, tmp_path / "with") == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_make_the_same_windows_of_what_they_kept(open_, write_rows, tmp_path, monkeypatch, workers):
    config = make_config(
        write_rows("a.jsonl", with_bad(pairs(300))), on_bad_row="skip", train={"epochs": 2.0}, window=8
    )
    expected = shards_of(config, open_(config, "plain"), tmp_path / "without")
    monkeypatch.setattr(pooling, "_FEW", 0)
    with pooling.Pool(workers, cache_dir=str(tmp_path / "kept")) as pool:
        stream = open_(config, "kept", read_all=pool.read_all)
        files = os.listdir(next((tmp_path / "kept" / "rendered").iterdir()))
        assert str(os.getpid()) not in files and 1 <= len(files) <= workers
        assert shards_of(config, stream, tmp_path / "with", pool.make) == expected
    assert os.listdir(tmp_path / "kept" / "rendered") == []


@pytest.fixture
def rendered_times(monkeypatch):
    """How often each row was rendered, by row and epoch."""
    seen = collections.Counter()
    read = RowReader.read

    def counting(self, rows, epochs=None):
        seen.update(zip(rows, epochs or [0] * len(rows), strict=True))
        return read(self, rows, epochs)

    monkeypatch.setattr(RowReader, "read", counting)
    return seen


def prepare_here(pool, config, stream, path):
    """As the pool, in this process."""

    def make(maker, folder, shards, done):
        pool.render_once(maker, shards)
        serially(pool.of_kept(maker), folder, shards, done)

    return shards_of(config, stream, path, make)


def test_each_row_is_rendered_once_whatever_the_epochs(open_, pool, write_rows, tmp_path, rendered_times, monkeypatch):
    """But for the few of each source that say how large a window is."""
    monkeypatch.setattr(loader, "_WINDOW_SAMPLE", 1)
    config = make_config(write_rows("a.jsonl", pairs(60)), train={"epochs": 4.0}, window=8)
    prepare_here(pool, config, open_(config, "kept", read_all=pool.read_all), tmp_path / "with")
    assert len(rendered_times) == 60 and sum(rendered_times.values()) == 61


def test_each_row_of_data_too_large_to_be_counted_is_rendered_once_beside_the_sample(
    open_, pool, write_rows, tmp_path, rendered_times, monkeypatch
):
    monkeypatch.setattr(loader, "_WINDOW_SAMPLE", 1)
    monkeypatch.setattr(measuring, "EXACT_ROWS", 10)
    monkeypatch.setattr(measuring, "SAMPLE_ROWS", 10)
    path = write_rows("a.jsonl", pairs(60))
    for epochs, times in ((4.0, 60 + 11), (1.0, 60 + 11 - 10)):  # of one epoch what the sample kept is used
        config = make_config(path, train={"epochs": epochs}, window=8)
        rendered_times.clear()
        cache = f"kept{epochs}"
        made = prepare_here(pool, config, open_(config, cache, read_all=pool.read_all), tmp_path / f"with{epochs}")
        assert len(rendered_times) == 60 and sum(rendered_times.values()) == times
        assert made == shards_of(config, open_(config, "plain"), tmp_path / f"without{epochs}")


def test_rows_counted_before_are_rendered_once_for_all_epochs(open_, pool, write_rows, tmp_path, rendered_times):
    config = make_config(write_rows("a.jsonl", pairs(60)), train={"epochs": 4.0}, window=8)
    open_(config, "kept")
    rendered_times.clear()
    stream = open_(config, "kept", read_all=pool.read_all)
    assert not rendered_times
    prepare_here(pool, config, stream, tmp_path / "with")
    assert len(rendered_times) == 60 and set(rendered_times.values()) == {1}


def test_without_room_on_the_disk_rows_are_rendered_again(open_, pool, write_rows, tmp_path, monkeypatch):
    config = make_config(write_rows("a.jsonl", pairs(60)), train={"epochs": 2.0}, window=8)
    expected = shards_of(config, open_(config, "plain"), tmp_path / "without")
    monkeypatch.setattr(rendered, "_FREE_BYTES", 1 << 62)
    stream = open_(config, "kept", read_all=pool.read_all)
    assert prepare_here(pool, config, stream, tmp_path / "with") == expected


def test_what_a_killed_command_kept_is_taken_away(tmp_path):
    host, base = rendered.socket.gethostname(), tmp_path / "rendered"
    for name in (f"{host}-999999999-x", f"{host}-{os.getpid()}-x", "elsewhere-999999999-x"):
        (base / name).mkdir(parents=True)
        (base / name / "1").write_text("rows")
    spool = rendered.Spool(str(tmp_path))
    left = {f"{host}-{os.getpid()}-x", "elsewhere-999999999-x"}
    assert set(os.listdir(base)) == {*left, os.path.basename(spool.folder)}
    spool.close()
    assert set(os.listdir(base)) == left


def test_a_failing_command_leaves_nothing(open_, write_rows, tmp_path):
    config = make_config(write_rows("a.jsonl", pairs(60)), window=8)
    with pytest.raises(RuntimeError), pooling.Pool(1, cache_dir=str(tmp_path / "kept")) as pool:
        open_(config, "kept", read_all=pool.read_all)
        assert len(os.listdir(tmp_path / "kept" / "rendered")) == 1
        raise RuntimeError
    assert os.listdir(tmp_path / "kept" / "rendered") == []


def test_rows_of_another_epoch_or_not_kept_are_rendered(open_, pool, write_rows):
    config = make_config({"path": write_rows("a.jsonl", pairs(60)), "templates": TEMPLATES}, window=8)
    stream = open_(config, "kept", read_all=pool.read_all)
    reader = stream.maker.readers[0]
    kept = pool.of_kept(stream.maker).readers[0]
    rows, epochs = [5, 59, 0, 5], [0, 7, 9, 1]
    for one, other in zip(kept.read(rows, epochs), reader.read(rows, epochs), strict=True):
        for example, again in zip(one.examples, other.examples, strict=True):
            assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(example, again, strict=True))


def test_a_worker_whose_command_was_killed_before_it_began_ends():
    code = "from jaxtune.data.ahead import pooling; pooling._begin(1 << 30); print('goes on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
