"""Starts the processes of a run on this machine, as a launcher of a pod does, and never leaves one behind."""

import atexit
import contextlib
import ctypes
import importlib
import multiprocessing
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence

import shared_cache

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# A run of four processes would import for longer than it computes.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["jaxtune.training", "jaxtune.convert.__main__", "transformers.models.llama.configuration_llama", "tensorboardX"]
)


def free_port() -> int:
    """Returns a port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end_with_parent() -> None:
    """In a child: the system kills it when what forked it ends, however that came."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of Linux


def _become(main: str, words: Sequence[str], environment: dict[str, str], cwd: pathlib.Path, log: pathlib.Path) -> None:
    """In a child, which has imported much and computed nothing: goes on as `python -m ...` in a shell of its own.

    Variables that a library reads as it is imported (most of jax's settings) are those of the test's process.
    """
    _end_with_parent()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    shared_cache.share_compilations()
    module, _, function = main.partition(":")
    try:
        code = getattr(importlib.import_module(module), function)(list(words))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # as an interpreter ends; multiprocessing leaves out what was asked for at exit
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Run:
    """Processes 0 .. n - 1 of one run, each with a log of its own."""

    def __init__(
        self,
        words: Sequence[str] | Sequence[Sequence[str]],
        *,
        processes: int,
        devices: int,
        logs: pathlib.Path,
        env: dict[str, str] | None = None,
        cwds: Sequence[pathlib.Path] | None = None,
        main: str = "worker:main",
    ) -> None:
        """Calls `main` ("module:function") with `words` in each process; they may be one list for each process."""
        logs.mkdir(parents=True, exist_ok=True)
        address = f"127.0.0.1:{free_port()}"
        self.logs = [logs / f"host{i}.log" for i in range(processes)]
        self.processes: list[multiprocessing.process.BaseProcess] = []
        for i in range(processes):
            own = list(words if isinstance(words[0], str) else words[i])
            several = {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(i),
            }
            environment = {
                **{key: value for key, value in os.environ.items() if key not in several},
                **(several if processes > 1 else {}),
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                "JAX_PLATFORMS": "cpu",
                "NPROC": str(4 * devices),
                "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}",
                **(env or {}),
            }
            self.logs[i].touch()
            cwd = cwds[i] if cwds else REPOSITORY
            process = FORKS.Process(target=_become, args=(main, own, environment, cwd, self.logs[i]))
            process.start()
            self.processes.append(process)

    def wait(self, seconds: float = 300.0) -> list[int]:
        """Returns the exit codes of all; kills them and fails when they take longer."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        if any(process.exitcode is None for process in self.processes):
            self.kill()
            raise AssertionError(f"not done in {seconds} s:\n{self.said()}")
        return [process.exitcode for process in self.processes]

    def send(self, host: int, number: signal.Signals) -> None:
        """Sends a signal to one process."""
        os.kill(self.processes[host].pid, number)

    def kill(self) -> None:
        """Kills those that are left, as a machine does that goes away."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def said(self, host: int | None = None, *, last: int = 6000) -> str:
        """Returns what a process (or all of them) printed."""
        hosts = range(len(self.logs)) if host is None else [host]
        return "\n".join(f"--- host {i}\n{self.logs[i].read_text()[-last:]}" for i in hosts)

    def wait_until(self, what: str, host: int = 0, seconds: float = 180.0) -> None:
        """Returns when a process has printed `what`."""
        deadline = time.monotonic() + seconds
        while what not in self.logs[host].read_text():
            assert time.monotonic() < deadline and self.processes[host].exitcode is None, self.said()
            time.sleep(0.02)


@contextlib.contextmanager
def started(words: Sequence[str] | Sequence[Sequence[str]], **options) -> Iterator[Run]:
    """Gives a `Run`, whose processes are gone when the block ends."""
    run = Run(words, **options)
    try:
        yield run
    finally:
        run.kill()


def finish(words: Sequence[str], *, expect: int = 0, seconds: float = 300.0, **options) -> Run:
    """Starts a run and asserts that all its processes end with `expect`."""
    with started(words, **options) as run:
        codes = run.wait(seconds)
        assert set(codes) == {expect}, f"exit codes {codes}\n{run.said()}"
        return run
