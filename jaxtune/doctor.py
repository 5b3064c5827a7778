"""`python -m jaxtune.doctor [CONFIG.yaml] [key=value ...]`: is this machine, or this pod, ready for the run?

    python -m jaxtune.doctor
    python -m jaxtune.doctor configs/lora.yaml mesh.tensor=4 --json doctor.json

Looks at versions, hosts and their clocks, devices and the mesh, the speed of an all-reduce along each axis, and, where
a configuration is given, at model, tokenizer, data and output as every host sees them. Nothing is trained and nothing
in the output folder changes. Start it as training is started: on every host of a pod, with the same words.
Exit code 0 when nothing is wrong, 1 when something is, 2 for usage and configuration.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from jaxtune import asking
from jaxtune.compat import prepare_environment
from jaxtune.decode import ConfigError, decode


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    flags = _parser().parse_args(words)
    try:
        config = decode(flags.config) if flags.config else None
        asking.check_writable(flags.json, "--json")
        if flags.megabytes < 1:
            raise ValueError(f"--megabytes: found {flags.megabytes}; expected at least 1")
    except ConfigError as error:
        return asking.fail(ConfigError(f"configuration:\n{error}"), 2)
    except ValueError as error:
        return asking.fail(error, 2)
    prepare_environment()
    from jaxtune import examining  # only now: a mistake in a flag should not wait for jax

    try:
        report = examining.examine(config, megabytes=flags.megabytes)
    except (ValueError, OSError) as error:
        return asking.fail(error, 1)
    if report.speaks and flags.json:
        pathlib.Path(flags.json).write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
    return 0 if report.is_fine else 1


def _parser() -> argparse.ArgumentParser:
    parser = asking.bare_parser("jaxtune.doctor", __doc__)
    parser.add_argument("config", nargs="*", metavar="CONFIG", help="a YAML file and key=value words, as for training")
    parser.add_argument("--json", metavar="FILE", help="write what was found as JSON too")
    parser.add_argument(
        "--megabytes", type=int, default=64, metavar="N", help="per device in an all-reduce; default: %(default)s"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
