"""Geometry of the implicit-GEMM convolutions, on the host and on the device.

The output is a matrix of N * P * Q pixels (rows) by K channels (columns), which is NHWC memory. No im2col:

- By windows, where there is TMA: a tile is a window of samples x rows x columns of the output. Under one tap its
  input is the same window, moved, of x (N, H, W, C), which one descriptor load brings to shared memory as a
  (pixels, channels) operand; what it brings from outside is zero, and that is the padding. With stride 2 the
  descriptor sees (N, H / 2, 2, W / 2, 2 C), so that a tap's rows and columns of one parity lie side by side. An
  input to be enlarged stays small: the output's pixels of one parity read a window of it.
- By pointers, for everything else: `conv2d_pointers`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.geometry import conv2d_output_size
from ldmq_kernels.kernels.triton.configurations import Problem
from ldmq_kernels.kernels.triton.launch import ALIGNMENT, Epilogue, activation_scale, expanded, has_tma


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

    def has_windows(self, x: Tensor) -> bool:
        """Whether descriptors can read x (N, C, H, W), channels_last, by windows."""
        strided = self.stride == (2, 2) and self.size[0] % 2 == 0 and self.size[1] % 2 == 0 and self.upsample == 1
        aligned = self.channels * x.element_size() % ALIGNMENT == 0 and x.data_ptr() % ALIGNMENT == 0
        return has_tma(x.device) and aligned and self.groups == 1 and (self.stride == (1, 1) or strided)

    def window(self, pixels: int) -> tuple[int, int, int]:
        """Samples, rows and columns of a window of so many pixels, with the least waste at the output's edges."""
        height, width = (-(-length // self.upsample) for length in self.out_size)
        shapes = [
            (pixels // (h * w), h, w) for h in (1, 2, 4, 8, 16, 32) for w in (4, 8, 16, 32, 64) if pixels % (h * w) == 0
        ]

        def waste(shape: tuple[int, int, int]) -> tuple[int, int]:
            covers = -(-self.samples // shape[0]) * -(-height // shape[1]) * -(-width // shape[2])
            return covers, shape[1] + shape[2]  # a window's neighbours read what it has read: squares share most

        return min(shapes, key=waste)

    def windows(self, window: tuple[int, int, int]) -> int:
        """How many windows cover the output."""
        height, width = (-(-length // self.upsample) for length in self.out_size)
        covers = -(-self.samples // window[0]) * -(-height // window[1]) * -(-width // window[2])
        return covers * self.upsample**2

    def window_arguments(self, window: tuple[int, int, int]) -> dict[str, int]:
        """Compile-time arguments of the kernels that read by windows."""
        return {
            "S": self.kernel_size[1],
            "TAPS": self.kernel_size[0] * self.kernel_size[1],
            "DILATION_H": self.dilation[0],
            "DILATION_W": self.dilation[1],
            "STRIDE": self.stride[0],
            "UPSAMPLE": self.upsample,
            "BLOCK_H": window[1],
            "BLOCK_W": window[2],
        }

    def sizes(self) -> tuple[int, ...]:
        """What the kernels that read by windows take, from `samples` to `left`."""
        return (self.samples, *self.out_size, self.channels, self.out_channels, self.padding[0], self.padding[2])

    def window_descriptor(self, x: Tensor, window: tuple[int, int, int], depth: int) -> TensorDescriptor:
        """Loads a window's input of `depth` channels from x (N, C, H, W), channels_last."""
        (height, width), channels = self.size, self.channels
        if self.stride == (1, 1):
            shape = [self.samples, height, width, channels]
            strides = [height * width * channels, width * channels, channels, 1]
            return TensorDescriptor(x, shape, strides, [*window, depth])
        row = width * channels
        shape = [self.samples, height // 2, 2, width // 2, 2 * channels]
        strides = [height * row, 2 * row, row, 2 * channels, 1]
        return TensorDescriptor(x, shape, strides, [window[0], window[1], 1, window[2], depth])

    def weight_descriptor(self, weight: Tensor, rows: int, depth: int) -> TensorDescriptor | None:
        """Loads (rows, 1, depth) from a weight (K, R, S, depth); None for no rows."""
        if rows == 0:
            return None
        taps = weight.view(weight.shape[0], -1, weight.shape[-1])
        return TensorDescriptor(taps, list(taps.shape), list(taps.stride()), [rows, 1, depth])

    def flat_weight_descriptor(self, weight: Tensor, rows: int, depth: int) -> TensorDescriptor | None:
        """Loads (rows, depth) from a weight (K, R * S * C), or None where a block could meet nonzero input.

        A block that goes beyond a tap's channels has the next tap's weights, where the window's channels are
        zero; with stride 2 they are another pixel's.
        """
        if self.stride != (1, 1) and self.channels % depth:
            return None
        flat = weight.view(weight.shape[0], -1)
        return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [rows, depth])

    @property
    def problem(self) -> Problem:
        """What the choice of a tile depends on."""
        depth = self.kernel_size[0] * self.kernel_size[1] * self.group_channels
        return Problem(self.rows, self.group_out_channels, depth, self.groups)

    def output(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for the output, channels_last."""
        return torch.empty(self.out_shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)

    def epilogue(
        self,
        x_scale: Tensor | None,
        weight_scale: Tensor,
        bias: Tensor | None,
        sample_bias: Tensor | None,
        residual: Tensor | None,
    ) -> Epilogue:
        """The epilogue's operands, in the sizes of this convolution's output.

        Raises:
            Unsupported: there are neither one activation scale nor one for each sample.
        """
        return Epilogue(
            None if x_scale is None else activation_scale(x_scale, self.samples),
            weight_scale.contiguous(),
            expanded(bias, (self.out_channels,)),
            expanded(sample_bias, (self.samples, self.out_channels)),
            expanded(residual, self.out_shape, is_image=True),
        )

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
def window_of_tile(
    tile: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    UPSAMPLE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """First sample, row and column of a window, among the output's pixels of one parity, and that parity."""
    across = tl.cdiv(tl.cdiv(out_width, UPSAMPLE), BLOCK_W)
    down = tl.cdiv(tl.cdiv(out_height, UPSAMPLE), BLOCK_H)
    w = (tile % across) * BLOCK_W
    h = (tile // across) % down * BLOCK_H
    rest = tile // (across * down)
    parities: tl.constexpr = UPSAMPLE * UPSAMPLE
    return rest // parities * BLOCK_S, h, w, rest % parities


@triton.jit
def load_window(
    x: tl.tensor,  # descriptor of (N, H, W, C), or of (N, H / 2, 2, W / 2, 2 C) with stride 2
    sample: tl.tensor,
    h: tl.tensor,
    w: tl.tensor,
    parity: tl.tensor,
    tap: tl.tensor,
    channel: tl.tensor,
    channels: tl.tensor,
    top: tl.tensor,
    left: tl.tensor,
    S: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    STRIDE: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """The (BLOCK_M, BLOCK_K) input values of a window under one tap, zero in the padding.

    Channels beyond the last are zero, or with stride 2 another pixel's: the weight is zero there.
    """
    r = (tap // S) * DILATION_H - top
    s = (tap % S) * DILATION_W - left
    if STRIDE == 2:
        block = x.load([sample, h + (r >> 1), r & 1, w + (s >> 1), (s & 1) * channels + channel])
    elif UPSAMPLE == 2:
        block = x.load([sample, h + ((r + parity // 2) >> 1), w + ((s + parity % 2) >> 1), channel])
    else:
        block = x.load([sample, h + r, w + s, channel])
    return tl.reshape(block, (BLOCK_M, BLOCK_K))


@triton.jit
def pixels_of_window(
    sample: tl.tensor,
    h: tl.tensor,
    w: tl.tensor,
    parity: tl.tensor,
    samples: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    UPSAMPLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Output row (int64), sample and mask of a window's pixels, (BLOCK_M,) each."""
    index = tl.arange(0, BLOCK_M)
    n = sample + index // (BLOCK_H * BLOCK_W)
    p = (h + index // BLOCK_W % BLOCK_H) * UPSAMPLE + parity // UPSAMPLE
    q = (w + index % BLOCK_W) * UPSAMPLE + parity % UPSAMPLE
    row = (n.to(tl.int64) * out_height + p) * out_width + q
    return row, n, (n < samples) & (p < out_height) & (q < out_width)
