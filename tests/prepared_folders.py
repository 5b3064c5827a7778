"""What `python -m jaxtune.prepare` is asked for and leaves, in tests."""

import pathlib

import tiny_runs

from jaxtune.data.attaching import ABOUT
from jaxtune.data.prepared import Folder, read_rows, read_summary


def words(base, data, tmp_path, *more):
    """The words of a command that prepares two epochs into `tmp_path`."""
    mine = (f"data.prepared={tmp_path / 'prepared'}", "train.steps=null", "train.epochs=2")
    return tiny_runs.words(base, data, tmp_path / "out", *mine, *more)


def folder_in(path):
    """The folder of the only stream that was prepared there."""
    (name,) = [name for name in Folder(str(path)).names() if not name.startswith(".")]
    return Folder(str(path)).inside(name)


def assert_complete(folder, windows):
    """Every window is in a whole shard, and nothing else lies about."""
    shards = folder.shards()
    assert [n for shard in shards for n in range(shard.first, shard.stop)] == list(range(windows))
    assert all(read_summary(folder, shard) is not None for shard in shards)
    assert len(read_rows(folder, windows).rows) == windows
    known = {ABOUT, f"rows-{windows:08}.json", *(n for s in shards for n in (s.name, s.summary_name))}
    assert set(folder.names()) == known


def contents(folder):
    """name -> bytes of all that is in a folder."""
    return {name: pathlib.Path(folder.file(name)).read_bytes() for name in folder.names()}
