"""Spikes: known by what is usual, not applied, gone back from after several in a row, their batches not seen again."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from jaxtune import loop
from jaxtune.guard import HISTORY, after, initial_guard, limits
from jaxtune.train import train


def watched(values, norms=None):
    """The guard after updates with these losses, all applied."""
    guard, step = initial_guard(), jax.jit(after)
    for loss, norm in zip(values, values if norms is None else norms, strict=True):
        guard = step(guard, jnp.float32(loss), jnp.float32(norm), jnp.bool_(True))
    return guard


def test_nothing_is_a_spike_before_enough_was_seen():
    assert float(limits(watched([1.0] * (HISTORY - 1)), 6.0).loss) == np.inf
    assert float(limits(watched([1.0] * HISTORY), 6.0).loss) == pytest.approx(1.06)
    assert float(limits(watched([1.0] * HISTORY), None).norm) == np.inf


def test_limits_lie_so_many_deviations_above_the_median():
    values = np.random.default_rng(0).normal(2.0, 0.1, 300)
    found = limits(watched(values, norms=3 * values), 6.0)
    assert float(found.loss) == pytest.approx(2.6, abs=0.2) and float(found.norm) == pytest.approx(7.8, abs=0.6)


def test_neither_the_fall_at_the_beginning_nor_a_far_value_hides_a_spike():
    usual = list(np.random.default_rng(0).normal(2.0, 0.1, 40))
    assert float(limits(watched([12.0, 9.0, 7.0, 5.0, 4.0, 3.0, *usual, 1000.0]), 6.0).loss) < 3.2


def test_an_update_that_is_not_applied_only_counts():
    guard = watched([2.0, 2.1, 1.9])
    later = after(guard, jnp.float32(jnp.nan), jnp.float32(9.0), jnp.bool_(False))
    assert (int(later.spikes), int(later.seen)) == (1, 3)
    np.testing.assert_array_equal(later.losses, guard.losses)
    np.testing.assert_array_equal(later.norms, guard.norms)
    assert int(after(later, jnp.float32(2.0), jnp.float32(2.0), jnp.bool_(True)).spikes) == 0


# Whole runs.


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return tiny_runs.write_model(folder / "base"), tiny_runs.write_rows(folder / "data.jsonl", tiny_runs.rows(60))


@pytest.fixture
def run(inputs, tmp_path, monkeypatch):
    """run(name, *words, wrong, dies): trains with wrong targets in these batches; the process dies at batch `dies`."""

    def start(name, *words, wrong=(), dies=None):
        calls, real = [0], loop.Loop._put

        def put(self, batch):
            calls[0] += 1
            if calls[0] == dies:
                raise RuntimeError("the machine is gone")
            if calls[0] in wrong:
                targets = ((batch.arrays.targets + 137) % 256).astype(np.int32)
                batch = batch._replace(arrays=batch.arrays._replace(targets=targets))
            return real(self, batch)

        more = ("train.steps=56", "train.spike_factor=6", "train.spike_patience=2", "checkpoint.every_steps=10")
        quiet = ("export.hf=false", "export.adapter=false", "log.examples=true")
        with monkeypatch.context() as patch:
            patch.setattr(loop.Loop, "_put", put)
            return train(tiny_runs.config(*inputs, tmp_path / name, *more, *quiet, *words))

    return start


def stream(folder):
    return [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]


def test_a_spike_is_not_applied_and_told(run, tmp_path, capsys):
    assert run("out", wrong=(48,)).exit_code == 0
    said = capsys.readouterr().out
    assert "step 48: loss" in said and "(limits" in said and "the update is not applied" in said
    records = {r["step"]: r for r in tiny_runs.records(tmp_path / "out") if "loss" in r}
    assert records[56]["skipped_steps"] == 1 and records[49]["loss"] < 0.5 * records[48]["loss"]
    assert not (tmp_path / "out" / "rollbacks.json").exists()


def test_after_several_in_a_row_the_run_goes_back_and_on_with_the_data_that_follows(run, tmp_path, capsys):
    run("plain", "train.steps=62")
    assert run("out", wrong=(44, 45)).exit_code == 0
    assert "back to step 40, and on with the data that follows" in capsys.readouterr().out
    (record,) = json.loads((tmp_path / "out" / "rollbacks.json").read_text())
    assert (record["from"], record["to"]) == (45, 40)
    plain, went = [one["rows"] for one in stream(tmp_path / "plain")], [one["rows"] for one in stream(tmp_path / "out")]
    assert went == plain[:40] + plain[45:61], "the 40 updates kept, 5 batches skipped, 16 updates more"
    assert [r["step"] for r in tiny_runs.records(tmp_path / "out") if "loss" in r] == list(range(1, 57))
    assert [r["went_back_from"] for r in tiny_runs.records(tmp_path / "out") if "went_back_from" in r] == [45]


@pytest.mark.parametrize(("copies_every", "to"), [(None, 40), (2, 42)], ids=["storage alone", "local copies"])
def test_a_run_killed_after_it_went_back_does_not_see_the_skipped_batches(run, tmp_path, copies_every, to):
    """With copies on the host's own disk it goes back to one of these; those of steps gone back from do not count."""

    def disk(name):
        copies = (f"checkpoint.local.path={tmp_path / name}-disk", f"checkpoint.local.every_steps={copies_every}")
        return copies if copies_every else ()

    run("whole", *disk("whole"), wrong=(44, 45))
    (record,) = json.loads((tmp_path / "whole" / "rollbacks.json").read_text())
    assert (record["from"], record["to"]) == (45, to)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        run("parts", *disk("parts"), wrong=(44, 45), dies=48)
    run("parts", *disk("parts"))
    assert stream(tmp_path / "parts") == stream(tmp_path / "whole")
    assert tiny_runs.losses(tmp_path / "parts") == tiny_runs.losses(tmp_path / "whole")


@pytest.mark.long
def test_a_run_goes_back_only_so_often(run, tmp_path):
    with pytest.raises(ValueError, match=r"the last 2 updates in a row .* the run went back 2 times already"):
        run("out", "train.max_rollbacks=2", wrong=range(44, 99))
    assert len(json.loads((tmp_path / "out" / "rollbacks.json").read_text())) == 2


def test_without_a_checkpoint_from_before_the_run_stops(run):
    with pytest.raises(ValueError, match=r"there is no checkpoint from before them, so the run stops.*every_steps"):
        run("out", "checkpoint.every_steps=null", wrong=(44, 45))


@pytest.mark.long
def test_where_epochs_end_the_data_what_was_skipped_is_not_made_up_for(run, tmp_path):
    words = ("train.steps=null", "train.epochs=10", "checkpoint.every_steps=10")
    whole = run("plain", *words).step
    result = run("out", *words, wrong=(44, 45))
    assert (result.exit_code, result.step) == (0, whole - 5)
    assert (tmp_path / "out" / "checkpoints" / str(whole - 5)).exists()
