"""Kills a run of several processes at random instants, again and again, and shows that nothing was lost.

    python tools/soak.py FOLDER --kills 200 [--processes 2] [--local] [--sum FOLDER/soak.json]

A tiny mixture is tuned on the loopback. Each time all processes, or one of them, get SIGKILL at a random instant of
their lives (start, restore, update, save), and the same command goes on; a run that reaches its end (a lap) is compared
with one that nothing happened to: every update's examples, and every array of the last checkpoint bit for bit. Figures
are summed in a JSON file, so that sittings add up: 5 of 200 are 1,000 kills.

With --local every host is a slice with copies on a disk of its own, made at every third update; after one kill of four
the disk of one host is lost.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

STEPS, SAVE_EVERY = 600, 5
PRELOADED = ["jaxtune.train", "jaxtune.training", "transformers.models.llama.configuration_llama", "tensorboardX"]
LIVES = 2.0  # the longest life, in times that a run needs to its first save
PATIENCE = 5  # kills in a row that may leave no newer checkpoint, before the run is let live longer
LATEST = 200.0  # seconds that processes may live on when one of them is gone: jax misses a host after 100
JOINED = "devices "  # what host 0 says once all hosts have met; before, jax waits 300 s for the others to come


def train(words: Sequence[str], environment: dict[str, str], log: str) -> None:
    """One process of the run; begins in a fork that has imported everything and computed nothing."""
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    import shared_cache

    from jaxtune.train import main

    shared_cache.share_compilations()
    sys.exit(main(words))


class Soak:
    """The inputs, the uninterrupted run, and what was found so far."""

    def __init__(self, folder: pathlib.Path, processes: int, *, local: bool, seed: int) -> None:
        self.folder, self.processes, self.local = folder, processes, local
        self.draw = random.Random(seed)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)

    def words(self, output: pathlib.Path) -> list[str]:
        """The command line; the inputs are written when they are not there."""
        import tiny_runs

        base = self.folder / "base"
        if not base.exists():
            tiny_runs.write_model(base)
            tiny_runs.write_rows(self.folder / "a.jsonl", tiny_runs.rows(60))
            tiny_runs.write_rows(self.folder / "b.jsonl", tiny_runs.rows(30, start=500))
        more = (
            f"data.train.1.path={self.folder / 'b.jsonl'}", "data.train.0.weight=1", "data.train.1.weight=2",
            f"train.steps={STEPS}", f"checkpoint.every_steps={SAVE_EVERY}", "log.examples=true", "train.batch_rows=4",
            "export.hf=false", "export.adapter=false", "data.max_length=48", "data.window=8",
        )  # fmt: skip
        if self.local:
            disks = f"checkpoint.local.path={self.folder / 'disks'}/$JAX_PROCESS_ID"
            more += (f"mesh.slice={self.processes}", "mesh.fsdp=1", disks, "checkpoint.local.every_steps=3")
        return tiny_runs.words(base, self.folder / "a.jsonl", output, *more)

    def start(self, output: pathlib.Path) -> list[Any]:
        """Starts the run's processes."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        started = []
        for i in range(self.processes):
            environment = {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(self.processes),
                "JAX_PROCESS_ID": str(i),
            }
            log = str(self.folder / f"host{i}.log")
            process = self.context.Process(target=train, args=(self.words(output), environment, log))
            process.start()
            started.append(process)
        return started

    def kill_once(self, output: pathlib.Path, longest: float) -> str:
        """Starts the run and kills it at a random instant; returns "killed", or "done" where it was faster."""
        before = saved(output)
        processes = self.start(output)
        deadline = time.monotonic() + self.draw.uniform(0, longest)
        while time.monotonic() < deadline and any(p.is_alive() for p in processes):
            time.sleep(0.01)
        codes = {p.exitcode for p in processes}
        if codes == {0}:
            return "done"
        if codes - {None, 0}:  # 0 beside None: one host is done, the other about to be
            raise AssertionError(f"ended by itself with {codes}:\n{self.said()}")
        one = self.draw.randrange(self.processes) if self.draw.random() < 0.3 else None
        if JOINED not in self.said():
            one = None  # whoever is left would only wait for the one that never came
        for i, process in enumerate(processes):
            if one is None or i == one:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        until = time.monotonic() + (LATEST if one is not None else 10)
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
        left = [process for process in processes if process.is_alive()]
        if left:
            for process in left:
                process.kill()
            raise AssertionError(f"{len(left)} processes outlived the one that was killed by {LATEST} s")
        if saved(output) < before:
            raise AssertionError(f"a finished checkpoint was lost: {before} before, {saved(output)} after")
        if self.local and self.draw.random() < 0.25:
            shutil.rmtree(self.folder / "disks" / str(self.draw.randrange(self.processes)), ignore_errors=True)
        return "killed"

    def finish(self, output: pathlib.Path) -> None:
        """Runs to the end, unharmed."""
        processes = self.start(output)
        for process in processes:
            process.join(900)
        codes = [process.exitcode for process in processes]
        if set(codes) != {0}:
            raise AssertionError(f"exit codes {codes}:\n{self.said()}")

    def until_saved(self, output: pathlib.Path) -> float:
        """Returns the seconds from a run's start to its first save."""
        began, processes = time.monotonic(), self.start(output)
        while saved(output) < 0 and all(process.is_alive() for process in processes):
            time.sleep(0.01)
        took = time.monotonic() - began
        for process in processes:
            process.kill()
            process.join()
        if saved(output) < 0:
            raise AssertionError(f"nothing was saved:\n{self.said()}")
        shutil.rmtree(output)
        return took

    def said(self) -> str:
        """The end of every process's log."""
        return "\n".join((self.folder / f"host{i}.log").read_text()[-3000:] for i in range(self.processes))


