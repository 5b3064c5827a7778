"""A small mixture, packed, with held-out rows, that runs of several processes learn."""

import json
import pathlib
import sys
from typing import NamedTuple

import pytest
import tiny_runs

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import launcher


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


@pytest.fixture(scope="session")
def mixture(tmp_path_factory) -> Mixture:
    root = tmp_path_factory.mktemp("pod")
    base = tiny_runs.write_model(root / "base")
    first = tiny_runs.write_rows(root / "first.jsonl", tiny_runs.rows(60))
    second = tiny_runs.write_rows(root / "second.jsonl", tiny_runs.rows(30, start=500))
    return Mixture(root, base, first, second)


@pytest.fixture(scope="session")
def reference(mixture) -> pathlib.Path:
    """The run that nothing happens to, in one process with four devices."""
    output = mixture.root / "reference"
    mixture.finish(output, processes=1, devices=4)
    return output
