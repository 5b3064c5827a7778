"""cloud/tpu-vm against a gcloud that runs out of quota, loses machines and hangs: nothing is billed without a word."""

import os
import re
import signal
import subprocess
import sys

import pytest
from cloud_stubs import ASLEEP, NOT_FOUND, Stubs, dry_lines

SCRIPT = "tpu-vm/tpu-vm.sh"
WHERE = ("--name", "mine", "--tpu", "v5e-16", "--zone", "some-zone", "--project", "some-project")
RUN = ("model.path=M", "data.train.0.path=gs://data/x.jsonl", "output=gs://some-bucket/run")
QUICK = ("--poll", "0", "--package", "jaxtune[tpu]")
DELETE = "gcloud compute tpus queued-resources delete mine --zone=some-zone --project=some-project --quiet --force"


def cloud(stubs: Stubs, *, states=("echo ACTIVE",), reports=("ended 0",), nodes=("echo READY",)) -> None:
    """A project in which nothing is called `mine` at first; `states` follow once it has been asked for."""
    stubs.answer("queued-resources describe", NOT_FOUND, *states)
    stubs.answer("value(state)", *nodes)
    stubs.answer("value(name)", "")
    stubs.answer("worker.sh report", *(f"echo jaxtune-job: {report} 7" for report in reports))


def verbs(stubs: Stubs) -> list[str]:
    """The calls in short: create, describe, nodes, scp, setup, start, report, stop, delete, left."""
    short = []
    for line in stubs.lines():
        worker = re.search(r"worker\.sh (\w+)", line)
        verb = worker[1] if worker else line.split()[4]
        short.append({"list": "left" if "value(name)" in line else "nodes"}.get(verb, verb))
    return short


UP = ["describe", "create", "describe", "nodes", "scp", "setup", "start"]


def test_up_creates_sets_up_runs_and_names_what_is_still_billed(stubs):
    cloud(stubs, reports=("running -", "ended 0"))
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, *RUN)
    assert done.returncode == 0, done.stderr
    assert verbs(stubs) == [*UP, "report", "report"]
    create = stubs.calls()[1]
    assert {"--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=mine"} <= set(create)
    assert "--valid-until-duration=21600s" in create, "a request that is forgotten must not turn into a bill"
    assert f"worker.sh start {' '.join(RUN)}" in stubs.lines()[6]
    assert "STILL BILLED: mine" in done.stderr
    assert DELETE in done.stderr


def test_delete_when_done_leaves_nothing(stubs):
    cloud(stubs)
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, "--delete-when-done", *RUN)
    assert done.returncode == 0, done.stderr
    assert verbs(stubs) == [*UP, "report", "delete", "left"]
    assert "STILL BILLED" not in done.stderr


@pytest.mark.parametrize("extra", [(), ("--slices", "2", "--spot"), ("--gcloud=--network=net",)])
def test_a_dry_run_prints_what_a_run_calls_and_calls_nothing(stubs, tmp_path, extra):
    words = ("up", *WHERE, *QUICK, *extra, "--delete-when-done", *RUN, "data.template=a 'b' $c")
    printed = dry_lines(stubs.run(SCRIPT, *words, "--dry-run"))
    assert stubs.calls() == []
    cloud(stubs, nodes=("echo READY; echo READY",) if "--slices" in extra else ("echo READY",))
    assert stubs.run(SCRIPT, *words).returncode == 0
    assert stubs.lines() == printed


