"""Audits for tests: a tiny model, rows, and the document that comes of them."""

import json
import pathlib
from typing import Any

import tiny_runs

from jaxtune.audit.__main__ import main


def write_base(folder: pathlib.Path) -> pathlib.Path:
    """Writes a tiny model with 4,096 positions."""
    return tiny_runs.write_model(folder, max_position_embeddings=4096)


def run(base: pathlib.Path, output: pathlib.Path, *words: str) -> tuple[int, dict[str, Any]]:
    """The exit code of an audit in this process, and its audit.json."""
    code = main([f"model.path={base}", f"output={output}", "--workers", "1", *words])
    return code, json.loads((output / "audit.json").read_text())


def line(where: str) -> int:
    """The line of `file:line`."""
    return int(where.rsplit(":", 1)[1])
