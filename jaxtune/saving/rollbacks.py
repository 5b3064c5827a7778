"""Going back to a checkpoint after a spike, and going on with the data that follows: what was skipped stays skipped.

OUTPUT/rollbacks.json has one record for each time. A run that is killed after it went back begins with the same
checkpoint again, whose own data state would bring the skipped batches back; the record's takes its place.
"""

import json
import pathlib
from typing import Any

from jaxtune import hosts

FILE = "rollbacks.json"


class Rollbacks:
    """The records of a run, known to all hosts; host 0 reads and writes them."""

    def __init__(self, folder: pathlib.Path, *, start: int) -> None:
        """Reads the records; those of checkpoints after `start` are of a past that is done again, and are dropped."""
        self._file = folder / FILE
        with hosts.together():
            found = json.loads(self._file.read_text()) if hosts.index() == 0 and self._file.exists() else []
        self.records: list[dict[str, Any]] = [one for one in hosts.from_first(found) if one["to"] <= start]

    def resumed(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Returns a checkpoint's JSON with the data that follows the skipped, if the run went back to it."""
        for record in reversed(self.records):
            if record["to"] == saved["step"]:
                return {**saved, "data": record["data"], "seen": record["seen"]}
        return saved

    def add(self, *, since: int, to: int, data: dict[str, Any], seen: list[int]) -> None:
        """Records that the run goes back from step `since` to step `to` and on with `data`."""
        self.records.append({"from": since, "to": to, "data": data, "seen": seen})
        with hosts.together():
            if hosts.index() == 0:
                aside = self._file.with_suffix(".tmp")
                aside.write_text(json.dumps(self.records, indent=1))
                aside.replace(self._file)