@pytest.mark.parametrize("command", ["create", "setup", "run", "logs", "status", "stop", "delete", "resume"])
def test_every_command_has_a_dry_run(stubs, command):
    done = stubs.run(SCRIPT, command, *WHERE, "--dry-run", *RUN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gcloud compute tpus ")
    assert stubs.calls() == []


def test_several_slices_are_one_request_and_all_must_be_ready(stubs):
    cloud(stubs, nodes=("echo READY; echo CREATING", "echo READY; echo READY"))
    assert stubs.run(SCRIPT, "up", *WHERE, *QUICK, "--slices", "2", "--spot", *RUN).returncode == 0
    assert {"--node-count=2", "--node-prefix=mine", "--spot"} <= set(stubs.calls()[1])
    assert verbs(stubs)[:6] == ["describe", "create", "describe", "nodes", "describe", "nodes"]
    assert "--filter=name~/mine-(0|1)$" in stubs.calls()[3]


def test_a_preempted_tpu_is_deleted_and_made_again_and_the_same_command_goes_on(stubs):
    cloud(
        stubs,
        states=("echo ACTIVE", "echo SUSPENDED", "echo SUSPENDED", "echo ACTIVE"),
        reports=("running -",),
    )
    stubs.folder.joinpath("rules/003/1.sh").write_text("exit 255\n")  # then nobody answers
    stubs.folder.joinpath("rules/003/2.sh").write_text("echo jaxtune-job: ended 0 7\n")
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, "--spot", *RUN)
    assert done.returncode == 0, done.stderr
    again = ["describe", "describe", "delete", "left", "create", "describe", "nodes", "scp", "setup", "start", "report"]
    assert verbs(stubs) == [*UP, "report", "report", *again]
    starts = [line for line in stubs.lines() if "worker.sh start" in line]
    assert len(starts) == 2
    assert starts[0] == starts[1]


def test_a_node_that_is_preempted_while_the_request_looks_active_counts_too(stubs):
    cloud(stubs, nodes=("echo READY", "echo PREEMPTED", "echo READY"), reports=("ended 1", "ended 0"))
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, *RUN)
    assert done.returncode == 0, done.stderr
    assert verbs(stubs).count("create") == 2


@pytest.mark.parametrize("code", [143, 137, 134])
def test_a_run_that_saved_or_was_killed_is_started_again_on_the_same_tpu(stubs, code):
    cloud(stubs, reports=(f"ended {code}", "ended 0"))
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, *RUN)
    assert done.returncode == 0, done.stderr
    assert verbs(stubs) == [*UP, "report", "describe", "nodes", "stop", "start", "report"]


def test_restarts_are_bounded(stubs):
    cloud(stubs, reports=("ended 143",))
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, "--restarts", "3", *RUN)
    assert done.returncode == 1
    assert verbs(stubs).count("start") == 4
    assert "started again 3 times" in done.stderr
    assert DELETE in done.stderr


@pytest.mark.parametrize("code", [1, 2, 130])
def test_an_error_of_the_training_is_not_tried_again(stubs, code):
    cloud(stubs, reports=(f"ended {code}",))
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, *RUN)
    assert done.returncode == code
    assert verbs(stubs).count("start") == 1
    assert f"exit code {code}" in done.stderr
    assert DELETE in done.stderr


def test_an_error_of_the_training_deletes_the_tpu_where_that_was_asked_for(stubs):
    cloud(stubs, reports=("ended 1",))
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, "--delete-when-done", *RUN)
    assert done.returncode == 1
    assert verbs(stubs)[-2:] == ["delete", "left"]
    assert "STILL BILLED" not in done.stderr


def test_no_quota_is_said_once_and_leaves_nothing(stubs):
    stubs.answer("describe", NOT_FOUND)
    stubs.answer("create", "echo 'RESOURCE_EXHAUSTED: Quota limit TPUV5sPreemptible exceeded' >&2; exit 1")
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, *RUN)
    assert done.returncode == 1
    assert verbs(stubs) == ["describe", "create", "describe"]
    assert "no quota for v5litepod-16 in some-zone" in done.stderr
    assert "STILL BILLED" not in done.stderr


