"""FLOPs of matrix products, by the shapes that HLO tells; a TPU's compiler writes them all as convolutions."""

import functools
import math
import re

from jaxtune.cost_model.hlo import Instruction, Module, Shape


def product_flops(module: Module, instruction: Instruction) -> float:
    """Returns the FLOPs of the matrix products that an op is, or that a fusion is made of."""
    return sum(_of_one(module, one) for one in (instruction, *module.inside(instruction)))


def _of_one(module: Module, instruction: Instruction) -> float:
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    operands = [module.named[name].results for name in instruction.inputs if name in module.named]
    if len(operands) != 2 or not all((*operands, instruction.results)):
        return 0.0
    (left, *_), (right, *_), (result, *_) = *operands, instruction.results
    if instruction.opcode == "dot":
        found = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", instruction.rest)
        contracted = [left.dims[int(d)] for d in found[1].split(",")] if found else []
        return 2.0 * math.prod(result.dims) * math.prod(contracted)
    return _convolution_flops(instruction.rest, left, right, result)


def _convolution_flops(rest: str, left: Shape, right: Shape, result: Shape) -> float:
    """Counts the products that are not with padding: a batched product is written with one kernel place per element of
    the batch, all but one of which fall outside of the input."""
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    if not found:
        return 0.0
    of_left, of_right, of_result = (
        dict(zip(labels, shape.dims, strict=True))
        for labels, shape in zip(found.groups(), (left, right, result), strict=True)
    )
    window = re.search(r"window=\{([^}]*)\}", rest)
    options = dict(option.split("=") for option in window[1].split()) if window else {}
    flops = 2.0 * of_result["b"] * of_result["f"] * of_right["i"]
    for label in of_result:
        if label.isdigit():

            def option(name: str, default: str, place: int = int(label)) -> str:
                return options[name].split("x")[place] if name in options else default

            flops *= _pairs(
                of_left[label],
                of_right[label],
                of_result[label],
                stride=int(option("stride", "1")),
                pad=int(option("pad", "0_0").split("_")[0]),
                left_step=int(option("lhs_dilate", "1")),
                right_step=int(option("rhs_dilate", "1")),
            )
    return flops


@functools.cache
def _pairs(size: int, kernel: int, results: int, *, stride: int, pad: int, left_step: int, right_step: int) -> int:
    """How many pairs of a result and a place of the kernel meet an element of the input along one dimension."""
    places = (at * stride + k * right_step - pad for at in range(results) for k in range(kernel))
    return sum(0 <= place <= (size - 1) * left_step and place % left_step == 0 for place in places)
