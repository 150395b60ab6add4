"""Every linear and convolution of SD 1.5's and SDXL's UNets and their VAE's decoder, with counts a call.

UNets at 512x512 and 1024x1024 with the two halves of guidance (batch 2), the decoder with one 1024x1024 picture.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("model_shapes.json")


@dataclass(frozen=True)
class Linear:
    """`count` products of (m, k) by (n, k)."""

    count: int
    m: int
    k: int
    n: int

    @property
    def product(self) -> tuple[int, int, int]:
        """Rows and columns of the output, and the length of each sum."""
        return self.m, self.n, self.k


@dataclass(frozen=True)
class Conv2d:
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

    @property
    def product(self) -> tuple[int, int, int]:
        """Rows and columns of the output as a matrix, and the length of each sum."""
        return self.n * self.out_size**2, self.k, self.kernel**2 * self.c


@dataclass(frozen=True)
class Input:
    """A tensor of these sizes to quantize, by a scale that is "static", or measured "per token" or "per sample"."""

    sizes: tuple[int, ...]
    scale: str


def of_models(*names: str) -> tuple[list[Linear], list[Conv2d]]:
    """All linears and convolutions of these models, equal shapes added up, the most work first."""
    table = json.loads(FILE.read_text())
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


def merged_of(*names: str) -> list[Linear]:
    """What attention's projections are where q, k and v, or k and v of a text, are one product."""
    table = json.loads(FILE.read_text())["merged"]
    return [Linear(*row) for name in names for row in table.get(name, [])]
