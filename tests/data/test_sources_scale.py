"""Thousands of sources: few open files, little to read when they are opened, and nothing fatal in the cache."""

import gzip
import json
import multiprocessing
import os
import pathlib
import pickle
import random
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxtune.config_data import SourceConfig
from jaxtune.data.files import sources, spool


def write(folder, count, rows=20):
    for n in range(count):
        lines = (json.dumps({"source": n, "row": i}) + "\n" for i in range(rows))
        (folder / f"s{n:04d}.jsonl").write_text("".join(lines))


def open_all(folder, count):
    return [sources.open_source(SourceConfig(path=str(folder / f"s{n:04d}.jsonl"))) for n in range(count)]


def check_some(opened, seed, rows=20):
    draw = random.Random(seed)
    for _ in range(2000):
        n, i = draw.randrange(len(opened)), draw.randrange(rows)
        assert opened[n].row(i) == {"source": n, "row": i}


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def in_child(opened, seed, inherited):
    check_some(opened, seed)
    assert descriptors() < inherited + 250
    os._exit(0 if len(spool.OPENED) <= 128 else 1)


def test_hundreds_of_sources_share_a_few_open_files_in_threads_and_processes(tmp_path):
    write(tmp_path, 300)
    before, threads = descriptors(), threading.active_count()
    opened = open_all(tmp_path, 300)
    assert descriptors() - before < 10 and len(pickle.dumps(opened)) < 300 * 2000
    failed = []

    def work(seed):
        try:
            check_some(opened, seed)
        except BaseException as error:
            failed.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    [worker.start() for worker in workers]
    for method, inherited in (("fork", before), ("spawn", 0)):  # forked while the threads read
        child = multiprocessing.get_context(method).Process(target=in_child, args=(opened, 1, inherited))
        child.start()
        child.join(120)
        assert child.exitcode == 0, method
    [worker.join() for worker in workers]
    assert not failed and threading.active_count() == threads
    assert descriptors() - before <= 128 + 10  # some are of multiprocessing itself


def test_an_indexed_source_is_opened_without_reading_its_rows(tmp_path, monkeypatch):
    write(tmp_path, 1)
    open_all(tmp_path, 1)
    read = []
    monkeypatch.setattr(spool.os, "pread", lambda *given: read.append(given))
    (source,) = open_all(tmp_path, 1)
    assert len(source) == 20 and source.fingerprint and not read


def cache_files(monkeypatch, tmp_path):
    folder = tmp_path / "cache"
    monkeypatch.setenv("JAXTUNE_CACHE", str(folder))
    return lambda: sorted(pathlib.Path(folder, "sources").iterdir())


@pytest.mark.parametrize("damage", ["cut", "emptied", "gone", "nonsense"])
def test_damaged_cache_files_are_made_again(damage, tmp_path, monkeypatch):
    listed = cache_files(monkeypatch, tmp_path)
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows", 2)
    (tmp_path / "rows" / "array.json").write_text(json.dumps([{"row": i} for i in range(20)]))
    fingerprint = sources.open_source(SourceConfig(path=str(tmp_path / "rows"))).fingerprint
    for file in listed():
        data = file.read_bytes()
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes({"cut": data[: len(data) // 2], "emptied": b"", "nonsense": b"?" * len(data)}[damage])
        source = sources.open_source(SourceConfig(path=str(tmp_path / "rows")))
        if damage == "nonsense" and file.suffix in (".places", ".jsonl", ".numbers"):
            file.write_bytes(data)  # the same length: only the sizes are known
            continue
        assert [source.row(i)["row"] for i in range(60)] == [*range(20)] * 3 and source.fingerprint == fingerprint


def test_a_damaged_arrow_file_of_the_right_size_is_made_again(tmp_path, monkeypatch):
    listed = cache_files(monkeypatch, tmp_path)
    pq.write_table(pa.Table.from_pylist([{"row": i} for i in range(20)]), tmp_path / "a.parquet")
    sources.open_source(SourceConfig(path=str(tmp_path / "a.parquet")))
    (made,) = (file for file in listed() if file.suffix == ".arrow")
    made.write_bytes(b"?" * made.stat().st_size)
    assert sources.open_source(SourceConfig(path=str(tmp_path / "a.parquet"))).row(7) == {"row": 7}


def test_a_cache_file_made_twice_at_once_disturbs_no_reader(tmp_path, monkeypatch):
    listed = cache_files(monkeypatch, tmp_path)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"row": %d}\n\n' % i for i in range(20))))
    source = sources.open_source(SourceConfig(path=str(path)))
    assert source.row(0) == {"row": 0} and source.where(3) == f"{path}:7"
    inodes = [file.stat().st_ino for file in listed()]
    for file in listed():
        if file.suffix == ".sizes":
            file.unlink()  # as another process sees it, that began before these were there
    sources.open_source(SourceConfig(path=str(path)))
    assert inodes != [file.stat().st_ino for file in listed()]
    monkeypatch.setattr(spool, "OPENED", spool.Pool(128))
    assert source.row(1) == {"row": 1} and source.where(3) == f"{path}:7"


def test_a_file_that_changes_under_a_run_is_told(tmp_path):
    write(tmp_path, 1)
    (source,) = open_all(tmp_path, 1)
    (tmp_path / "s0000.jsonl").write_text('{"other": 1}\n' * 50)
    with pytest.raises(ValueError, match=r"s0000.jsonl: the file has changed since it was opened"):
        source.row(3)


def test_missing_sources_are_an_error_of_their_own(tmp_path):
    for path in (tmp_path / "a.jsonl", tmp_path / "*.jsonl", "nobody/nothing-here", "builtin:none/*.jsonl"):
        with pytest.raises(sources.MissingSource):
            sources.open_source(SourceConfig(path=str(path)))
    (tmp_path / "a.xml").write_text("x")
    with pytest.raises(ValueError) as error:
        sources.open_source(SourceConfig(path=str(tmp_path / "a.xml")))
    assert not isinstance(error.value, sources.MissingSource)
    with pytest.raises(ValueError, match="source 'g' has no path of its own; a group is opened member by member"):
        sources.open_source(SourceConfig(id="g"))
