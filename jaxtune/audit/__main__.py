"""`python -m jaxtune.audit CONFIG.yaml`: what training will see of the data, before it is trained on.

    python -m jaxtune.audit configs/quickstart.yaml
    python -m jaxtune.audit model.path=M data.train.0.path=DATA.jsonl output=O --strict
    python -m jaxtune.audit configs/flan2022.yaml --mixture-only --json plan.json

CONFIG and `key=value` words are those of `jaxtune.train`. Every row is read as training reads it; OUTPUT/audit.html and
OUTPUT/audit.json say what becomes of each. Exit code 1 when training would stop, or with --strict on any warning.

With --mixture-only no text is read: sources whose `examples` are given are believed, others counted. With
data.missing=skip files that are not on this machine are left out of the plan.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from jaxtune import asking
from jaxtune.compat import prepare_environment
from jaxtune.config import Config
from jaxtune.decode import ConfigError, decode


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code: 0 finished, 1 error, 2 usage or configuration."""
    flags = _parser().parse_intermixed_args(words)
    try:
        config = decode(flags.config)
        _check(flags, config)
    except (ConfigError, ValueError) as error:
        return asking.fail(ConfigError(f"configuration:\n{error}"), 2)
    prepare_environment()
    # Only now: a mistake in the configuration should not wait.
    try:
        if flags.mixture_only:
            from jaxtune.audit.mixture_only import tell_mixture

            return tell_mixture(config, flags.json)
        from jaxtune.audit.auditing import audit

        return audit(
            config,
            json_path=flags.json,
            workers=flags.workers,
            skip=flags.skip,
            examples=flags.examples,
            seed=flags.seed,
            strict=flags.strict,
        )
    except (ValueError, OSError) as error:
        return asking.fail(error, 1)
    except KeyboardInterrupt:
        return asking.fail(RuntimeError("interrupted; audit.json and audit.html were not written"), 1)


def _check(flags: argparse.Namespace, config: Config) -> None:
    if flags.workers < 1:
        raise ValueError(f"--workers: found {flags.workers}; expected at least 1")
    if flags.examples < 0:
        raise ValueError(f"--examples: found {flags.examples}; expected 0 or more")
    if not config.data.train:
        raise ValueError("data.train: found no source; expected at least one, e.g. data.train.0.path=FILE.jsonl")


def _parser() -> argparse.ArgumentParser:
    parser = asking.bare_parser("jaxtune.audit", __doc__)
    add = parser.add_argument
    add("config", nargs="+", metavar="CONFIG", help="YAML files and key=value words")
    add("--mixture-only", action="store_true", help="the mixture, without the texts")
    add("--json", metavar="FILE", help="where to write the facts, - for the terminal alone; default: OUTPUT/audit.json")
    add("--strict", action="store_true", help="exit code 1 on any warning")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes; default: %(default)s")
    add("--skip", action="append", default=[], choices=("near", "languages"), help="what takes longest; may repeat")
    add("--examples", type=int, default=100, metavar="N", help="drawn at random for the page; default: %(default)s")
    add("--seed", type=int, default=0, metavar="S", help="of that draw; default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
