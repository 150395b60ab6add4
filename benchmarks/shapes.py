"""The shapes that carry SD 1.5 and SDXL, and how often one UNet call (batch 2, guidance) has each."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Linear(NamedTuple):
    """`count` products of (m, k) by (n, k)."""

    count: int
    m: int
    k: int
    n: int


class Conv2d(NamedTuple):
    """`count` convolutions of (n, c, size, size) to k channels, padded to keep their size."""

    count: int
    n: int
    c: int
    size: int
    k: int
    kernel: int = 3


GPU_LINEARS = (
    Linear(60, 2048, 1280, 10240),
    Linear(372, 2048, 1280, 1280),
    Linear(60, 2048, 5120, 1280),
    Linear(10, 8192, 640, 5120),
    Linear(70, 8192, 640, 640),
    Linear(10, 8192, 2560, 640),
    Linear(5, 8192, 320, 2560),
    Linear(30, 8192, 320, 320),
)
GPU_CONVOLUTIONS = (
    Conv2d(10, 2, 1280, 32, 1280),
    Conv2d(7, 2, 320, 128, 320),
    Conv2d(6, 2, 640, 64, 640),
    Conv2d(2, 2, 2560, 32, 1280),
    Conv2d(1, 2, 1280, 64, 1280),
    Conv2d(1, 2, 640, 128, 640),
    Conv2d(7, 2, 320, 64, 320),
    Conv2d(7, 2, 1280, 16, 1280),
    Conv2d(6, 2, 640, 32, 640),
)
CPU_LINEARS = (
    Linear(30, 4096, 320, 320),
    Linear(5, 4096, 320, 2560),
    Linear(30, 1024, 640, 640),
    Linear(5, 256, 1280, 10240),
)
CPU_CONVOLUTIONS = (
    Conv2d(7, 1, 320, 64, 320),
    Conv2d(6, 1, 640, 32, 640),
    Conv2d(7, 1, 1280, 16, 1280),
    Conv2d(11, 1, 1280, 8, 1280),
)


def linears() -> tuple[Linear, ...]:
    """The linears to measure here: both models on a GPU, SD 1.5 at batch 1 on a CPU."""
    return GPU_LINEARS if torch.cuda.is_available() else CPU_LINEARS


def convolutions() -> tuple[Conv2d, ...]:
    """The convolutions to measure here: both models on a GPU, SD 1.5 at batch 1 on a CPU."""
    return GPU_CONVOLUTIONS if torch.cuda.is_available() else CPU_CONVOLUTIONS
