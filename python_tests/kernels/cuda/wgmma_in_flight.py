"""What machine code does to the registers that wgmmas in flight still read."""

from __future__ import annotations

import re

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
FROM_REGISTERS = re.compile(r"R\d+, R(\d+), gdesc")
OPERAND_REGISTERS = 4
MOST_GROUPS = 4  # told apart; older ones are taken for one, since kernels wait for all but one or none

Group = frozenset[int]
State = tuple[tuple[Group, ...], Group]  # operand registers of committed groups, oldest first, and of the open one


def written(opcode: str, operands: str) -> range:
    """The registers that an instruction writes: its first operand, after those that are predicates."""
    target = re.match(r"(?:U?P[T\d]+, )*R(\d+)\b", operands)
    if target is None or "SETP" in opcode:
        return range(0)
    first, parts = int(target[1]), opcode.split(".")
    width = 4 if "128" in parts else 2 if {"64", "WIDE"} & set(parts) or opcode == "CS2R" else 1
    return range(first, first + width)


def _after(opcode: str, operands: str, state: State) -> State:
    groups, opened = state
    if opcode.startswith("IGMMA"):
        if read := FROM_REGISTERS.match(operands):
            opened |= frozenset(range(int(read[1]), int(read[1]) + OPERAND_REGISTERS))
        if "gsb0" not in operands:
            return groups, opened
        groups = (*groups, opened)
        surplus = max(0, len(groups) - MOST_GROUPS)
        return (frozenset[int]().union(*groups[: surplus + 1]), *groups[surplus + 1 :]), frozenset()
    if opcode.startswith("WARPGROUP.DEPBAR"):
        left = int(operands.rsplit("0x", 1)[1], 16)
        return groups[len(groups) - min(left, len(groups)) :], opened
    return state


def overwritten_operands(text: str) -> set[str]:
    """The instructions of a kernel that, on some way through it, write what a wgmma in flight reads."""
    code = [(int(at, 16), predicate, opcode, rest) for at, predicate, opcode, rest in INSTRUCTION.findall(text)]
    place = {at: index for index, (at, *_) in enumerate(code)}
    found: set[str] = set()
    ways: list[tuple[int, State]] = [(0, ((), frozenset()))]
    seen = set(ways)
    while ways:
        index, state = ways.pop()
        at, predicate, opcode, operands = code[index]
        in_flight = state[1].union(*state[0])
        if not opcode.startswith("IGMMA") and in_flight.intersection(written(opcode, operands)):
            found.add(f"{at:04x} {opcode} {operands}")
        state = _after(opcode, operands, state)
        followers = []
        if opcode.startswith("BRA"):
            followers.append(place[int(operands.rsplit("0x", 1)[1], 16)])
        if (predicate or opcode not in ("BRA", "EXIT")) and index + 1 < len(code):
            followers.append(index + 1)
        new = [(follower, state) for follower in followers if (follower, state) not in seen]
        seen.update(new)
        ways += new
    return found
