"""`python -m jaxtune.generate RUN --prompts FILE`: answers to a file of prompts, or to prompts given as flags.

    python -m jaxtune.generate runs/mine --prompt "Name three colours."
    python -m jaxtune.generate runs/mine --prompts prompts.txt --output answers.jsonl --temperature 0.7 --top-p 0.9

RUN is the output= folder of a run, a Hugging Face folder, a hub id or a PEFT adapter. FILE is a `.txt` with a prompt a
line, or a `.jsonl` with `prompt` (text) or `messages` (role and content) a line. The output has a line for each
prompt: the prompt, `answer`, `tokens` (their number) and `stopped`: stop, length (--max-new-tokens) or positions.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from jaxtune import asking
from jaxtune.compat import prepare_environment

SHOWN = 5  # answers printed when all are in a file
ROLES = ("system", "user", "assistant")
Request = dict[str, Any]  # {"prompt": text} or {"messages": [...]}, as it is written beside its answer


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code: 0 finished, 1 error, 2 usage."""
    flags = _parser().parse_args(words)
    try:
        sampling = asking.read_sampling(flags)
        requests = read_requests(flags.prompts, flags.prompt)
        asking.check_writable(flags.output, "--output")
    except ValueError as error:
        return asking.fail(error, 2)
    prepare_environment()
    from jaxtune.answering import open_answerer  # only now: a mistake in a flag should not wait for jax

    try:
        answerer = open_answerer(
            flags.model, template=flags.template, base=flags.base, dtype=flags.dtype, batch=flags.batch, say=_say
        )
        start = time.perf_counter()
        answers = answerer.answer([messages_of(request, flags.system) for request in requests], sampling)
        seconds = time.perf_counter() - start
    except ValueError as error:
        return asking.fail(error, 1)
    records = [
        {**request, "answer": answer.text, "tokens": len(answer.tokens), "stopped": answer.stopped}
        for request, answer in zip(requests, answers, strict=True)
    ]
    _report(records, flags.output, seconds)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = asking.make_parser("jaxtune.generate", __doc__ or "")
    parser.add_argument("--prompts", metavar="FILE", help=".txt, a prompt a line, or .jsonl")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    parser.add_argument("--output", metavar="FILE", help="JSON lines, one for each prompt; default: printed only")
    parser.add_argument("--system", metavar="TEXT", help="system message of prompts that have none")
    parser.add_argument("--batch", type=int, metavar="N", help="prompts at once; default: what 1 GiB holds")
    asking.add_sampling(parser, max_new_tokens=256, temperature=0.0, top_p=1.0)
    return parser


def read_requests(path: str | None, prompts: Sequence[str] = ()) -> list[Request]:
    """Returns the prompts of a file, and those given as text, in this order.

    Raises:
        ValueError: no prompt at all, no such file, or a line that is none, with `file:line` and what was expected.
    """
    requests: list[Request] = []
    if path is not None:
        if not os.path.isfile(path):
            raise ValueError(f"--prompts: {path}: no such file; expected a .txt (a prompt a line) or .jsonl file")
        if not path.endswith((".txt", ".jsonl", ".ndjson")):
            raise ValueError(f"--prompts: {path}: found a file of unknown kind; expected a name ending .txt or .jsonl")
        with open(path, "rb") as file:
            lines = file.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        for number, line in enumerate(lines, 1):
            if line.strip():
                requests.append(_read_line(line, f"{path}:{number}", is_json=not path.endswith(".txt")))
    requests += [{"prompt": text} for text in prompts]
    if not requests:
        raise ValueError(
            f"{path}: found no prompt; expected one a line" if path else "give prompts: --prompts FILE or --prompt TEXT"
        )
    return requests


def _read_line(line: bytes, where: str, *, is_json: bool) -> Request:
    try:
        text = line.decode("utf-8").rstrip("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: byte {error.start + 1} of the line is not UTF-8; expected UTF-8 text") from error
    if not is_json:
        return {"prompt": text}
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: column {error.colno}: {error.msg}; expected one complete JSON object a line"
        ) from error
    expected = "expected prompt (text) or messages (a list of role and content)"
    if not isinstance(row, dict):
        raise ValueError(f"{where}: found a JSON {type(row).__name__}; {expected}")
    if isinstance(row.get("prompt"), str):
        return {"prompt": row["prompt"]}
    if "messages" not in row:
        raise ValueError(f"{where}: found keys {', '.join(row) or 'none'}; {expected}")
    _check_messages(row["messages"], where)
    return {"messages": row["messages"]}


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages: expected a list of objects with role and content")
    for number, message in enumerate(messages, 1):
        known = isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
        if not known:
            raise ValueError(
                f"{where}: message {number}: found {json.dumps(message, ensure_ascii=False)[:80]}; expected role (one "
                f"of {', '.join(ROLES)}) and content (text)"
            )
    if messages[-1]["role"] != "user":
        raise ValueError(f"{where}: the last message is of role {messages[-1]['role']}; expected user, to be answered")


def messages_of(request: Request, system: str | None = None) -> list[dict[str, str]]:
    """Returns the messages of a request; `system` opens those that have no system message."""
    messages = request.get("messages") or [{"role": "user", "content": request["prompt"]}]
    if system is not None and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return list(messages)


def _report(records: list[dict[str, Any]], output: str | None, seconds: float) -> None:
    """Writes the records and prints them, or the first few where they are in a file."""
    if output:
        with open(output, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    for record in records[: SHOWN if output else None]:
        asked = record["prompt"] if "prompt" in record else record["messages"][-1]["content"]
        cut = "" if record["stopped"] == "stop" else f" … ({record['stopped']})"
        print(f"> {asked}\n{record['answer']}{cut}\n")
    tokens = sum(record["tokens"] for record in records)
    rate = f"{tokens / seconds:,.0f} tokens/s, compiling included"
    _say(f"{len(records):,} answers, {tokens:,} tokens in {seconds:.1f} s ({rate})")
    if output:
        _say(f"wrote {output}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
