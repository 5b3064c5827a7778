"""Faults of a run on several hosts, each one injected: what happens then, and that nothing is lost."""

import json
import random
import signal
import time

import pytest
import tiny_runs
from pods import assert_close, assert_same_stream, examples

from jaxtune.saving.manifest import MANIFEST


def steps_of(output):
    return sorted(int(path.name) for path in (output / "checkpoints").glob("[0-9]*"))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)]
)
def test_a_signal_to_one_host_stops_all_at_one_update_saved(mixture, reference, tmp_path, number, code):
    output = tmp_path / "out"
    with mixture.start(output, processes=2, devices=2) as run:
        run.wait_until("step 2/8")
        run.send(1, number)
        assert run.wait(120) == [code, code], run.said()
    assert "saved; the same command goes on from there" in run.said(0)
    last = steps_of(output)[-1]
    assert 2 <= last < 8 and len(examples(output)) == last
    mixture.finish(output, processes=1, devices=4)
    assert_same_stream(output, reference)
    assert_close(output, reference)


@pytest.mark.long
def test_a_host_that_dies_ends_the_others_soon(mixture, tmp_path):
    with mixture.start(tmp_path / "out", "train.steps=500", processes=2, devices=1) as run:
        run.wait_until("step 2/500")
        run.send(1, signal.SIGKILL)
        killed = time.monotonic()
        codes = run.wait(120)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, 143), (codes, run.said(0))
    assert time.monotonic() - killed < 90


@pytest.mark.long
def test_an_error_of_one_host_alone_ends_all_soon(mixture, tmp_path):
    with mixture.start(tmp_path / "out", processes=2, devices=1, env={"FAILS_ALONE": "1"}) as run:
        run.wait_until("error: [Errno 5]", host=1)
        failed = time.monotonic()
        codes = run.wait(150)
    assert codes[1] == 1 and codes[0] not in (0, 143) and time.monotonic() - failed < 120


def test_a_host_that_hangs_is_told_by_the_others_with_every_threads_stack(mixture, tmp_path):
    output = tmp_path / "out"
    with mixture.start(output, "train.steps=500", "train.hang_seconds=8", processes=2, devices=1) as run:
        run.wait_until("step 2/500")
        run.send(1, signal.SIGSTOP)
        stopped = time.monotonic()
        run.processes[0].join(90)
        assert run.processes[0].exitcode == 1, run.said(0)
        assert time.monotonic() - stopped < 60
    told = (output / "hang-host0.txt").read_text()
    assert "nothing was done for 8 s (train.hang_seconds)" in run.said(0)
    for text in (told, run.said(0, last=30000)):
        assert "loop.py" in text and "most recent call first" in text


KILLS = [(2, 0), *(pytest.param(4, point, marks=pytest.mark.long) for point in range(10))]


@pytest.mark.parametrize(("processes", "point"), KILLS)
def test_killed_at_a_random_point_the_run_goes_on_on_another_host_count(mixture, reference, tmp_path, processes, point):
    """Kill -9 to all processes; resumed on 1 and on 2 in turn."""
    draw, output = random.Random(100 * processes + point), tmp_path / "out"
    with mixture.start(output, processes=processes, devices=4 // processes) as run:
        run.wait_until(f"step {draw.randint(1, 6)}/8")
        time.sleep(draw.uniform(0, 2))
        run.kill()
    again = 2 if point % 2 else 1
    mixture.finish(output, processes=again, devices=4 // again)
    assert_same_stream(output, reference)
    assert_close(output, reference)
    assert all((output / "checkpoints" / str(step) / MANIFEST).exists() for step in steps_of(output))


@pytest.mark.long
@pytest.mark.parametrize("damage", ["flipped bit", "half written"])
def test_a_damaged_checkpoint_is_passed_over_by_all_hosts(mixture, reference, tmp_path, damage):
    output = tmp_path / "out"
    mixture.finish(output, "train.steps=4", "optimizer.schedule=constant", processes=2, devices=2)
    newest = output / "checkpoints" / "4"
    if damage == "flipped bit":
        tiny_runs.flip_a_bit(max(newest.glob("state/**/d/*"), key=lambda file: file.stat().st_size))
    else:
        (newest / MANIFEST).unlink()
    run = mixture.finish(output, "optimizer.schedule=constant", processes=2, devices=2)
    assert f"{newest} is not usable" in run.said(0)
    assert ("SHA-256" if damage == "flipped bit" else "the save was cut off") in run.said(0)
    assert_same_stream(output, reference)


@pytest.mark.long
def test_storage_that_fails_for_a_while_is_tried_again_by_all_hosts(mixture, reference, tmp_path):
    """Host 1's first two shares of a manifest cannot be written."""
    output, keys = tmp_path / "out", ("checkpoint.retry_seconds=0.1", "checkpoint.save_seconds=20")
    run = mixture.finish(output, *keys, processes=2, devices=2, env={"FAILING_SHARES": "2"})
    assert "No space left on device" in run.said(0) and "host 1 (" in run.said(0)
    assert_same_stream(output, reference)


@pytest.mark.long
def test_storage_that_goes_on_failing_stops_all_hosts_with_a_word(mixture, tmp_path):
    output, keys = (
        tmp_path / "out",
        ("checkpoint.retry_seconds=0.1", "checkpoint.save_seconds=5", "checkpoint.retries=1"),
    )
    with mixture.start(output, *keys, processes=2, devices=2, env={"FAILING_SHARES": "99"}) as run:
        assert run.wait(180) == [1, 1], run.said()
    assert "cannot be saved" in run.said(0) and "give the same command to go on from there" in run.said(0)


@pytest.mark.long
def test_a_run_that_went_back_on_two_hosts_skips_the_same_batches_as_on_one(mixture, tmp_path):
    more = ("train.steps=50", "train.spike_factor=6", "train.spike_patience=2", "checkpoint.every_steps=10")
    for processes in (1, 2):
        mixture.finish(
            tmp_path / f"{processes}", *more, processes=processes, devices=4 // processes, env={"SPIKES": "43,44"}
        )
    records = [json.loads((tmp_path / f"{n}" / "rollbacks.json").read_text()) for n in (1, 2)]
    assert [(r["from"], r["to"]) for r in records[0]] == [(44, 40)] and records[0] == records[1]
    assert examples(tmp_path / "1") == examples(tmp_path / "2")
