"""`python -m jaxtune.prepare CONFIG [key=value ...]`: render, tokenise and pack what a run will read, ahead of it.

    python -m jaxtune.prepare configs/mine.yaml
    python -m jaxtune.prepare configs/mine.yaml data.prepared=gs://BUCKET/prepared
    python -m jaxtune.prepare configs/mine.yaml --runner=Dataflow --project=P --region=R --temp_location=gs://B/tmp

CONFIG and `key=value` words are those of `jaxtune.train`, which then finds the windows where `data.prepared` says: the
same batches, example for example, with nothing left to tokenise. What is there is not made again, so a command that was
cut off goes on; several at once share the work. docs/preparing.md tells the rest.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

from jaxtune import asking
from jaxtune.compat import prepare_environment
from jaxtune.config import Config
from jaxtune.decode import ConfigError, decode

RUNNERS = ("Direct", "Dataflow", "Flink", "Spark")


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code: 0 finished, 1 error, 2 usage or configuration."""
    flags, rest = _parser().parse_known_args(words)
    try:
        config = _decoded(flags, rest)
    except (ConfigError, ValueError) as error:
        return asking.fail(error, 2)
    prepare_environment()
    try:
        _prepare(config, flags, [word for word in rest if word.startswith("--")])
    except (ValueError, OSError) as error:
        return asking.fail(error, 1)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _prepare(config: Config, flags: argparse.Namespace, runner_options: Sequence[str]) -> None:
    from jaxtune.data.ahead import pooling  # only now: a mistake in the configuration should not wait
    from jaxtune.hub import cache_dir

    with pooling.Pool(flags.workers or _cores(), cache_dir=cache_dir()) as pool:
        pool.begin()  # they load their libraries while this process loads its own
        _prepare_with(pool, config, flags, runner_options)


def _prepare_with(pool: Any, config: Config, flags: argparse.Namespace, runner_options: Sequence[str]) -> None:
    from jaxtune.data.ahead import beaming, preparing
    from jaxtune.data.ahead.prepared import folder_of
    from jaxtune.data.files import streams
    from jaxtune.data.planning import evaluation_tree, training_tree
    from jaxtune.hub import cache_dir
    from jaxtune.inputs import open_training_data
    from jaxtune.metrics import Terminal, duration

    terminal = Terminal()
    trees = training_tree(config)[0], evaluation_tree(config)
    sources = [leaf.config for tree in trees if tree is not None for leaf in tree.leaves()]
    with terminal.counting("writing streamed rows into the cache") as progress:
        for sentence in streams.fetch_all(sources, cache_dir(), progress=progress):
            terminal.say(sentence)
    stream, config = open_training_data(config, terminal, pool.read_all)
    folder = folder_of(config, stream.fingerprint)
    assert folder is not None  # refused before
    terminal.say(dataclasses.replace(stream, told_prepared="").describe())  # what there is of it is said below
    for sentence in stream.warnings:
        terminal.warn(sentence)
    if flags.check:
        with terminal.working("reading every record"):
            damaged = preparing.check(stream, config, folder, cache=cache_dir(), say=terminal.say)
        terminal.say(f"{damaged:,} shards are damaged" if damaged else "every record is whole")
    beam = beaming.Beam(config, stream, flags.runner, runner_options) if flags.runner else None
    make = beam.make if beam else pool.make
    with terminal.counting("preparing", unit="windows") as progress:
        outcome = preparing.prepare(config, stream, folder, make, say=terminal.say, progress=progress)
    terminal.say(outcome.describe())
    if outcome.made_windows:
        rate = outcome.made_draws / max(outcome.seconds, 1e-9)
        terminal.say(
            f"made {outcome.made_windows:,} windows in {duration(outcome.seconds)}: {rate:,.0f} rows of data a second"
        )
    terminal.say("train with the same words reads them: python -m jaxtune.train ...")


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decoded(flags: argparse.Namespace, rest: Sequence[str]) -> Config:
    """The configuration; raises ConfigError, or ValueError for flags that mean nothing."""
    unknown = [word for word in rest if word.startswith("--")]
    if unknown and flags.runner is None:
        raise ValueError(f"{unknown[0]}: unknown flag; expected those of --help, or a --runner that it is an option of")
    bare = [word for word in unknown if "=" not in word]
    if bare:
        raise ValueError(f"{bare[0]}: expected --NAME=VALUE for an option of the runner")
    if flags.workers is not None and flags.workers < 1:
        raise ValueError(f"--workers: found {flags.workers}; expected at least 1")
    if flags.workers is not None and flags.runner is not None:
        raise ValueError("--workers: found beside --runner; give the runner's own option for it")
    words = [*flags.config, *(word for word in rest if not word.startswith("--"))]
    try:
        config = decode(words)
    except ConfigError as error:
        raise ConfigError(f"configuration:\n{error}") from None
    if not config.data.train:
        raise ValueError("data.train: found no source; expected the data that is to be prepared")
    if config.data.prepared == "off":
        raise ValueError("data.prepared: found off; expected auto, a folder or a URL to prepare into")
    return config


def _parser() -> argparse.ArgumentParser:
    parser = asking.bare_parser("jaxtune.prepare", __doc__)
    parser.add_argument("config", nargs="+", metavar="CONFIG", help="a YAML file and key=value words")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: as many as there are cores")
    parser.add_argument(
        "--runner",
        choices=RUNNERS,
        help="have Apache Beam do it, on one machine (Direct) or many; further --NAME=VALUE are the runner's options",
    )
    parser.add_argument("--check", action="store_true", help="read every record first, and make damaged shards again")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
