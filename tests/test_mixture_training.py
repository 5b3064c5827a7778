"""Whole runs on mixtures: losses by source and tag, held-out clusters, phases, and how such runs go on."""

import json
import os
import signal

import numpy as np
import pytest
import tiny_runs

from jaxtune import watching
from jaxtune.decode import from_tree
from jaxtune.train import train


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_runs.write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Three files: colours to learn, colours of one cluster to hold out, and sums."""
    folder = tmp_path_factory.mktemp("rows")
    sums = [{"instruction": f"{i} + {i}", "output": str(2 * i)} for i in range(60)]
    for name, these in (
        ("colours", tiny_runs.rows(60)),
        ("later", tiny_runs.rows(12, start=500)),
        ("sums", sums),
    ):
        tiny_runs.write_rows(folder / f"{name}.jsonl", these)
    return folder


def config(base, rows, output, *, steps=8, phases=(), weights=(3, 1), **data):
    sources = [
        {"path": str(rows / "colours.jsonl"), "weight": weights[0], "tags": ["words"]},
        {"path": str(rows / "sums.jsonl"), "weight": weights[1], "tags": ["numbers"]},
        {"path": str(rows / "later.jsonl"), "weight": 1, "cluster": "later", "tags": ["words"]},
    ]
    return from_tree(
        {
            "output": str(output),
            "model": {"path": str(base)},
            "optimizer": {"learning_rate": 0.01, "schedule": "constant"},
            "train": {"steps": steps, "batch_rows": 8},
            "log": {"every_steps": 1, "tensorboard": False},
            "eval": {"every_steps": 4},
            "export": {"hf": False},
            "data": {
                "train": sources,
                "hold_out": {"clusters": ["later"]},
                "max_length": 64,
                "window": 8,
                "phases": list(phases),
                **data,
            },
        }
    )


def stop_after(monkeypatch, step):
    """Sends SIGTERM once this update is reported."""
    report = watching.Watcher._report

    def stopping(self, number, *given):
        report(self, number, *given)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(watching.Watcher, "_report", stopping)


@pytest.fixture(scope="module")
def mixed(base, rows, tmp_path_factory):
    output = tmp_path_factory.mktemp("mixed") / "out"
    train(config(base, rows, output))
    return tiny_runs.records(output), json.loads((output / "mixture.json").read_text())


def test_losses_are_told_by_source_and_by_tag(mixed):
    """They are those of the same update: weighed by their tokens they make its loss."""
    updates = [record for record in mixed[0] if "loss" in record]
    assert {name for record in updates for name in record["sources"]} == {"colours", "sums"}
    for record in updates:
        for key in ("sources", "tags"):
            told = record[key].values()
            weight = sum(one["weight"] for one in told)
            assert weight == record["trained_tokens"]
            assert sum(one["loss"] * one["weight"] for one in told) / weight == pytest.approx(record["loss"], rel=1e-5)
            assert all(0 <= one["accuracy"] <= 1 for one in told)
    assert updates[-1]["sources"]["colours"]["loss"] < updates[0]["sources"]["colours"]["loss"]


def test_what_comes_of_the_plan_is_told_on_the_way(mixed):
    last = [record for record in mixed[0] if "loss" in record][-1]["sources"]
    assert last["colours"]["share"] == pytest.approx(0.75, abs=0.08)
    assert sum(one["share"] for one in last.values()) == pytest.approx(1)
    assert (
        last["colours"]["epochs"] == pytest.approx(3 * last["sums"]["epochs"], rel=0.4) and last["sums"]["epochs"] > 0
    )


def test_the_held_out_cluster_is_evaluated_by_source(mixed):
    evaluated = [record for record in mixed[0] if "eval_loss" in record]
    assert [record["step"] for record in evaluated] == [4, 8]
    for record in evaluated:
        assert set(record["eval_tags"]) == {"words"}
        assert record["eval_tags"]["words"]["loss"] == pytest.approx(record["eval_loss"], rel=1e-5)


def test_the_plan_lies_in_the_run_folder(mixed):
    leaves = {leaf["name"]: leaf for leaf in mixed[1]["leaves"]}
    assert {name: leaf["rate"] for name, leaf in leaves.items()} == {"colours": 0.75, "sums": 0.25}
    assert mixed[1]["tags"] == {"numbers": 0.25, "words": 0.75}


PHASES = ({"until": {"steps": 3}, "weights": {"colours": 1}}, {"weights": {"sums": 1}})


def test_a_run_stopped_within_its_phases_goes_on_as_if_never_stopped(base, rows, tmp_path, monkeypatch):
    train(config(base, rows, tmp_path / "whole", phases=PHASES))
    for step in (2, 3, 5):
        output = tmp_path / f"stopped{step}"
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            assert train(config(base, rows, output, phases=PHASES)).exit_code == 143
        assert train(config(base, rows, output, phases=PHASES)).exit_code == 0
        assert tiny_runs.losses(output) == tiny_runs.losses(tmp_path / "whole")
        ends = [
            [r for r in tiny_runs.records(o) if "sources" in r][-1]["sources"] for o in (output, tmp_path / "whole")
        ]
        assert ends[0] == ends[1], "also what it has seen of each source"
        tiny_runs.assert_same_bits(tiny_runs.weights(output), tiny_runs.weights(tmp_path / "whole"))
    told = [record for record in tiny_runs.records(tmp_path / "whole") if "phase" in record]
    assert [(record["phase"], record["step"]) for record in told] == [(1, 3)] and told[0]["phase_first_draw"] % 8 == 0
    seen = [set(record["sources"]) for record in tiny_runs.records(tmp_path / "whole") if "loss" in record]
    assert seen[0] == {"colours"} and seen[-1] == {"sums"}


def test_a_changed_mixture_never_goes_on_silently(base, rows, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        train(config(base, rows, output))
    with pytest.raises(ValueError, match=r"data\.train\.1\.weight: 1\.0 there, 2\.0 now"):
        train(config(base, rows, output, weights=(3, 2)))
    changed = np.random.default_rng(0).permutation(60).tolist()
    copy = rows / "sums.jsonl"
    before = copy.read_text()
    copy.write_text("".join(before.splitlines(keepends=True)[i] for i in changed))
    try:
        with pytest.raises(ValueError, match="since this run was saved: source sums is another"):
            train(config(base, rows, output))
    finally:
        copy.write_text(before)
