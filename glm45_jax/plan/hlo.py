"""Collectives of a compiled program, counted from its text: kinds, how often they run, bytes.
The type to know is `Collective`.

A scan is a `while` in HLO; what its body holds runs as often as its condition says. Loops that end
by data are left out and said: here they are the further passes of experts' exchanges, which even
routing does not take.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}  # others end in their bits: f32, s8, u64
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLS = re.compile(
    r"\b(?:calls|to_apply|body|branch_computations|true_computation|"
    r"false_computation|called_computations)=(\{[^}]*\}|%?[\w.-]+)"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction. runs: in one step. bytes: of the whole array that it makes or
    sums on one device, each run. group: devices that take part, their numbers.
    """

    kind: str
    runs: float
    bytes: float
    group: tuple[int, ...]

    @property
    def sent(self) -> float:
        """Bytes that leave a device in one run of the best algorithm: a part of each array stays
        where it is; a sum goes there and back.
        """
        n = max(len(self.group), 1)
        share = 1.0 if self.kind == "collective-permute" else (n - 1) / n
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO: name, shape as written, opcode, names of its operands, what comes after."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


@dataclasses.dataclass(frozen=True)
class Counted:
    """What a program sends. unknown_loops: those that hold a collective and whose length the text
    does not say; what is in them is not counted.
    """

    collectives: tuple[Collective, ...]
    unknown_loops: int

    def by_kind(self) -> dict[str, tuple[float, float]]:
        """{kind: (runs, bytes sent by a device)} of one step."""
        found: dict[str, tuple[float, float]] = {}
        for c in self.collectives:
            runs, sent = found.get(c.kind, (0.0, 0.0))
            found[c.kind] = runs + c.runs, sent + c.runs * c.sent
        return found


def count(text: str, devices: int) -> Counted:
    """Collectives of one run of the program whose text this is (`Compiled.as_text()`)."""
    programs, entry = computations(text)
    holds = _holding(programs)
    found: list[Collective] = []
    unknown = 0

    def visit(name: str, runs: float) -> None:
        nonlocal unknown
        shapes = {i.name: i.shape for i in programs[name]}
        for i in programs[name]:
            kind = i.opcode.removesuffix("-start")
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # TPU writes one as a fusion of a sum and a slice
            if kind in KINDS:
                found.append(_collective(kind, i, shapes, runs, devices))
                continue
            called = [c for c in _called(i) if c in holds]
            if i.opcode == "while" and called:
                trips = trip_count(i, programs)
                unknown += trips is None
                runs_inside = runs * (trips or 0)
            else:
                runs_inside = runs
            if runs_inside and not i.opcode.endswith(("-done", "-update")):
                for c in called:
                    visit(c, runs_inside)

    if entry in programs:
        visit(entry, 1.0)
    return Counted(tuple(found), unknown)


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """({name: instructions}, name of the entry) of a module's text."""
    programs: dict[str, list[Instruction]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            programs[name] = []
            entry = name if head[1] else entry
        elif name and line.startswith("  ") and (i := _instruction(line)):
            programs[name].append(i)
    return programs, entry


def trip_count(loop: Instruction, programs: dict[str, list[Instruction]]) -> int | None:
    """How often a `while` runs: as XLA notes it, else the one integer its condition compares with;
    None where neither says.
    """
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.rest)
    if condition is None or condition[1] not in programs:
        return None
    seen = list(programs[condition[1]])
    seen += [j for i in seen for c in _called(i) for j in programs.get(c, [])]
    compares = [i for i in seen if i.opcode == "compare"]
    numbers = {
        int(i.operands[0])
        for i in seen
        if i.opcode == "constant" and re.match(r"[su]\d+\[\]", i.shape) and i.operands
    }
    if len(compares) != 1 or len(numbers) != 1 or "direction=LT" not in compares[0].rest:
        return None
    return numbers.pop()


def array_bytes(shape: str) -> list[float]:
    """Bytes of each array in a shape as HLO writes it, tuples flattened."""
    sizes = []
    for kind, dims in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape)):
        bits = BITS.get(kind) if kind in BITS else int(re.findall(r"\d+", kind)[0])
        assert bits is not None
        sizes.append(math.prod(int(n) for n in dims.split(",") if n) * bits / 8)
    return sizes


def group_of(rest: str, devices: int) -> tuple[int, ...]:
    """The first group of devices that exchange, from any of the three forms that XLA writes."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return int(pairs[1]), int(pairs[2])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = {k: int(n) for k, n in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
        axes = re.findall(r"'([^']*)'", mesh[2])
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        if set(axes) <= set(sizes):
            at = tuple(slice(None) if axis in axes else 0 for axis in sizes)
            return tuple(ids[at].reshape(-1).tolist())
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        ids = np.arange(math.prod(dims := _ints(iota[3]))).reshape(dims)
        ids = ids.transpose(_ints(iota[4])) if iota[4] else ids
        return tuple(ids.reshape(int(iota[1]), int(iota[2]))[0].tolist())
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return _ints(listed[1])
    return tuple(range(devices))


def _collective(
    kind: str, i: Instruction, shapes: dict[str, str], runs: float, devices: int
) -> Collective:
    """all-gather by what it makes, the others by what they are given."""
    group = group_of(i.rest, devices)
    given = sum(sum(array_bytes(shapes.get(name, ""))) for name in i.operands)
    if kind == "all-gather":
        given *= len(group)
    elif kind == "ragged-all-to-all":  # rows, a buffer of zeros, four lists of numbers
        given = sum(array_bytes(shapes.get(i.operands[0], "")))
    return Collective(kind, runs, given, group)


def _called(i: Instruction) -> list[str]:
    """Computations that an instruction runs, a loop's condition apart."""
    return [c for text in _CALLS.findall(i.rest) for c in re.findall(r"[\w.-]+", text)]


def _holding(programs: dict[str, list[Instruction]]) -> set[str]:
    """Computations that hold a collective, or call one that does."""
    calls = {name: {c for i in body for c in _called(i)} for name, body in programs.items()}
    holds = {
        name
        for name, body in programs.items()
        if any(i.opcode.removesuffix("-start") in KINDS for i in body)
    }
    while more := {name for name, called in calls.items() if called & holds} - holds:
        holds |= more
    return holds


def _instruction(line: str) -> Instruction | None:
    name, equals, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    shape, rest = _balanced(rest) if rest.startswith("(") else rest.split(" ", 1)
    opcode, _, rest = rest.strip().partition("(")
    inside, rest = _balanced("(" + rest)
    operands = tuple(_operands(inside, opcode))
    return Instruction(name.removeprefix("%"), shape, opcode, operands, rest)


def _operands(inside: str, opcode: str) -> Iterator[str]:
    """Names of operands; of a constant, its text."""
    if opcode == "constant":
        yield from re.findall(r"^\((-?\d+)\)$", inside)
    else:
        yield from re.findall(r"%([\w.-]+)", inside)


def _balanced(text: str) -> tuple[str, str]:
    """(the parenthesis that text begins with, what follows)."""
    depth = 0
    for at in re.finditer(r"[()]", text):
        depth += 1 if at[0] == "(" else -1
        if depth == 0:
            return text[: at.end()], text[at.end() :]
    return text, ""


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))
