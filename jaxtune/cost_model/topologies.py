"""Names of accelerators as people say them, and what they stand for.

v2 to v5p are sold by TensorCores, two a chip (v5p-8 is 4 chips); v5e, v6e and tpu7x by chips; GPUs by cards. Shapes
that belong to a number of chips are those of the pages "TPU configurations" at cloud.google.com/tpu/docs.
"""

import itertools
import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Generation:
    """A kind of TPU: what its name counts, how many dimensions its torus has, how jax sees it.

    `counts`: how many of what the name counts a chip has. `devices`: jax devices of a chip. `single`: the chips of the
    largest slice that is one machine; `largest`: those of the largest slice; `options`: what libtpu must be told
    besides the shape.
    """

    counts: int
    dimensions: int
    devices: int
    single: int
    largest: int
    options: tuple[tuple[str, str], ...] = ()


GENERATIONS: dict[str, Generation] = {
    "v2": Generation(counts=2, dimensions=2, devices=2, single=4, largest=256),
    "v3": Generation(counts=2, dimensions=2, devices=2, single=4, largest=1024),
    "v4": Generation(
        counts=2, dimensions=3, devices=1, single=4, largest=4096, options=(("chip_config_name", "megacore"),)
    ),
    "v5p": Generation(counts=2, dimensions=3, devices=1, single=4, largest=8960),
    "v5e": Generation(counts=1, dimensions=2, devices=1, single=8, largest=256),
    "v6e": Generation(counts=1, dimensions=2, devices=1, single=8, largest=256),
    "tpu7x": Generation(counts=1, dimensions=3, devices=2, single=4, largest=9216),
}
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e", "v6": "v6e", "v7x": "tpu7x", "tpu7": "tpu7x"}
GPUS = ("a100", "h100", "h200", "b200")
CHIPS_PER_HOST = 4  # of a slice of several machines
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Topology:
    """One or several slices of one kind of accelerator.

    `kind` is a key of `GENERATIONS` or of `GPUS`; `shape` the chips of one slice along each dimension of its torus,
    for GPUs (nodes, cards of a node); `slices` are joined by the data-centre network.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def is_gpu(self) -> bool:
        """Whether these are GPUs."""
        return self.kind in GPUS

    @property
    def chips(self) -> int:
        """Chips or cards of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """What jax counts as devices, over all slices."""
        return self.chips * (1 if self.is_gpu else GENERATIONS[self.kind].devices)

    @property
    def hosts(self) -> int:
        """Machines of all slices."""
        if self.is_gpu:
            return self.shape[0] * self.slices
        chips = math.prod(self.shape)
        return self.slices * (1 if chips <= GENERATIONS[self.kind].single else chips // CHIPS_PER_HOST)

    @property
    def layout(self) -> str:
        """A slice as libtpu names it: v5p:2x2x2."""
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    def describe(self) -> str:
        """Says in one line what the name stands for, in chips and in what the name counts."""
        if self.is_gpu:
            return f"{self.name}: {_count(self.chips, 'card')} {self.kind.upper()}, {_count(self.hosts, 'node')}"
        generation = GENERATIONS[self.kind]
        cores = f" ({self.chips * generation.counts} TensorCores)" if generation.counts > 1 else ""
        slices = f" in {self.slices} slices" if self.slices > 1 else ""
        shape = "x".join(map(str, self.shape))
        return (
            f"{self.name}: {_count(self.chips, 'chip')}{cores} {self.kind}{slices} of {shape}, "
            f"{_count(self.hosts, 'host')}, {_count(self.devices, 'device')} to jax"
        )


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Returns what a name stands for.

    Args:
        name: `v5p-128`, `v5e-64`, `tpu7x-64`, a shape in chips (`v5p:4x4x8`), or GPUs (`h100-8`); gcloud's spelling
            (`v5litepod-16`) too.
        slices: how many of it.

    Raises:
        ValueError: no such kind, or no slice of that size.
    """
    if slices < 1:
        raise ValueError(f"--slices: found {slices}; expected at least 1")
    found = re.fullmatch(r"([a-z0-9]+)(?:-(\d+)|:(\d+(?:x\d+)*))", name.strip().lower())
    kind = ALIASES.get(found[1], found[1]) if found else ""
    if found is None or (kind not in GENERATIONS and kind not in GPUS):
        raise ValueError(
            f"--topology: found {name!r}; expected KIND-N such as v5p-128, v5e-64 or h100-8, or a shape in chips such "
            f"as v5p:4x4x8; kinds: {', '.join((*GENERATIONS, *GPUS))}"
        )
    if kind in GPUS:
        return Topology(name, kind, _nodes(name, found[2]), slices)
    generation = GENERATIONS[kind]
    if found[3]:
        shape = tuple(int(size) for size in found[3].split("x"))
    else:
        shape = _shape(name, kind, int(found[2]))
    shape = shape[:2] if generation.dimensions == 2 and shape[2:] == (1,) else shape
    if len(shape) != generation.dimensions or not all(shape):
        raise ValueError(
            f"--topology: found {name!r}; expected {generation.dimensions} dimensions for {kind}, e.g. "
            f"{kind}:{'x'.join('2' * generation.dimensions)}"
        )
    return Topology(name, kind, shape, slices)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _nodes(name: str, cards: str | None) -> tuple[int, int]:
    number = int(cards or 0)
    if number < 1 or (number > GPUS_PER_NODE and number % GPUS_PER_NODE):
        raise ValueError(f"--topology: found {name!r}; expected 1 to {GPUS_PER_NODE} cards, or whole nodes of them")
    return (1, number) if number <= GPUS_PER_NODE else (number // GPUS_PER_NODE, GPUS_PER_NODE)


def _shape(name: str, kind: str, counted: int) -> tuple[int, ...]:
    """The shape that a number of chips is sold in: as near to a cube, or a square, as it gets."""
    generation = GENERATIONS[kind]
    smallest = 1 if generation.counts == 1 and generation.dimensions == 2 else 4
    chips, rest = divmod(counted, generation.counts)
    possible = not rest and smallest <= chips <= generation.largest
    if not possible or (chips not in (1, 4) and not _shapes(chips, generation.dimensions)):
        unit = "TensorCores, two a chip" if generation.counts == 2 else "chips"
        sizes = ", ".join(f"{kind}-{n * generation.counts}" for n in (smallest, 8, 16, 32, 64))
        largest, example = generation.largest * generation.counts, "x".join("4" * generation.dimensions)
        raise ValueError(
            f"--topology: found {name!r}; {kind}-N counts {unit}, and there is no slice of {counted}: expected {sizes} "
            f"... {kind}-{largest}, or a shape in chips such as {kind}:{example}"
        )
    if chips <= 4:
        return ((2, 2) if chips == 4 else (1, 1)) + (1,) * (generation.dimensions - 2)
    return min(_shapes(chips, generation.dimensions), key=lambda shape: (max(shape) / min(shape), shape))


def _shapes(chips: int, dimensions: int) -> list[tuple[int, ...]]:
    """The shapes that so many chips can have, sides ascending: powers of 2 for a square, multiples of 4 for a cube."""
    unit = 4 if dimensions == 3 and chips >= 64 else 2
    sides = [n for n in range(unit, chips + 1, unit) if chips % n == 0 and (dimensions == 3 or n.bit_count() == 1)]
    return [
        shape
        for shape in itertools.combinations_with_replacement(sides, dimensions)
        if math.prod(shape) == chips and (dimensions == 3 or 2 * shape[0] >= shape[1])
    ]
