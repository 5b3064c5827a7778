"""cloud/gke: a JobSet that a cluster accepts, kubectl and gcloud that fail halfway, XPK's words."""

import copy
import os
import pathlib
import re
import shlex
import signal
import subprocess

import jsonschema
import pytest
import yaml
from cloud_stubs import ASLEEP, Stubs, dry_lines, render
from jobset_schema import JOBSET

SCRIPT = "gke/gke.sh"
RUN = ("model.path=M", "data.train.0.path=gs://data/x.jsonl", "output=gs://some-bucket/run")
JOB = ("--name", "mine", "--tpu", "v5p-32", "--image", "some/image:1")
QUICK = ("--poll", "0")
PLACE = ("--cluster", "some-cluster", "--location", "some-zone", "--project", "some-project")
DELETE = "kubectl --namespace=default delete jobset/mine configmap/mine --ignore-not-found"
CONFIG = """\
# a comment that travels too
output: gs://some-bucket/run
model:
  path: M
data:
  train:
    - path: gs://data/x.jsonl
"""


@pytest.fixture
def config(tmp_path: pathlib.Path) -> str:
    file = tmp_path / "tune.yaml"
    file.write_text(CONFIG)
    return str(file)


def jobset_of(*words: str) -> dict:
    done = render("gke/render.py", *words)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))[-1]


def problems_of(jobset: dict) -> list[str]:
    """What the schema and the rules behind it (as JobSet's webhook holds them) say against a JobSet."""
    problems = [error.message for error in jsonschema.Draft202012Validator(JOBSET).iter_errors(jobset)]
    if problems:
        return problems
    spec, name = jobset["spec"], jobset["metadata"]["name"]
    jobs = {job["name"]: job for job in spec["replicatedJobs"]}
    coordinator = jobs.get(spec["coordinator"]["replicatedJob"])
    if coordinator is None:
        return ["the coordinator is no replicated job"]
    inner = coordinator["template"]["spec"]
    if (
        spec["coordinator"]["jobIndex"] >= coordinator["replicas"]
        or spec["coordinator"]["podIndex"] >= inner["completions"]
    ):
        problems.append("the coordinator has no such pod")
    if inner["completionMode"] != "Indexed":
        problems.append("a coordinator needs indexed pods")
    longest = f"{name}-slice-{coordinator['replicas'] - 1}-{inner['completions'] - 1}-abcde"
    if len(longest) > 63:
        problems.append(f"{longest} is too long for the name of a pod")
    for rule in spec["failurePolicy"]["rules"]:
        if not re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"]):
            problems.append(f"{rule['name']} is no name of a rule")
    return problems


@pytest.mark.parametrize(
    ("tpu", "slices", "accelerator", "shape", "hosts", "chips"),
    [
        ("v4-8", 1, "tpu-v4-podslice", "2x2x1", 1, 4),
        ("v5p-8", 1, "tpu-v5p-slice", "2x2x1", 1, 4),
        ("v5p-32", 2, "tpu-v5p-slice", "2x2x4", 4, 4),
        ("v5p:4x4x16", 1, "tpu-v5p-slice", "4x4x16", 64, 4),
        ("v5e-1", 1, "tpu-v5-lite-podslice", "1x1", 1, 1),
        ("v5e-8", 1, "tpu-v5-lite-podslice", "2x4", 1, 8),
        ("v5litepod-256", 4, "tpu-v5-lite-podslice", "16x16", 64, 4),
        ("v6e-16", 1, "tpu-v6e-slice", "4x4", 4, 4),
        ("tpu7x-64", 2, "tpu7x", "4x4x4", 16, 4),
    ],
)
def test_a_tpu_name_becomes_selectors_pods_and_chips(config, tpu, slices, accelerator, shape, hosts, chips):
    found = jobset_of("--name", "a" * 40, "--tpu", tpu, "--slices", str(slices), "--image", "i", "--spot", config)
    assert problems_of(found) == []
    job = found["spec"]["replicatedJobs"][0]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": shape,
        "cloud.google.com/gke-spot": "true",
    }
    assert job["replicas"] == slices
    assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == hosts
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}


