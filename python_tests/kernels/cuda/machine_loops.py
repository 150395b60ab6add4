"""The loops of machine code, and whether they divide integers."""

from __future__ import annotations

from python_tests.kernels.cuda.wgmma_in_flight import INSTRUCTION

DIVISION = ("MUFU.RCP", "CALL")  # by the reciprocal, or by a function


def loops(text: str) -> list[list[str]]:
    """The opcodes of each loop, the smallest first; all branches back to one place are one loop."""
    code = [(int(at, 16), opcode, rest) for at, _, opcode, rest in INSTRUCTION.findall(text)]
    ends: dict[int, int] = {}
    for at, opcode, rest in code:
        if opcode.startswith(("BRA", "UBRA")) and "0x" in rest:
            target = int(rest.rsplit("0x", 1)[1], 16)
            if target <= at:
                ends[target] = max(at, ends.get(target, 0))
    return sorted(([op for at, op, _ in code if start <= at <= end] for start, end in ends.items()), key=len)


def step_loops(text: str, copy: str, is_persistent: bool) -> list[list[str]]:
    """The loops over steps: those that copy both operands.

    Args:
        text: of a kernel.
        copy: the opcode of its copies to shared memory.
        is_persistent: whether another warp multiplies, and the largest of these loops is that over tiles.
    """
    found = [loop for loop in loops(text) if sum(opcode.startswith(copy) for opcode in loop) >= 2]
    if not is_persistent:
        return found
    return [loop for loop in found if not any("GMMA" in opcode for opcode in loop)][:-1]


def divides(loop: list[str]) -> bool:
    """Whether integers are divided in a loop."""
    return any(opcode.startswith(DIVISION) for opcode in loop)
