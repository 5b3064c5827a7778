"""`python -m jaxtune.convert merge | gguf-check`: folders made into other folders, and looked over.

    python -m jaxtune.convert merge runs/mine/adapter --output merged
    python -m jaxtune.convert gguf-check runs/mine/hf

`merge` writes an adapter's base with the adapter in its weights, a Hugging Face folder. `gguf-check` asks of a folder
what llama.cpp's converter will ask, and prints the commands that make a GGUF file of it.
"""

import argparse
import sys
from collections.abc import Sequence

from jaxtune import asking
from jaxtune.compat import prepare_environment


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code: 0 finished (for gguf-check: nothing is wrong), 1 error, 2 usage."""
    flags = _parser().parse_args(words)
    prepare_environment()
    from jaxtune import conversions  # only now: a mistake in a flag should not wait for jax

    try:
        if flags.command == "merge":
            conversions.merge(flags.adapter, flags.output, base=flags.base)
            return 0
        findings = conversions.check(flags.folder)
    except (ValueError, OSError) as error:  # OSError: no folder can be made there, or the disk is full
        return asking.fail(error, 1)
    for finding in findings:
        print(f"{finding.level:8} {finding.text}")
    if any(finding.level == "error" for finding in findings):
        return 1
    print(f"\nwith llama.cpp (its convert_hf_to_gguf.py and built programs):\n{conversions.commands(flags.folder)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxtune.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    merge = commands.add_parser("merge", help="an adapter into its base")
    merge.add_argument("adapter", metavar="ADAPTER", help="PEFT folder or hub id")
    merge.add_argument("--output", required=True, metavar="DIR", help="new folder")
    merge.add_argument("--base", metavar="PATH", help="the base, if not where the adapter says")
    check = commands.add_parser("gguf-check", help="is a folder ready for llama.cpp?")
    check.add_argument("folder", metavar="FOLDER", help="Hugging Face model folder")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
