"""`python -m jaxtune.evaluate RUN --data FILE`: how often a model's own answers are exactly right.

    python -m jaxtune.evaluate runs/mine --data held_out.jsonl --json scores.json
    python -m jaxtune.evaluate runs/mine --data a.jsonl --data b.jsonl --by task --limit 500

RUN is the output= folder of a run, a Hugging Face folder, a hub id or a PEFT adapter. FILE has rows of any form that
training reads; the model is given everything before a conversation's last assistant turn and answers greedily, and
its answer is right when it equals that turn but for white space around it.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from jaxtune import asking
from jaxtune.compat import prepare_environment

SHOWN = 3  # wrong answers printed for each file, and
WIDTH = 160  # characters of each


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code: 0 finished, 1 error, 2 usage."""
    flags = _parser().parse_args(words)
    try:
        columns = _columns(flags.columns)
        asking.check_writable(flags.json, "--json")
        for flag, value in (("--limit", flags.limit), ("--max-new-tokens", flags.max_new_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{flag}: found {value}; expected at least 1")
    except ValueError as error:
        return asking.fail(error, 2)
    prepare_environment()
    from jaxtune.evaluate import running  # only now: a mistake in a flag should not wait for jax

    try:
        start = time.perf_counter()
        report = running.run(
            flags.model,
            flags.data,
            by=flags.by,
            limit=flags.limit,
            columns=columns,
            max_new_tokens=flags.max_new_tokens,
            batch=flags.batch,
            say=_say,
            template=flags.template,
            base=flags.base,
            dtype=flags.dtype,
        )
    except ValueError as error:
        return asking.fail(error, 1)
    seconds = time.perf_counter() - start
    print(running.table(report))
    _show_wrong(report)
    _say(f"{report['overall']['count']:,} answers, {report['tokens']:,} tokens in {seconds:.1f} s, loading included")
    if flags.json:
        with open(flags.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2, ensure_ascii=False)
            file.write("\n")
        _say(f"wrote {flags.json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = asking.make_parser("jaxtune.evaluate", __doc__ or "")
    add = parser.add_argument
    add("--data", action="append", required=True, metavar="FILE", help="rows to ask; may be repeated")
    add("--by", metavar="COLUMN", help="column whose values are scored apart; default: task, where rows have it")
    add("--columns", action="append", default=[], metavar="FIELD=COLUMN", help="as data.train.0.columns in training")
    add("--limit", type=int, metavar="N", help="rows of each file at most, spread evenly over it")
    add("--max-new-tokens", type=int, metavar="N", help="default: the longest right answer, and 8 more")
    add("--batch", type=int, metavar="N", help="prompts at once; default: what 1 GiB holds")
    add("--json", metavar="OUT", help="write the scores, counts and some wrong answers here")
    return parser


def _columns(words: Sequence[str]) -> dict[str, str]:
    columns = {}
    for word in words:
        field, found, column = word.partition("=")
        if not (field and found and column):
            raise ValueError(f"--columns: found {word!r}; expected FIELD=COLUMN, e.g. --columns prompt=question")
        columns[field] = column
    return columns


def _show_wrong(report: dict[str, Any]) -> None:
    for file in report["files"].values():
        for wrong in file["wrong"][:SHOWN]:
            print(f"\nwrong ({wrong['where']}): {_short(wrong['messages'][-1]['content'])}")
            print(f"  expected {_short(wrong['expected'])!r}\n  found    {_short(wrong['answer'])!r}")


def _short(text: str) -> str:
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
