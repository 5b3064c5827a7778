"""cloud/slurm: what sbatch is asked, and what the job does when its tasks end."""

import os
import signal

import pytest
from cloud_stubs import CLOUD, dry_lines

SCRIPT, JOB = "slurm/slurm.sh", "slurm/job.sh"
WHAT = ("--name", "mine", "--nodes", "2", "--gpus", "8")
RUN = ("model.path=M", "data.train.0.path=/data/x.jsonl", "output=/shared/runs/mine")


def test_a_job_has_a_task_for_each_gpu_and_is_warned_before_its_time_is_up(stubs):
    stubs.answer("sbatch", "echo 4711")
    done = stubs.run(SCRIPT, "submit", *WHAT, "--time", "24:00:00", "--sbatch=--partition=gpu", *RUN)
    assert done.returncode == 0, done.stderr
    _, call = stubs.calls()
    assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--requeue", "--signal=TERM@300"} <= set(call)
    assert {"--open-mode=append", "--time=24:00:00", "--partition=gpu"} <= set(call)
    assert call[-7:-3] == [str(CLOUD / JOB), str(CLOUD), "50", stubs.environment["PYTHON"]]
    assert call[-3:] == list(RUN)
    assert "job 4711 is queued" in done.stderr


@pytest.mark.parametrize("command", ["submit", "status", "cancel"])
def test_a_dry_run_prints_what_a_run_calls(stubs, command):
    words = (command, *WHAT, *RUN, "data.template=a b")
    printed = dry_lines(stubs.run(SCRIPT, *words, "--dry-run"))
    assert stubs.calls() == []
    assert stubs.run(SCRIPT, *words).returncode == 0
    assert stubs.lines() == printed


def test_a_job_of_the_same_name_is_not_doubled(stubs):
    stubs.answer("squeue", "echo 12")
    done = stubs.run(SCRIPT, "submit", *WHAT, *RUN)
    assert done.returncode == 1
    assert "job 12 is called mine already" in done.stderr
    assert [call[0] for call in stubs.calls()] == ["squeue"]


def test_a_refusal_is_told_and_not_tried_again(stubs):
    stubs.answer("sbatch", "echo 'Job violates accounting/QOS policy' >&2; exit 1")
    done = stubs.run(SCRIPT, "submit", *WHAT, *RUN)
    assert done.returncode == 1
    assert "violates accounting" in done.stderr
    assert [call[0] for call in stubs.calls()] == ["squeue", "sbatch"]


def test_a_submission_that_timed_out_is_tried_again_where_it_left_no_job(stubs):
    stubs.answer("sbatch", "echo 'Socket timed out on send/recv' >&2; exit 1", "echo 5")
    done = stubs.run(SCRIPT, "submit", *WHAT, *RUN)
    assert done.returncode == 0, done.stderr
    assert [call[0] for call in stubs.calls()] == ["squeue", "sbatch", "squeue", "sbatch"]


def test_a_submission_that_timed_out_and_was_queued_all_the_same_is_not_doubled(stubs):
    stubs.answer("squeue", "", "echo 77")
    stubs.answer("sbatch", "echo 'Socket timed out on send/recv' >&2; exit 1")
    done = stubs.run(SCRIPT, "submit", *WHAT, *RUN)
    assert done.returncode == 0, done.stderr
    assert "job 77 is queued" in done.stderr
    assert [call[0] for call in stubs.calls()] == ["squeue", "sbatch", "squeue"]


def test_cancelling_speaks_to_the_batch_shell_before_the_tasks(stubs):
    assert stubs.run(SCRIPT, "cancel", "--name", "mine").returncode == 0
    asked = [call[3:] for call in stubs.calls()]
    assert asked == [
        ["--state=PENDING"],
        ["--state=RUNNING", "--batch", "--signal=TERM"],
        ["--state=RUNNING", "--signal=TERM"],
    ]


def test_a_job_that_cannot_be_cancelled_is_named(stubs):
    stubs.answer("scancel", "exit 1")
    done = stubs.run(SCRIPT, "cancel", "--name", "mine")
    assert done.returncode == 1
    assert "--name=mine" in done.stderr


# ---- inside the job


def job(stubs, restarts="50", **environment):
    environment = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[1-2]"} | environment
    return stubs.run(JOB, str(CLOUD), restarts, "/env/bin/python", *RUN, **environment)


def test_the_job_starts_the_same_command_on_every_task(stubs):
    assert job(stubs).returncode == 0
    assert stubs.calls() == [["srun", "--kill-on-bad-exit=0", "/env/bin/python", "-m", "jaxtune.train", *RUN]]


@pytest.mark.parametrize("code", [143, 137, 134])
def test_a_run_that_saved_or_was_killed_is_queued_again(stubs, code):
    stubs.answer("srun", f"exit {code}")
    done = job(stubs)
    assert done.returncode == code
    assert stubs.calls()[-1] == ["scontrol", "requeue", "4711"]
    assert "goes on where it stopped" in done.stderr


@pytest.mark.parametrize("code", [1, 2, 130])
def test_an_error_of_the_run_is_not_queued_again(stubs, code):
    stubs.answer("srun", f"exit {code}")
    assert job(stubs).returncode == code
    assert [call[0] for call in stubs.calls()] == ["srun"]


def test_restarts_are_bounded(stubs):
    stubs.answer("srun", "exit 143")
    done = job(stubs, restarts="3", SLURM_RESTART_COUNT="3")
    assert done.returncode == 143
    assert [call[0] for call in stubs.calls()] == ["srun"]
    assert "queued again 3 times" in done.stderr


def test_requeueing_is_tried_again_and_its_failure_told(stubs):
    stubs.answer("srun", "exit 143")
    stubs.answer("scontrol", "exit 1")
    done = job(stubs)
    assert [call[0] for call in stubs.calls()] == ["srun", *["scontrol"] * 5]
    assert "submit it anew" in done.stderr


def test_a_cancelled_job_does_not_come_back(stubs):
    stubs.answer("srun", "trap 'exit 143' TERM; touch \"$STUBS/asleep\"; sleep 30 & wait")
    process = stubs.start(JOB, str(CLOUD), "50", "/env/bin/python", *RUN, SLURM_JOB_ID="4711")
    stubs.wait_until_asleep(process)
    os.killpg(process.pid, signal.SIGTERM)  # as SLURM does: all processes of the job
    _, told = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "ended by SLURM" in told
    assert [call[0] for call in stubs.calls()] == ["srun"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "no command"),
        (("fly",), "fly: expected submit"),
        (("submit", *WHAT[2:], *RUN), "--name is missing"),
        (("submit", *WHAT[:4], *RUN), "--gpus is missing"),
        (("submit", *WHAT), "nothing to train"),
        (("submit", *WHAT, "no_such.yaml"), "no such file"),
        (("submit", *WHAT, *RUN[:2]), "output: missing"),
        (("submit", *WHAT[:5], "many", *RUN), "--gpus: found 'many'"),
        (("submit", *WHAT, "--logs", "/no/such", *RUN), "no such folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(stubs, words, told):
    done = stubs.run(SCRIPT, *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.splitlines()) <= 2, done.stderr
    assert stubs.calls() == []
