"""The shapes that the benchmarks measure, how often a model's call has each, and how a person writes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.harness.machine import device
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
    if device().type != "cuda":
        return CPU_LINEARS
    return tuple(shape for shape in of_models(*UNETS)[0] if shape.m >= FEWEST_ROWS)


def convolutions() -> tuple[Conv2d, ...]:
    """The convolutions to measure here: all of both UNets on a GPU, SD 1.5's at batch 1 on a CPU."""
    return tuple(of_models(*UNETS)[1]) if device().type == "cuda" else CPU_CONVOLUTIONS


@dataclass(frozen=True)
class Notation:
    """How the shapes of an op are written: numbers with an x between them.

    Attributes:
        names: of the numbers, in order.
        make: a shape, called no time by any model, of that many numbers.
        optional: how many of the last numbers may be left out.
    """

    names: tuple[str, ...]
    make: Callable[..., Linear | Conv2d]
    example: str
    optional: int = 0

    def __str__(self) -> str:
        kept = len(self.names) - self.optional
        return "x".join(self.names[:kept]) + "".join(f"[x{name}]" for name in self.names[kept:])

    def parse(self, text: str) -> Linear | Conv2d:
        """The shape of a text.

        Raises:
            ValueError: it is not that many positive numbers.
        """
        parts = text.lower().split("x")
        fits = len(self.names) - self.optional <= len(parts) <= len(self.names)
        if not fits or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise ValueError(f"the shape {text} is not {self}, positive whole numbers such as {self.example}")
        return self.make(*map(int, parts))


LINEAR = Notation(("M", "K", "N"), lambda m, k, n: Linear(0, m, k, n), "4096x1280x1280")
TOKENS = Notation(("M", "K"), lambda m, k: Linear(0, m, k, k), "4096x1280")
CONV2D = Notation(
    ("N", "C", "SIZE", "K", "KERNEL", "STRIDE", "UPSAMPLE"),
    lambda *numbers: Conv2d(0, *numbers),
    "2x320x64x320x3",
    optional=3,
)
IMAGE = Notation(("N", "C", "SIZE"), lambda n, c, size: Conv2d(0, n, c, size, c), "2x320x64")
