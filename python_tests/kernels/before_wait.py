"""What the machine code of a kernel does before it waits for the kernel in front of it to end (ACQBULK)."""

from __future__ import annotations

import re

from python_tests.kernels.cuda.wgmma_in_flight import INSTRUCTION

WAIT, LET_THE_NEXT_BEGIN = "ACQBULK", "PREEXIT"
# of global memory, by whatever way, and the end of a thread that has not waited; shared memory, constants and the
# prefetch of a descriptor, which is a parameter of the kernel itself, are nobody else's
TOUCHES = re.compile(r"(LDG|LDGSTS|STG|LD|ST|ATOMG?|REDG?|UTMALDG|UTMASTG|UTMAREDG|UBLKCP|UBLKRED|EXIT|RET)(\.|$)")
UNKNOWN_WAYS = ("BRX", "BRXU", "JMP", "JMX", "CALL.ABS")


LABEL = re.compile(r"^\s*([\w.$]+):\s*$")


def with_addresses(text: str) -> str:
    """The text of `nvdisasm` with addresses in place of labels, as `cuobjdump` has it."""
    places: dict[str, str] = {}
    waiting: list[str] = []
    for line in text.splitlines():
        if label := LABEL.match(line):
            waiting.append(label[1])
        elif waiting and (instruction := INSTRUCTION.search(line)):
            places |= dict.fromkeys(waiting, f"0x{int(instruction[1], 16):x}")
            waiting = []
    return re.sub(r"`\(([\w.$]+)\)", lambda label: places.get(label[1], label[0]), text)


def touched_before_wait(text: str) -> set[str]:
    """The instructions that touch global memory, or end a thread, on some way through a kernel that has not waited yet.

    Args:
        text: of the kernel, with addresses as `cuobjdump -sass` writes them.
    """
    code = [(int(at, 16), predicate, opcode, rest) for at, predicate, opcode, rest in INSTRUCTION.findall(text)]
    place = {at: index for index, (at, *_) in enumerate(code)}
    found: set[str] = set()
    ways, seen = [0], {0}
    while ways:
        index = ways.pop()
        at, predicate, opcode, rest = code[index]
        if opcode == WAIT and not predicate:
            continue
        if TOUCHES.match(opcode) or opcode.startswith(UNKNOWN_WAYS):
            found.add(f"{at:04x} {opcode} {rest}")
            continue
        followers = []
        if opcode.startswith(("BRA", "CALL")) and "0x" in rest:
            followers.append(place[int(rest.rsplit("0x", 1)[1], 16)])
        if (predicate or opcode != "BRA" or not rest.startswith("0x")) and index + 1 < len(code):
            followers.append(index + 1)
        ways += [follower for follower in followers if follower not in seen]
        seen.update(followers)
    return found
