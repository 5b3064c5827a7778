"""What one update costs: memory by kind, cycles by part, traffic by axis, time."""

import dataclasses
import math
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxtune import adapters, blueprint
from jaxtune.assembly import ModelPlan
from jaxtune.choosing import Ranked, usable
from jaxtune.config import Config
from jaxtune.cost_model.chips import CHIPS, Chip
from jaxtune.cost_model.estimate import Estimate, estimate
from jaxtune.cost_model.hlo import parse
from jaxtune.cost_model.links import directions
from jaxtune.cost_model.saved import saved_bytes
from jaxtune.cost_model.topologies import Topology
from jaxtune.forecast import Forecast, Forecaster, layers_of
from jaxtune.memory import is_out_of_memory
from jaxtune.sharding import BATCH_AXES, make_mesh

GIB = 2**30
GPU_KINDS = {  # by the names that topologies have
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
}
HLO_FILE = "step.optimized.hlo.txt"
_NEEDED = re.compile(r"\(?([\d.]+)([KMGT])\)? (?:exceeds available HBM|of [\d.]+[KMGT] hbm)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Memory(NamedTuple):
    """Bytes of one device by kind, and the `limit` that a program may use.

    `activations` are what the forward pass keeps for the backward one; `temporaries` all else that is there for a
    while. `told`: the total that the compiler named when it refused, where it did. `host`: bytes that lie in the memory
    of the host meanwhile.
    """

    weights: float
    optimizer: float
    gradients: float
    activations: float
    temporaries: float
    batch: float
    limit: float
    told: float | None = None
    host: float = 0.0

    @property
    def total(self) -> float:
        """Bytes in all."""
        return self.told if self.told is not None else sum(self[:6])


@dataclasses.dataclass(frozen=True)
class Plan:
    """An update of one configuration on one topology.

    `tokens`: positions of an update, padding included. `model_flops`: of an update, over all devices, nothing computed
    again counted. `by`: who says so, `compiler` or `forecast`; with the compiler's word there is an `estimate`.
    `why`: a sentence about the attention kernel. `problem`: why it does not fit, or None. `price`: of a chip for an
    hour.
    """

    topology: Topology
    config: Config
    chip: Chip
    device_kind: str
    mesh: dict[str, int]
    parameters: int
    trained: int
    layers: int
    tokens: int
    model_flops: float
    memory: Memory
    by: str
    compile_seconds: float
    why: str
    estimate: Estimate | None = None
    forecast: Forecast | None = None
    problem: str | None = None
    price: float | None = None

    @property
    def fits(self) -> bool:
        """Whether a device holds it."""
        return self.problem is None

    @property
    def devices(self) -> int:
        """What jax counts."""
        return self.topology.devices

    @property
    def seconds(self) -> float | None:
        """Of one update; None where the compiler refused."""
        if self.estimate is not None:
            away = 2 * self.memory.host / self.chip.host  # out and back, beside the work
            return max(self.estimate.seconds, away)
        return self.forecast.seconds if self.forecast is not None and self.by == "forecast" else None

    @property
    def flops(self) -> float | None:
        """Computed in an update by all devices, what is computed again counted too; None where the compiler refused."""
        by_one = self.estimate or self.forecast
        return by_one.flops * self.devices if by_one is not None else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of all devices together."""
        return self.tokens / self.seconds if self.seconds else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over what the devices could do in the time (PaLM, Chowdhery et al. 2022, appendix B)."""
        return self.model_flops / (self.seconds * self.chip.peak * self.devices) if self.seconds else None

    @property
    def hours(self) -> float | None:
        """Of the run's updates; None where the configuration does not say how many."""
        steps = self.config.train.steps
        return self.seconds * steps / 3600 if self.seconds and steps else None

    def priced(self, price: float | None) -> "Plan":
        """Returns the same plan with the price of one chip for an hour."""
        return dataclasses.replace(self, price=price)

    @property
    def cost(self) -> float | None:
        """Of the run, in the prices' currency."""
        return self.hours * self.price * self.topology.chips if self.hours and self.price is not None else None


def compile_plan(
    config: Config,
    hf_config: dict[str, Any],
    topology: Topology,
    devices: Sequence[Any],
    *,
    where: str,
    hlo: str | None,
) -> Plan:
    """Compiles the update for devices that are not here, and reads what it costs.

    Args:
        config: with nothing left open and lengths filled in.
        hf_config: config.json.
        devices: of the topology.
        where: what to call the model in errors.
        hlo: folder for the text of the optimized module.
    """
    mesh = make_mesh(config.mesh.model_dump(), devices)
    steps, sources = config.train.steps or 1000, len(config.data.train)
    drawn = blueprint.draw(config, hf_config, mesh, where=where, steps=steps, sources=sources)
    kind = devices[0].device_kind
    chip = CHIPS[kind]
    facts = _facts(config, drawn.model, topology, kind, dict(mesh.shape))
    start = time.perf_counter()
    try:
        compiled = blueprint.compile_update(drawn)
    except Exception as error:
        if not isinstance(error, jax.errors.JaxRuntimeError):
            raise
        if not is_out_of_memory(error):
            told = str(error).splitlines()[0]
            raise ValueError(f"the compiler refuses this update, not for its memory: {told}") from error
        facts |= {"memory": _memory_refused(drawn, str(error), chip), "problem": str(error).splitlines()[0]}
        return Plan(**facts, by="compiler", why=drawn.why_attention, compile_seconds=time.perf_counter() - start)
    seconds, text = time.perf_counter() - start, compiled.as_text() or ""
    if hlo is not None:
        pathlib.Path(hlo).mkdir(parents=True, exist_ok=True)
        (pathlib.Path(hlo) / HLO_FILE).write_text(text, encoding="utf-8")
    module = parse(text)
    memory = _memory(drawn, compiled, saved_bytes(module), chip)
    ways = directions([device.coords for device in mesh.devices.flat], topology.shape, mesh.shape, chip)
    beyond = memory.total - memory.limit
    return Plan(
        **facts,
        memory=memory,
        by="compiler",
        why=drawn.why_attention,
        compile_seconds=seconds,
        estimate=estimate(module, chip, mesh=dict(mesh.shape), directions=ways),
        problem=f"needs {beyond / GIB:.2f} GiB more than a device has" if beyond > 0 else None,
    )


def forecast_plan(config: Config, forecaster: Forecaster, topology: Topology, ranked: Ranked) -> Plan:
    """Returns the plan of a way that was forecast, for hardware that nothing here compiles for.

    Args:
        config: with nothing left open.
    """
    forecast, chip = ranked.forecast, forecaster.chip
    beyond = forecast.memory - usable(chip.memory)
    return Plan(
        **_facts(config, forecaster.model, topology, GPU_KINDS[topology.kind], ranked.choice.sizes),
        memory=_memory_forecast(config, forecast, ranked.choice.sizes, chip),
        by="forecast",
        why="attention: plain" if forecaster.model.config.is_encoder_decoder else "attention: a fused kernel",
        compile_seconds=0.0,
        forecast=forecast,
        problem=f"needs {beyond / GIB:.2f} GiB more than is safe on a device" if beyond > 0 else None,
    )


def _facts(config: Config, model: ModelPlan, topology: Topology, kind: str, sizes: dict[str, int]) -> dict[str, Any]:
    """What a plan says whether it compiles or not."""
    tokens = config.train.batch_rows * sum(blueprint.lengths(config).values())
    return {
        "topology": topology,
        "config": config,
        "chip": CHIPS[kind],
        "device_kind": kind,
        "mesh": sizes,
        "parameters": adapters.count((model.trainable, model.frozen)),
        "trained": adapters.count(model.trainable),
        "layers": layers_of(model),
        "tokens": tokens,
        "model_flops": blueprint.flops_per_token(config, model) * tokens,
    }


def _memory(drawn: blueprint.Blueprint, compiled: jax.stages.Compiled, saved: float, chip: Chip) -> Memory:
    """What the compiler's analysis says, told apart: what is given by its sharding, what is saved by the loops."""
    memory: Any = compiled.memory_analysis()
    weights, optimizer, gradients = _given(drawn)
    temporaries = max(blueprint.memory_needed(compiled) - memory.argument_size_in_bytes, 0)
    activations = min(saved, temporaries)
    gradients = min(gradients, temporaries - activations)
    return Memory(
        weights=weights,
        optimizer=optimizer,
        gradients=gradients,
        activations=activations,
        temporaries=temporaries - activations - gradients,
        batch=max(memory.argument_size_in_bytes - weights - optimizer, 0),
        limit=chip.memory,
        host=memory.host_temp_size_in_bytes,
    )


def _memory_refused(drawn: blueprint.Blueprint, message: str, chip: Chip) -> Memory:
    """What is known of an update that the compiler refused: what it is given, and the total that was named."""
    found = _NEEDED.search(message)
    weights, optimizer, gradients = _given(drawn)
    batch = blueprint.shard_bytes(drawn.batch)
    told = float(found[1]) * _UNITS[found[2]] if found else math.inf
    rest = max(told - weights - optimizer - gradients - batch, 0.0) if found else 0.0
    return Memory(weights, optimizer, gradients, 0.0, rest, batch, limit=chip.memory, told=told)


def _memory_forecast(config: Config, forecast: Forecast, sizes: dict[str, int], chip: Chip) -> Memory:
    ways = math.prod(sizes[axis] for axis in BATCH_AXES) * sizes["context"]
    batch = 6 * 4 * config.train.batch_rows * sum(blueprint.lengths(config).values()) / ways
    return Memory(*forecast[:5], batch=batch, limit=chip.memory)


def _given(drawn: blueprint.Blueprint) -> tuple[float, float, float]:
    """Bytes on one device of (weights, optimizer state, gradients)."""
    trained = blueprint.shard_bytes(drawn.state.trainable)
    whole = trained + blueprint.shard_bytes(drawn.frozen)
    return whole, blueprint.shard_bytes(drawn.state.opt_state), trained
