"""No kernel reads or writes outside of its operands, or what another thread is still writing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
FOUND_SOMETHING = 9


def _sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), f"{home}/bin"]))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = _sanitizer()
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    options = ["--tool", tool, "--error-exitcode", str(FOUND_SOMETHING), "--print-limit", "5"]
    command = [sanitizer, *options, sys.executable, "-m", "python_tests.gpu.small_calls"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor has bounds of its own
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if "not supported" in run.stdout + run.stderr:
        pytest.skip("compute-sanitizer does not run on this machine")
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    assert "linear_w8a8 triton" in run.stdout
