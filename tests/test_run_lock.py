"""The lock of a run's folder: one holder at a time, on a disk and in a bucket, and none that is dead."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import gcs_server
import gcsfs
import pytest

from jaxtune import hub, run_lock
from jaxtune.run_lock import RunLock

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
HOLD = """
import sys
from jaxtune.run_lock import RunLock
try:
    lock = RunLock(sys.argv[1])
except ValueError as error:
    print("refused", error)
    sys.exit(1)
print("held", flush=True)
sys.stdin.read()
lock.release()
"""


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path, monkeypatch):
    """Where a run writes."""
    if request.param == "disk":
        yield str(tmp_path)
        return
    gcsfs.GCSFileSystem.clear_instance_cache()  # or the last test's server would be asked
    with gcs_server.serve() as (_, variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield f"gs://{gcs_server.BUCKET}/run"


def hold(folder: str) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", HOLD, folder], text=True, cwd=REPOSITORY, **pipes)


def lock_of(folder: str, number: int = 1, **changes) -> None:
    """Leaves a lock behind, of this very process unless `changes` says otherwise."""
    now = {"host": socket.gethostname(), "pid": os.getpid(), "start": "1", "heartbeat": time.time()}
    write(folder, number, json.dumps({**now, **changes}))


def write(folder: str, number: int, text: str) -> None:
    fs, root = hub.file_system(folder)
    fs.makedirs(f"{root}/.lock", exist_ok=True)
    fs.pipe_file(f"{root}/.lock/{number}", text.encode())


def locks(folder: str) -> dict[str, str]:
    """The lock's files by number."""
    fs, root = hub.file_system(folder)
    fs.invalidate_cache()
    try:
        return {name.rpartition("/")[2]: fs.cat_file(name).decode() for name in fs.ls(f"{root}/.lock", detail=False)}
    except FileNotFoundError:
        return {}


def test_a_second_live_run_is_refused_and_a_dead_one_taken_over(folder):
    with hold(folder) as other:
        assert other.stdout.readline().strip() == "held"
        with pytest.raises(ValueError, match=rf"being written by another run \(host .*, process {other.pid}.*output="):
            RunLock(folder)
        other.kill()  # dies without a word
        other.wait()
        said = []
        lock = RunLock(folder, say=said.append)
    assert len(said) == 1 and "taking over" in said[0] and str(other.pid) in said[0]
    assert [json.loads(text)["pid"] for text in locks(folder).values()] == [os.getpid()]
    lock.release()


def test_a_run_that_ends_gives_the_folder_up_without_a_word(folder):
    RunLock(folder).release()
    assert locks(folder) == {}
    said = []
    RunLock(folder, say=said.append).release()
    assert said == []


def test_of_many_that_find_a_dead_lock_one_alone_takes_it(folder):
    lock_of(folder, number=7, pid=2**22 + 1)
    others = [hold(folder) for _ in range(6)]
    for other in others:
        assert other.stdout.readline()
    for other in others:
        other.communicate("")
    assert sum(other.returncode == 0 for other in others) == 1
    assert locks(folder) == {}


def test_who_comes_in_between_is_seen_after_all(folder, monkeypatch):
    """Another run takes the folder after this one has looked and before it has made its own number."""
    real, looks = RunLock._holders, []

    def look(self):
        found = real(self)
        if not looks:
            lock_of(folder, number=9, host="elsewhere")
        looks.append(found)
        return found

    monkeypatch.setattr(RunLock, "_holders", look)
    with pytest.raises(ValueError, match="host elsewhere"):
        RunLock(folder)
    assert looks[0] == {} and list(locks(folder)) == ["9"]


def test_the_number_of_a_dead_process_given_anew_keeps_nobody_out(folder):
    lock_of(folder, start="another time")
    said = []
    RunLock(folder, say=said.append).release()
    assert "taking over" in said[0]


@pytest.mark.parametrize(("age", "alive"), [(10, True), (run_lock.DEAD_AFTER_SECONDS + 10, False)])
def test_a_run_on_another_host_is_judged_by_its_heartbeat(folder, age, alive):
    lock_of(folder, host="elsewhere", heartbeat=time.time() - age)
    if alive:
        with pytest.raises(ValueError, match=r"host elsewhere.*last seen 1\d s ago"):
            RunLock(folder)
    else:
        RunLock(folder).release()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3"])
def test_a_lock_that_cannot_be_read_is_a_dead_one(tmp_path, text):
    write(str(tmp_path), 1, text)
    said = []
    RunLock(str(tmp_path), say=said.append).release()
    assert "taking over" in said[0]


def test_the_heart_beats_and_stops(folder, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.02)
    lock = RunLock(folder)
    first = json.loads(locks(folder)["1"])["heartbeat"]
    deadline = time.time() + 5
    while json.loads(locks(folder)["1"])["heartbeat"] == first and time.time() < deadline:
        time.sleep(0.02)
    assert json.loads(locks(folder)["1"])["heartbeat"] > first
    lock.check()
    lock.release()
    time.sleep(0.1)
    assert locks(folder) == {}


def test_a_lock_that_another_run_took_is_neither_beaten_nor_removed(folder, monkeypatch):
    """A process that slept so long that it was taken for dead must not drive out who came after it."""
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.02)
    lock = RunLock(folder)
    lock_of(folder, number=2, host="elsewhere")
    deadline = time.time() + 5
    with pytest.raises(ValueError, match=r"taken over by another run \(host elsewhere"):
        while time.time() < deadline:
            lock.check()
            time.sleep(0.02)
    lock.release()
    assert [json.loads(text)["host"] for text in locks(folder).values()] == ["elsewhere"]
