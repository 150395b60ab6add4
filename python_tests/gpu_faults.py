"""After a fault on a GPU nothing more runs in a process: the tests after it go to another one, or are not run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest


def is_usable() -> bool:
    """Whether this process can still use its GPU; waits for what tests left running."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run nothing after a test that left the GPU unusable: a worker of pytest-xdist ends, and gets a successor."""
    result = yield
    if not is_usable():
        if hasattr(item.config, "workerinput"):
            os._exit(1)  # its reports are sent
        told = f"{item.nodeid} left the GPU unusable; with -n 1 the tests after it run in another process"
        item.session.shouldfail = told
    return result
