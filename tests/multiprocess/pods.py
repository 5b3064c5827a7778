"""A small mixture, packed, that runs of several processes learn, and what is compared between them."""

import json
import pathlib
from typing import NamedTuple

import launcher
import pytest
import tiny_runs


class Mixture(NamedTuple):
    """Where a run's inputs lie; every run of a test gets its own output."""

    root: pathlib.Path
    base: pathlib.Path
    first: pathlib.Path
    second: pathlib.Path

    def words(self, output: pathlib.Path, *more: str) -> list[str]:
        """The command line of 8 updates; nothing is exported, for checkpoints are looked at."""
        mixed = (f"data.train.1.path={self.second}", "data.train.0.weight=1", "data.train.1.weight=2")
        told = ("log.examples=true", "train.steps=8", "checkpoint.every_steps=2", "data.window=8")
        plain = ("export.hf=false", "export.adapter=false", "data.max_length=48", "optimizer.schedule=cosine")
        return tiny_runs.words(self.base, self.first, output, *mixed, *told, *plain, *more)

    def start(self, output: pathlib.Path, *more: str, processes: int, devices: int, **options) -> launcher.Run:
        """Starts such a run; to be used in a `with` block."""
        logs = output.parent / f"{output.name}-logs"
        env = {"JAXTUNE_CACHE": str(self.root / "cache"), **options.pop("env", {})}
        given = options.pop("given", None) or self.words(output, *more)
        return launcher.started(given, processes=processes, devices=devices, logs=logs, env=env, **options)

    def finish(self, output: pathlib.Path, *more: str, expect: int = 0, **options) -> launcher.Run:
        """Runs it to its end."""
        with self.start(output, *more, **options) as run:
            codes = run.wait()
            assert set(codes) == {expect}, f"exit codes {codes}\n{run.said()}"
            return run


def examples(output: pathlib.Path) -> dict[int, list]:
    """The rows of examples of every update."""
    lines = (output / "examples.jsonl").read_text().splitlines()
    return {one["step"]: one["rows"] for one in map(json.loads, lines)}


def assert_same_stream(output: pathlib.Path, other: pathlib.Path) -> None:
    """Asserts that two runs have seen the same examples, row by row, update by update, each once in the file."""
    lines = (output / "examples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert examples(output) == examples(other)


def assert_close(output, other, *, first=1e-6, last=1e-4):
    """Asserts that losses differ by at most `first` (relative) at update 1 and `last` at the end."""
    ours, theirs = tiny_runs.losses(output), tiny_runs.losses(other)
    assert ours.keys() == theirs.keys()
    steps = max(theirs)
    for step, (loss, norm) in ours.items():
        allowed = first + (last - first) * (step - 1) / max(1, steps - 1)
        assert loss == pytest.approx(theirs[step][0], rel=allowed), f"loss at update {step}"
        assert norm == pytest.approx(theirs[step][1], rel=20 * allowed), f"gradient norm at update {step}"
    held_out = [[r["eval_loss"] for r in tiny_runs.records(o) if "eval_loss" in r] for o in (output, other)]
    assert held_out[0] == pytest.approx(held_out[1], rel=last)
