"""Memory that is kept between large temporaries."""

import resource
import threading

import pytest
import torch

from ldmq_kernels import allocator
from ldmq_kernels.allocator import kept_memory

BYTES = 64 << 20
PAGES = BYTES // 4096

pytestmark = pytest.mark.skipif(allocator._libc() is None, reason="this C library is not glibc")


def faults() -> int:
    """Page faults of a temporary."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(BYTES, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_second_temporary_has_no_new_pages() -> None:
    with kept_memory():
        faults()
        assert faults() < PAGES / 8
        with kept_memory():
            pass
        assert faults() < PAGES / 8, "an inner block ends nothing"
    assert faults() > PAGES / 2


def test_an_error_ends_it_too() -> None:
    def fail() -> None:
        with kept_memory():
            faults()
            raise ValueError("trouble")

    with pytest.raises(ValueError, match="trouble"):
        fail()
    assert faults() > PAGES / 2


def test_the_last_of_several_threads_ends_it() -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def other() -> None:
        with kept_memory():
            begun.set()
            goes_on.wait()

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait()
    with kept_memory():
        faults()
    assert faults() < PAGES / 8, "the other thread's block goes on"
    goes_on.set()
    thread.join()
    assert faults() > PAGES / 2