def saved(output: pathlib.Path) -> int:
    """The newest step with a manifest, -1 where there is none."""
    return max((int(file.parent.name) for file in output.glob("checkpoints/*/jaxtune_manifest.json")), default=-1)


def differences(output: pathlib.Path, reference: pathlib.Path) -> list[str]:
    """What is not as in the uninterrupted run: examples by update, arrays of the last checkpoint."""
    import numpy as np
    import orbax.checkpoint as ocp

    def stream(folder: pathlib.Path) -> list[Any]:
        return [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]

    found = []
    if stream(output) != stream(reference) or len(stream(output)) != STEPS:
        found.append("the stream of examples")

    def arrays_of(folder: pathlib.Path) -> dict[str, Any]:
        state, reader = folder / "checkpoints" / str(STEPS) / "state", ocp.PyTreeCheckpointHandler()
        plain = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in dict(reader.metadata(state))}
        return ocp.Checkpointer(reader).restore(state, args=ocp.args.PyTreeRestore(restore_args=plain))

    arrays = [arrays_of(folder) for folder in (output, reference)]
    for name, array in arrays[0].items():
        if np.asarray(array).tobytes() != np.asarray(arrays[1][name]).tobytes():
            found.append(f"the array {name}")
    return found


def main() -> int:
    """Runs the soak; returns 1 when anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--local", action="store_true", help="with copies on disks of the hosts' own")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long, between two kills")
    parser.add_argument("--sum", type=pathlib.Path, help="JSON file; default FOLDER/soak.json")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(
        JAX_PLATFORMS="cpu",
        HF_HUB_OFFLINE="1",
        XLA_FLAGS="--xla_force_host_platform_device_count=1",
        JAXTUNE_CACHE=str(folder / "cache"),
        JAX_COMPILATION_CACHE_DIR=str(folder / "xla"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        PYTHONPATH=f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}",
    )
    file = options.sum or folder / "soak.json"
    total = {"kills": 0, "laps": 0, "lost": [], "seconds": 0.0}
    if file.exists():
        total |= json.loads(file.read_text())
    soak = Soak(folder, options.processes, local=options.local, seed=total["kills"])
    kind = f"{options.processes}{'-local' if options.local else ''}"
    reference, output = folder / f"reference{kind}", folder / f"lap{kind}"
    if saved(reference) < STEPS:
        soak.finish(reference)
    longest = LIVES * soak.until_saved(folder / "timed")
    began, kills, idle = time.monotonic(), 0, 0
    while kills < options.kills and time.monotonic() - began < 60 * options.minutes:
        before = time.monotonic()
        try:
            newest = saved(output)
            outcome = soak.kill_once(output, longest)
            idle = 0 if saved(output) > newest else idle + 1
            if idle >= PATIENCE:  # the machine has become slower since it was timed
                longest, idle = 1.3 * longest, 0
            kills += outcome == "killed"
            total["kills"] += outcome == "killed"
            if saved(output) >= STEPS:
                soak.finish(output)
                total["lost"] += differences(output, reference)
                total["laps"] += 1
                shutil.rmtree(output)
        except AssertionError as error:
            total["lost"].append(str(error))
        total["seconds"] += time.monotonic() - before
        file.write_text(json.dumps(total, indent=1))
        print(
            f"{total['kills']} kills, {total['laps']} laps, at step {saved(output)}, lost: {total['lost']}", flush=True
        )
        if total["lost"]:
            return 1
    if output.exists():  # the lap that was under way when the kills were done
        soak.finish(output)
        total["lost"] += differences(output, reference)
        total["laps"] += 1
        shutil.rmtree(output)
        file.write_text(json.dumps(total, indent=1))
    print(json.dumps(total))
    return 1 if total["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
