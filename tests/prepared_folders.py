"""What `python -m jaxtune.prepare` is asked for and leaves, in tests."""

import multiprocessing
import os
import pathlib
import sys

import tiny_runs

from jaxtune import prepare
from jaxtune.data.ahead.attaching import ABOUT
from jaxtune.data.ahead.prepared import Folder, read_rows, read_summary, write_shard

TEMPLATES = tuple(
    {"name": text, "task": "*", "kind": "zero-shot", "input": text, "target": "{completion}"}
    for text in ("{prompt}?", "Say: {prompt}")
)


def serially(maker, folder, shards, done):
    """Makes shards one after another, as a pool or Beam would."""
    for shard in shards:
        done(shard, write_shard(maker, folder, shard))


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


PRELOADED = [
    *("jaxtune.prepare", "jaxtune.inputs", "jaxtune.metrics", "transformers", "tiny_runs"),
    *(f"jaxtune.data.ahead.{name}" for name in ("beaming", "preparing", "pooling")),
]


def command_in_a_fork(words, cache, log):
    """Starts the command in a fork that has imported everything and done nothing; what it says goes into `log`.

    Twenty starts of a process would take longer than all that these are to do.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_command, args=(words, str(cache), str(log)))
    process.start()
    return process


def _command(words, cache, log):
    os.environ["JAXTUNE_CACHE"] = cache
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.exit(prepare.main(words))
