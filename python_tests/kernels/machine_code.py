"""What the main loop of a GEMM does between its products; on sm_90, how many it leaves in flight and what it waits for.

`wgmma.wait_group N` (WARPGROUP.DEPBAR in machine code) leaves N groups of products in flight; 0 empties the tensor
cores at each step. A warpgroup that has waited has read its operands, and the others may not have: with several of them
a barrier must stand between the wait and the next write of that shared memory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

WAIT = re.compile(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
BARRIER = re.compile(r"\bBAR\.SYNC|\bSYNCS\.ARRIVE")
RECIPROCAL = re.compile(r"\bMUFU\.RCP\b")
SHARED_WRITE = re.compile(r"\b(UTMALDG|LDGSTS|STS)\b")


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
