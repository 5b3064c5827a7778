"""What the forward loops keep for the backward ones: the activations of a step, told by the shape of its loops.

A scan over layers that saves an array for the gradient becomes a loop that fills, one layer at a time, an array with
the number of its trips in front, and the scan back is a later loop that reads it and leaves it as it is:

    (x, saved bf16[32,2,2048,4096], ...) = while(...)   fills it
    ...                                  = while(gradient, saved, ...)   reads it

Gradients are filled as well, by the loop back, but no loop comes after it; weights are read by both and filled by none.
What is not seen: what one trip keeps for itself, layers that are not in a loop (a stack of one), whatever the compiler
computes again instead, and the padding of layouts.
"""

from jaxtune.cost_model.hlo import HANDED_ON, Instruction, Module, Shape, elements, shapes


def saved(module: Module) -> list[Shape]:
    """Returns the arrays that one loop fills and a later one reads, each once."""
    found: list[Shape] = []
    for lines in module.computations.values():
        kept: dict[tuple[str, int], Shape] = {}  # by the loop that fills, and place in its result
        for loop in (one for one in lines if one.opcode == "while"):
            written = _filled(module, loop)
            sources = _sources(module, loop)
            for place, source in sources.items():
                if place not in written and source in kept:
                    found.append(kept.pop(source))
            kept |= {(loop.name, place): shape for place, shape in written.items()}
    return found


def saved_bytes(module: Module) -> float:
    """Returns the bytes of what the forward loops keep for the backward ones, on one device."""
    return sum(shape.size for shape in saved(module))


def _filled(module: Module, loop: Instruction) -> dict[int, Shape]:
    """The places of a loop's result whose array it updates a part of in each trip."""
    trips = module.trips(loop)
    found: dict[int, Shape] = {}
    for body in loop.called("body"):
        lines = module.computations.get(body, ())
        if not lines or lines[-1].opcode != "tuple" or trips < 2:
            continue
        for place, (name, text) in enumerate(zip(lines[-1].inputs, elements(lines[-1].type), strict=True)):
            arrays = shapes(text)
            if len(arrays) != 1 or not arrays[0].dims or arrays[0].dims[0] < trips:
                continue
            if _is_update(module, name):
                found[place] = arrays[0]
    return found


def _is_update(module: Module, name: str) -> bool:
    """Whether an array is made by writing into a part of another."""
    made = _origin(module, name)[0]
    if made is None:
        return False
    return any(one.opcode == "dynamic-update-slice" for one in (made, *module.inside(made)))


def _sources(module: Module, loop: Instruction) -> dict[int, tuple[str, int]]:
    """Which result of which other loop stands at each place of a loop's first values."""
    begin = module.named.get((*loop.inputs, "")[0])
    if begin is None or begin.opcode != "tuple":
        return {}
    found = {}
    for place, name in enumerate(begin.inputs):
        made, index = _origin(module, name)
        if made is not None and made.opcode == "while":
            found[place] = (made.name, index)
    return found


def _origin(module: Module, name: str) -> tuple[Instruction | None, int]:
    """The op that made an array, and the array's place in its result."""
    index, one = 0, module.named.get(name)
    while one is not None and one.inputs:
        if one.opcode == "get-tuple-element":
            index = one.index
        elif one.opcode not in HANDED_ON:
            break
        one = module.named.get(one.inputs[0])
    return one, index
