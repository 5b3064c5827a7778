"""What may befall a run from outside: a signal that asks it to stop, a host that hangs, a host that is gone."""

import contextlib
import faulthandler
import itertools
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, Literal

from jax.experimental import multihost_utils

from jaxtune import hosts

_STDERR = 2
HANG_SECONDS = 3600.0  # of several hosts, where nobody says otherwise
INTERRUPTED = 130  # exit code of a run that Ctrl-C has ended, as shells give it
_GRACE = 1.25  # of a hang's seconds, until a process whose Python does not run any more is ended as well
_points = itertools.count(1)  # of this process: jax's agreement on where to stop wants numbers that only rise


class Stop:
    """Whether the run was asked to stop, and by what."""

    def __init__(self) -> None:
        self.caught: list[int] = []

    def asked(self) -> bool:
        """Whether to stop after this update: the same answer on all hosts, which call it once for each update.

        With several hosts SIGTERM is caught by jax, which agrees on an update that no host is past.
        """
        if hosts.count() == 1:
            return bool(self.caught)
        return multihost_utils.reached_preemption_sync_point(next(_points))

    def exit_code(self, preempted: int) -> int:
        """Returns `preempted`, or 130 where Ctrl-C asked, on all hosts."""
        interrupted = self.caught and self.caught[0] == signal.SIGINT
        return INTERRUPTED if any(hosts.gather(bool(interrupted))) else preempted


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """Collects SIGTERM and SIGINT instead of dying of them, so that the update under way ends and is saved.

    A second SIGINT interrupts at once. Outside the main thread signals cannot be caught, and nothing changes. With
    several hosts SIGTERM is left to jax, whose handler is there since the hosts met, and SIGINT is handed on as one.
    """
    stop = Stop()

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and stop.caught:
            raise KeyboardInterrupt
        stop.caught.append(number)
        if hosts.count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    ours = (signal.SIGTERM, signal.SIGINT) if hosts.count() == 1 else (signal.SIGINT,)
    try:
        old = {number: signal.signal(number, note) for number in ours}
    except ValueError:
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Watchdog:
    """Ends this process when nothing was done for too long: another host hangs, or storage, or a device.

    The stacks of all threads go to stderr and to a file; the exit code is 1, at once, so that a launcher starts the
    run again. A collective that waits for ever cannot be interrupted in any other way.
    """

    def __init__(self, seconds: float | Literal["auto"] | None, file: pathlib.Path) -> None:
        """Watches from the first `beat` on, where `seconds` says so; `file` gets the stacks."""
        automatic = HANG_SECONDS if hosts.count() > 1 else None
        self._seconds, self._file = automatic if seconds == "auto" else seconds, file
        self._last: float | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._done.set()
        if self._last is not None:
            faulthandler.cancel_dump_traceback_later()
            self._thread.join()

    def beat(self) -> None:
        """Says that something was done."""
        if self._seconds is not None:
            self._last = time.monotonic()
            # A thread of the system's own, for a hang in which Python itself does not run.
            faulthandler.dump_traceback_later(_GRACE * self._seconds + 1.0, exit=True, file=_STDERR)

    def _watch(self) -> None:
        assert self._seconds is not None
        while not self._done.wait(min(1.0, self._seconds / 4)):
            if self._last is not None and time.monotonic() - self._last > self._seconds:
                self._end()

    def _end(self) -> None:
        word = (
            f"host {hosts.index()}: nothing was done for {self._seconds:g} s (train.hang_seconds); where each thread "
            f"stands is told here and in {self._file}. This process ends with exit code 1; start the run again"
        )
        print(f"error: {word}", file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        with contextlib.suppress(OSError), self._file.open("a") as file:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {word}", file=file, flush=True)
            faulthandler.dump_traceback(file=file, all_threads=True)
        os._exit(1)


def leave_if_several(error: BaseException) -> None:
    """In a run of several hosts, ends the process with exit code 1 for an error that this host alone may have met.

    At its proper end a process waits for all others. Those may be gone, which is what such an error often means, or
    wait for this one themselves. Only a surprise is told here, with its stack.
    """
    if hosts.count() > 1 and not isinstance(error, hosts.ToldToAll):
        if not isinstance(error, ValueError | OSError):
            traceback.print_exception(error)
        word = "if the error speaks of a connection or a peer, another host's output says what happened first"
        print(f"host {hosts.index()} ends at once; {word}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