def test_preemptions_restart_all_and_errors_end_the_jobset(config):
    found = jobset_of(*JOB, "--restarts", "7", "--grace", "33", config)
    spec = found["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["values"] == [1, 2, 130], "143, 137 and 134 are left to the JobSet, which restarts"
    assert rule["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] == 33
    assert spec["failurePolicy"]["maxRestarts"] == 7
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_a_folder_of_the_machine_is_there_for_local_copies(config):
    found = jobset_of(*JOB, "--local-disk", "/var/jaxtune", config, "checkpoint.local.path=/var/jaxtune")
    assert problems_of(found) == []
    pod = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    mounted = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounted["local-disk"] == "/var/jaxtune"
    assert volumes["local-disk"]["hostPath"] == {"path": "/var/jaxtune", "type": "DirectoryOrCreate"}
    refused = render("gke/render.py", *JOB, "--local-disk", "copies", config)
    assert refused.returncode == 2 and "--local-disk: found copies; expected a path from the root on" in refused.stderr


def test_another_exit_code_of_a_preempted_run_is_heard(config):
    found = jobset_of(*JOB, config, "train.preempted_exit_code=2")
    rule = found["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"][0]
    assert rule["onExitCodes"]["values"] == [1, 130]


def test_the_configuration_travels_as_it_is_written(config):
    documents = list(
        yaml.safe_load_all(render("gke/render.py", *JOB, config, "seed=3", "data.template=$(HOME)").stdout)
    )
    assert documents[0]["data"] == {"config.yaml": CONFIG}
    container = documents[1]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", "jaxtune.train"]
    assert container["args"] == ["/etc/jaxtune/config.yaml", "seed=3", "data.template=$$(HOME)"]


def test_without_a_file_there_is_no_config_map():
    (document,) = yaml.safe_load_all(render("gke/render.py", *JOB, *RUN).stdout)
    assert document["kind"] == "JobSet"
    assert problems_of(document) == []


def test_the_optional_flags_are_accepted_by_the_schema(config):
    flags = ("--queue", "q", "--service-account", "s", "--secret", "hf", "--namespace", "n", "--slices", "2")
    found = jobset_of(*JOB, *flags, config)
    assert problems_of(found) == []
    assert found["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda found: found["spec"].update(replicatedJob=[]),
        lambda found: found["spec"]["failurePolicy"]["rules"][0].update(action="Fail"),
        lambda found: found["spec"]["failurePolicy"]["rules"][0].update(name="an error"),
        lambda found: found["spec"]["replicatedJobs"][0].pop("template"),
        lambda found: found["spec"]["replicatedJobs"][0].update(replicas="2"),
        lambda found: found["spec"]["coordinator"].update(podIndex=99),
        lambda found: found["metadata"].update(name="a" * 60),
    ],
)
def test_the_check_of_manifests_sees_what_is_wrong(config, spoil):
    found = copy.deepcopy(jobset_of(*JOB, config))
    spoil(found)
    assert problems_of(found)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((*JOB[:2], "--tpu", "v9-8", *JOB[4:], *RUN), "--tpu: found 'v9-8'"),
        ((*JOB[:2], "--tpu", "h100-8", *JOB[4:], *RUN), "--tpu: found 'h100-8'"),
        ((*JOB[:2], "--tpu", "v5p-8", *JOB[4:], "--slices", "2", *RUN), "slices of several machines only"),
        ((*JOB, "--slices", "0", *RUN), "--slices"),
        ((*JOB, "no_such.yaml"), "no_such.yaml: no such file"),
        ((*JOB, *RUN, "output=runs/x"), "expected a bucket"),
        ((*JOB, *RUN, "trian.steps=3"), "trian: unknown key"),
        (("--name", "A", *JOB[2:], *RUN), "--name: found 'A'"),
    ],
)
def test_a_mistake_is_told_before_anything_is_applied(words, told):
    done = render("gke/render.py", *words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


# ---- the script


def test_up_applies_waits_and_says_what_stays(stubs, config):
    stubs.answer("terminalState", "echo ' 0'", "echo ' 1'", "echo 'Completed 1'")
    done = stubs.run(SCRIPT, "up", *JOB, *QUICK, config)
    assert done.returncode == 0, done.stderr
    assert [call[2] for call in stubs.calls()] == ["get", "apply", "get", "get", "get"]
    manifest = stubs.calls()[1][3].removeprefix("--filename=")
    assert problems_of(list(yaml.safe_load_all(pathlib.Path(manifest).read_text()))[-1]) == []
    assert "started again, 1 of at most 20 times" in done.stderr
    assert DELETE in done.stderr
    assert "Nodes are billed" in done.stderr


@pytest.mark.parametrize("command", ["up", "submit", "status", "logs", "delete"])
def test_a_dry_run_prints_what_a_run_calls(stubs, config, command):
    words = (command, *JOB, *QUICK, "--spot", "--delete-when-done", config, "data.template=a b")
    printed = dry_lines(stubs.run(SCRIPT, *words, "--dry-run"))
    assert stubs.calls() == []
    stubs.answer("terminalState", "echo 'Completed 0'")
    assert stubs.run(SCRIPT, *words).returncode == 0
    assert stubs.lines() == printed


@pytest.mark.parametrize("command", ["pool", "pool-delete", "xpk", "xpk-delete"])
def test_pools_and_xpk_have_a_dry_run_too(stubs, config, command):
    words = (command, *JOB, *PLACE, "--slices", "2", "--spot", config, "data.template=a 'b'")
    printed = dry_lines(stubs.run(SCRIPT, *words, "--dry-run"))
    assert stubs.calls() == []
    assert stubs.run(SCRIPT, *words).returncode == 0
    assert stubs.lines() == printed
    assert printed


def test_a_failed_run_is_an_error_and_names_its_log(stubs):
    stubs.answer("terminalState", "echo 'Failed 2'")
    done = stubs.run(SCRIPT, "up", *JOB, *QUICK, "--delete-when-done", *RUN)
    assert done.returncode == 1
    assert "logs --selector" in done.stderr
    assert stubs.lines()[-1] == DELETE


def test_a_manifest_that_is_refused_leaves_nothing(stubs):
    stubs.answer("apply", "echo 'quota exceeded' >&2; exit 1")
    done = stubs.run(SCRIPT, "up", *JOB, *QUICK, *RUN)
    assert done.returncode == 1
    assert [call[2] for call in stubs.calls()] == ["get", *["apply"] * 5, "delete"]
    assert "nothing of it is left" in done.stderr


def test_what_cannot_be_deleted_is_named_with_its_command(stubs):
    stubs.answer("apply", "exit 1")
    stubs.answer("delete", "exit 1")
    done = stubs.run(SCRIPT, "up", *JOB, *QUICK, *RUN)
    assert done.returncode == 1
    assert "could not be deleted: kubectl --namespace=default delete jobset/mine" in done.stderr


def test_a_jobset_of_the_same_name_is_not_touched(stubs):
    stubs.answer("get jobset", "echo jobset.jobset.x-k8s.io/mine")
    done = stubs.run(SCRIPT, "up", *JOB, *QUICK, "--delete-when-done", *RUN)
    assert done.returncode == 1
    assert "is there already" in done.stderr
    assert [call[2] for call in stubs.calls()] == ["get"]


def test_kubectl_may_fail_for_a_moment(stubs):
    stubs.answer("terminalState", "exit 1", "exit 1", "echo 'Completed 0'")
    stubs.answer("apply", "exit 1", "")
    assert stubs.run(SCRIPT, "up", *JOB, *QUICK, *RUN).returncode == 0


def test_ctrl_c_says_what_is_still_there(stubs):
    stubs.answer("terminalState", ASLEEP)
    process = stubs.start(SCRIPT, "up", *JOB, *QUICK, *RUN)
    stubs.wait_until_asleep(process)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "STILL THERE: JobSet mine" in told
    assert DELETE in told


def test_pools_are_one_a_slice_with_a_node_for_each_machine(stubs):
    done = stubs.run(SCRIPT, "pool", *JOB, *PLACE, "--slices", "2", "--spot")
    assert done.returncode == 0, done.stderr
    for number, call in enumerate(stubs.calls()):
        assert call[:5] == ["gcloud", "container", "node-pools", "create", f"mine-{number}"]
        assert {"--machine-type=ct5p-hightpu-4t", "--num-nodes=4", "--tpu-topology=2x2x4", "--spot"} <= set(call)
    assert "BILLED from now on: mine-0 mine-1" in done.stderr


def test_half_of_the_pools_is_deleted(stubs):
    stubs.answer("create mine-1", "echo 'Quota exceeded' >&2; exit 1")
    done = stubs.run(SCRIPT, "pool", *JOB, *PLACE, "--slices", "3")
    assert done.returncode == 1
    assert [call[3:5] for call in stubs.calls()] == [
        ["create", "mine-0"],
        ["create", "mine-1"],
        ["delete", "mine-0"],
        ["delete", "mine-1"],
    ]
    assert "no node pools were made" in done.stderr


def test_a_pool_that_was_there_before_is_not_deleted(stubs):
    stubs.answer("create mine-1", "echo 'Already exists: nodePools/mine-1' >&2; exit 1")
    done = stubs.run(SCRIPT, "pool", *JOB, *PLACE, "--slices", "2")
    assert done.returncode == 1
    assert "Already exists" in done.stderr
    assert [call[3:5] for call in stubs.calls()][2:] == [["delete", "mine-0"]]


def test_a_workload_that_was_there_before_is_not_deleted(stubs):
    stubs.answer("workload create", "echo 'mine already exists, XPK will not create this workload.'; exit 1")
    done = stubs.run(SCRIPT, "xpk", *JOB, *PLACE, *RUN)
    assert done.returncode == 1
    assert len(stubs.calls()) == 1


def test_a_pool_that_is_not_there_is_deleted_already_and_one_that_stays_is_named(stubs):
    stubs.answer("delete mine-0", "echo 'Not found: nodePools/mine-0' >&2; exit 1")
    stubs.answer("delete mine-1", "echo 'operation in progress' >&2; exit 1")
    done = stubs.run(SCRIPT, "pool-delete", *JOB, *PLACE, "--slices", "2")
    assert done.returncode == 1
    assert "STILL BILLED: node pools mine-1." in done.stderr
    assert "gcloud container node-pools delete mine-1 --cluster=some-cluster" in done.stderr


def test_xpk_gets_the_configuration_by_the_bucket_and_a_shape(stubs, config):
    done = stubs.run(SCRIPT, "xpk", *JOB[:2], "--tpu", "tpu7x-64", *JOB[4:], *PLACE, config, "data.template=a b")
    assert done.returncode == 0, done.stderr
    copied, created = stubs.calls()
    assert copied == ["gcloud", "storage", "cp", config, "gs://some-bucket/run.yaml"]
    assert "--tpu-type=tpu7x-4x4x4" in created
    command = next(word for word in created if word.startswith("--command=")).removeprefix("--command=")
    assert shlex.split(command) == [
        "exec", "python", "-m", "jaxtune.train", "gs://some-bucket/run.yaml", "data.template=a b",
    ]  # fmt: skip


def test_a_workload_that_xpk_half_made_is_deleted(stubs):
    stubs.answer("workload create", "exit 1")
    done = stubs.run(SCRIPT, "xpk", *JOB, *PLACE, *RUN)
    assert done.returncode == 1
    assert stubs.calls()[-1][1:3] == ["workload", "delete"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "no command"),
        (("fly",), "fly: expected up"),
        (("up", *JOB[:4], *RUN), "--image is missing"),
        (("up", *JOB[:2], *JOB[4:], *RUN), "--tpu is missing"),
        (("up", *JOB, "no_such.yaml"), "no such file"),
        (("pool", *JOB, *PLACE[2:]), "--cluster is missing"),
        (("pool", *JOB, *PLACE[:2], *PLACE[4:]), "--location is missing"),
        (("pool", *JOB, *PLACE[:4]), "--project is missing"),
        (("xpk", *JOB, *PLACE), "nothing to train"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(stubs, words, told):
    done = stubs.run(SCRIPT, *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert stubs.calls() == []


def test_stubs_answer_in_order(tmp_path):
    """The stand-ins themselves: rules in order, answers in order, the last one kept, calls recorded word by word."""
    stubs = Stubs(tmp_path / "s")
    stubs.answer("get x", "echo one", "echo two; exit 3")
    environment = os.environ | stubs.environment
    told = [
        subprocess.run(["kubectl", "get", "x\ny"], env=environment, capture_output=True, text=True) for _ in range(3)
    ]
    assert [(one.stdout, one.returncode) for one in told] == [("one\n", 0), ("two\n", 3), ("two\n", 3)]
    assert stubs.calls() == [["kubectl", "get", "x\ny"]] * 3