def test_a_request_that_failed_halfway_is_deleted_before_the_next_try(stubs):
    cloud(stubs, states=("echo FAILED", "echo ACTIVE"))
    stubs.answer("create", "echo 'INTERNAL: try again' >&2; exit 1", "")
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, *RUN)
    assert done.returncode == 0, done.stderr
    assert verbs(stubs)[:7] == ["describe", "create", "describe", "delete", "left", "create", "describe"]


def test_a_request_that_was_made_although_gcloud_failed_is_used(stubs):
    cloud(stubs, states=("echo PROVISIONING", "echo ACTIVE"))
    stubs.answer("create", "echo 'the connection broke' >&2; exit 1")
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, *RUN)
    assert done.returncode == 0, done.stderr
    assert verbs(stubs).count("create") == 1


def test_a_request_that_the_service_fails_is_deleted_and_told(stubs):
    stubs.answer("--format=value(state)", "echo 'no capacity, says the service'")
    cloud(stubs, states=("echo PROVISIONING", "echo FAILED"))
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, *RUN)
    assert done.returncode == 1
    assert verbs(stubs)[-2:] == ["delete", "left"]
    assert "no capacity, says the service" in done.stderr
    assert "STILL BILLED" not in done.stderr


def test_waiting_too_long_deletes_the_request(stubs):
    cloud(stubs, states=("echo WAITING_FOR_RESOURCES",))
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, "--wait", "0", *RUN)
    assert done.returncode == 1
    assert "after 0s the TPU was still WAITING_FOR_RESOURCES" in done.stderr
    assert verbs(stubs)[-2:] == ["delete", "left"]
    assert "STILL BILLED" not in done.stderr


def test_a_tpu_that_is_half_there_is_deleted_when_the_time_is_up(stubs):
    cloud(stubs, nodes=("echo READY; echo CREATING",))
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, "--slices", "2", "--wait", "0", *RUN)
    assert done.returncode == 1
    assert "1 of 2 slices are ready" in done.stderr
    assert "delete" in verbs(stubs)


def test_nodes_that_outlive_their_request_are_deleted(stubs):
    cloud(stubs)
    stubs.folder.joinpath("rules/002/0.sh").write_text("echo projects/p/locations/z/nodes/mine\n")
    done = stubs.run(SCRIPT, "delete", *WHERE)
    assert done.returncode == 0, done.stderr
    assert stubs.lines()[-1].startswith("gcloud compute tpus tpu-vm delete mine --zone=some-zone")


def test_deleting_is_tried_again_and_what_cannot_be_deleted_is_named(stubs):
    stubs.answer("describe", "echo ACTIVE")
    stubs.answer("queued-resources delete", "echo busy >&2; exit 1")
    done = stubs.run(SCRIPT, "delete", *WHERE)
    assert done.returncode == 1
    assert verbs(stubs).count("delete") == 5
    assert "mine could not be deleted" in done.stderr
    assert DELETE in done.stderr


def test_deleting_succeeds_at_last(stubs):
    stubs.answer("describe", "echo ACTIVE")
    stubs.answer("queued-resources delete", "exit 1", "exit 1", "")
    done = stubs.run(SCRIPT, "delete", *WHERE)
    assert done.returncode == 0, done.stderr
    assert verbs(stubs).count("delete") == 3
    assert "STILL BILLED" not in done.stderr


def test_what_is_there_already_is_not_touched(stubs):
    stubs.answer("describe", "echo ACTIVE")
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, "--delete-when-done", *RUN)
    assert done.returncode == 1
    assert verbs(stubs) == ["describe"]
    assert "is there already" in done.stderr


def test_resume_follows_a_run_that_is_under_way(stubs):
    stubs.answer("queued-resources describe", "echo ACTIVE")
    stubs.answer("value(state)", "echo READY")
    stubs.answer("worker.sh report", "echo a line; echo jaxtune-job: running - 1", "echo jaxtune-job: ended 0 1")
    done = stubs.run(SCRIPT, "resume", *WHERE, *QUICK, *RUN)
    assert done.returncode == 0, done.stderr
    assert verbs(stubs) == ["describe", "describe", "nodes", "report", "report"]


