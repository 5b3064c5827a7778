"""`python -m jaxtune.prepare`: hit or miss, killed at any moment, several at once, streams, buckets."""

import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import gcs_server
import pytest
import tiny_runs
from prepared_folders import assert_complete, command_in_a_fork, contents, folder_in, words

from jaxtune import prepare
from jaxtune.data.ahead.prepared import read_summary
from jaxtune.train import train

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_runs.write_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def data(tmp_path):
    return tiny_runs.write_rows(tmp_path / "data.jsonl", tiny_runs.rows(160))


def start(words, cache, *flags, **options):
    environment = {**os.environ, "JAXTUNE_CACHE": str(cache), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "jaxtune.prepare", *words, *flags]
    return subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        **options,
    )


def test_training_takes_what_was_prepared(base, data, tmp_path, capsys):
    losses = []
    for name, more in (("plain", ["data.prepared=off"]), ("prepared", [])):
        if name == "prepared":
            assert prepare.main([*words(base, data, tmp_path), "--workers=2"]) == 0
            said = capsys.readouterr().out
            assert "miss: nothing is prepared" in said and "made 20 windows" in said and "rows of data a second" in said
            assert_complete(folder_in(tmp_path / "prepared"), 20)
            assert prepare.main([*words(base, data, tmp_path), "--check"]) == 0
            said = capsys.readouterr().out
            assert "every record is whole" in said and "hit: all 20 windows of this run" in said
        config = prepare.decode([*words(base, data, tmp_path, *more), f"output={tmp_path / name}"])
        assert train(config).exit_code == 0
        losses.append(tiny_runs.losses(tmp_path / name))
    assert "prepared: 20 of 20 windows" in capsys.readouterr().out
    assert losses[0] == losses[1] and len(losses[0]) > 9


