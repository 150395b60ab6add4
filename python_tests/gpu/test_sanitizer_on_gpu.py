"""No kernel reads or writes outside of its operands, or what another thread is still writing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_run.sanitizer import FOUND, sanitizer

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    command = sanitizer()
    if command is None:
        pytest.skip("compute-sanitizer is not installed")
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "5"]
    watched = [command, *options, sys.executable, "-m", "python_tests.gpu.small_calls"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor has bounds of its own
    run = subprocess.run(watched, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if "not supported" in run.stdout + run.stderr:
        pytest.skip("compute-sanitizer does not run on this machine")
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    assert "linear_w8a8 triton" in run.stdout
