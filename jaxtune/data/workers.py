"""Worker processes that never outlive the process that started them."""

import os
import threading
import time

_LOOK_EVERY_SECONDS = 1.0


def end_with(parent: int) -> None:
    """In a worker of `parent`, ends this process soon after the parent has gone; elsewhere does nothing.

    A trainer that is killed (SIGKILL, out of memory) cannot tell its workers, which would wait for ever to hand over
    what they made, holding the memory of a run that is no more. An orphan has another parent, which is how it knows.
    """
    if os.getppid() == parent:
        threading.Thread(target=_watch, args=(parent,), name="end-with-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY_SECONDS)
    os._exit(1)
