"""The inputs that runs of several processes share, and the run that nothing happens to."""

import pathlib
import sys

import pytest
import tiny_runs

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from pods import Mixture


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
