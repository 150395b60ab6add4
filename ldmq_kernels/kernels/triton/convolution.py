"""Geometry of the implicit-GEMM convolutions, on the host and on the device.

The output is a matrix of N * P * Q pixels (rows) by K channels (columns), which is NHWC memory. A row's
receptive field is read in place, tap by tap; what lies in the padding is masked to zero: no im2col.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.geometry import conv2d_output_size


@dataclass(frozen=True)
class Convolution:
    """Sizes of one convolution. x is (N, C, H, W) and the output (N, K, P, Q)."""

    samples: int
    channels: int
    size: tuple[int, int]
    out_channels: int
    out_size: tuple[int, int]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    upsample: int

    @classmethod
    def of(
        cls,
        x: Tensor,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int, int, int],
        dilation: tuple[int, int],
        groups: int,
        upsample: int,
    ) -> Convolution:
        """The convolution that these arguments of an op ask for.

        Raises:
            Unsupported: the groups do not divide the channels.
        """
        samples, channels, height, width = x.shape
        if channels % groups or out_channels % groups:
            raise Unsupported(f"{groups} groups do not divide {channels} -> {out_channels} channels")
        out_size = conv2d_output_size((height, width), kernel_size, stride, padding, dilation, upsample)
        return cls(
            samples,
            channels,
            (height, width),
            out_channels,
            out_size,
            (kernel_size[0], kernel_size[1]),
            (stride[0], stride[1]),
            (padding[0], padding[1], padding[2], padding[3]),
            (dilation[0], dilation[1]),
            groups,
            upsample,
        )

    @property
    def rows(self) -> int:
        """Output pixels of all samples."""
        return self.samples * self.out_size[0] * self.out_size[1]

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """(N, K, P, Q)."""
        return (self.samples, self.out_channels, *self.out_size)

    @property
    def group_channels(self) -> int:
        """Input channels of one group."""
        return self.channels // self.groups

    @property
    def group_out_channels(self) -> int:
        """Output channels of one group."""
        return self.out_channels // self.groups

    def output(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for the output, channels_last."""
        return torch.empty(self.out_shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)

    def arguments(self) -> tuple[int, ...]:
        """What the kernels take, from `rows` to `dilation_w`."""
        return (
            self.rows,
            *self.size,
            *self.out_size,
            self.channels,
            self.out_channels,
            self.group_channels,
            self.group_out_channels,
            *self.stride,
            self.padding[0],
            self.padding[2],
            *self.dilation,
        )


@triton.jit
def receptive_field(
    row: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    stride_h: tl.tensor,
    stride_w: tl.tensor,
    padding_h: tl.tensor,
    padding_w: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Sample, and the input position (h, w) under the first tap, of each output pixel."""
    area = out_height * out_width
    position = row % area
    h = (position // out_width) * stride_h - padding_h
    w = (position % out_width) * stride_w - padding_w
    return row // area, h, w


@triton.jit
def load_tap(
    x_ptr: tl.tensor,
    sample: tl.tensor,  # (BLOCK_M,)
    h: tl.tensor,  # (BLOCK_M,) row under this tap of the enlarged input, which may lie outside
    w: tl.tensor,  # (BLOCK_M,)
    row_mask: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    UPSAMPLE: tl.constexpr,
    channels: tl.tensor,
    channel: tl.tensor,  # (BLOCK_K,)
    channel_mask: tl.tensor,
) -> tl.tensor:
    """The (BLOCK_M, BLOCK_K) input values under one tap, zero in the padding."""
    inside = row_mask & (h >= 0) & (h < height * UPSAMPLE) & (w >= 0) & (w < width * UPSAMPLE)
    pixel = (sample.to(tl.int64) * height + h // UPSAMPLE) * width + w // UPSAMPLE
    return tl.load(
        x_ptr + pixel[:, None] * channels + channel[None, :], mask=inside[:, None] & channel_mask[None, :], other=0
    )
