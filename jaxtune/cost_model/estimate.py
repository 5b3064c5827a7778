"""A step's cycles on one chip, from the text of its compiled module: the compiler's own estimate, op by op.

The compiler writes into each scheduled op how many cycles it expects; loops are counted. A Pallas call carries no
estimate and is charged the larger of FLOPs / peak and bytes / bandwidth, an attention kernel's FLOPs by the shapes of q
and k with the causal half, any other kernel's by its bytes alone. Collectives that overlap with work carry none either:
they are counted with their bytes.
"""

import collections
import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxtune.cost_model.chips import Chip
from jaxtune.cost_model.hlo import Instruction, Module, Shape

# Matrix products of an attention kernel by what its name says, each of 2 T S H FLOPs: forward; key and value gradients;
# query gradient; both gradients in one. (FlashAttention-2, Dao 2023, section 3.1.2, counts the same five backward.)
PRODUCTS = {"fwd": 2, "dkv": 5, "dq": 3}
OTHER_PRODUCTS = 7
ATTENTION = re.compile(r"splash|flash|mha|mqa|attention")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

# The part of a step that an op belongs to: that of the innermost of its functions that is named here.
PARTS: Mapping[str, str] = {
    "Attention.__call__": "attention",
    "LatentAttention.__call__": "attention",
    "Mlp.__call__": "mlp",
    "SparseMlp.__call__": "experts",
    "Embedding.__call__": "embedding",
    "token_losses": "head",
    "RMSNorm.__call__": "norms",
    "LayerNorm.__call__": "norms",
    "make_train_step.<locals>.train_step": "optimizer",
}


class Calls(NamedTuple):
    """Calls of one kernel in a step, and the cycles of all of them."""

    number: int
    cycles: float


class Traffic(NamedTuple):
    """Collectives of one kind in a step: how many, and the bytes that they give one device."""

    number: int
    size: float


class Estimate(NamedTuple):
    """One step on one chip. `parts`: cycles by part, kernels included; "other" is what no function tells."""

    cycles: float
    parts: dict[str, float]
    kernels: dict[str, Calls]
    collectives: dict[str, Traffic]


def estimate(module: Module, chip: Chip) -> Estimate:
    """Adds up what a step runs."""
    parts: dict[str, float] = collections.defaultdict(float)
    kernels: dict[str, Calls] = {}
    collectives: dict[str, Traffic] = {}
    for instruction, times in module.executed():
        cycles = float(instruction.cycles or 0)
        if instruction.target == "tpu_custom_call" and not cycles:
            cycles = kernel_cycles(instruction, chip)
            label = re.sub(r"[.\d]+$", "", instruction.name)
            number, total = kernels.get(label, (0, 0.0))
            kernels[label] = Calls(number + times, total + times * cycles)
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            number, size = collectives.get(kind, (0, 0.0))
            given = sum(shape.size for shape in instruction.results)
            begun = 2 if instruction.opcode.endswith("-start") else 1  # its type has what goes in, too
            collectives[kind] = Traffic(number + times, size + times * given / begun)
        parts[part_of(module, instruction)] += times * cycles
    return Estimate(sum(parts.values()), dict(parts), kernels, collectives)


def part_of(module: Module, instruction: Instruction) -> str:
    """Returns the part of the step that an op belongs to."""
    functions = module.functions.get(instruction.frame or 0, ())
    return next((PARTS[name] for name in functions if name in PARTS), "other")


def kernel_cycles(instruction: Instruction, chip: Chip) -> float:
    """Returns what a Pallas call is charged."""
    operands, flops = instruction.operands, 0.0
    if ATTENTION.search(instruction.name):
        flops = attention_flops(instruction.name, operands)
    size = sum(shape.size for shape in (*instruction.results, *operands))
    return max(flops / chip.peak, size / chip.bandwidth) * chip.clock


def attention_flops(name: str, operands: list[Shape]) -> float:
    """Returns the FLOPs of a causal attention kernel: its first large arrays are q `[... T H]` and k `[... S H]`."""
    large = [s.dims for s in operands if s.dtype in ("bf16", "f32") and len(s.dims) >= 3 and s.dims[-1] >= 32]
    if len(large) < 2:
        return 0.0
    (*lead, queries, head), keys = large[0], large[1][-2]
    products = next((n for word, n in PRODUCTS.items() if word in name), OTHER_PRODUCTS)
    batch = 1
    for size in lead:
        batch *= size
    return 0.5 * products * 2.0 * batch * queries * keys * head
