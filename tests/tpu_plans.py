"""Plans of small models for TPUs that are not here, two at a time in processes of their own."""

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import plan_shapes

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
HLO = "step.optimized.hlo.txt"


class Planned(NamedTuple):
    """How a plan ended: exit code, what it printed, its JSON (empty where none was written), the optimized module.

    `began` and `ended`: seconds of one clock.
    """

    code: int
    out: str
    error: str
    plan: dict[str, Any]
    module: str
    began: float
    ended: float


def plan(folder: pathlib.Path, shape: dict[str, Any], *words: str) -> Planned:
    """Plans a model that is config.json alone; the parent's own back end is one that is not here."""
    path = plan_shapes.write(folder / "model", shape)
    command = [sys.executable, "-m", "jaxtune.plan", f"model.path={path}", f"output={folder / 'out'}", *words]
    environment = os.environ | {"JAX_PLATFORMS": "rocm", "PYTHONPATH": str(REPOSITORY)}
    began = time.monotonic()
    done = subprocess.run(
        [*command, "--json", str(folder / "plan.json"), "--hlo", str(folder)],
        capture_output=True, text=True, check=False, env=environment, cwd=folder,
    )  # fmt: skip
    ended = time.monotonic()
    told = (folder / "plan.json").read_text()
    module = (folder / HLO).read_text() if (folder / HLO).exists() else ""
    return Planned(done.returncode, done.stdout, done.stderr, json.loads(told) if told else {}, module, began, ended)


class Plans:
    """Plans by name, two at a time: who asks for one begins it, and all others behind it."""

    def __init__(self, folder: pathlib.Path, asked: dict[str, tuple[dict[str, Any], Sequence[str]]]) -> None:
        """Begins nothing yet; `asked` is the shape and the words of each."""
        self._folder, self._asked = folder, asked
        self._pool = concurrent.futures.ThreadPoolExecutor(2)
        self._begun: dict[str, concurrent.futures.Future[Planned]] = {}

    def __getitem__(self, name: str) -> Planned:
        """Returns a plan that fits."""
        found = self.whatever(name)
        assert found.code == 0, found.error[-2000:] or found.out
        return found

    def whatever(self, name: str) -> Planned:
        """Returns a plan, whether it fits or not."""
        for each in (name, *self._asked):
            if each not in self._begun:
                shape, words = self._asked[each]
                self._begun[each] = self._pool.submit(plan, self._folder / each, shape, *words)
        return self._begun[name].result()

    def close(self) -> None:
        """Waits for what runs, and begins no more."""
        self._pool.shutdown(cancel_futures=True)
