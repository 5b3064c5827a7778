"""cloud/tpu-vm/worker.sh, run for real in a folder: a training outlives its connection and tells how it ended."""

import os
import pathlib
import shutil
import subprocess
import time

import pytest
from cloud_stubs import CLOUD

TRAINING = """#!/usr/bin/env bash
trap 'echo saved; exit 143' TERM
echo "arguments: $*, TOKEN=${TOKEN:-}"
for _ in $(seq "${LOOPS:-1}"); do sleep 0.05; done
exit "${CODE:-0}"
"""


class Machine:
    """A home folder with jaxtune-job/ in it, as tpu-vm.sh leaves it; its Python is a script of this test."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.job = folder / "jaxtune-job"
        (self.job / "venv/bin").mkdir(parents=True)
        shutil.copy(CLOUD / "tpu-vm/worker.sh", self.job)
        (self.job / "venv/bin/python").write_text(TRAINING)
        (self.job / "venv/bin/python").chmod(0o755)

    def do(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.job / "worker.sh"), *words],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=20,
        )

    def report(self, line: int = 1) -> list[str]:
        return self.do("report", str(line)).stdout.splitlines()

    def wait(self) -> list[str]:
        while "running" in (told := self.report())[-1]:
            time.sleep(0.02)
        return told


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    yield machine
    machine.do("stop")


def test_nothing_started_is_told_so(machine):
    assert machine.report() == ["jaxtune-job: none - 0"]


@pytest.mark.parametrize("code", ["0", "1", "143"])
def test_a_training_runs_on_and_its_exit_code_is_kept(machine, code):
    assert machine.do("start", "config.yaml", "data.template=a b", LOOPS="40", CODE=code).returncode == 0
    assert machine.report()[-1].startswith("jaxtune-job: running - ")
    told = machine.wait()
    assert told[1:] == [
        "arguments: -m jaxtune.train config.yaml data.template=a b, TOKEN=",
        f"jaxtune-job: ended {code} 2",
    ]
    assert machine.report(2)[0].startswith("arguments:"), "a report begins where the one before it ended"


def test_a_second_start_is_refused_while_one_runs(machine):
    machine.do("start", LOOPS="100")
    again = machine.do("start")
    assert again.returncode == 3
    assert "running already" in again.stderr


def test_stop_lets_the_training_save(machine):
    machine.do("start", LOOPS="200")
    while len(machine.report()) < 3:  # its trap is set once it has spoken
        time.sleep(0.02)
    machine.do("stop")
    told = machine.wait()
    assert told[-2:] == ["saved", "jaxtune-job: ended 143 3"]


def test_after_an_end_it_starts_again_and_the_log_grows(machine):
    for _ in range(2):
        machine.do("start")
        told = machine.wait()
    assert told[-1] == "jaxtune-job: ended 0 4"


def test_the_variables_of_env_reach_the_training(machine):
    (machine.job / "env").write_text("TOKEN='it'\\''s'\n")
    machine.do("start")
    assert machine.wait()[1].endswith("TOKEN=it's")


def test_a_machine_that_was_started_anew_has_lost_its_training(machine):
    (machine.job / "supervisor").write_text("999999999\n")
    assert machine.report() == ["jaxtune-job: none - 0"]
