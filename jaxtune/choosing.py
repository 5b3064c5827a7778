"""Chooses what a configuration leaves to us: mesh, rows at once, what the backward pass computes again.

All ways that divide are forecast (`forecast`) and ranked; the best are compiled, and of those that fit the fastest is
taken. What was found is kept in the cache, by everything that decides it.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import psutil

from jaxtune import assembly, blueprint, hub
from jaxtune.config import Config
from jaxtune.cost_model.chips import CHIPS, Chip
from jaxtune.forecast import OFFLOAD, SLACK, Forecast, Forecaster
from jaxtune.memory import OutOfMemory, memory_explained
from jaxtune.sharding import BATCH_AXES, make_mesh, mesh_sizes, mesh_words

GIB = 2**30
REMATS = ("none", "minimal", "dots", "mid", "full", "offload")
SHORTEST = 1024  # tokens of a row that a device should have; shorter parts are not worth the sending
MOST_TENSOR = 16
TRIES = 4  # ways that are compiled
SURE = 0.75  # of the memory; what should need less is not compiled only to see that it fits
LESS = 0.85  # of the memory that a way which did not fit was to need, the next one may be expected to need


class Choice(NamedTuple):
    """One way to compute the update: devices along each axis, rows at once, remat, options of the compiler."""

    sizes: dict[str, int]
    rows: int
    remat: str
    options: dict[str, Any] = {}  # noqa: RUF012  # never changed

    def of(self, config: Config) -> Config:
        """Returns the configuration with what it leaves open filled in."""
        left = open_keys(config)
        train: dict[str, Any] = {"compiler_options": {**config.train.compiler_options, **self.options}}
        changes: dict[str, Any] = {}
        if "mesh" in left:
            changes["mesh"] = config.mesh.model_copy(update={"auto": False, **self.sizes})
        if "remat" in left:
            changes["model"] = config.model.model_copy(update={"remat": self.remat})
        if "microbatch_rows" in left:
            train["microbatch_rows"] = None if self.rows == config.train.batch_rows else self.rows
        return config.model_copy(update={**changes, "train": config.train.model_copy(update=train)})

    def describe(self) -> str:
        """Says in a few words what it is."""
        axes = mesh_words(self.sizes)
        told = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"{axes}, {self.rows} rows at once, remat {self.remat}{told}"


class Ranked(NamedTuple):
    """A way, and what it should cost."""

    choice: Choice
    forecast: Forecast


def open_keys(config: Config) -> frozenset[str]:
    """Returns what a configuration leaves to us: of mesh, remat, microbatch_rows."""
    left = {
        "mesh": config.mesh.auto,
        "remat": config.model.remat == "auto",
        "microbatch_rows": config.train.microbatch_rows == "auto",
    }
    return frozenset(key for key, is_open in left.items() if is_open)


def choose(
    config: Config, hf_config: dict[str, Any], devices: Sequence[Any], *, where: str, say: Callable[[str], None]
) -> Choice | None:
    """Returns what to fill a configuration's open keys with, for devices that are here; None where none is open.

    The best ways are compiled, one after another, until one fits; one that should leave plenty of room is just taken.

    Args:
        hf_config: config.json of the model.
        devices: all of the run.
        where: what to call the model in errors.
        say: told what was chosen.

    Raises:
        ValueError: none of the best fits.
    """
    left, platform = open_keys(config), devices[0].platform
    if not left:
        return None
    if platform == "cpu" and left == {"remat"}:
        return Choice({}, config.rows_at_once, "none")
    model, config = plan_model(config, hf_config, platform, where)
    if config.mesh.auto:
        slices = len({getattr(device, "slice_index", None) for device in devices})
        config = config.model_copy(update={"mesh": config.mesh.model_copy(update={"slice": slices})})
    known = recall(cache_key(config, hf_config, devices[0].device_kind, len(devices)))
    if known is not None:
        say(f"chosen by a search before: {known.describe()}")
        return known
    chip = chip_of(devices)
    kind = devices[0].device_kind
    forecaster = Forecaster(config, model, chip, platform)
    ranked = rank(forecaster, devices=len(devices), left=left, memory=chip.memory, kind=kind)
    problem: OutOfMemory | None = None
    for choice, forecast in to_try(ranked):
        room = f"{forecast.memory / GIB:.1f} of {chip.memory / GIB:.1f} GiB a device expected"
        if forecast.memory <= SURE * chip.memory:
            say(f"chosen: {choice.describe()}; {room}")
            return choice
        settled = choice.of(config)
        mesh = make_mesh(settled.mesh.model_dump(), devices)
        drawn = blueprint.draw(settled, hf_config, mesh, where=where, steps=1, sources=1)
        try:
            with memory_explained(settled, None):
                blueprint.check_memory(blueprint.compile_update(drawn), chip.memory)
        except OutOfMemory as error:
            say(f"does not fit: {choice.describe()}")
            problem = error
            continue
        say(f"chosen: {choice.describe()}; {room}")
        return choice
    assert problem is not None
    raise problem


def plan_model(
    config: Config, hf_config: dict[str, Any], platform: str, where: str
) -> tuple[assembly.ModelPlan, Config]:
    dtype, param_dtype = assembly.resolve_dtypes(config, platform)
    model = assembly.plan_model(
        hf_config, config.tuning, param_dtype=param_dtype or dtype, seed=config.seed, where=where
    )
    return model, blueprint.fill_lengths(config, model.config, where)


def chip_of(devices: Sequence[Any]) -> Chip:
    """Returns what one of these devices can do, with the memory that a GPU says it has.

    Raises:
        ValueError: neither the table nor the device knows its memory.
    """
    device = devices[0]
    if device.platform == "cpu":
        return Chip(1e11, psutil.virtual_memory().total / len(devices), 1e10, None, link=1e10, dcn=1e9)
    # jax takes a part of a GPU's memory for itself, and says how much that is.
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform == "gpu" else None
    known = CHIPS.get(device.device_kind)
    if known is None and limit is None:
        raise ValueError(
            f"found {device.device_kind}, of which neither we nor its driver say how much memory it has; expected "
            "model.remat, train.microbatch_rows and mesh to be given for it"
        )
    chip = known or Chip(3e14, 0.0, 2e12, None, link=3e11, dcn=2.5e10)
    return dataclasses.replace(chip, memory=float(limit)) if limit is not None else chip


def cache_key(config: Config, hf_config: Mapping[str, Any], kind: str, devices: int) -> str:
    """Returns a name for everything that decides what is best.

    Args:
        config: with lengths filled in.
        kind: jax's name of the devices.
    """
    decisive = {
        "config.json": dict(hf_config),
        "model": config.model.model_dump(mode="json", include={"dtype", "param_dtype", "attention", "remat"}),
        "tuning": config.tuning.model_dump(mode="json"),
        "optimizer": [config.optimizer.name, config.optimizer.options],
        "mesh": config.mesh.model_dump(),
        "rows": [config.train.batch_rows, config.train.microbatch_rows, *blueprint.lengths(config).values()],
        "compiler": config.train.compiler_options,
        "devices": [kind, devices],
        "jax": jax.__version__,
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()[:24]


def remember(key: str, choice: Choice) -> str:
    """Keeps what a search has found for later runs; returns the file."""
    path = os.path.join(hub.cache_dir(), "plans", f"{key}.json")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    aside = f"{path}.{os.getpid()}"
    with open(aside, "w", encoding="utf-8") as stream:
        json.dump(choice._asdict(), stream)
    os.replace(aside, path)
    return path


def recall(key: str) -> Choice | None:
    """Returns what a search has found, if there was one."""
    try:
        with open(os.path.join(hub.cache_dir(), "plans", f"{key}.json"), encoding="utf-8") as stream:
            return Choice(**json.load(stream))
    except (FileNotFoundError, ValueError, TypeError):  # a file of another version is as good as none
        return None


def rank(
    forecaster: Forecaster, *, devices: int, left: frozenset[str], memory: float, kind: str = "such"
) -> list[Ranked]:
    """Returns every way that divides, those that should fit first, and of these the fastest first.

    Args:
        devices: of the whole run.
        left: what may be chosen, as `open_keys` says; the rest is as the configuration has it.
        memory: bytes of a device that may be used.
        kind: what to call the devices in errors.

    Raises:
        ValueError: nothing divides, or the mesh that is given does not make so many devices.
    """
    config, found = forecaster.config, []
    meshes = (
        list(_meshes(forecaster, devices))
        if "mesh" in left
        else [mesh_sizes(config.mesh.model_dump(), devices, kind=kind)]
    )
    remats = [name for name in REMATS if name != OFFLOAD or forecaster.platform != "cpu"]  # a CPU is its own host
    remats = remats if "remat" in left else [config.model.remat]
    for sizes in meshes:
        ways = math.prod(sizes[axis] for axis in BATCH_AXES)
        for rows in _rows(config, ways) if "microbatch_rows" in left else [config.rows_at_once]:
            for remat in remats if rows % ways == 0 else ():
                forecast = forecaster.forecast(sizes, rows=rows, remat=remat)
                found.append(Ranked(Choice(sizes, rows, remat), forecast))
    if not found:
        raise ValueError(
            f"train.batch_rows: found {config.train.batch_rows}, which no mesh of {devices} devices divides; expected "
            f"a multiple of them, e.g. train.batch_rows={devices}"
        )
    limit = usable(memory)
    return sorted(found, key=lambda one: _merit(one, limit))


def usable(memory: float) -> float:
    """Returns the bytes of a device that a forecast may count on."""
    return memory * (1 - SLACK)


def different(ranked: Sequence[Ranked], number: int) -> list[Ranked]:
    """Returns the best that are not alike: of one mesh and remat the best number of rows alone."""
    best: dict[tuple[Any, ...], Ranked] = {}
    for one in ranked:
        best.setdefault((*one.choice.sizes.values(), one.choice.remat), one)
    return list(best.values())[:number]


def to_try(ranked: Sequence[Ranked]) -> list[Ranked]:
    """Returns the best way, and for the case that it does not fit after all the best that needs clearly less, etc."""
    found, limit = [], math.inf
    for one in ranked:
        if one.forecast.memory <= limit:
            found.append(one)
            limit = LESS * one.forecast.memory
    return found[:TRIES]


def _merit(one: Ranked, limit: float) -> tuple[float, ...]:
    """Small is good. What does not fit is ranked by how much; equal times by how plain the mesh is."""
    beyond = max(0.0, one.forecast.memory - limit)
    split = sum(size > 1 for size in one.choice.sizes.values())
    return (beyond, round(one.forecast.seconds, 9), split, one.forecast.memory)


def _meshes(forecaster: Forecaster, devices: int) -> Iterator[dict[str, int]]:
    """Every way to lay the devices out that model, rows and lengths divide; slices are what they are."""
    config, model = forecaster.config, forecaster.model.config
    slices = max(config.mesh.slice, 1)
    per_slice = devices // slices
    heads = math.gcd(getattr(model, "num_kv_heads", 0) or model.num_heads, MOST_TENSOR)
    experts = getattr(model, "experts", None)
    length = config.data.max_length or 0
    contexts = [n for n in _divisors(per_slice) if length % n == 0 and (n == 1 or length // n >= SHORTEST)]
    for tensor, context, expert in itertools.product(
        _divisors(heads), contexts, _divisors(math.gcd(per_slice, experts.count)) if experts else [1]
    ):
        left, rest = divmod(per_slice, tensor * context * expert)
        if rest or config.train.batch_rows % (slices * left * expert):
            continue
        for data in _divisors(left):
            yield {
                "slice": slices,
                "data": data,
                "fsdp": left // data,
                "tensor": tensor,
                "context": context,
                "expert": expert,
            }


def _rows(config: Config, ways: int) -> list[int]:
    """Numbers of rows at once that divide the batch and are divided by the mesh."""
    return [rows for rows in _divisors(config.train.batch_rows) if rows % ways == 0]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
