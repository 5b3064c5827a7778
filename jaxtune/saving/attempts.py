"""Which attempt of a run a step is of: every start, and every going back, begins one at the step that it goes on from.

    begin at 0, then at 100     steps 1 .. 100 are the first attempt's, all later ones the second's
    and then at 50              steps 1 .. 50 are the first's, all later ones the third's; nothing is the second's

So a copy of step 110 that the first attempt wrote, on a disk that comes back late, is known to be of a past that was
done again. Where the attempts are kept, host 0 writes; all hosts call everything here.
"""

import json
import secrets
from typing import Any, NamedTuple

from etils import epath

from jaxtune import hosts
from jaxtune.saving.manifest import write_aside


class Attempt(NamedTuple):
    """`token`: its name, on all hosts. `start`: the step that it goes on from."""

    token: str
    start: int


class Attempts:
    """The attempts of one run. `run`: a name that a run begun anew in the same folder does not have."""

    def __init__(self, file: epath.Path) -> None:
        """Reads the attempts, or names a run that has none yet."""
        self._file = file
        with hosts.together():
            found: dict[str, Any] = {}
            if hosts.index() == 0:
                found = json.loads(file.read_text()) if file.exists() else {"run": secrets.token_hex(8), "attempts": []}
                write_aside(file, found)
        told = hosts.from_first(found)
        self.run: str = told["run"]
        self._all = [Attempt(*one) for one in told["attempts"]]

    def begin(self, step: int) -> None:
        """Begins an attempt that goes on from `step`; it is written down before this returns."""
        token = hosts.from_first(secrets.token_hex(8))
        self._all = [one for one in self._all if one.start < step] + [Attempt(token, step)]
        with hosts.together():
            if hosts.index() == 0:
                write_aside(self._file, {"run": self.run, "attempts": self._all})

    @property
    def current(self) -> str:
        """The token of the attempt that is under way."""
        return self._all[-1].token

    def token_of(self, step: int) -> str | None:
        """Returns the token of the attempt that a step is of, or None where none was begun before it."""
        return next((one.token for one in reversed(self._all) if one.start < step), None)
