"""`python -m jaxtune.convert merge | export | check | gguf-check`: folders made into other folders, and looked over.

    python -m jaxtune.convert merge runs/mine/adapter --output merged
    python -m jaxtune.convert export runs/mine --step 1000 --output exported
    python -m jaxtune.convert check Qwen/Qwen2.5-0.5B
    python -m jaxtune.convert gguf-check runs/mine/hf

`merge` writes an adapter's base with the adapter in its weights, a Hugging Face folder. `export` writes hf/ and
adapter/ of a run from one of its checkpoints, on as many hosts as it is started on. `check` says whether and how a
model is supported, by its config.json and tensor by tensor; with torch installed it also compares its logits with those
of transformers (exit code 0 when supported and at parity). `gguf-check` asks of a folder what llama.cpp's converter
will ask, and prints the commands that make a GGUF file of it.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence

from jaxtune import asking
from jaxtune.compat import prepare_environment


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code: 0 finished (for the checks: nothing is wrong), 1 error, 2 usage."""
    flags = _parser().parse_args(words)
    try:
        return COMMANDS[flags.command](flags)
    except (ValueError, OSError) as error:  # OSError: no folder can be made there, or the disk is full
        return asking.fail(error, 1)


def _merge(flags: argparse.Namespace) -> int:
    prepare_environment()
    from jaxtune import conversions  # only now: a mistake in a flag should not wait for jax

    conversions.merge(flags.adapter, flags.output, base=flags.base)
    return 0


def _export(flags: argparse.Namespace) -> int:
    prepare_environment()
    from jaxtune import conversions  # only now, as above

    try:
        conversions.export(flags.run, step=flags.step, output=flags.output)
    except (ValueError, OSError) as error:
        code = asking.fail(error, 1)
        conversions.leave_if_several(error)
        return code
    return 0


def _check(flags: argparse.Namespace) -> int:
    prints_json = flags.json == "-"
    try:
        asking.check_writable(None if prints_json else flags.json, "--json")
        if flags.length is not None and flags.length < 2:
            raise ValueError(f"--length: found {flags.length}; expected at least 2 tokens")
    except ValueError as error:
        return asking.fail(error, 2)
    prepare_environment()
    os.environ["JAX_PLATFORMS"] = "cpu"  # as transformers: a device's own arithmetic is not what is checked
    from jaxtune import checking  # only now, as above

    report = checking.check(flags.folder, length=flags.length, say=_nothing if prints_json else _say)
    if flags.json:
        told = json.dumps(report.as_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        if prints_json:
            print(told, end="")
        else:
            pathlib.Path(flags.json).write_text(told, encoding="utf-8")
    return 0 if report.is_fine else 1


def _gguf_check(flags: argparse.Namespace) -> int:
    prepare_environment()
    from jaxtune import conversions  # only now, as above

    findings = conversions.check(flags.folder)
    for finding in findings:
        print(f"{finding.level:8} {finding.text}")
    if any(finding.level == "error" for finding in findings):
        return 1
    print(f"\nwith llama.cpp (its convert_hf_to_gguf.py and built programs):\n{conversions.commands(flags.folder)}")
    return 0


COMMANDS = {"merge": _merge, "export": _export, "check": _check, "gguf-check": _gguf_check}


def _say(text: str) -> None:
    print(text, flush=True)  # some lines are minutes apart


def _nothing(text: str) -> None:
    pass


def _parser() -> argparse.ArgumentParser:
    parser = asking.bare_parser("jaxtune.convert", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    merge = commands.add_parser("merge", help="an adapter into its base")
    merge.add_argument("adapter", metavar="ADAPTER", help="PEFT folder or hub id")
    merge.add_argument("--output", required=True, metavar="DIR", help="new folder")
    merge.add_argument("--base", metavar="PATH", help="the base, if not where the adapter says")
    export = commands.add_parser("export", help="a run's folders, from one of its checkpoints")
    export.add_argument("run", metavar="RUN", help="output= folder of a run that is not under way")
    export.add_argument("--step", type=int, metavar="N", help="of the checkpoint; default: the newest intact one")
    export.add_argument("--output", metavar="DIR", help="where hf/ and adapter/ go; default: RUN")
    check = commands.add_parser("check", help="is a model supported, and computed as transformers does?")
    check.add_argument("folder", metavar="FOLDER", help="Hugging Face folder or hub id; a run, or an adapter's base")
    check.add_argument("--length", type=int, metavar="N", help="tokens a row; default: past every window if affordable")
    check.add_argument("--json", metavar="FILE", help="write what was found as JSON; - prints it alone")
    gguf = commands.add_parser("gguf-check", help="is a folder ready for llama.cpp?")
    gguf.add_argument("folder", metavar="FOLDER", help="Hugging Face model folder")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
