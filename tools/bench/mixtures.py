"""The data path's figures: draws per second, indexing, preparation beside TRL, thousands of sources, packing.

    python tools/bench/mixtures.py draws
    python tools/bench/mixtures.py prepare --data FOLDER --tokenizer FOLDER --trl-python PY [--rows 40000] [--rounds 2]
    python tools/bench/mixtures.py many --folder EMPTY_FOLDER --tokenizer FOLDER [--sources 2000] [--gigabytes 20]

`draws`: blocks of 65,536 draws from 1,836 leaves, beside Grain's own mix. `prepare`: the same T0 and chain-of-thought
pairs (FOLDER/t0/*.jsonl.gz, FOLDER/cot/*.tsv) read, templated, tokenised and packed at 2,048 by our stream and by
`trl.SFTTrainer` (PY: an environment with trl 1.16) in turns, both with two processes; and how full our rows are. Ours
is timed from the first look at the stream to its last batch, which reads the JSON and starts the workers; TRL's from
rows in memory to packed rows. Opening our stream comes before that: it measures every row once and keeps the lengths in
a cache, here an empty one. It is told apart, and the rate "with opening" counts it.
`many`: JSON-lines files are generated and indexed, then a fresh process opens them all and makes its first batch.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from fractions import Fraction
from typing import Any

from trl_preparation import CHATML, LENGTH, run_trl


def run_draws() -> dict[str, float]:
    """Draws per second of our sampler and of Grain's, over leaves whose sizes differ by a factor of a million."""
    import grain
    import numpy as np

    from jaxtune.data.mixing.mixture import Leaf, Mixture

    sizes = np.exp(np.random.default_rng(0).uniform(0, np.log(1e6), 1836)).astype(int) + 1
    leaves = [Leaf(int(n), source=i) for i, n in enumerate(sizes)]
    mixture, block = Mixture(leaves, [[Fraction(int(n)) for n in sizes]], seed=0), 1 << 16
    began = time.perf_counter()
    for i in range(16):
        mixture.block(i * block, block)
    ours = 16 * block / (time.perf_counter() - began)
    mixed = grain.MapDataset.mix([grain.MapDataset.range(10**6) for _ in sizes], weights=sizes.astype(float))
    began = time.perf_counter()
    for i in range(5000):
        mixed[i]
    return {"ours, draws/s": ours, "grain, draws/s": 5000 / (time.perf_counter() - began)}


