"""cloud/skypilot: the task that is rendered, and a `sky` that fails."""

import os
import pathlib
import signal
import subprocess

import pytest
import yaml
from cloud_stubs import ASLEEP, ROOT, dry_lines, render

SCRIPT = "skypilot/sky.sh"
RUN = ("model.path=M", "data.train.0.path=gs://data/x.jsonl", "output=gs://some-bucket/run")
TPU = ("--name", "mine", "--tpu", "v5e-16")
GPU = ("--name", "mine", "--gpus", "H100:8", "--nodes", "2")
CANCEL = "sky jobs cancel --name mine --yes"


def task_of(*words: str) -> dict:
    done = render("skypilot/render.py", *words)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def test_a_tpu_task_names_the_tpu_as_the_cloud_does():
    task = task_of(*TPU, "--spot", *RUN)
    assert task["resources"]["accelerators"] == "tpu-v5litepod-16"
    assert task["resources"]["accelerator_args"] == {"runtime_version": "v2-alpha-tpuv5-lite"}
    assert task["resources"]["use_spot"] is True
    assert task["workdir"] == str(ROOT)
    assert "JAX_" not in task["run"], "machines of a TPU find one another"
    assert ".[tpu]" in task["setup"]


def test_only_preemptions_are_recovered_from():
    recovery = task_of(*TPU, *RUN)["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [134, 137, 143]}


def test_machines_with_gpus_are_told_of_one_another(tmp_path):
    task = task_of(*GPU, *RUN)
    assert task["num_nodes"] == 2
    python = tmp_path / "jaxtune-venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID $*"\n')
    python.chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    for nodes, told in (("2", "10.0.0.1:8476 2 1 -m"), ("1", "   -m")):
        environment |= {"SKYPILOT_NUM_NODES": nodes, "SKYPILOT_NODE_RANK": "1"}
        done = subprocess.run(["bash", "-c", task["run"]], env=environment, capture_output=True, text=True)
        assert done.stdout.startswith(told), done


def test_the_configuration_is_mounted_and_words_keep_their_spaces(tmp_path):
    config = tmp_path / "tune.yaml"
    config.write_text("output: gs://some-bucket/run\nmodel:\n  path: M\ndata:\n  train:\n    - path: gs://d/x.jsonl\n")
    task = task_of(*TPU, str(config), "data.template=a b")
    assert task["file_mounts"] == {"~/jaxtune-config.yaml": str(config)}
    assert task["run"].endswith("-m jaxtune.train ~/jaxtune-config.yaml 'data.template=a b'\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((*TPU[:2], *RUN), "expected --tpu NAME"),
        ((*TPU, "--gpus", "H100:8", *RUN), "one of them"),
        ((*TPU[:2], "--gpus", "H100", *RUN), "--gpus: found 'H100'"),
        ((*TPU, "--nodes", "2", *RUN), "--nodes: found 2"),
        ((*TPU[:2], "--tpu", "tpu7x-8", *RUN), "by GKE only"),
        ((*TPU[:2], "--tpu", "v9-8", *RUN), "--tpu: found 'v9-8'"),
        ((*TPU, *RUN[:2], "output=runs/x"), "expected a bucket"),
        ((*TPU, "no_such.yaml"), "no such file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(stubs, words, told):
    done = render("skypilot/render.py", *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert stubs.run(SCRIPT, "up", *words).returncode == 2
    assert stubs.calls() == []


def test_up_launches_and_follows(stubs):
    done = stubs.run(SCRIPT, "up", *TPU, "--env", "TOKEN", *RUN, TOKEN="secret")
    assert done.returncode == 0, done.stderr
    queue, launch, logs = stubs.calls()
    assert queue == ["sky", "jobs", "queue", "--skip-finished", "--verbose"]
    assert launch[:7] == ["sky", "jobs", "launch", "--name", "mine", "--yes", "--detach-run"]
    assert launch[7:9] == ["--env", "TOKEN"]
    assert yaml.safe_load(pathlib.Path(launch[-1]).read_text())["name"] == "mine"
    assert logs == ["sky", "jobs", "logs", "--name", "mine", "--follow"]
    assert "secret" not in done.stdout + done.stderr + str(stubs.calls())


@pytest.mark.parametrize("command", ["up", "submit", "status", "logs", "delete"])
def test_a_dry_run_prints_what_a_run_calls(stubs, command):
    words = (command, *GPU, "--spot", "--infra", "gcp", *RUN)
    printed = dry_lines(stubs.run(SCRIPT, *words, "--dry-run"))
    assert stubs.calls() == []
    assert stubs.run(SCRIPT, *words).returncode == 0
    assert stubs.lines() == printed


def test_a_job_of_the_same_name_is_not_touched(stubs):
    stubs.answer("jobs queue", "echo 'ID NAME STATUS'; echo '3 mine RUNNING'")
    done = stubs.run(SCRIPT, "up", *TPU, *RUN)
    assert done.returncode == 1
    assert "is there already" in done.stderr
    assert len(stubs.calls()) == 1


def test_a_launch_that_failed_is_cancelled(stubs):
    stubs.answer("jobs launch", "echo 'no quota in any region' >&2; exit 1")
    done = stubs.run(SCRIPT, "up", *TPU, *RUN)
    assert done.returncode == 1
    assert stubs.lines()[-1] == CANCEL
    assert "no quota" in done.stderr
    assert "STILL THERE" not in done.stderr


def test_a_launch_that_failed_and_cannot_be_cancelled_is_named(stubs):
    stubs.answer("jobs launch", "exit 1")
    stubs.answer("jobs cancel", "echo 'no answer' >&2; exit 1")
    done = stubs.run(SCRIPT, "up", *TPU, *RUN)
    assert done.returncode == 1
    assert stubs.lines().count(CANCEL) == 5
    assert CANCEL in done.stderr


def test_ctrl_c_says_that_the_job_goes_on(stubs):
    stubs.answer("jobs logs", ASLEEP)
    process = stubs.start(SCRIPT, "up", *TPU, *RUN)
    stubs.wait_until_asleep(process)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "STILL THERE" in told
    assert CANCEL in told
