"""An audit from the configuration to what is written, in the order things happen."""

import json
import os
from collections.abc import Sequence

from jaxtune.asking import check_writable
from jaxtune.audit.document import document, write_json
from jaxtune.audit.page import write_page
from jaxtune.audit.samples import Samples
from jaxtune.audit.summary import summary
from jaxtune.audit.survey import survey
from jaxtune.config import Config
from jaxtune.inputs import open_reading
from jaxtune.metrics import Terminal

JSON, PAGE = "audit.json", "audit.html"


def audit(
    config: Config,
    *,
    json_path: str | None,
    workers: int,
    skip: Sequence[str],
    examples: int,
    seed: int,
    strict: bool,
) -> int:
    """Reads all data of `config`, writes audit.html and audit.json, prints the summary; returns the exit code.

    1 when training would stop, or with `strict` on any warning. Raises ValueError where nothing can be read at all.
    """
    terminal = Terminal()
    os.makedirs(config.output, exist_ok=True)
    path = os.path.join(config.output, JSON) if json_path is None else json_path
    if json_path != "-":
        check_writable(path, "--json")
    reading, config = open_reading(config, needs_weights=False)
    surveyed = survey(config, reading, terminal, workers=workers, skip=skip)
    told, found = document(surveyed)
    samples = Samples(surveyed, count=examples, seed=seed)
    page = os.path.join(config.output, PAGE)
    write_page(page, told, samples.as_json(), title=config.output)
    if json_path == "-":
        print(json.dumps(told, ensure_ascii=False, indent=1))
    else:
        write_json(path, told)
        terminal.say(summary(told, found, surveyed.stream))
        terminal.say(f"written: {path} and {page}")
    bad = {"error", "warning"} if strict else {"error"}
    return int(any(finding.level in bad for finding in found))
