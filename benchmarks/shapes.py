"""The shapes that the benchmarks measure, and how often a model's call has each (`model_shapes.json`)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

FEWEST_ROWS = 512  # of the linears that carry a UNet; text and time embeddings have fewer
UNETS = ("sd15", "sdxl")


class Linear(NamedTuple):
    """`count` products of (m, k) by (n, k)."""

    count: int
    m: int
    k: int
    n: int


class Conv2d(NamedTuple):
    """`count` convolutions of (n, c, size, size) to k channels, padded by kernel // 2 on all sides."""

    count: int
    n: int
    c: int
    size: int
    k: int
    kernel: int = 3
    stride: int = 1
    upsample: int = 1

    @property
    def out_size(self) -> int:
        """Height and width of the output."""
        return (self.upsample * self.size - 1) // self.stride + 1


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


def of_models(*names: str) -> tuple[list[Linear], list[Conv2d]]:
    """All linears and convolutions of these models, equal shapes added up, the most work first."""
    table = json.loads(Path(__file__).with_name("model_shapes.json").read_text())
    counts: Counter[tuple] = Counter()
    for name in names:
        for count, kind, *shape in table[name]:
            counts[kind, *shape] += count
    linears = [Linear(count, *shape) for (kind, *shape), count in counts.items() if kind == "linear"]
    convolutions = [
        Conv2d(count, n, c, height, k, kernel, stride, upsample)
        for (kind, *shape), count in counts.items()
        if kind == "conv2d"
        for n, c, height, _, k, kernel, stride, upsample in [shape]
    ]
    linears.sort(key=lambda s: -s.count * s.m * s.k * s.n)
    convolutions.sort(key=lambda s: -s.count * s.n * s.out_size**2 * s.c * s.k * s.kernel**2)
    return linears, convolutions


def linears() -> tuple[Linear, ...]:
    """The linears to measure here: the large ones of both UNets on a GPU, SD 1.5's at batch 1 on a CPU."""
    if not torch.cuda.is_available():
        return CPU_LINEARS
    return tuple(shape for shape in of_models(*UNETS)[0] if shape.m >= FEWEST_ROWS)


def convolutions() -> tuple[Conv2d, ...]:
    """The convolutions to measure here: all of both UNets on a GPU, SD 1.5's at batch 1 on a CPU."""
    return tuple(of_models(*UNETS)[1]) if torch.cuda.is_available() else CPU_CONVOLUTIONS
