"""What every kernel's launch needs on the host: operands checked and contiguous, descriptors, a device."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.triton import configurations
from ldmq_kernels.kernels.triton.candidates import Tile
from ldmq_kernels.kernels.triton.matrix import add_splits

TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
ALIGNMENT = 16  # bytes, of what TMA reads
_NO_GUARD = contextlib.nullcontext()


class Epilogue(NamedTuple):
    """Operands of the epilogue, contiguous; see `matrix.store_slice`."""

    x_scale: Tensor | None
    weight_scale: Tensor
    bias: Tensor | None
    vector: Tensor | None
    residual: Tensor | None

    @property
    def has_one_scale(self) -> bool:
        """Whether one scale holds for all rows."""
        return self.x_scale is not None and self.x_scale.numel() == 1

    def finish(self, target: Tensor, out: Tensor, rows: int, columns: int, sample_rows: int) -> None:
        """Add the splits in `target` (splits, rows, columns) into `out`; nothing where they are one tensor."""
        if target is out:
            return
        grid = triton.cdiv(rows, 16), triton.cdiv(columns, 128)
        add_splits[grid](
            target,
            *self,
            out,
            rows,
            columns,
            sample_rows,
            ONE_SCALE=self.has_one_scale,
            SPLITS=target.shape[0],
            BLOCK_M=16,
            BLOCK_N=128,
            enable_fp_fusion=False,
        )


def partial_sums(out: Tensor, tile: Tile, rows: int, columns: int) -> Tensor:
    """Where the main loop stores: `out` itself, or int32 for each split."""
    if tile.splits == 1:
        return out
    return torch.empty((tile.splits, rows, columns), dtype=torch.int32, device=out.device)


def is_aligned(*operands: Tensor) -> bool:
    """Whether the rows and the start of contiguous operands are multiples of 16 bytes: read by TMA, or 16 at a time."""
    return all(t.shape[-1] * t.element_size() % ALIGNMENT == 0 and t.data_ptr() % ALIGNMENT == 0 for t in operands)


def has_tma(device: torch.device) -> bool:
    """Whether descriptors pay: elsewhere Triton makes pointers of them, whose strides it does not know."""
    return configurations.gpu_of(device).capability >= 90


def operand(matrix: Tensor, rows: int, depth: int, tiled: bool) -> Tensor | TensorDescriptor | None:
    """A (rows, depth) operand as the kernels take it: by descriptor, or by pointer; None for blocks of no rows."""
    if rows == 0:
        return None
    if not tiled:
        return matrix
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, depth])


def dot_dtype(x: Tensor) -> tl.dtype:
    """What a floating product multiplies in: x's dtype, and float32 in the interpreter, which lacks bfloat16."""
    return tl.float32 if x.device.type == "cpu" else TRITON_DTYPES[x.dtype]


def stored_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a kernel stores an output of this dtype in: the interpreter truncates to bfloat16, so torch rounds there."""
    return torch.float32 if x.device.type == "cpu" and dtype == torch.bfloat16 else dtype


def output(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory for an output of x's dtype."""
    return torch.empty(shape, dtype=stored_dtype(x, x.dtype), device=x.device)


def float_op(op: str, x: Tensor) -> str:
    """An op's name in the tables: products of float32 have tiles of their own."""
    return f"{op} float32" if x.dtype == torch.float32 else op


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make x's GPU the current one, so that its current stream takes the launch."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(x.device)


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


def expanded(operand: Tensor | None, shape: Sequence[int], is_image: bool = False) -> Tensor | None:
    """An operand of the epilogue in this shape, contiguous, or channels_last for an image."""
    if operand is None:
        return None
    layout = torch.channels_last if is_image else torch.contiguous_format
    return operand.expand(tuple(shape)).contiguous(memory_format=layout)


def activation_scale(x_scale: Tensor, count: int) -> Tensor:
    """One scale, or `count` of them, contiguous.

    Raises:
        Unsupported: there is another number of scales.
    """
    if x_scale.numel() not in (1, count):
        raise Unsupported(f"{x_scale.numel()} activation scales; one is taken, or one for each of {count}")
    return x_scale.reshape(-1).contiguous()
