"""Starts the processes of a run on this machine, as a launcher of a pod does, and never leaves one behind."""

import contextlib
import ctypes
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
WORKER = pathlib.Path(__file__).with_name("worker.py")


def free_port() -> int:
    """Returns a port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end_with_parent() -> None:
    """In a child: the system kills it when the test's process ends, however that came."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of Linux


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
        script: Sequence[str] = (str(WORKER),),
    ) -> None:
        """Starts `python SCRIPT words...` in each process; `words` may be one list for each process."""
        logs.mkdir(parents=True, exist_ok=True)
        address = f"127.0.0.1:{free_port()}"
        self.logs = [logs / f"host{i}.log" for i in range(processes)]
        self.processes: list[subprocess.Popen] = []
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
            with self.logs[i].open("a") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *script, *own],
                        cwd=cwds[i] if cwds else REPOSITORY,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        preexec_fn=_end_with_parent,
                    )
                )

    def wait(self, seconds: float = 300.0) -> list[int]:
        """Returns the exit codes of all; kills them and fails when they take longer."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not done in {seconds} s:\n{self.said()}") from None

    def kill(self) -> None:
        """Kills those that are left, as a machine does that goes away."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def said(self, host: int | None = None, *, last: int = 6000) -> str:
        """Returns what a process (or all of them) printed."""
        hosts = range(len(self.logs)) if host is None else [host]
        return "\n".join(f"--- host {i}\n{self.logs[i].read_text()[-last:]}" for i in hosts)

    def wait_until(self, what: str, host: int = 0, seconds: float = 180.0) -> None:
        """Returns when a process has printed `what`."""
        deadline = time.monotonic() + seconds
        while what not in self.logs[host].read_text():
            assert time.monotonic() < deadline and self.processes[host].poll() is None, self.said()
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