def test_resume_makes_anew_what_was_suspended(stubs):
    stubs.answer("queued-resources describe", "echo SUSPENDED", "echo SUSPENDED", "echo ACTIVE")
    stubs.answer("value(state)", "echo READY")
    stubs.answer("worker.sh report", "exit 1", "echo jaxtune-job: ended 0 1")
    done = stubs.run(SCRIPT, "resume", *WHERE, *QUICK, *RUN)
    assert done.returncode == 0, done.stderr
    assert verbs(stubs)[:5] == ["describe", "describe", "delete", "left", "create"]


def test_a_set_up_that_fails_on_a_tpu_that_is_there_ends_with_the_bill_named(stubs):
    cloud(stubs)
    stubs.answer("worker.sh setup", "exit 1")
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, *RUN)
    assert done.returncode == 1
    assert verbs(stubs).count("setup") == 5
    assert DELETE in done.stderr


def test_a_tpu_that_is_taken_away_during_set_up_is_made_again(stubs):
    cloud(stubs, states=("echo ACTIVE", "echo SUSPENDED", "echo SUSPENDED", "echo ACTIVE"))
    stubs.answer("worker.sh setup", *["exit 255"] * 5, "")
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, *RUN)
    assert done.returncode == 0, done.stderr
    assert verbs(stubs).count("create") == 2
    assert verbs(stubs).count("start") == 1


def test_one_of_several_slices_that_is_missing_counts_as_taken_away(stubs):
    both = "echo READY; echo READY"
    cloud(stubs, nodes=(both, "echo READY", both), reports=("ended 1", "ended 0"))
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, "--slices", "2", *RUN)
    assert done.returncode == 0, done.stderr
    assert verbs(stubs).count("create") == 2


def test_nodes_that_cannot_be_listed_are_not_taken_for_lost(stubs):
    cloud(stubs, nodes=("echo READY", "exit 1"), reports=("ended 143", "ended 0"))
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, *RUN)
    assert done.returncode == 0, done.stderr
    assert verbs(stubs).count("create") == 1


def test_a_run_that_saved_because_its_machine_goes_waits_for_the_news(stubs):
    """SIGTERM reaches the run before the state of the TPU tells of the preemption."""
    cloud(
        stubs,
        states=("echo ACTIVE", "echo ACTIVE", "echo ACTIVE", "echo SUSPENDED", "echo SUSPENDED", "echo ACTIVE"),
        reports=("ended 143", "ended 0"),
    )
    stubs.answer("worker.sh start", "", "exit 255", "exit 255", "")
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, *RUN)
    assert done.returncode == 0, done.stderr
    assert verbs(stubs).count("create") == 2


def test_machines_that_do_not_answer_any_more_count_as_taken_away(stubs):
    cloud(stubs)
    for number in range(10):
        stubs.folder.joinpath(f"rules/003/{number}.sh").write_text("exit 255\n")
    stubs.folder.joinpath("rules/003/10.sh").write_text("echo jaxtune-job: ended 0 7\n")
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, *RUN)
    assert done.returncode == 0, done.stderr
    assert verbs(stubs).count("create") == 2


def test_no_answer_to_the_first_question_creates_nothing(stubs):
    stubs.answer("describe", "echo 'You do not currently have an active account selected.' >&2; exit 1")
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, *RUN)
    assert done.returncode == 1
    assert "active account" in done.stderr
    assert "STILL BILLED" not in done.stderr
    assert verbs(stubs) == ["describe"]


