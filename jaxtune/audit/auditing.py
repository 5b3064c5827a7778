"""An audit from the configuration to what is written, in the order things happen."""

import json
from collections.abc import Sequence

from jaxtune.asking import check_writable
from jaxtune.audit.document import document
from jaxtune.audit.looking import warm_up
from jaxtune.audit.page import page_of
from jaxtune.audit.samples import Samples
from jaxtune.audit.summary import summary
from jaxtune.audit.survey import survey
from jaxtune.audit.writing import joined, prepare_output, write_text
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
    prepare_output(config.output)
    path = joined(config.output, JSON) if json_path is None else json_path
    if json_path not in (None, "-"):
        check_writable(path, "--json")
    warm_up(workers)
    reading, config = open_reading(config, needs_weights=False)
    surveyed = survey(config, reading, terminal, workers=workers, skip=skip)
    told, found = document(surveyed)
    samples = Samples(surveyed, count=examples, seed=seed)
    page = joined(config.output, PAGE)
    write_text(page, page_of(told, samples.as_json(), title=config.output))
    if json_path == "-":
        print(json.dumps(told, ensure_ascii=False, indent=1))
    else:
        write_text(path, json.dumps(told, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
        terminal.say(summary(told, found, surveyed.stream))
        terminal.say(f"written: {path} and {page}")
    bad = {"error", "warning"} if strict else {"error"}
    return int(any(finding.level in bad for finding in found))
