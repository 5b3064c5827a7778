"""How much of the collectives' time other work hides, by the order in which a scheduled module begins its ops.

Between the op that begins a collective and the op that waits for it, the time of the ops in between is the
collective's: what it needs beyond that is exposed, and one that is waited for where it stands is exposed whole. The
links of a slice, and those between slices, each do one collective at a time, in the order in which they begin, so that
two in flight never use the same cycles twice. What is begun in one computation, such as a loop's body, is waited for
in it. Left out: that two axes may have links of their own; latency; the memory bandwidth that collectives take from
other work; and that of a chain of fusions only its own may take a collective of several steps further.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from jaxtune.cost_model.collectives import Collective, Role, event
from jaxtune.cost_model.hlo import CALLS, Instruction, Module
from jaxtune.cost_model.links import SLICE, Network, sent_bytes


class Traffic(NamedTuple):
    """Collectives of one kind along the same axes in a step: how many; bytes that each device sends; seconds that the
    links take, and those of them that nothing hides."""

    number: int
    size: float
    seconds: float
    exposed: float


@dataclass
class _Flight:
    """A collective that has begun: seconds that it still needs, and those that were waited for."""

    collective: Collective
    left: float
    exposed: float = 0.0

    @property
    def between_slices(self) -> bool:
        return SLICE in self.collective.axes


class Schedule:
    """Walks through a module; `traffic` is by (kind, axes) once it has run."""

    def __init__(self, module: Module, network: Network, seconds_of: Callable[[Instruction], float]):
        """Takes how many seconds an op computes for."""
        self.module, self.network, self.seconds_of = module, network, seconds_of
        self.traffic: dict[tuple[str, tuple[str, ...]], Traffic] = {}

    def run(self, computation: str | None = None, times: int = 1) -> float:
        """Returns the seconds of one run of a computation, exposed ones included, and adds its traffic up."""
        flights: dict[str, _Flight] = {}
        total = 0.0
        for instruction in self.module.computations.get(computation or self.module.entry, ()):
            found = event(self.module, instruction, self.network.mesh)
            if found and found.role is Role.WHOLE and found.collective:
                total += self._whole(found.collective, self.seconds_of(instruction), flights, times)
                continue
            if found and found.role is Role.START and found.collective:
                flights[found.key] = _Flight(found.collective, self._needed(found.collective))
            elapsed = self._work(instruction, times, is_start=bool(found))
            _advance(list(flights.values()), elapsed)
            if found and found.role is Role.DONE and found.key in flights:
                elapsed += self._wait(found.key, flights, times)
            total += elapsed
        while flights:
            total += self._wait(next(iter(flights)), flights, times)
        return total

    def _needed(self, one: Collective) -> float:
        return self.network.seconds(one.kind, one.size, one.devices, one.axes)

    def _work(self, instruction: Instruction, times: int, *, is_start: bool) -> float:
        """Seconds of an op that is not waited for, loops and branches with all that is in them."""
        if instruction.opcode == "while":
            trips = self.module.trips(instruction)
            return sum(trips * self.run(body, times * trips) for body in instruction.called("body"))
        if instruction.opcode == "conditional":
            return sum(self.run(name, times) for name in self.module.taken(instruction))
        own = self.seconds_of(instruction)
        if instruction.opcode in CALLS and is_start:  # of a collective, which is in flight already
            own += sum(self.seconds_of(one) for one in self.module.inside(instruction))
        elif instruction.opcode in CALLS:
            own += sum(self.run(name, times) for name in instruction.called("to_apply", "calls"))
        return own

    def _whole(self, one: Collective, computed: float, flights: dict[str, _Flight], times: int) -> float:
        flight = _Flight(one, self._needed(one))
        flight.exposed = max(0.0, flight.left - computed)
        self._land(flight, times)
        elapsed = computed + flight.exposed
        _advance([other for other in flights.values() if other.between_slices != flight.between_slices], elapsed)
        return elapsed

    def _wait(self, key: str, flights: dict[str, _Flight], times: int) -> float:
        """Waits for a collective and for those that began before it on the same links."""
        flight, waited = flights[key], 0.0
        for other_key, other in list(flights.items()):
            if other.between_slices == flight.between_slices:
                other.exposed += other.left
                waited += other.left
                other.left = 0.0
                if other_key == key:
                    break
        del flights[key]
        self._land(flight, times)
        _advance([other for other in flights.values() if other.between_slices != flight.between_slices], waited)
        return waited

    def _land(self, flight: _Flight, times: int) -> None:
        one = flight.collective
        key = (one.kind, one.axes)
        before = self.traffic.get(key, Traffic(0, 0.0, 0.0, 0.0))
        sent = sent_bytes(one.kind, one.size, one.devices)
        self.traffic[key] = Traffic(
            before.number + times,
            before.size + times * sent,
            before.seconds + times * self._needed(one),
            before.exposed + times * flight.exposed,
        )


def _advance(flights: list[_Flight], seconds: float) -> None:
    """Lets time pass: on each network the first that has begun goes on until it is through, then the next."""
    for network in (False, True):
        left = seconds
        for flight in flights:
            if flight.between_slices == network:
                used = min(left, flight.left)
                flight.left -= used
                left -= used