@pytest.mark.parametrize(
    ("more", "code", "told"),
    [
        (["train.step=3"], 2, "train.steps"),
        (["--runner=Ray"], 2, "invalid choice: 'Ray'"),
        (["--worker=2"], 2, "--worker=2: unknown flag"),
        (["--workers=0"], 2, "--workers: found 0"),
        (["--runner=Direct", "--workers=2"], 2, "--workers: found beside --runner"),
        (["--runner=Direct", "--project"], 2, "--project: expected --NAME=VALUE"),
        (["data.prepared=off"], 2, "data.prepared: found off"),
        (["data.train.0.take=3"], 2, "data.train.0.take: only read with streaming"),
        (["data.prepared=/proc/prepared"], 1, "/proc/prepared"),
        (["data.train.0.path=nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["data.template=alpcaa"], 1, "alpcaa"),
    ],
)
def test_bad_input(base, data, tmp_path, capsys, more, code, told):
    try:
        found = prepare.main([*words(base, data, tmp_path), *more])
    except SystemExit as refused:  # of argparse
        found = refused.code
    assert found == code and told in capsys.readouterr().err


def test_a_row_that_cannot_be_read_stops_it_as_it_stops_training(base, tmp_path, capsys):
    data = tiny_runs.write_rows(tmp_path / "data.jsonl", [*tiny_runs.rows(9), "{not json"])
    assert prepare.main(words(base, data, tmp_path)) == 1
    assert "data.jsonl:10" in capsys.readouterr().err


# Kills, and several at once.


@pytest.mark.long
def test_twenty_kills_leave_a_cache_that_the_next_run_completes(base, tmp_path):
    """SIGKILL at a random moment of the work, 20 times, each on what the one before it left; a cache that is complete
    is taken away, so that there is always work."""
    data = tiny_runs.write_rows(tmp_path / "data.jsonl", tiny_runs.rows(2000))
    these = words(base, data, tmp_path, "data.window=8")
    alone = words(base, data, tmp_path, "data.window=8", f"data.prepared={tmp_path / 'alone'}")
    assert start(alone, tmp_path / "cache").wait() == 0
    expected = folder_in(tmp_path / "alone")
    total, chance, log = len(expected.shards()), random.Random(0), tmp_path / "log"
    reached = killed_between = 0
    for _ in range(20):
        log.write_text("")
        process = command_in_a_fork(these, tmp_path / "cache", log)
        wait_until(lambda: re.search("goes into|are made now|hit:", log.read_text(), re.I), process)
        folder, more = folder_in(tmp_path / "prepared"), chance.randrange(total // 4)
        wait_until(lambda: len(folder.shards()) >= min(total, reached + more), process)  # noqa: B023
        time.sleep(chance.uniform(0.0, 0.05))
        process.kill()
        process.join()
        for shard in folder.shards():  # what has its name is whole, always
            assert read_summary(folder, shard) is not None
            assert (
                pathlib.Path(folder.file(shard.name)).read_bytes()
                == pathlib.Path(expected.file(shard.name)).read_bytes()
            )
        assert len(folder.shards()) >= reached
        reached = len(folder.shards())
        killed_between += 0 < reached < total
        if reached == total:
            shutil.rmtree(folder.path)
            reached = 0
    assert killed_between >= 10
    done = start(these, tmp_path / "cache")
    assert done.wait() == 0, done.stdout.read()
    assert_complete(folder, 512)
    assert contents(folder) == contents(expected)


def wait_until(is_so, process):
    """Looks every few milliseconds, while the process lives."""
    while process.is_alive() and not is_so():
        time.sleep(0.003)


def test_a_preparer_killed_in_the_middle_is_gone_on_with(base, tmp_path):
    data = tiny_runs.write_rows(tmp_path / "data.jsonl", tiny_runs.rows(800))
    these = words(base, data, tmp_path, "data.window=8")
    process = start(these, tmp_path / "cache")
    while not (tmp_path / "prepared").exists() or not folder_in(tmp_path / "prepared").shards():
        time.sleep(0.01)
        assert process.poll() is None, process.stdout.read()
    process.kill()
    folder = folder_in(tmp_path / "prepared")
    assert prepare.main([*these, "--workers=2"]) == 0
    assert_complete(folder, 212)


@pytest.mark.long
def test_two_preparers_of_one_thing_share_the_work(base, tmp_path):
    data = tiny_runs.write_rows(tmp_path / "data.jsonl", tiny_runs.rows(800))
    these = words(base, data, tmp_path, "data.window=8")
    both = [start(these, tmp_path / f"cache{i}", "--workers=1") for i in range(2)]
    told = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert_complete(folder_in(tmp_path / "prepared"), 212)
    made = [int(found[1]) if (found := re.search(r"^made (\d+) windows", text, re.M)) else 0 for text in told]
    assert sum(made) == 212, told


def test_ctrl_c_ends_it_and_its_workers_at_once(base, tmp_path):
    data = tiny_runs.write_rows(tmp_path / "data.jsonl", tiny_runs.rows(4000))
    process = start(
        words(base, data, tmp_path, "data.window=8"), tmp_path / "cache", "--workers=1", start_new_session=True
    )
    while not (tmp_path / "prepared").exists() or not folder_in(tmp_path / "prepared").shards():
        time.sleep(0.01)
        assert process.poll() is None, process.stdout.read()
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=20)[0]  # ends when the workers have let go of the pipe too
    assert process.returncode == 130 and "goes on from here" in told and "Traceback" not in told


# Streams.


def test_a_stream_enters_through_prepare_and_is_rows_from_then_on(base, tmp_path, capsys):
    folder = tmp_path / "dataset"
    folder.mkdir()
    tiny_runs.write_rows(folder / "train.jsonl", tiny_runs.rows(90))
    streamed = ("data.train.0.streaming=true", "data.train.0.take=40")
    these = words(base, folder, tmp_path, *streamed)
    with pytest.raises(ValueError, match=r"its rows are streamed and are not in the cache .*jaxtune\.prepare"):
        train(prepare.decode(these))
    capsys.readouterr()
    assert prepare.main([*these, "--workers=1"]) == 0
    said = capsys.readouterr().out
    assert "40 rows written into the cache" in said and "40   " in said
    assert prepare.main([*these, "--workers=1"]) == 0
    said = capsys.readouterr().out
    assert "its rows are in the cache" in said and "hit:" in said
    assert train(prepare.decode(these)).exit_code == 0
    assert "prepared: 6 of 6 windows" in capsys.readouterr().out


# Elsewhere.


@pytest.mark.long
def test_a_bucket_holds_what_hosts_share(base, data, tmp_path, capsys, monkeypatch):
    with gcs_server.serve() as (objects, variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        there = f"data.prepared=gs://{gcs_server.BUCKET}/prepared"
        these = words(base, data, tmp_path, there)
        assert prepare.main([*these, "--workers=1"]) == 0, capsys.readouterr().err
        names = [name for name in objects.by_name if name.endswith(".array_record")]
        assert len(names) == 20 and not any("claim-" in name or "aside-" in name for name in objects.by_name)
        assert prepare.main([*these, "--workers=1"]) == 0
        assert "hit: all 20 windows" in capsys.readouterr().out
        monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path / "another-host"))
        assert train(prepare.decode(these)).exit_code == 0
        assert "prepared: 20 of 20 windows" in capsys.readouterr().out
        fetched = list((tmp_path / "another-host" / "sources").glob("*.array_record"))
        assert len(fetched) == 20
        content = fetched[0].read_bytes()
        fetched[0].write_bytes(content[:200] + bytes(40) + content[240:])  # damaged here, not there: fetched again
        assert prepare.main([*these, "--check"]) == 0
        assert "every record is whole" in capsys.readouterr().out and fetched[0].read_bytes() == content


def test_help_and_a_typo_do_not_wait_for_jax():
    code = (
        "import sys; from jaxtune import prepare; code = prepare.main(['train.step=3'])\n"
        "print(sorted({'jax', 'numpy', 'transformers', 'datasets'} & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 2 and done.stdout.strip() == "[]" and "train.steps" in done.stderr
