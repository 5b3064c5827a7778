"""Which devices a collective runs over, and along which axes of the mesh they lie."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence

UNKNOWN = ("?",)
_PART = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")  # an axis, or the part `(2)4` of it: 4 within each of 2


def replica_groups(rest: str) -> list[list[int]]:
    """Returns the groups of devices, by their place in the mesh, that a collective runs over; none where none is said.

    Three ways of writing them: `{{0,1},{2,3}}`, `[2,2]<=[4]` (a reshaped, maybe transposed count), and
    `mesh['a'=2,'b'=4] {'b'}` (axes of a mesh of its own, or `'b':(2)2`, the inner half of one), which may say
    `device_ids=([4,2]T(1,0))` in between.
    """
    if found := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", rest):
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", found[1])]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return _split(_counted(found[2]), math.prod(_numbers(found[1])[1:]))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}", rest):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        parts = {name: (int(before or 1), int(size or 0)) for name, before, size in _PART.findall(found[3])}
        dims: list[int] = []
        over: list[int] = []
        for name, whole in axes.items():
            before, size = parts.get(name, (whole, 1))
            size = size or whole
            over.append(len(dims) + 1)
            dims += [before, size, whole // before // size]
        order = [*(i for i in range(len(dims)) if i not in over), *over]
        devices = _counted(found[2]) if found[2] else range(math.prod(dims))
        return _split([devices[i] for i in _transposed(dims, order)], math.prod(dims[i] for i in over))
    return []


def pairs(rest: str) -> list[list[int]]:
    """Returns (source, target) of everything that a collective-permute sends."""
    found = re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", rest)
    return [_numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", found[1])] if found else []


def axes_of(groups: Sequence[Sequence[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the axes of the mesh along which the devices of a group differ: ("fsdp",) or ("data", "fsdp").

    With mesh data=2, fsdp=4 device 5 is data 1, fsdp 1, so [[0, 4], ...] runs over data and [[0, 1, 2, 3], ...] over
    fsdp. Groups of one device give (); no groups, or devices that the mesh has not, give `UNKNOWN`.

    Args:
        groups: places in the mesh: replica groups, or pairs of source and target.
        mesh: sizes of the axes, the slowest first: devices are numbered in the order of `mesh.devices.flat`.
    """
    if not groups or max(itertools.chain(*groups)) >= math.prod(mesh.values()):
        return UNKNOWN
    found, step = [], math.prod(mesh.values())
    for name, size in mesh.items():
        step //= size
        if any(len({place // step % size for place in group}) > 1 for group in groups):
            found.append(name)
    return tuple(found)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _counted(text: str) -> list[int]:
    """The numbers that `[2,4]T(1,0)` stands for: 0 to 7 as an array of these dimensions, transposed."""
    found = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert found, text
    dims = _numbers(found[1])
    return _transposed(dims, _numbers(found[2]) if found[2] else range(len(dims)))


def _transposed(dims: Sequence[int], order: Sequence[int]) -> list[int]:
    """The numbers 0, 1, ... of an array of these dimensions, read in another order of its axes."""
    steps = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    return [
        sum(at * steps[axis] for at, axis in zip(place, order, strict=True))
        for place in itertools.product(*(range(dims[axis]) for axis in order))
    ]


def _split(numbers: Sequence[int], size: int) -> list[list[int]]:
    return [list(numbers[i : i + size]) for i in range(0, len(numbers), size)]
