"""The shapes that the benchmarks measure, and how often a model's call has each."""

from __future__ import annotations

import torch

from ldmq_kernels.tuning.shapes import Conv2d, Linear, of_models

FEWEST_ROWS = 512  # of the linears that carry a UNet; text and time embeddings have fewer
UNETS = ("sd15", "sdxl")


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
    """The linears to measure here: the large ones of both UNets on a GPU, SD 1.5's at batch 1 on a CPU."""
    if not torch.cuda.is_available():
        return CPU_LINEARS
    return tuple(shape for shape in of_models(*UNETS)[0] if shape.m >= FEWEST_ROWS)


def convolutions() -> tuple[Conv2d, ...]:
    """The convolutions to measure here: all of both UNets on a GPU, SD 1.5's at batch 1 on a CPU."""
    return tuple(of_models(*UNETS)[1]) if torch.cuda.is_available() else CPU_CONVOLUTIONS
