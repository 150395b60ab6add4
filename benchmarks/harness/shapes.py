"""The shapes that the benchmarks measure, how often a model's call has each, and how a person writes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.harness.machine import device
from ldmq_kernels.tuning.calls import GEGLU_WIDENING
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


def geglus() -> Iterator[Linear]:
    """Those of `linears` whose outputs are values and gates."""
    return (shape for shape in linears() if shape.n == GEGLU_WIDENING * shape.k)


def convolutions() -> tuple[Conv2d, ...]:
    """The convolutions to measure here: all of both UNets on a GPU, SD 1.5's at batch 1 on a CPU."""
    return tuple(of_models(*UNETS)[1]) if device().type == "cuda" else CPU_CONVOLUTIONS


@dataclass(frozen=True)
class Notation:
    """How the shapes of an op are written, as `ldmq bench` has them: numbers with an x between them.

    Attributes:
        names: of the numbers, in order.
        make: a shape, called no time by any model, of that many numbers.
    """

    names: tuple[str, ...]
    make: Callable[..., Linear | Conv2d]
    example: str

    def __str__(self) -> str:
        return "x".join(self.names)

    def parse(self, text: str) -> Linear | Conv2d:
        """The shape of a text.

        Raises:
            ValueError: it is not that many positive numbers, or a picture is not square.
        """
        parts = text.lower().split("x")
        if len(parts) != len(self.names) or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise ValueError(f"the shape {text} is not {self}, positive whole numbers such as {self.example}")
        return self.make(*map(int, parts))


def _image(n: int, c: int, height: int, width: int, k: int | None = None) -> Conv2d:
    if height != width:
        raise ValueError(f"the benchmarks measure square pictures, as the models have them, and not {height}x{width}")
    return Conv2d(0, n, c, height, c if k is None else k)


LINEAR = Notation(("M", "N", "K"), lambda m, n, k: Linear(0, m, k, n), "4096x1280x1280")
TOKENS = Notation(("M", "K"), lambda m, k: Linear(0, m, k, k), "4096x1280")
CONV2D = Notation(("N", "C", "H", "W", "K"), _image, "2x320x64x64x320")
IMAGE = Notation(("N", "C", "H", "W"), _image, "2x320x64x64")
