"""One run writes a folder at a time, and only the run that it holds goes on."""

import fcntl
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from jaxtune import run_folder
from jaxtune.config import Config
from jaxtune.decode import decode, to_yaml
from jaxtune.run_folder import MAY_CHANGE, RunFolder, differences

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from jaxtune.run_folder import RunFolder
try:
    folder = RunFolder(sys.argv[1])
except ValueError as error:
    print("refused", error)
    sys.exit(1)
print("held", flush=True)
sys.stdin.read()
folder.release()
"""


def hold(path) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", HOLD, str(path)], text=True, cwd=REPOSITORY, **pipes)


def lock_of(path, **changes):
    now = {"host": socket.gethostname(), "pid": os.getpid(), "start": "1", "heartbeat": time.time()}
    path.mkdir(exist_ok=True)
    (path / ".lock").write_text(json.dumps({**now, **changes}))


def config(*words) -> Config:
    return decode(["model.path=m", "output=o", "train.steps=5", "data.train.0.path=d.jsonl", *words])


# The lock.


def test_a_second_live_run_is_refused_and_a_dead_one_taken_over(tmp_path):
    with hold(tmp_path / "run") as other:
        assert other.stdout.readline().strip() == "held"
        with pytest.raises(ValueError, match=rf"being written by another run \(host .*, process {other.pid}.*output="):
            RunFolder(str(tmp_path / "run"))
        other.kill()  # dies without a word
        other.wait()
        said = []
        folder = RunFolder(str(tmp_path / "run"), say=said.append)
    assert len(said) == 1 and "taking over" in said[0] and str(other.pid) in said[0]
    assert json.loads(folder.lock.read_text())["pid"] == os.getpid()
    folder.release()


def test_a_run_that_ends_gives_the_folder_up_without_a_word(tmp_path):
    RunFolder(str(tmp_path)).release()
    assert not (tmp_path / ".lock").exists()
    said = []
    RunFolder(str(tmp_path), say=said.append).release()
    assert said == []


def test_of_many_that_find_a_dead_lock_one_alone_takes_it(tmp_path):
    lock_of(tmp_path / "run", pid=2**22 + 1)
    others = [hold(tmp_path / "run") for _ in range(6)]
    for other in others:
        assert other.stdout.readline()
    for other in others:
        other.communicate("")
    assert sum(other.returncode == 0 for other in others) == 1


def test_nobody_looks_at_the_lock_while_another_judges_and_replaces_it(tmp_path, monkeypatch):
    lock_of(tmp_path / "run", pid=2**22 + 1)
    judged = []

    def is_alive(holder):
        with (tmp_path / "run" / ".lock.guard").open("w") as guard, pytest.raises(BlockingIOError):
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        judged.append(holder["pid"])
        return False

    monkeypatch.setattr(run_folder, "_is_alive", is_alive)
    RunFolder(str(tmp_path / "run")).release()
    assert judged == [2**22 + 1]


def test_the_number_of_a_dead_process_given_anew_keeps_nobody_out(tmp_path):
    lock_of(tmp_path / "run", start="another time")
    said = []
    RunFolder(str(tmp_path / "run"), say=said.append).release()
    assert "taking over" in said[0]


@pytest.mark.parametrize(("age", "alive"), [(10, True), (run_folder.DEAD_AFTER_SECONDS + 10, False)])
def test_a_run_on_another_host_is_judged_by_its_heartbeat(tmp_path, age, alive):
    lock_of(tmp_path / "run", host="elsewhere", heartbeat=time.time() - age)
    if alive:
        with pytest.raises(ValueError, match=r"host elsewhere.*last seen 10 s ago"):
            RunFolder(str(tmp_path / "run"))
    else:
        RunFolder(str(tmp_path / "run")).release()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3"])
def test_a_lock_that_cannot_be_read_is_a_dead_one(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    said = []
    RunFolder(str(tmp_path), say=said.append).release()
    assert "taking over" in said[0]


def test_the_heart_beats_and_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "HEARTBEAT_SECONDS", 0.02)
    folder = RunFolder(str(tmp_path))
    first = json.loads(folder.lock.read_text())["heartbeat"]
    deadline = time.time() + 5
    while json.loads(folder.lock.read_text())["heartbeat"] == first and time.time() < deadline:
        time.sleep(0.02)
    assert json.loads(folder.lock.read_text())["heartbeat"] > first
    folder.release()
    time.sleep(0.1)
    assert not folder.lock.exists()


def test_a_lock_that_another_run_took_is_neither_beaten_nor_removed(tmp_path, monkeypatch):
    """A process that slept so long that it was taken for dead must not drive out who came after it."""
    monkeypatch.setattr(run_folder, "HEARTBEAT_SECONDS", 0.02)
    folder = RunFolder(str(tmp_path))
    lock_of(tmp_path, host="elsewhere", heartbeat=5.0)
    time.sleep(0.1)
    folder.release()
    assert json.loads((tmp_path / ".lock").read_text()) == {
        "host": "elsewhere", "pid": os.getpid(), "start": "1", "heartbeat": 5.0
    }  # fmt: skip


# What may go on.


def held(tmp_path, *words) -> RunFolder:
    folder = RunFolder(str(tmp_path))
    folder.write_config(config(*words))
    return folder


def test_checkpoints_without_their_configuration_are_not_gone_on_with(tmp_path):
    folder = RunFolder(str(tmp_path))
    with pytest.raises(ValueError, match=r"holds checkpoints but no config.yaml"):
        folder.check_resume(config(), has_saved=True)
    folder.release()


def test_a_tilde_is_the_home_and_a_bucket_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = RunFolder("~/run")
    folder.release()
    assert folder.path == tmp_path / "run"
    with pytest.raises(ValueError, match=r"output: found gs://bucket/run; .*Mount the bucket"):
        RunFolder("gs://bucket/run")


@pytest.mark.parametrize(
    "word",
    [
        "output=p",
        "train.steps=9",
        "train.epochs=9",
        "train.microbatch_rows=2",
        "log.every_steps=1",
        "eval.every_steps=1",
        "checkpoint.every_steps=1",
        "mesh.tensor=2",
        "model.remat=full",
        "data.workers=2",
        "export.hf=false",
    ],
)
def test_how_long_and_how_watched_may_change(tmp_path, word):
    folder = held(tmp_path)
    folder.check_resume(config(word), has_saved=True)
    folder.release()


@pytest.mark.parametrize(
    "word",
    [
        "model.path=n",
        "tuning.rank=8",
        "data.train.0.path=e.jsonl",
        "data.train.1.path=e.jsonl",
        "data.max_length=32",
        "optimizer.learning_rate=1.0",
        "optimizer.options.b1=0.5",
        "train.batch_rows=16",
        "seed=1",
        "model.dtype=bfloat16",
        "model.param_dtype=bfloat16",
    ],
)
def test_what_is_learned_may_not_change_and_both_values_are_told(tmp_path, word):
    folder = held(tmp_path)
    with pytest.raises(ValueError, match=rf"(?s){word.partition('=')[0]}\b.* there, .* now\nGive another output="):
        folder.check_resume(config(word), has_saved=True)
    folder.release()


def test_all_changed_keys_are_listed_at_once(tmp_path):
    folder = held(tmp_path)
    with pytest.raises(ValueError) as caught:
        folder.check_resume(config("tuning.rank=8", "seed=3", "data.window=9", "log.every_steps=3"), has_saved=True)
    told = str(caught.value)
    assert all(
        line in told for line in ("tuning.rank: 16 there, 8 now", "seed: 0 there, 3 now", "data.window: 'auto' there")
    )
    assert "log.every_steps" not in told
    folder.release()


def test_a_run_that_shall_not_go_on_is_refused(tmp_path):
    folder = held(tmp_path)
    with pytest.raises(ValueError, match=r"already holds a run and checkpoint.resume is never.*another output="):
        folder.check_resume(config("checkpoint.resume=never"), has_saved=True)
    folder.release()


def test_keys_that_may_change_are_keys():
    leaves = {key for key, _, _ in differences(config(), config())} | set(run_folder._leaves(config().model_dump()))
    for allowed in MAY_CHANGE:
        assert any(key == allowed or key.startswith(f"{allowed}.") for key in leaves), allowed


def test_the_configuration_of_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch):
    folder = held(tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    monkeypatch.setattr(pathlib.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("power lost")))
    with pytest.raises(OSError):
        folder.write_config(config("train.steps=9"))
    assert (tmp_path / "config.yaml").read_text() == before == to_yaml(config())
    monkeypatch.undo()
    folder.release()


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors", "metrics.jsonl", "hf/"])
def test_a_folder_with_other_work_is_not_written_over(tmp_path, name):
    (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"holds {name.strip('/')} but no run.*another output="):
        RunFolder(str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == [name.strip("/")]


def test_a_folder_with_harmless_files_is_taken(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    RunFolder(str(tmp_path)).release()
