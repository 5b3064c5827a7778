"""Who reads which part of a state from which disk, when some disks are gone and machines have changed their numbers.

A place is a position in `mesh.devices.flat`. A part is what all places hold that differ only along axes over which no
leaf is split.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh


class Seats(NamedTuple):
    """`devices`: which device, by its number in the mesh, sits at each place. `sources`: whether the device at a place
    reads its part for all. `all_have_own`: every device's host has its part, and nothing need be sent.
    """

    devices: list[int]
    sources: list[bool]
    all_have_own: bool

    def of(self, mesh: Mesh) -> np.ndarray:
        """Returns the devices of a mesh in this order, in its shape."""
        return mesh.devices.reshape(-1)[self.devices].reshape(mesh.devices.shape)


def find_seats(
    mesh: Mapping[str, int], unsplit: Sequence[str], owners: Sequence[int], held: Sequence[set[int]]
) -> Seats | None:
    """Says which devices read which parts from their hosts' disks, or None where a part is on no disk.

    mesh {slice 2, fsdp 2}, unsplit [slice], one device a host; places 0 1 | 2 3 hold parts 0 1 | 0 1:

        held {0} {1} {2} {3}   all read their own
        held {0} {1} {} {}     0 and 1 read, 2 and 3 are sent theirs
        held {} {1} {2} {}     1 and 2 read
        held {1} {0} {} {}     the devices of hosts 0 and 1 change seats, read, and what they read moves back
        held {0} {} {2} {}     None: part 1 is lost

    Args:
        mesh: size of each axis.
        unsplit: the axes along which all places hold the same.
        owners: the host of each device, by its number in the mesh.
        held: of each host, the places that its disk has.
    """
    shape = tuple(mesh.values())
    split = [number for number, axis in enumerate(mesh) if axis not in unsplit]
    corners = np.stack(np.unravel_index(np.arange(len(owners)), shape))[split]
    parts = [tuple(corner) for corner in corners.T.tolist()]
    parts_held = [{parts[place] for place in places} for places in held]
    as_they_are = list(range(len(owners)))
    for devices in (as_they_are, _where_disks_fit(owners, held)):
        has = [parts[place] in parts_held[owners[device]] for place, device in enumerate(devices)]
        first = {part: place for place, part in reversed(list(enumerate(parts))) if has[place]}
        if len(first) == len(set(parts)):
            sources = [first[part] == place for place, part in enumerate(parts)]
            return Seats(devices, sources, all_have_own=all(has) and devices == as_they_are)
    return None


def _where_disks_fit(owners: Sequence[int], held: Sequence[set[int]]) -> list[int]:
    """Seats each host's devices at the places that its disk has, as far as they are free; the others take the rest.

    Hosts with few places choose first, for a disk that is shared, or was of several hosts, has more than one can take.
    """
    free = [[device for device, owner in enumerate(owners) if owner == host] for host in range(len(held))]
    seats: dict[int, int] = {}
    for host in sorted(range(len(held)), key=lambda host: len(held[host])):
        for place in sorted(held[host] - seats.keys())[: len(free[host])]:
            seats[place] = free[host].pop(0)
    rest = iter([device for devices in free for device in devices])
    return [seats[place] if place in seats else next(rest) for place in range(len(owners))]
