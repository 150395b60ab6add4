"""glibc's memory for large temporaries: kept between them, or each time new pages of the system's.

glibc gives what is freed above some size back at once. Of an analysis, whose temporaries are as large as the weights,
a part of the time then goes into page faults.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Iterator

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # parameters of mallopt(3): bytes, bytes and a number of maps
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1}
USUAL = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}  # what thresholds grow to by themselves

_users, _lock = 0, threading.Lock()


@functools.cache
def _libc() -> ctypes.CDLL | None:
    """The C library of the process; None where it is not glibc."""
    if os.name != "posix":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def _set(libc: ctypes.CDLL, sizes: dict[int, int]) -> None:
    for parameter, size in sizes.items():
        libc.mallopt(parameter, size)


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Have glibc keep what is freed inside this block, in all threads, and give it back at the end of the last one."""
    global _users
    libc = _libc()
    if libc is None:
        yield
        return
    with _lock:
        _users += 1
        _set(libc, KEPT)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _set(libc, USUAL)
                libc.malloc_trim(0)
