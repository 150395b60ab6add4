"""The memory that a process may use is the machine's, or what its container leaves of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch import nn

from ldmq_kernels.calibration import host_memory, probes


@pytest.fixture
def limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which a container's limit stands, in place of the system's; there is none yet."""
    monkeypatch.setattr(host_memory, "LIMITS", (tmp_path / "absent", tmp_path / "memory.max"))
    return tmp_path / "memory.max"


def test_without_a_limit_it_is_the_machines(limit: Path) -> None:
    found = host_memory.host_memory()
    assert found == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit.write_text("max\n")
    assert host_memory.host_memory() == found


def test_a_containers_limit_counts_where_it_is_less(limit: Path) -> None:
    found = host_memory.host_memory()
    limit.write_text(f"{3 << 28}\n")
    assert host_memory.host_memory() == 3 << 28
    limit.write_text(f"{2 * found}\n")
    assert host_memory.host_memory() == found


def test_a_system_that_does_not_tell(limit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf")
    assert host_memory.host_memory() == host_memory.UNKNOWN


def test_records_take_a_third_of_it_at_most_on_a_cpu_alone(limit: Path) -> None:
    limit.write_text(f"{3 << 28}\n")
    assert probes._memory(nn.Linear(2, 2)) == 1 << 28
    assert probes._memory(nn.Linear(2, 2, device="meta")) == probes.MEMORY
    limit.write_text("max")
    assert probes._memory(nn.Linear(2, 2)) <= probes.HOST_MEMORY
