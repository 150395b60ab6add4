"""The launch of an int8 product: operands checked and contiguous, a tile chosen; csrc/products.cu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import extension, tiles
from ldmq_kernels.kernels.dispatch import Unsupported

_BIAS_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_OUT_DTYPES = {**_BIAS_DTYPES, torch.int8: "int8"}


class Pictures(NamedTuple):
    """Where the pixels of a convolution are; padding is at the top and on the left, the output's size says the rest."""

    samples: int
    height: int
    width: int
    out_height: int
    out_width: int
    kernel_height: int
    kernel_width: int
    stride_height: int
    stride_width: int
    dilation_height: int
    dilation_width: int
    pad_top: int
    pad_left: int
    upsample: int

    @property
    def rows(self) -> int:
        """Pixels of the output."""
        return self.samples * self.out_height * self.out_width


def int8(x_q: Tensor) -> Tensor:
    """x_q itself.

    Raises:
        Unsupported: its dtype is not int8.
    """
    if x_q.dtype != torch.int8:
        raise Unsupported(f"quantized activations are {x_q.dtype}; the CUDA kernels take int8")
    return x_q


def plain(weight: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A contiguous weight of this dtype and shape.

    Raises:
        Unsupported: it is packed for another backend, or its dtype or shape is another.
    """
    if weight.layout != torch.strided:
        raise Unsupported(f"the weight is packed ({weight.layout}); the CUDA kernels take plain {dtype}")
    if weight.dtype != dtype or tuple(weight.shape) != tuple(shape):
        raise Unsupported(
            f"the weight is {weight.dtype} {tuple(weight.shape)}; this layer takes {dtype} {tuple(shape)}"
        )
    return weight.contiguous()


def _added(name: str, operand: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """What the epilogue adds, contiguous in this shape; of a picture, NHWC."""
    if operand is None:
        return None
    if operand.dtype != dtype:
        raise Unsupported(f"the {name} is {operand.dtype}, must be {dtype} like the output")
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return operand.expand(tuple(shape)).contiguous(memory_format=layout)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def run(
    op: str,
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    multiplier: Tensor | None,
    weight_scale: Tensor,
    bias: Tensor | None,
    sample_vector: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    *,
    depth: int,
    pictures: Pictures | None = None,
    out_reciprocal: Tensor | None = None,
) -> Tensor:
    """Compute `out` of operands whose shapes are checked.

    Args:
        op: "linear_w8a8", "linear_w4a8" or "conv2d_w8a8".
        x: (rows, depth) int8 contiguous, or (N, C, H, W) int8 channels_last.
        x_scale: float32: one, or one for each row or sample.
        weight: (N, depth) or (K, R, S, C) int8, or (N, depth / 2) uint8 holding int4; contiguous.
        multiplier: (N, groups) uint8 contiguous, of an int4 weight.
        weight_scale: (N,) float32.
        bias: (N,) floating.
        sample_vector: (samples, N) of out's dtype.
        residual: out's shape and dtype.
        out: (..., N) contiguous or (samples, N, P, Q) channels_last; floating, or int8 with `out_reciprocal`.
        depth: input channels.
        pictures: of a convolution.
        out_reciprocal: (1,) or (N,) float32, the reciprocal of an int8 output's scale.

    Returns:
        out.

    Raises:
        Unsupported: a shape, dtype or layout that the kernels do not take.
    """
    columns = weight_scale.shape[0]
    rows = pictures.rows if pictures else x.shape[0]
    units = pictures.samples if pictures else rows
    if x_scale.numel() not in (1, units):
        raise Unsupported(f"{x_scale.numel()} activation scales; one is taken, or one for each of {units}")
    if out.dtype not in _OUT_DTYPES:
        raise Unsupported(f"the output is {out.dtype}, must be float16, bfloat16 or float32")
    x_scale, weight_scale = x_scale.reshape(-1).contiguous(), weight_scale.contiguous()
    bias = None if bias is None else bias.expand(columns).contiguous()
    if bias is not None and bias.dtype not in _BIAS_DTYPES:
        raise Unsupported(f"the bias is {bias.dtype}, must be float16, bfloat16 or float32")
    residual = _added("residual", residual, out.shape, out.dtype)
    sample_vector = _added("sample vector", sample_vector, (units, columns), out.dtype)
    taps = pictures.kernel_height * pictures.kernel_width if pictures else 1
    binding = extension.binding()
    arguments: dict[str, Any] = {
        "x": x.data_ptr(),
        "weight": weight.data_ptr(),
        "multiplier": _address(multiplier),
        "x_scale": x_scale.data_ptr(),
        "scale_count": x_scale.numel(),
        "scale_rows": 0 if x_scale.numel() == 1 else rows // max(units, 1),
        "weight_scale": weight_scale.data_ptr(),
        "bias": _address(bias),
        "bias_dtype": "float32" if bias is None else _BIAS_DTYPES[bias.dtype],
        "sample_vector": _address(sample_vector),
        "residual": _address(residual),
        "out": out.data_ptr(),
        "out_dtype": _OUT_DTYPES[out.dtype],
        "out_reciprocal": _address(out_reciprocal),
        "out_reciprocal_count": 0 if out_reciprocal is None else out_reciprocal.numel(),
        "rows": rows,
        "columns": columns,
        "depth": depth,
        "pictures": pictures or (),
        **extension.target(x),
    }
    problem = op, rows, columns, taps * depth, x.device
    tile = tiles.choose(*problem)
    try:
        binding.run_product(tile=tile.place, **arguments)
    except binding.Refusal as refusal:
        if tile.family < tiles.HOPPER or tiles.is_forced():
            raise Unsupported(str(refusal)) from None
        try:  # Hopper's tiles refuse a few convolutions that those for every GPU take
            binding.run_product(tile=tiles.choose(*problem, for_all=True).place, **arguments)
        except binding.Refusal as final:
            raise Unsupported(str(final)) from None
    return out
