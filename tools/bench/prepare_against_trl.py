"""Rows per second of `jaxtune.prepare` beside TRL's preparation of the same conversations, in turns.

    PYTHONPATH=. python tools/bench/prepare_against_trl.py --data FILE [--data FILE] --tokenizer FOLDER \\
        --trl-python PY [--rows 20000] [--workers 2] [--rounds 3]

FILE holds rows of any form that we read (.jsonl, .jsonl.gz); their first questions and answers become the same rows
for both. PY is an interpreter of an environment with trl (1.16). Both tokenise with FOLDER's tokenizer and one chat
template, train the answer alone, and pack rows of 2,048 tokens with two processes. TRL is timed from rows in memory to
packed rows in memory, imports and reading left out. Ours is timed from JSON lines to shards on the disk, the start of
its processes counted. Opening the stream before that looks every row over, tells what is lost, and keeps what it
rendered for the windows, so the rate of windows alone says little; "with opening" is the rate of the whole. "Process"
compares the seconds of whole processes, from start to end with all that is imported. Caches are empty. The machine's
speed drifts, so ratios are taken within a round. No row is repeated to make
more: a copy would find its words remembered.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from trl_preparation import CHATML, LENGTH, run_trl


def single_turns(files: list[str], rows: int) -> Iterator[tuple[str, str]]:
    """Yields (question, answer) of the first rows that have both, of the files in turns."""
    from jaxtune.config_data import SourceConfig
    from jaxtune.data.files.sources import open_source
    from jaxtune.data.layouts import formats
    from jaxtune.data.records import NothingToLearn, RowError

    opened = [open_source(SourceConfig(path=file)) for file in files]
    layouts = [formats.find_layout([s.row(i) for i in range(20)], format="auto", columns={}) for s in opened]
    made = 0
    for number in range(max(map(len, opened))):
        for source, layout in zip(opened, layouts, strict=True):
            if number >= len(source) or made == rows:
                continue
            try:
                turns = layout.convert(source.row(number))[0].messages
            except (RowError, NothingToLearn):
                continue
            said = [m.content for m in turns if m.role in ("user", "assistant")]
            if len(said) >= 2:
                yield said[0], said[1]
                made += 1


def run_jaxtune(file: str, tokenizer: str, workers: str) -> dict[str, float]:
    """Rows a second, of windows alone and with the opening of the stream."""
    from jaxtune import hub
    from jaxtune.config import Config
    from jaxtune.data import loader
    from jaxtune.data.ahead import pooling, prepared, preparing
    from jaxtune.data.chat.templates import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    loaded.chat_template = CHATML
    config = Config(
        output="unused",
        model={"path": "unused"},  # type: ignore[arg-type]
        train={"epochs": 1.0, "batch_rows": 8},  # type: ignore[arg-type]
        data={"train": ({"path": file},)},  # type: ignore[arg-type]
    )
    with pooling.Pool(int(workers), cache_dir=hub.cache_dir()) as pool:
        began = time.perf_counter()
        pool.begin()
        stream = loader.open_stream(config, tokenizer=loaded, max_length=LENGTH, read_all=pool.read_all)
        opened = time.perf_counter() - began
        folder = prepared.folder_of(config, stream.fingerprint)
        assert folder is not None
        done = preparing.prepare(config, stream, folder, pool.make, say=str, progress=lambda done, total: None)
    return {
        "rows_per_second": done.draws / done.seconds,
        "with_opening": done.draws / (opened + done.seconds),
        "bytes_per_token": done.bytes / done.tokens,
        "tokens": done.tokens,
        "fill": done.fill[0],
    }


def in_process(python: str, side: str, file: str, tokenizer: str, workers: int) -> dict[str, float]:
    """Runs one side in a process of its own with an empty cache, and returns what it measured."""
    root = str(pathlib.Path(__file__).resolve().parents[2])
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": root, "JAXTUNE_CACHE": cache,
        }  # fmt: skip
        words = [python, __file__, "one", side, file, tokenizer, str(workers)]
        began = time.perf_counter()
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1]) | {"process": seconds}


def compare(options: argparse.Namespace, folder: pathlib.Path) -> None:
    """Prints both rates by round, and the median of their ratios."""
    ours, theirs = folder / "messages.jsonl", folder / "prompt_completion.jsonl"
    count = 0
    with ours.open("w") as mine, theirs.open("w") as other:
        for question, answer in single_turns(options.data, options.rows):
            asked, told = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
            mine.write(json.dumps({"messages": [asked, told]}) + "\n")
            other.write(json.dumps({"prompt": [asked], "completion": [told]}) + "\n")
            count += 1
    print(f"{count:,} rows, {ours.stat().st_size / 1e6:.1f} MB, {options.workers} processes")
    alone, whole, processes = [], [], []
    for number in range(options.rounds):
        mine_told = in_process(sys.executable, "jaxtune", str(ours), options.tokenizer, options.workers)
        told = in_process(options.trl_python, "trl", str(theirs), options.tokenizer, options.workers)
        alone.append(mine_told["rows_per_second"] / told["rows_per_second"])
        whole.append(mine_told["with_opening"] / told["rows_per_second"])
        processes.append(told["process"] / mine_told["process"])
        print(
            f"round {number + 1}: prepare {mine_told['rows_per_second']:,.0f} rows/s "
            f"({mine_told['with_opening']:,.0f} with opening; {mine_told['tokens']:,.0f} tokens, "
            f"{mine_told['bytes_per_token']:.2f} bytes a token, rows {mine_told['fill']:.1%} full), "
            f"TRL {told['rows_per_second']:,.0f}: {alone[-1]:.2f} ({whole[-1]:.2f}) times; processes "
            f"{mine_told['process']:.1f} and {told['process']:.1f} s",
            flush=True,
        )
    print(
        f"median: {statistics.median(alone):.2f} times TRL's rate, {statistics.median(whole):.2f} with opening, "
        f"{statistics.median(processes):.2f} as processes"
    )


def main() -> None:
    """Runs what the words ask for."""
    if sys.argv[1:2] == ["one"]:
        side, *words = sys.argv[2:]
        print(json.dumps({"jaxtune": run_jaxtune, "trl": run_trl}[side](*words)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--trl-python", required=True)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(options, pathlib.Path(folder))


if __name__ == "__main__":
    main()
