"""What Pallas calls cost, which carry no estimate of the compiler: the larger of FLOPs / peak and bytes / bandwidth."""

import math
import re

from jaxtune.cost_model.chips import Chip
from jaxtune.cost_model.hlo import Instruction, Shape

# Matrix products of an attention kernel by what its name says, each of 2 T S H FLOPs: forward; key and value gradients;
# query gradient; both gradients in one. (FlashAttention-2, Dao 2023, section 3.1.2, counts the same five backward.)
PRODUCTS = {"fwd": 2, "dkv": 5, "dq": 3}
OTHER_PRODUCTS = 7
ATTENTION = re.compile(r"splash|flash|mha|mqa|attention")
GROUPED = re.compile(r"^t?gmm\b")


def is_kernel(instruction: Instruction) -> bool:
    """Whether an op is a Pallas call that the compiler does not estimate."""
    return instruction.target == "tpu_custom_call" and not instruction.cycles


def kernel_flops(instruction: Instruction, *, experts: int = 1) -> float:
    """Returns the FLOPs of a Pallas call, the mean of all devices; 0 for a kernel that is not known.

    Args:
        experts: devices that experts are spread over.
    """
    if GROUPED.match(instruction.name):
        return _grouped_flops(instruction, experts)
    if ATTENTION.search(instruction.name):
        return _attention_flops(instruction)[0]
    return 0.0


def kernel_cycles(instruction: Instruction, chip: Chip, *, experts: int = 1) -> float:
    """Returns what a Pallas call is charged on the device for which it takes longest."""
    assert chip.clock is not None
    flops, arrays = 0.0, [*instruction.results, *instruction.operands]
    size = sum(shape.size for shape in arrays)
    if GROUPED.match(instruction.name):
        flops = _grouped_flops(instruction, experts)
        size -= sum(shape.size for shape in arrays if len(shape.dims) == 2) * (1 - 1 / experts)
    elif ATTENTION.search(instruction.name):
        flops = _attention_flops(instruction)[1]
    return max(flops / chip.peak, size / chip.bandwidth) * chip.clock


def _attention_flops(instruction: Instruction) -> tuple[float, float]:
    """Returns the FLOPs of a causal attention kernel: the mean of the devices, and the most of one.

    Its first large arrays are q `[... T H]` and k `[... S H]`. Of rows split over devices (T < S) the last part of the
    queries sees nearly all keys, and all wait for it. A window makes the grid smaller than half of the pairs: splash
    is given a mask of `[heads, blocks of queries, blocks of keys]`, those left out that nobody sees.
    """
    operands = instruction.operands
    large = [s.dims for s in operands if s.dtype in ("bf16", "f32") and len(s.dims) >= 3 and s.dims[-1] >= 32]
    if len(large) < 2:
        return 0.0, 0.0
    (*lead, queries, head), keys = large[0], large[1][-2]
    products = next((n for word, n in PRODUCTS.items() if word in instruction.name), OTHER_PRODUCTS)
    grid = _grid_pairs(instruction, operands)
    each = products * 2.0 * math.prod(lead) * head
    mean, most = 0.5 * queries * keys, queries * (keys - queries / 2)
    return each * min(mean, grid), each * min(most, grid)


def _grid_pairs(instruction: Instruction, operands: list[Shape]) -> float:
    """Returns how many pairs of query and key the grid visits; infinity where it is not told."""
    masks = [s.dims for s in operands if s.dtype == "s8" and len(s.dims) == 3]
    suffix = next((word for word in ("dkv", "dq") if f"_{word}" in instruction.name), "")
    names = [f"{name}_{suffix}" if suffix else name for name in ("block_q", "block_kv")]
    blocks = [re.search(rf'\\"{name}\\": (\d+)', instruction.rest) for name in names]
    if not masks or not all(blocks):
        return math.inf
    return math.prod(masks[0][1:]) * math.prod(int(found[1]) for found in blocks if found)


def _grouped_flops(instruction: Instruction, experts: int) -> float:
    """Returns the FLOPs of megablox' gmm, rows `[m k]` by kernels `[E k n]`, or tgmm, `[m k]` and `[m n]` to `[E k n]`.

    Where experts are spread over devices, the rows are the room for all that could come; tiles without rows are
    skipped, and a device gets its share of them when the router is balanced.
    """
    large = [s.dims for s in instruction.operands if s.dtype in ("bf16", "f32") and len(s.dims) >= 2]
    if len(large) < 2 or not instruction.results:
        return 0.0
    (m, k), result = large[0][-2:], instruction.results[0].dims
    return 2.0 * m * k * result[-1] / experts