def write_pairs(data: pathlib.Path, file: pathlib.Path, count: int) -> int:
    """Writes `count` pairs, sources shuffled, as prompt/completion messages, of which both train the answer alone."""
    import gzip
    import random

    texts = []
    for path in sorted(data.glob("t0/*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as rows:
            texts.append([(r["inputs"], r["targets"]) for r in map(json.loads, rows) if r["targets"].strip()])
    for path in sorted(data.glob("cot/*.tsv")):
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n") if line]
        texts.append([(q.replace("\\n", "\n"), f"{c} {a}".replace("\\n", "\n")) for q, a, c in lines])
    pairs = [(source[i], n) for n, source in enumerate(texts) for i in range(len(source))]
    random.Random(0).shuffle(pairs)
    with file.open("w", encoding="utf-8") as out:
        for (prompt, completion), _ in pairs[:count]:
            asked, answered = {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}
            out.write(json.dumps({"prompt": [asked], "completion": [answered]}) + "\n")
    return min(count, len(pairs))


def load_tokenizer(folder: str) -> Any:
    """The tokenizer with a template that needs no new tokens."""
    from jaxtune.data.chat import templates

    loaded = templates.load_tokenizer(folder)
    loaded.chat_template = CHATML
    return loaded


def make_stream(paths: list[str], tokenizer: Any, **more: Any) -> Any:
    """Our stream over some files, eight rows of 2,048 a batch."""
    from jaxtune.config import Config
    from jaxtune.data import loader

    config = Config(
        output="unused",
        model={"path": "unused"},  # type: ignore[arg-type]
        train={"steps": 10**6, "batch_rows": 8},  # type: ignore[arg-type]
        data={"train": tuple({"path": path} for path in paths), **more},  # type: ignore[arg-type]
    )
    return loader.open_stream(config, tokenizer=tokenizer, max_length=LENGTH)


def run_ours(file: str, tokenizer: str, workers: int) -> dict[str, float]:
    """Examples per second from lines to packed batches, and the share of positions that hold a token."""
    first, again = load_tokenizer(tokenizer), load_tokenizer(tokenizer)
    opening = time.perf_counter()
    make_stream([file], first, workers=workers, lanes=1)
    opened = time.perf_counter() - opening
    stream = make_stream([file], again, workers=workers, lanes=1)  # the first tokenizer knows the words of these rows
    examples = positions = filled = 0
    total = stream.funnel.total("kept")
    began = time.perf_counter()
    for batch, _ in stream.batches(stream.initial_state()):
        examples += sum(map(len, batch.examples))
        positions += batch.arrays.tokens.size
        filled += int((batch.arrays.segment_ids > 0).sum())
        if examples >= total:
            break
    seconds = time.perf_counter() - began
    return {
        "examples_per_second": examples / seconds,
        "with opening": examples / (opened + seconds),
        "fill": filled / positions,
    }


def run_many(folder: str, tokenizer: str) -> dict[str, float]:
    """Seconds to the first batch of all files of a folder, and what this process then holds."""
    import psutil

    import jaxtune.data.loader  # noqa: F401  (imports are not what is measured)

    paths = sorted(str(path) for path in pathlib.Path(folder).glob("*.jsonl"))
    loaded = load_tokenizer(tokenizer)
    began = time.perf_counter()
    stream = make_stream(paths, loaded)
    opened = time.perf_counter() - began
    next(stream.batches(stream.initial_state()))
    seconds, process = time.perf_counter() - began, psutil.Process()
    memory = process.memory_full_info()
    return {
        "seconds_to_first_batch": seconds,
        "of_these_to_open": opened,
        "window": stream.maker.size,
        "lanes": stream.lanes,
        "resident_gib": memory.rss / 2**30,
        "own_gib": memory.uss / 2**30,
        "threads": threading.active_count(),
        "system_threads": process.num_threads(),
        "open_files": process.num_fds(),
    }


def generate(folder: pathlib.Path, sources: int, gigabytes: float) -> int:
    """Writes `sources` files of conversations, all different, of `gigabytes` together; returns the bytes written."""
    import random

    folder.mkdir(parents=True, exist_ok=True)
    words = [f"word{i}" for i in range(5000)]
    rng = random.Random(0)
    lines = []
    for i in range(4000):
        question, answer = (" ".join(rng.choices(words, k=rng.randint(20, 200))) for _ in range(2))
        lines.append(json.dumps({"prompt": f"{i} {question}", "completion": answer}) + "\n")
    each, total = int(gigabytes * 1e9 / sources), 0
    for n in range(sources):
        size, first = 0, rng.randrange(len(lines))
        with (folder / f"source{n:05d}.jsonl").open("w") as file:
            file.write(json.dumps({"prompt": f"Which source is this? {n}", "completion": f"Source {n}."}) + "\n")
            while size < each:
                size += file.write(lines[first % len(lines)])
                first += 1
        total += size
    return total


def in_process(python: str, *words: str, **more: str) -> dict[str, float]:
    """Runs one contestant in a process of its own, `more` its environment, and returns what it measured."""
    root = str(pathlib.Path(__file__).resolve().parents[2])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": root, **more}
    done = subprocess.run([python, __file__, "one", *words], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def prepare(options: argparse.Namespace) -> None:
    """Prints preparation rates, ours and TRL's in turns."""
    file = pathlib.Path(options.scratch) / "pairs.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    print(f"{write_pairs(pathlib.Path(options.data), file, options.rows):,} pairs")
    found: dict[str, list[float]] = {"ours, 2 processes": [], "ours, threads": [], "trl": []}
    for _ in range(options.rounds):
        for name, workers in (("ours, 2 processes", "2"), ("ours, threads", "0")):
            with tempfile.TemporaryDirectory() as cache:
                measured = in_process(
                    sys.executable, "ours", str(file), options.tokenizer, workers, JAXTUNE_CACHE=cache
                )
            found[name].append(measured["examples_per_second"])
            rate, whole = measured["examples_per_second"], measured["with opening"]
            print(f"{name}: {rate:,.0f} examples/s, {whole:,.0f} with opening, rows {measured['fill']:.2%} full")
        if options.trl_python:
            measured = in_process(options.trl_python, "trl", str(file), options.tokenizer)
            found["trl"].append(measured["rows_per_second"])
            print(f"trl: {measured['rows_per_second']:,.0f} examples/s")
    if found["trl"]:
        for name in ("ours, 2 processes", "ours, threads"):
            ratios = [a / b for a, b in zip(found[name], found["trl"], strict=True)]
            print(f"{name} / trl: {statistics.median(ratios):.2f}")


def many(options: argparse.Namespace) -> None:
    """Prints how fast files are indexed, and what a mixture of all of them takes."""
    from jaxtune.config_data import SourceConfig
    from jaxtune.data.files import sources

    folder = pathlib.Path(options.folder)
    if not any(folder.glob("*.jsonl")):
        generate(folder, options.sources, options.gigabytes)
    paths = sorted(folder.glob("*.jsonl"))
    total = sum(path.stat().st_size for path in paths)
    began = time.perf_counter()
    for path in paths:
        sources.open_source(SourceConfig(path=str(path)))
    seconds = time.perf_counter() - began
    print(f"{len(paths):,} files, {total / 1e9:.1f} GB: opened in {seconds:.1f} s, {total / 1e6 / seconds:,.0f} MB/s")
    for run in ("first, lengths sampled", "again"):
        told = in_process(sys.executable, "many", str(folder), options.tokenizer)
        print(f"{run}: " + ", ".join(f"{key} {value:.3g}" for key, value in told.items()))


def main() -> None:
    """Runs what the words ask for."""
    if sys.argv[1:2] == ["one"]:
        kind, *words = sys.argv[2:]
        if kind == "ours":
            told = run_ours(words[0], words[1], int(words[2]))
        else:
            told = {"trl": run_trl, "many": run_many}[kind](*words)
        print(json.dumps(told))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("draws")
    prepares = commands.add_parser("prepare")
    prepares.add_argument("--data", required=True)
    prepares.add_argument("--tokenizer", required=True)
    prepares.add_argument("--trl-python")
    prepares.add_argument("--rows", type=int, default=40_000)
    prepares.add_argument("--rounds", type=int, default=2)
    prepares.add_argument("--scratch", default="build/bench")
    manies = commands.add_parser("many")
    manies.add_argument("--folder", required=True)
    manies.add_argument("--tokenizer", required=True)
    manies.add_argument("--sources", type=int, default=2000)
    manies.add_argument("--gigabytes", type=float, default=20.0)
    options = parser.parse_args()
    if options.command == "draws":
        for name, rate in run_draws().items():
            print(f"{name}: {rate:,.0f}")
    else:
        {"prepare": prepare, "many": many}[options.command](options)


if __name__ == "__main__":
    main()
