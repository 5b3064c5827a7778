"""The same run on any number of hosts: the same examples in every row of every update, and the same losses."""

import pytest
import tiny_runs
from pods import assert_close, assert_same_stream, examples


def test_two_hosts_learn_what_one_learns_from_the_same_rows(mixture, reference, tmp_path):
    run = mixture.finish(tmp_path / "out", processes=2, devices=2)
    assert_same_stream(tmp_path / "out", reference)
    assert_close(tmp_path / "out", reference)
    assert "step 8/8" in run.said(0) and "step 8/8" not in run.said(1), "host 0 speaks"
    assert (tmp_path / "out" / "README.md").exists() and not list((tmp_path / "out").glob(".*"))


def experts(mixture):
    folder = mixture.root / "experts"
    if not folder.exists():
        tiny_runs.write_model(folder, "mixtral")
    return folder


def assert_the_same_everywhere(mixture, tmp_path, *more, shapes=((1, 8), (2, 4), (4, 2)), env=None, **tolerances):
    """Runs the mixture on every shape (processes, devices of each) and compares the others with the first."""
    for processes, devices in shapes:
        mixture.finish(tmp_path / f"{processes}", *more, processes=processes, devices=devices, env=env or {})
    for processes, _ in shapes[1:]:
        assert_same_stream(tmp_path / f"{processes}", tmp_path / f"{shapes[0][0]}")
        assert_close(tmp_path / f"{processes}", tmp_path / f"{shapes[0][0]}", **tolerances)


LONGER = ("train.steps=20", "checkpoint.every_steps=10")
FULL = ("tuning.method=full", "optimizer.learning_rate=0.003")


@pytest.mark.long
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("method", [(), FULL], ids=["lora", "full"])
@pytest.mark.parametrize("model", ["dense", "experts"])
def test_hosts_and_devices_change_nothing(mixture, tmp_path, model, method, bits):
    """Losses of 20 updates within 1e-6 at the first and 1e-4 at the last, in float64 within 1e-9 at all."""
    more = [*LONGER, *method, "data.eval_fraction=0.1", "eval.every_steps=10"]
    if model == "experts":
        more += [f"model.path={experts(mixture)}", "mesh.expert=2"]
    precise = {"env": {"FLOAT64": "1"}, "first": 1e-9, "last": 1e-9} if bits == 64 else {}
    assert_the_same_everywhere(mixture, tmp_path, *more, **precise)


KINDS = {
    "microbatches, phases, rows made by workers": (
        "tuning.method=full",
        "train.microbatch_rows=8",
        "train.batch_rows=16",
        "data.workers=2",
        "data.phases.0.weights.first=1",
        "data.phases.0.weights.second=1",
        "data.phases.0.until.tokens=1500",
        "data.phases.1.weights.first=1",
        "data.phases.1.weights.second=5",
    ),
    "context": ("mesh.context=4", "mesh.fsdp=2"),
    "slices": ("mesh.slice=2", "mesh.fsdp=4"),
    "all of a host's devices in one group": ("mesh.data=2", "mesh.tensor=4", "mesh.fsdp=1"),
    "a group of both hosts": ("mesh.data=1", "mesh.tensor=8", "mesh.fsdp=1"),
    "tensor and fsdp": ("mesh.tensor=4", "mesh.fsdp=2"),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_two_hosts_change_nothing_on_any_mesh(mixture, tmp_path, kind):
    assert_the_same_everywhere(mixture, tmp_path, *LONGER, *KINDS[kind], shapes=((1, 8), (2, 4)))


# Hosts that are not one run.


def test_hosts_with_other_configurations_stop_and_say_which(mixture, tmp_path):
    words = [mixture.words(tmp_path / "out"), mixture.words(tmp_path / "out", "seed=7")]
    with mixture.start(tmp_path / "out", processes=2, devices=1, given=words) as run:
        assert run.wait(120) == [1, 1]
    for host in (0, 1):
        assert "the hosts of this run disagree on seed" in run.said(host) and "host 1 (" in run.said(host)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_hosts_with_other_data_stop_and_say_which_source(mixture, tmp_path):
    """One relative path, two working directories: the files differ in a word."""
    for host in (0, 1):
        (tmp_path / f"{host}").mkdir()
        rows = [*tiny_runs.rows(40), {"instruction": "say", "output": f"host {host}"}]
        tiny_runs.write_rows(tmp_path / f"{host}" / "mine.jsonl", rows)
    cwds = [tmp_path / "0", tmp_path / "1"]
    with mixture.start(tmp_path / "out", "data.train.0.path=mine.jsonl", processes=2, devices=1, cwds=cwds) as run:
        assert run.wait(120) == [1, 1]
    assert "disagree on data: source mine" in run.said(1)


@pytest.mark.long
def test_hosts_that_do_not_share_the_output_folder_stop(mixture, tmp_path):
    cwds = [tmp_path / "0", tmp_path / "1"]
    for cwd in cwds:
        cwd.mkdir()
    with mixture.start(tmp_path / "out", "output=here", processes=2, devices=1, cwds=cwds) as run:
        assert run.wait(180) == [1, 1]
    assert "is not the folder that host 0 writes" in run.said(0) and "host 1 (" in run.said(0)


@pytest.mark.long
def test_a_checkpoint_of_two_hosts_goes_on_in_one(mixture, reference, tmp_path):
    """Stopped after 4 of 8 updates on 2 x 2; the rest on one device in one process."""
    output = tmp_path / "out"
    mixture.finish(output, "train.steps=4", "optimizer.schedule=constant", processes=2, devices=2)
    assert len(examples(output)) == 4
    mixture.finish(output, "optimizer.schedule=constant", processes=1, devices=1)
    assert_same_stream(output, reference)
