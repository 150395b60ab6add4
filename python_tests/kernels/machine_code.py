"""What the main loop of a GEMM does between its products; on sm_90, how many it leaves in flight and what it waits for.

`wgmma.wait_group N` (WARPGROUP.DEPBAR in machine code) leaves N groups of products in flight; 0 empties the tensor
cores at each step. A warpgroup that has waited has read its operands, and the others may not have: with several of them
a barrier must stand between the wait and the next write of that shared memory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MATRIX = ("IGMMA", "QGMMA", "HGMMA", "UTCIMMA", "UTCHMMA", "UTCQMMA", "IMMA", "QMMA", "HMMA")
PRODUCT = re.compile(rf"\b({'|'.join(MATRIX)})\b")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
BRANCH = re.compile(r"\bBRA\b.*?`\((\.L_x_\d+)")
END = re.compile(r"^(?:\s*/\*\w+\*/)?\s*EXIT\b")  # without a predicate
CONDITIONAL = re.compile(r"(?:@!?U?P\d\s+BRA\b|\bBRA\.U\s+!?UP\d)[^`]*`\((\.L_x_\d+)")
WAIT = re.compile(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
BARRIER = re.compile(r"\bBAR\.SYNC|\bSYNCS\.ARRIVE")
RECIPROCAL = re.compile(r"\bMUFU\.RCP\b")
SHARED_WRITE = re.compile(r"\b(UTMALDG|LDGSTS|STS)\b")


def main_loop(code: str) -> list[str]:
    """The shortest body of a loop that has a matrix instruction, line by line.

    A branch back over the end of the kernel is no loop's: it returns from where a warp waits, which lies behind that.
    """
    lines = code.splitlines()
    labels = places(lines)
    bodies = []
    for i, line in enumerate(lines):
        back = BRANCH.search(line)
        if back and labels.get(back[1], i) < i:
            body = lines[labels[back[1]] : i + 1]
            if any(map(PRODUCT.search, body)) and not any(map(END.search, body)):
                bodies.append(body)
    return min(bodies, key=len, default=[])


def of_every_step(loop: Sequence[str]) -> list[str]:
    """The loop without what a branch may pass over, products apart.

    Where the loop over tiles and that over their steps are one, that is the next tile's place and the last one's end.
    """
    labels = places(loop)
    found, i = [], 0
    while i < len(loop):
        found.append(loop[i])
        branch = CONDITIONAL.search(loop[i])
        end = labels.get(branch[1], 0) if branch else 0
        i = i + 1 if end <= i or any(map(PRODUCT.search, loop[i:end])) else end
    return found


def places(lines: Sequence[str]) -> dict[str, int]:
    """Which line each label is."""
    return {label[1]: i for i, line in enumerate(lines) if (label := LABEL.match(line))}


def waits(loop: Sequence[str]) -> list[int]:
    """The groups of products that each wait of a loop leaves in flight."""
    return [int(found[1], 16) for line in loop if (found := WAIT.search(line))]


def has_unguarded_write(loop: Sequence[str]) -> bool:
    """Whether shared memory is written after a wait, round the loop, before any barrier."""
    for start, line in enumerate(loop):
        if not WAIT.search(line):
            continue
        for later in (*loop[start + 1 :], *loop[: start + 1]):
            if BARRIER.search(later):
                break
            if SHARED_WRITE.search(later):
                return True
    return False


def divides(loop: Sequence[str]) -> bool:
    """Whether a loop divides by what is no constant: by a reciprocal."""
    return any(RECIPROCAL.search(line) for line in loop)
