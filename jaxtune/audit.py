"""`python -m jaxtune.audit CONFIG.yaml --mixture-only`: what a run would draw from each of its sources.

    python -m jaxtune.audit configs/flan2022.yaml --mixture-only
    python -m jaxtune.audit configs/flan2022.yaml --mixture-only --json plan.json

CONFIG and `key=value` words are those of `jaxtune.train`. Sources whose `examples` are given are not read; others are
counted. With data.missing=skip files that are not on this machine are left out of the plan. `--json FILE` writes the
plan as JSON, `-` to the terminal alone.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from jaxtune import asking
from jaxtune.compat import prepare_environment
from jaxtune.decode import ConfigError, decode


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code: 0 finished, 1 error, 2 usage or configuration."""
    flags = _parser().parse_args(words)
    try:
        config = decode(flags.config)
    except ConfigError as error:
        return asking.fail(ConfigError(f"configuration:\n{error}"), 2)
    prepare_environment()
    from jaxtune.data.planning import mixture_plan  # only now: a mistake in the configuration should not wait

    try:
        plan = mixture_plan(config)
        told = json.dumps(plan.as_json(), indent=1)
        if flags.json == "-":
            print(told)
            return 0
        print(plan.table())
        if plan.skipped:
            more = ", ..." if len(plan.skipped) > 10 else ""
            print(f"{len(plan.skipped):,} sources are not there and are left out: {', '.join(plan.skipped[:10])}{more}")
        if plan.believed:
            skips = config.data.missing == "skip"
            hint = "they are hub ids or URLs" if skips else "data.missing=skip looks for local files"
            print(f"{plan.believed:,} sources have their sizes from `examples` and were not looked for ({hint})")
        if flags.json:
            with open(flags.json, "w", encoding="utf-8") as file:
                file.write(told + "\n")
    except (ValueError, OSError) as error:
        return asking.fail(error, 1)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = asking.bare_parser("jaxtune.audit", __doc__)
    parser.add_argument("config", nargs="+", metavar="CONFIG", help="a YAML file and key=value words")
    parser.add_argument("--mixture-only", action="store_true", required=True, help="the mixture, without the texts")
    parser.add_argument("--json", metavar="FILE", help="write the plan as JSON; - prints it")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
