"""What collectives send, and how long the links take over it.

n devices, V bytes of the whole array that the group shares or adds up. Bytes that leave one device (Thakur et al. 2005,
"Optimization of Collective Communication Operations in MPICH", the ring algorithms; "How to Scale Your Model", part 3):

    all-gather, reduce-scatter      (n - 1) / n V
    all-reduce                      2 (n - 1) / n V         a reduce-scatter and an all-gather
    all-to-all, ragged-all-to-all   (n - 1) / n v           v: the part of V that a device has
    collective-permute              v
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxtune.cost_model.chips import Chip
from jaxtune.cost_model.topologies import GPUS_PER_NODE

SLICE = "slice"  # the axis of the mesh between slices or nodes


def sent_bytes(kind: str, size: float, devices: int) -> float:
    """Returns the bytes that a collective sends from each of a group's devices.

    Args:
        kind: as HLO calls it.
        size: bytes of V for all-gather, reduce-scatter and all-reduce; those on one device for the others.
        devices: of one group.
    """
    share = (devices - 1) / devices
    return size * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)


def link_seconds(kind: str, size: float, devices: int, bandwidth: float, *, hops: bool = True) -> float:
    """Returns how long a collective takes at `bandwidth` bytes/s out of each device; latency is left out.

    On a torus the rows of an all-to-all travel over other devices' links: n / 4 of V / n links on average, one ring
    being taken for the whole group. A permute is one link's work. Without `hops`, on a switch, all reach all.
    """
    sent = sent_bytes(kind, size, devices)
    if hops and kind in ("all-to-all", "ragged-all-to-all"):
        sent = max(sent, size * devices / 4)
    return sent / bandwidth


@dataclass(frozen=True)
class Network:
    """The links of a mesh's devices.

    `mesh`: sizes of its axes, the slowest first. `directions`: by axis, how many links carry a collective along it out
    of each chip: 2 for a ring, 1 for a row whose ends are not joined, added up over the dimensions of the torus that
    the axis extends over. An axis that is not named has 2.
    """

    chip: Chip
    mesh: Mapping[str, int]
    directions: Mapping[str, float] = field(default_factory=dict)

    def bandwidth(self, axes: Sequence[str]) -> float:
        """Returns bytes/s that a device sends along these axes together: along slices no more than its DCN.

        On a torus axes add up; on a switch the slowest of them counts.
        """
        if SLICE in axes:
            return self.chip.dcn
        if not self.chip.dimensions:
            return min(map(self._switched, axes), default=self.chip.link)
        ways = sum(self.directions.get(axis, 2.0) for axis in axes) if axes else 2.0
        return self.chip.link * min(ways, 2.0 * self.chip.dimensions) / self.chip.devices

    def _switched(self, axis: str) -> float:
        """Bytes/s along one axis of cards: the switch's within a node, beyond it all of a group's network cards."""
        size = self.mesh.get(axis, 1)
        faster = itertools.takewhile(lambda name: name != axis, reversed(list(self.mesh)))
        inner = math.prod(self.mesh[name] for name in faster)
        if inner * size <= GPUS_PER_NODE:
            return self.chip.link
        return min(self.chip.link, self.chip.dcn * min(size, max(GPUS_PER_NODE // inner, 1)))

    def seconds(self, kind: str, size: float, devices: int, axes: Sequence[str]) -> float:
        """Returns how long a collective along these axes takes."""
        if devices < 2:
            return 0.0
        bandwidth = self.bandwidth(axes)
        torus = bool(self.chip.dimensions) and SLICE not in axes
        if torus and kind == "collective-permute":
            bandwidth = self.chip.link / self.chip.devices
        return link_seconds(kind, size, devices, bandwidth, hops=torus)


def directions(
    places: Sequence[Sequence[int]], shape: Sequence[int], mesh: Mapping[str, int], chip: Chip
) -> dict[str, float]:
    """Returns how many links carry a collective along each axis of the mesh, for `Network`.

    A dimension of the torus gives two links to an axis that goes all around it, if it is closed to a ring, and one to
    an axis that has only a part of it.

    Args:
        places: coordinates of every device's chip within its slice, in the order of `mesh.devices.flat`.
        shape: chips of a slice along each dimension.
    """
    closed = [size % chip.ring == 0 for size in shape]
    if chip.dimensions == 3:  # whole cubes are joined by optical switches: all dimensions or none
        closed = [all(closed)] * len(closed)
    found, step = {}, math.prod(mesh.values())
    for name, size in mesh.items():
        step //= size
        line = [places[i * step] for i in range(size)]  # the devices of the axis that the first one is of
        sides = [len({place[d] for place in line}) for d in range(len(shape))]
        ways = sum(1 + (closed[d] and side == shape[d] and side > 2) for d, side in enumerate(sides) if side > 1)
        found[name] = float(max(ways, 1))
    return found
