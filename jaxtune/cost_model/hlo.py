"""Reads the text of an optimized XLA module: computations, instructions, and how often each of them runs.

The grammar is that of XLA's HLO text (openxla.org/xla/hlo_dumps); only what costs are read from is understood. A
module of a TPU is scheduled, so the order of its instructions is the order in which they begin.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

BYTES: dict[str, float] = dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1)
BYTES |= dict.fromkeys(("s16", "u16", "bf16", "f16"), 2) | dict.fromkeys(("s32", "u32", "f32"), 4)
BYTES |= dict.fromkeys(("s64", "u64", "f64"), 8) | dict.fromkeys(("s4", "u4"), 0.5)
CALLS = ("call", "call-start", "async-start")  # ops that run a computation once, here or on another core
HANDED_ON = ("copy", "bitcast", "copy-start", "copy-done", "opt-barrier", "reshape")  # an array by another name
_UNKNOWN_CYCLES = 1 << 62  # what the compiler writes for work of another core is the largest number there is
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b(" + "|".join(BYTES) + r")\[([\d,]*)\]")
_CONSTANT = re.compile(r"[su](?:32|64)\[\]\S* constant\((\d+)\)")
_TABLE = re.compile(r"^(FileNames|FunctionNames|FileLocations|StackFrames)$")
_FIELD = re.compile(r"(\w+)=(\d+)")


class Shape(NamedTuple):
    """One array of a type: its element type as HLO writes it, and its dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> float:
        """Bytes, without the padding of a layout."""
        return BYTES[self.dtype] * math.prod(self.dims)


def shapes(text: str) -> list[Shape]:
    """Returns the arrays of a type, those of tuples one after another."""
    return [Shape(dtype, tuple(int(d) for d in dims.split(",") if d)) for dtype, dims in _SHAPE.findall(text)]


def elements(text: str) -> list[str]:
    """Returns the types that a tuple's type is made of; of any other type the type itself."""
    if not text.startswith("("):
        return [text]
    found, depth, begin = [], 0, 1
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if (depth == 1 and character == ",") or not depth:
            found.append(re.sub(r"/\*.*?\*/", "", text[begin:place]).strip())
            begin = place + 1
        if not depth:
            break
    return found


@dataclass(frozen=True)
class Instruction:
    """One line of a computation: what it makes (`type`), by which operation, and the rest of the line."""

    name: str
    opcode: str
    type: str
    rest: str

    @cached_property
    def cycles(self) -> int | None:
        """The compiler's own estimate; None where it gives none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found and int(found[1]) < _UNKNOWN_CYCLES else None

    @property
    def target(self) -> str | None:
        """What a custom call calls."""
        found = re.search(r'custom_call_target="([^"]+)"', self.rest)
        return found[1] if found else None

    @property
    def operands(self) -> list[Shape]:
        """The arrays that a custom call reads, where their layouts are given."""
        found = re.search(r"operand_layout_constraints=\{(.*?)\}, \w+=", self.rest)
        return shapes(found[1]) if found else []

    @property
    def inputs(self) -> list[str]:
        """Names of the instructions that it reads, in order; of a custom call too."""
        return re.findall(r"%([\w.\-]+)", self.rest[: _end_of(self.rest)])

    @property
    def results(self) -> list[Shape]:
        """The arrays that it makes."""
        return shapes(self.type)

    @property
    def index(self) -> int:
        """Which element of a tuple a get-tuple-element takes."""
        found = re.search(r"\bindex=(\d+)", self.rest)
        return int(found[1]) if found else 0

    @property
    def frame(self) -> int | None:
        """Number of the stack frame that it comes from."""
        found = re.search(r"stack_frame_id=(\d+)", self.rest)
        return int(found[1]) if found else None

    def called(self, *attributes: str) -> list[str]:
        """Names of the computations that these attributes name."""
        names = []
        for attribute in attributes:
            found = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.rest)
            if found:
                names += [name.strip().lstrip("%") for name in (found[1] or found[2]).split(",")]
        return names


class Executed(NamedTuple):
    """An instruction of a computation that runs, and how many times a step runs it."""

    instruction: Instruction
    times: int


@dataclass(frozen=True)
class Module:
    """A module as read: instructions by computation, in order; `functions` of each stack frame, the innermost first."""

    entry: str
    computations: dict[str, tuple[Instruction, ...]]
    functions: dict[int, tuple[str, ...]]

    @cached_property
    def named(self) -> dict[str, Instruction]:
        """Every instruction by its name; no two of a module share one."""
        return {one.name: one for lines in self.computations.values() for one in lines}

    def executed(self) -> Iterator[Executed]:
        """Yields what a step runs, in order: loop bodies times their trips, of branches the costliest alone."""
        yield from self._run(self.entry, 1)

    def _run(self, computation: str, times: int) -> Iterator[Executed]:
        for instruction in self.computations.get(computation, ()):
            if instruction.opcode == "while":
                for body in instruction.called("body"):
                    yield from self._run(body, times * self.trips(instruction))
            elif instruction.opcode in CALLS:
                yield Executed(instruction, times)
                for name in instruction.called("to_apply", "calls"):
                    yield from self._run(name, times)
            elif instruction.opcode == "conditional":
                for name in self.taken(instruction):
                    yield from self._run(name, times)
            else:
                yield Executed(instruction, times)

    def taken(self, conditional: Instruction) -> list[str]:
        """The costliest of its branches."""
        branches = conditional.called("branch_computations", "true_computation", "false_computation")
        return [max(branches, key=self._cycles)] if branches else []

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """Yields what a fusion, or another call of one computation, is made of."""
        for name in instruction.called("calls", "to_apply"):
            for one in self.computations.get(name, ()):
                yield one
                yield from self.inside(one)

    def _cycles(self, computation: str) -> int:
        return sum((one.cycles or 0) * times for one, times in self._run(computation, 1))

    def trips(self, loop: Instruction) -> int:
        """How often a loop's body runs, as scans are written: from its counter's first value, 0 unless the compiler has
        peeled trips off, to the largest constant that its condition compares with."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if known:
            return int(known[1])
        lines = [one for name in loop.called("condition") for one in self.computations.get(name, ())]
        ends = [number for one in lines if (number := _constant(one)) is not None]
        counters = [
            one for one in lines if one.opcode == "get-tuple-element" and one.type.startswith(("s32[]", "u32[]"))
        ]
        begins = [self._first(loop, counters[0].index)] if len(counters) == 1 else []
        end, begin = max(ends, default=1), max(begins, default=0)
        return end - begin if end > begin else end

    def _first(self, loop: Instruction, place: int) -> int:
        """The value that a loop's carried array has before the first trip; 0 where that is not a constant."""
        begin = self.named.get((*loop.inputs, "")[0])
        one = self.named.get(begin.inputs[place]) if begin and place < len(begin.inputs) else None
        while one is not None and one.opcode in HANDED_ON:
            one = self.named.get((*one.inputs, "")[0])
        return (_constant(one) if one else None) or 0


