"""A test that leaves the GPU unusable takes none with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# a process whose GPU is unusable stands for itself: every later test in it fails
CONFTEST = """
import pytest
from python_tests import gpu_faults
from python_tests.gpu_faults import pytest_runtest_protocol

usable = [True]
gpu_faults.is_usable = lambda: usable[0]


@pytest.fixture
def gpu():
    assert usable[0], "the GPU is unusable"
    return usable
"""
TESTS = """
def test_before(gpu):
    pass

def test_faults(gpu):
    gpu[0] = False

def test_after(gpu):
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "passed", "told"),
    [
        ((), 2, "test_faults left the GPU unusable"),
        (("-p", "xdist", "-n", "1"), 3, "crashed while running 'test_it.py::test_faults'"),
    ],
    ids=["one process", "a worker"],
)
def test_the_tests_after_a_fault_run_in_another_process_or_not_at_all(
    options: tuple[str, ...], passed: int, told: str, tmp_path: Path
) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), *options, "-v"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert told in run.stdout
    assert run.stdout.count("PASSED") == passed
    assert "the GPU is unusable" not in run.stdout
