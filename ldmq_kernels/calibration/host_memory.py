"""How much memory this process may use on a CPU."""

from __future__ import annotations

import os
from pathlib import Path

LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
UNKNOWN = 16 << 30  # bytes, where the system does not tell


def host_memory() -> int:
    """Bytes of the machine's memory, or of the container's, whichever is less."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        found = UNKNOWN
    for path in LIMITS:
        try:
            found = min(found, int(path.read_text()))
        except (OSError, ValueError):  # there is no such file, or no limit in it
            continue
    return found
