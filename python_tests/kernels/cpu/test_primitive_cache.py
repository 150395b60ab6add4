"""What oneDNN keeps for each shape is bounded; `python -m benchmarks memory` shows what that is in megabytes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

SHAPES = 600
PROGRAM = f"""
import ldmq_kernels.nn
import torch

weight = torch.randn(16, 16, 1, 1)


def convolve(height):
    x = torch.randn(1, 16, height, 4)
    torch.mkldnn_convolution(x, weight, None, [0, 0], [1, 1], [1, 1], 1)


for height in range(1, {SHAPES} + 1):
    convolve(height)
print("again", flush=True)
convolve(1)
"""


def _again(**settings: str) -> str:
    """What oneDNN says of the first shape's convolution after many others: "cache_hit" or "cache_miss"."""
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    environment |= {"ONEDNN_VERBOSE": "profile_create"} | settings
    told = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    (line,) = (line for line in told.stdout.partition("again")[2].splitlines() if "cpu,convolution" in line)
    return line.split(",")[3].removeprefix("create:")


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_a_shape_is_forgotten_after_many_others_unless_the_user_wants_more_kept() -> None:
    assert _again() == "cache_miss"
    assert _again(ONEDNN_PRIMITIVE_CACHE_CAPACITY="4096") == "cache_hit"