@pytest.mark.parametrize("deletes", [False, True])
def test_ctrl_c_tells_what_is_billed_or_deletes_it(stubs, deletes):
    cloud(stubs)
    stubs.folder.joinpath("rules/003/0.sh").write_text(ASLEEP)
    words = ("up", *WHERE, *QUICK, *(["--delete-when-done"] if deletes else []), *RUN)
    process = stubs.start(SCRIPT, *words)
    stubs.wait_until_asleep(process)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=20)
    assert process.returncode == 130
    if deletes:
        assert verbs(stubs)[-3:] == ["stop", "delete", "left"]
        assert "STILL BILLED" not in told
    else:
        assert verbs(stubs)[-1] == "report"
        assert DELETE in told
        assert "resume" in told


def test_variables_are_handed_over_in_a_file_and_never_printed(stubs):
    cloud(stubs)
    stubs.answer("scp", f"cp -r ${{!#}} /dev/null 2>/dev/null; cp -r $HOME/.cache/jaxtune-cloud {stubs.folder}/seen")
    done = stubs.run(SCRIPT, "up", *WHERE, *QUICK, "--env", "TOKEN", *RUN, TOKEN="it's secret")
    assert done.returncode == 0, done.stderr
    seen = stubs.folder / "seen/mine/jaxtune-job"
    read = subprocess.run(["bash", "-c", f'. {seen}/env; printf %s "$TOKEN"'], capture_output=True, text=True)
    assert read.stdout == "it's secret"
    assert (stubs.folder / "seen/mine").stat().st_mode & 0o077 == 0 or seen.stat().st_mode & 0o077 == 0
    assert "secret" not in done.stdout + done.stderr + str(stubs.calls())
    assert not (stubs.folder / "home/.cache/jaxtune-cloud/mine/jaxtune-job").exists()


def test_without_jaxtune_s_packages_the_configuration_is_not_checked_and_its_output_is_found(stubs, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    config = tmp_path / "tune.yaml"
    config.write_text("# tune\noutput: 'gs://some-bucket/run' # there\nmodel:\n  path: M\n")
    done = stubs.run(SCRIPT, "up", *WHERE, str(config), "--dry-run", PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    assert "not checked beforehand" in done.stderr
    assert "would write to gs://some-bucket/run\n" in done.stderr
    config.write_text("output: runs/here\n")
    assert "expected a bucket" in stubs.run(SCRIPT, "up", *WHERE, str(config), "--dry-run", PYTHON=str(python)).stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "no command"),
        (("fly",), "fly: expected up"),
        (("up",), "--name is missing"),
        (("up", "--name", "Mine"), "--name: found 'Mine'"),
        (("up", *WHERE[:2], *WHERE[4:]), "--tpu is missing"),
        (("up", *WHERE[:2], "--tpu", "v9-8", *WHERE[4:]), "--tpu: found 'v9-8'"),
        (("up", *WHERE[:2], "--tpu", "v5p-7", *WHERE[4:]), "v5p-N counts TensorCores"),
        (("up", *WHERE[:2], "--tpu", "tpu7x-64", *WHERE[4:]), "not rented as a TPU VM"),
        (("up", *WHERE[:4], "--project", "p"), "--zone is missing"),
        (("up", *WHERE[:6]), "--project is missing"),
        (("up", *WHERE), "nothing to train"),
        (("up", *WHERE, "no_such.yaml"), "no_such.yaml: no such file"),
        (("up", *WHERE, *RUN, "output=runs/x"), "expected a bucket"),
        (("up", *WHERE, *RUN, "trian.steps=3"), "trian: unknown key"),
        (("up", *WHERE, "--slices", "two", *RUN), "--slices: found 'two'"),
        (("up", *WHERE, "--poll"), "--poll needs a value"),
        (("up", *WHERE, "--env", "NOBODY_SET_THIS", *RUN), "--env NOBODY_SET_THIS"),
        (("up", *WHERE, "--fast", "x", *RUN), "--fast is no option"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(stubs, words, told):
    done = stubs.run(SCRIPT, *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.splitlines()) <= 2, done.stderr
    assert stubs.calls() == []
