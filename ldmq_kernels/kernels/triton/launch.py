"""What every kernel's launch needs on the host: operands checked and contiguous, a tile, a device."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.numerics.formats import GROUP_SIZE

TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
FEW_TILES = 132  # the multiprocessors of an H100 or H200


@dataclass(frozen=True)
class Tile:
    """The part of the output that one program computes, and the pipeline that feeds it."""

    rows: int
    columns: int
    warps: int
    stages: int
    depth: int = GROUP_SIZE

    def programs(self, rows: int, columns: int) -> int:
        """Tiles that cover rows x columns."""
        return -(-rows // self.rows) * -(-columns // self.columns)

    def narrowed(self, columns: int) -> Tile:
        """The tile with at most so many columns, for a kernel that keeps two accumulators."""
        return replace(self, columns=min(self.columns, columns))

    def shallow(self, channels: int) -> Tile:
        """The tile for a convolution of so few channels that a deep one would be mostly padding."""
        return replace(self, depth=min(self.depth, 32)) if channels <= 32 else self

    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch: without fusion the epilogue rounds as the reference does."""
        return {
            "BLOCK_M": self.rows,
            "BLOCK_N": self.columns,
            "BLOCK_K": self.depth,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": False,
        }


MAIN_TILE = Tile(128, 128, warps=8, stages=4)
INT8_TILES = {
    (16, 16): Tile(16, 16, warps=4, stages=4),
    (16, 128): Tile(16, 64, warps=4, stages=4),
    (64, 16): Tile(64, 16, warps=4, stages=4),
    (64, 128): Tile(64, 64, warps=4, stages=4),
    (128, 16): Tile(128, 16, warps=8, stages=4),
    (128, 128): MAIN_TILE,
}
HALF_TILES = {
    (16, 16): Tile(16, 16, warps=4, stages=3),
    (16, 128): Tile(16, 64, warps=4, stages=3),
    (64, 16): Tile(64, 16, warps=4, stages=3),
    (64, 128): Tile(64, 64, warps=4, stages=3),
    (128, 16): Tile(128, 16, warps=8, stages=3),
    (128, 128): Tile(128, 128, warps=8, stages=3),
}
# exact float32 products have no tensor cores: larger or deeper tiles spill, and from 64 rows on
# Triton 3.6 silently multiplies them in TF32 on sm_100
FLOAT_TILES = {
    (16, 16): Tile(16, 16, warps=4, stages=2, depth=16),
    (16, 128): Tile(16, 64, warps=4, stages=2, depth=16),
    (64, 16): Tile(32, 16, warps=4, stages=2, depth=16),
    (64, 128): Tile(32, 64, warps=4, stages=2, depth=16),
}


def _size_class(rows: int, columns: int, tallest: int = 128) -> tuple[int, int]:
    height = 16 if rows <= 16 else 64 if rows <= 64 or MAIN_TILE.programs(rows, columns) < FEW_TILES else 128
    return min(height, tallest), 16 if columns <= 16 else 128


def int8_tile(rows: int, columns: int) -> Tile:
    """The tile of an int8 matrix product with an output of rows x columns."""
    return INT8_TILES[_size_class(rows, columns)]


def float_tile(rows: int, columns: int, dtype: torch.dtype) -> Tile:
    """The tile of a floating matrix product with an output of rows x columns."""
    if dtype == torch.float32:
        return FLOAT_TILES[_size_class(rows, columns, tallest=64)]
    return HALF_TILES[_size_class(rows, columns)]


def dot_dtype(x: Tensor) -> tl.dtype:
    """What a floating product multiplies in: x's dtype, and float32 in the interpreter, which lacks bfloat16."""
    return tl.float32 if x.device.type == "cpu" else TRITON_DTYPES[x.dtype]


def stored_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a kernel stores an output of this dtype in: the interpreter truncates to bfloat16, so torch rounds there."""
    return torch.float32 if x.device.type == "cpu" and dtype == torch.bfloat16 else dtype


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make x's GPU the current one, so that its current stream takes the launch."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def plain(weight: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A contiguous weight of this dtype and shape.

    Raises:
        Unsupported: it is packed for another backend, or its dtype or shape is another.
    """
    if weight.layout != torch.strided:
        raise Unsupported(f"the weight is packed ({weight.layout}); Triton takes plain {dtype}")
    if weight.dtype != dtype or tuple(weight.shape) != tuple(shape):
        raise Unsupported(
            f"the weight is {weight.dtype} {tuple(weight.shape)}; this layer takes {dtype} {tuple(shape)}"
        )
    return weight.contiguous()


def floating(x: Tensor) -> Tensor:
    """x itself.

    Raises:
        Unsupported: its dtype is not float16, bfloat16 or float32.
    """
    if x.dtype not in TRITON_DTYPES:
        raise Unsupported(f"activations are {x.dtype}; Triton takes float16, bfloat16 and float32")
    return x


def int8(x_q: Tensor) -> Tensor:
    """x_q itself.

    Raises:
        Unsupported: its dtype is not int8.
    """
    if x_q.dtype != torch.int8:
        raise Unsupported(f"quantized activations are {x_q.dtype}; Triton takes int8")
    return x_q


def expanded(operand: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """An operand of the epilogue, contiguous in this shape (channels_last for a 4-D one)."""
    if operand is None:
        return None
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return operand.expand(tuple(shape)).contiguous(memory_format=layout)


def activation_scale(x_scale: Tensor, count: int) -> Tensor:
    """One scale, or `count` of them, contiguous.

    Raises:
        Unsupported: there is another number of scales.
    """
    if x_scale.numel() not in (1, count):
        raise Unsupported(f"{x_scale.numel()} activation scales; one is taken, or one for each of {count}")
    return x_scale.reshape(-1).contiguous()