def _constant(instruction: Instruction) -> int | None:
    found = _CONSTANT.fullmatch(
        f"{instruction.type} {instruction.opcode}{instruction.rest[: _end_of(instruction.rest) + 1]}"
    )
    return int(found[1]) if found else None


def parse(text: str) -> Module:
    """Reads a module's text.

    Raises:
        ValueError: no entry computation, so it is not the text of a module.
    """
    computations: dict[str, list[Instruction]] = {}
    tables: dict[str, dict[int, str]] = {}
    entry, current, table = None, None, None
    for line in _logical_lines(text):
        if found := _TABLE.match(line):
            table = tables.setdefault(found[1], {})
        elif found := _COMPUTATION.match(line):
            table, current = None, computations.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            if found := _INSTRUCTION.match(line):
                current.append(_instruction(found[1], found[2]))
        elif table is not None and line[:1].isdigit():
            number, _, value = line.partition(" ")
            table[int(number)] = value
    if entry is None:
        raise ValueError("found no ENTRY computation; expected the text of an optimized HLO module")
    return Module(entry, {name: tuple(lines) for name, lines in computations.items()}, _stacks(tables))


def _logical_lines(text: str) -> Iterator[str]:
    """Lines, those joined that a custom call's attributes are broken over: strings in them may hold line ends."""
    waiting = ""
    for line in text.splitlines():
        if waiting:
            waiting += " " + line.strip()
        elif _INSTRUCTION.match(line):
            waiting = line
        else:
            yield line
            continue
        if _is_whole(waiting):
            yield waiting
            waiting = ""
    if waiting:
        yield waiting


def _is_whole(line: str) -> bool:
    """Whether brackets and quotes of an instruction are closed."""
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", line)
    return '"' not in bare and sum(map(bare.count, "([{")) <= sum(map(bare.count, ")]}"))


def _instruction(name: str, text: str) -> Instruction:
    end = _end_of_type(text)
    found = re.match(r"([\w\-]+)(\(.*)", text[end + 1 :], re.S)
    opcode, rest = (found[1], found[2]) if found else ("", text[end + 1 :])
    return Instruction(name, opcode, text[:end], rest)


def _end_of(text: str) -> int:
    """Place of the bracket that closes the first one."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if not depth:
            return place
    return len(text)


def _end_of_type(text: str) -> int:
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == " " and depth == 0:  # a tuple's type has spaces of its own
            return place
    return len(text)


def _stacks(tables: dict[str, dict[int, str]]) -> dict[int, tuple[str, ...]]:
    """Function names of every stack frame, from the innermost out."""
    names = {number: value.strip('"') for number, value in tables.get("FunctionNames", {}).items()}
    locations = {n: dict(_FIELD.findall(value)) for n, value in tables.get("FileLocations", {}).items()}
    frames = {n: dict(_FIELD.findall(value)) for n, value in tables.get("StackFrames", {}).items()}
    out: dict[int, tuple[str, ...]] = {}
    for number in frames:
        stack: list[str] = []
        at = number
        while at in frames and len(stack) < len(frames):
            location = locations.get(int(frames[at].get("file_location_id", 0)), {})
            stack.append(names.get(int(location.get("function_name_id", 0)), ""))
            at = int(frames[at].get("parent_frame_id", 1)) - 1  # numbered from 1, so that 1 is nobody
        out[number] = tuple(stack)
    return out
