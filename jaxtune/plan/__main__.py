"""`python -m jaxtune.plan [CONFIG.yaml] [key=value ...] --topology NAME`: does it fit, how long, what does it cost?

    python -m jaxtune.plan configs/lora.yaml --topology v5p-128
    python -m jaxtune.plan model.path=configs/shapes/llama-3.1-8b train.batch_rows=32 --topology v5e-16 --search

Compiles the very update that training runs, for TPUs that are not here (needs the `plan` extra: libtpu), and reads
memory, cycles and traffic from what the compiler made; GPUs (h100-8) are forecast by a model of our own, and marked so.
Of the model only config.json is read; the data may be absent. Nothing is trained; OUTPUT/plan.json keeps the estimate,
and a run in the same folder compares itself with it.
Exit code 0 when it fits, 1 when it does not or nothing could be planned, 2 for usage and configuration.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from jaxtune import asking
from jaxtune.config import Config
from jaxtune.cost_model.topologies import Topology, parse_topology
from jaxtune.decode import ConfigError, decode, read_yaml

# A plan asks for no data, and writes little: what a configuration must say for a run may be missing here.
MISSING: dict[str, Any] = {"output": "runs/plan", "data": {"train": [{"path": "not given"}]}}


def main(words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    flags = _parser().parse_intermixed_args(words)
    try:
        topology = parse_topology(flags.topology, flags.slices)
        configs = _configs(flags, topology)
        price = _price(flags.prices, topology)
        for path, flag in ((flags.json, "--json"), (flags.overrides, "--overrides")):
            asking.check_writable(path, flag)
        _check_flags(flags, topology)
    except ConfigError as error:
        return asking.fail(ConfigError(f"configuration:\n{error}"), 2)
    except ValueError as error:
        return asking.fail(error, 2)
    _prepare()
    from jaxtune.plan import planning, report  # only now: a mistake in a flag should not wait for jax

    try:
        if flags.compare:
            plans = planning.compare(configs, flags.compare, topology, price=price)
        elif flags.search:
            plans = [planning.search(configs[0], topology, price=price, overrides=flags.overrides, hlo=flags.hlo)]
        else:
            plans = [planning.plan(configs[0], topology, price=price, hlo=flags.hlo)]
    except (ValueError, OSError) as error:
        return asking.fail(error, 1)
    if flags.json:
        told = [report.as_json(plan) for plan in plans]
        text = json.dumps(told[0] if len(told) == 1 else told, indent=1)
        pathlib.Path(flags.json).write_text(text + "\n", encoding="utf-8")
    return 0 if all(plan.fits for plan in plans) else 1


def _prepare() -> None:
    """Keeps the accelerators of this machine out of it, and lets several plans load libtpu at once."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    # libtpu complains of what it cannot find out about a machine without TPUs.
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}


def _configs(flags: argparse.Namespace, topology: Topology) -> list[Config]:
    """The configurations to plan, with the slices that the topology has."""
    if flags.compare:
        configs = [decode([file, *flags.config], MISSING) for file in flags.compare]
    else:
        if not flags.config:
            raise ValueError("found no configuration; expected a YAML file, or at least model.path=FOLDER")
        configs = [decode(flags.config, MISSING)]
    return [_with_slices(config, topology) for config in configs]


def _with_slices(config: Config, topology: Topology) -> Config:
    found = config.mesh.slice
    if found in (1, -1):
        mesh = config.mesh.model_copy(update={"slice": topology.slices})
        return config.model_copy(update={"mesh": mesh})
    if found != topology.slices:
        raise ValueError(f"mesh.slice: found {found}, but --slices is {topology.slices}; expected the same, or 1")
    return config


def _price(path: str | None, topology: Topology) -> float | None:
    """The price of a chip for an hour, of a YAML or JSON file by kind (`v5p: 4.2`); None without a file."""
    if path is None:
        return None
    table = read_yaml(path)
    price = table.get(topology.kind)
    if not isinstance(price, int | float) or isinstance(price, bool) or price < 0:
        raise ValueError(
            f"--prices: {path} has {price!r} for {topology.kind}; expected the price of a chip for an hour, e.g. "
            f"{topology.kind}: 4.20 (kinds there: {', '.join(map(str, table)) or 'none'})"
        )
    return float(price)


def _check_flags(flags: argparse.Namespace, topology: Topology) -> None:
    if flags.compare and flags.search:
        raise ValueError("found --compare and --search; expected one of the two")
    if flags.overrides and not flags.search:
        raise ValueError("found --overrides without --search, which alone finds something to write there")
    if flags.hlo and (flags.compare or topology.is_gpu):
        what = "--compare" if flags.compare else f"a GPU ({topology.name}), for which nothing is compiled"
        raise ValueError(f"found --hlo with {what}; expected it with one plan for a TPU")


def _parser() -> argparse.ArgumentParser:
    parser = asking.bare_parser("jaxtune.plan", __doc__)
    add = parser.add_argument
    add("config", nargs="*", metavar="CONFIG", help="YAML files and key=value words, as for training")
    add("--topology", required=True, metavar="NAME", help="v5p-128, v5e-64, v6e-256, tpu7x-64, v5p:4x4x8, h100-8 ...")
    add("--slices", type=int, default=1, metavar="N", help="so many of it, joined by the network; default: %(default)s")
    add("--search", action="store_true", help="find the best mesh, remat, rows at once and compiler options")
    add("--overrides", metavar="FILE", help="where --search writes what it found; default: OUTPUT/overrides.yaml")
    add("--compare", nargs=2, metavar=("A.yaml", "B.yaml"), help="two configurations side by side")
    add("--prices", metavar="FILE", help="YAML of prices by kind, of a chip for an hour: v5p: 4.20")
    add("--json", metavar="FILE", help="write the plan as JSON too")
    add("--hlo", metavar="DIR", help="write the optimized module there: step.optimized.hlo.txt")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
