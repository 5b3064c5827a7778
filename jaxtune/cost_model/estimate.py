"""A step on one chip, from the text of its compiled module: cycles, by the compiler's own estimate op by op, and the
time of the collectives that they do not hide.

The compiler writes into each scheduled op how many cycles it expects; loops are counted. A Pallas call carries no
estimate and is charged by `kernels`, a collective none either: `links` says what it takes and `schedule` what of that
is exposed. A step takes its cycles and the exposed time.
"""

import collections
import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxtune.cost_model.chips import Chip
from jaxtune.cost_model.flops import product_flops
from jaxtune.cost_model.hlo import Instruction, Module
from jaxtune.cost_model.kernels import is_kernel, kernel_cycles, kernel_flops
from jaxtune.cost_model.links import Network
from jaxtune.cost_model.parts import COLLECTIVES, part_of
from jaxtune.cost_model.schedule import Schedule, Traffic

EXPERT = "expert"  # the axis of the mesh that experts are spread over


class Calls(NamedTuple):
    """Calls of one kernel in a step, and the cycles of all of them."""

    number: int
    cycles: float


class Estimate(NamedTuple):
    """One step on one chip.

    `cycles` of what the chip computes, kernels included; `flops` of the matrix products and known kernels that it
    runs, what is computed again included; `exposed`: seconds of collectives that nothing hides; `seconds`: of all.
    `parts`: cycles by part of the step, the exposed time among them as "collectives", so that they sum up to
    `seconds` times the clock. `collectives` by kind and axes of the mesh.
    """

    cycles: float
    flops: float
    exposed: float
    seconds: float
    parts: dict[str, float]
    kernels: dict[str, Calls]
    collectives: dict[tuple[str, tuple[str, ...]], Traffic]


def estimate(
    module: Module, chip: Chip, *, mesh: Mapping[str, int], directions: Mapping[str, float] | None = None
) -> Estimate:
    """Adds up what a step runs.

    Args:
        mesh: sizes of the mesh's axes, the slowest first.
        directions: links of a chip that each axis uses, as `links.directions` finds them; 2 for an axis left out.

    Raises:
        ValueError: a chip whose compiler estimates no cycles.
    """
    if chip.clock is None:
        raise ValueError("found a chip without a clock; expected a TPU, whose compiler estimates cycles")
    experts = mesh.get(EXPERT, 1)

    def cycles_of(instruction: Instruction) -> float:
        if is_kernel(instruction):
            return kernel_cycles(instruction, chip, experts=experts)
        return float(instruction.cycles or 0)

    flops = 0.0
    parts: dict[str, float] = collections.defaultdict(float)
    kernels: dict[str, Calls] = {}
    for instruction, times in module.executed():
        cycles = cycles_of(instruction)
        if is_kernel(instruction):
            label = re.sub(r"[.\d]+$", "", instruction.name)
            number, total = kernels.get(label, (0, 0.0))
            kernels[label] = Calls(number + times, total + times * cycles)
            flops += times * kernel_flops(instruction, experts=experts)
        elif instruction.opcode in ("fusion", "convolution", "dot"):
            flops += times * product_flops(module, instruction)
        parts[part_of(module, instruction)] += times * cycles
    cycles = sum(parts.values())
    clock = chip.clock
    schedule = Schedule(module, Network(chip, mesh, directions or {}), lambda one: cycles_of(one) / clock)
    schedule.run()
    exposed = sum(traffic.exposed for traffic in schedule.traffic.values())
    parts[COLLECTIVES] += exposed * clock
    return Estimate(cycles, flops, exposed, cycles / clock + exposed, dict(parts), kernels, schedule.traffic)
