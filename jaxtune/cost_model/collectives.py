"""Collectives as a module has them: which op begins one, which waits for it, and what it sends along which axes.

Four ways in which libtpu writes one that runs beside other work: X-start and X-done; async-start, or call-start for
another core, of a computation that has it in it; a chain of fusions of which the first ends in the call
`AsyncCollectiveStart` and the last in `AsyncCollectiveDone` (all have the same channel, and those between compute while
it runs); and, between slices, a send to the runtime whose answer a recv-done waits for. Any other is waited for where
it stands, in a fusion as well (`all-reduce-scatter`, which is a reduce-scatter).
"""

import math
import re
from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from jaxtune.cost_model.groups import axes_of, pairs, replica_groups
from jaxtune.cost_model.hlo import Instruction, Module, elements, shapes
from jaxtune.cost_model.links import SLICE

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


class Collective(NamedTuple):
    """`size`: bytes as `links.sent_bytes` takes them; `devices`: of one group."""

    kind: str
    axes: tuple[str, ...]
    size: float
    devices: int


class Role(Enum):
    """What an op does to a collective."""

    WHOLE = "begins it and waits for it"
    START = "begins it"
    DONE = "waits for it"


class Event(NamedTuple):
    """An op of a collective; `key` joins the op that begins it to the one that waits. DONE says the key alone."""

    role: Role
    key: str
    collective: Collective | None


def event(module: Module, instruction: Instruction, mesh: Mapping[str, int]) -> Event | None:
    """Returns what an op does to a collective; None for an op of other work."""
    opcode = instruction.opcode
    if opcode in KINDS:
        return Event(Role.WHOLE, instruction.name, _read(module, instruction, opcode, mesh))
    if opcode.removesuffix("-start") in KINDS:
        kind = opcode.removesuffix("-start")
        return Event(Role.START, instruction.name, _read(module, instruction, kind, mesh))
    if opcode.endswith("-done") and opcode.removesuffix("-done") in (*KINDS, "async", "call"):
        return Event(Role.DONE, _begun_by(module, instruction), None)
    if opcode in ("async-start", "call-start"):
        inner = _inner(module, instruction)
        return Event(Role.START, instruction.name, _read(module, inner, inner.opcode, mesh)) if inner else None
    if opcode == "fusion":
        return _of_fusion(module, instruction, mesh)
    if opcode in ("send", "recv-done") and "megascale" in instruction.rest:
        return _between_slices(module, instruction, mesh)
    return None


def _inner(module: Module, instruction: Instruction) -> Instruction | None:
    return next((one for one in module.inside(instruction) if one.opcode in KINDS), None)


def _begun_by(module: Module, instruction: Instruction) -> str:
    """Follows what a done, or an update before it, reads to the start."""
    while instruction.inputs and not instruction.opcode.endswith("-start"):
        begun = module.named.get(instruction.inputs[0])
        if begun is None:
            break
        instruction = begun
    return instruction.name


def _of_fusion(module: Module, instruction: Instruction, mesh: Mapping[str, int]) -> Event | None:
    inner = _inner(module, instruction)
    if inner is None:
        return None
    channel = re.search(r"channel_id=(\d+)", inner.rest)
    key = f"channel {channel[1]}" if channel else inner.name
    targets = [one.target for one in module.inside(instruction)]
    if "AsyncCollectiveDone" in targets:
        return Event(Role.DONE, key, None)
    kind = inner.opcode
    if kind == "all-reduce" and any("all-reduce-scatter" in name for name in instruction.called("calls")):
        kind = "reduce-scatter"
    collective = _read(module, inner, kind, mesh, whole=inner.opcode != "reduce-scatter")
    if "AsyncCollectiveStart" in targets:
        return Event(Role.START, key, collective)
    if "async_collective_fusion_config" in inner.rest:
        return None  # a link of the chain
    return Event(Role.WHOLE, key, collective)


def _between_slices(module: Module, instruction: Instruction, mesh: Mapping[str, int]) -> Event | None:
    """The runtime that joins slices is sent an array and told what to do with it."""
    asked = instruction if instruction.opcode == "send" else module.named.get((*instruction.inputs, "")[0])
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]+)"', asked.rest) if asked else None
    if found is None:
        return None
    if instruction.opcode == "recv-done":
        return Event(Role.DONE, found[1], None)
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
    name = kind[1].lower().replace("_", "-") if kind else ""
    devices = mesh.get(SLICE, 1)
    size = sum(shape.size for shape in shapes(elements(instruction.type)[0]))
    if name == "all-gather":
        size *= devices  # what is sent is the part of one slice
    name = name if name in KINDS else "collective-permute"
    return Event(Role.START, found[1], Collective(name, (SLICE,), size, devices))


def _read(
    module: Module, instruction: Instruction, kind: str, mesh: Mapping[str, int], *, whole: bool = False
) -> Collective:
    """Reads what a collective sends; `whole` says that a reduce-scatter's type is that of what goes in."""
    if kind == "collective-permute":
        groups = pairs(instruction.rest)
        devices = 2
    else:
        groups = replica_groups(instruction.rest)
        if "replica_groups={}" in instruction.rest:  # all devices are one group
            groups = [list(range(math.prod(mesh.values())))]
        devices = len(groups[0]) if groups else 1
    given = instruction.type
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        given = elements(given)[1]  # (what goes in, what comes out, ...)
    size = sum(shape.size for shape in shapes(given))
    if kind == "ragged-all-to-all":  # one of the two is the room for all that could come
        sent = module.named.get((*instruction.inputs, "")[0])
        size = min(size, sum(shape.size for shape in shapes(sent.type))) if sent else size
    if kind == "reduce-scatter" and not whole:
        size *= devices
    return Collective(kind, axes_of(groups, mesh), size, devices)
