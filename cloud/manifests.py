"""What the renderers share: the run that a command line describes, checked, and YAML that people can read."""

import pathlib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # scripts: they run from a clone

from jaxtune.config import Config
from jaxtune.decode import decode


def read_run(words: Sequence[str]) -> tuple[Config, str | None]:
    """Returns the configuration of `[CONFIG.yaml] key=value ...`, and its file.

    Raises:
        ValueError: the configuration is wrong, there are two files, or `output` lies in no bucket.
    """
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ValueError(f"expected one configuration file, found {', '.join(files)}")
    config = decode(words)
    if not str(config.output).startswith(("gs://", "s3://")):
        raise ValueError(f"output: found {str(config.output)!r}; expected a bucket, output=gs://BUCKET/runs/NAME")
    return config, files[0] if files else None


def check_name(name: str) -> None:
    """Raises ValueError for a name that machines, pods or jobs cannot have."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise ValueError(f"--name: found {name!r}; expected at most 40 of a-z, 0-9 and -, a letter first")


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, so that a configuration can be read in a manifest."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
_Dumper.ignore_aliases = lambda *_: True  # type: ignore[method-assign]


def to_yaml(documents: Iterable[Any]) -> str:
    """Returns the documents as one YAML text."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=100)
