"""Sizes of the implicit-GEMM convolutions on the host, and what their tma_tiled kernels share on the device.

The output is a matrix of m = N * P * Q pixels by K channels, which is NHWC memory. No im2col:

- tma_tiled, where there is TMA: a tile of the output is an image tile of samples x rows x columns. Under one tap its
  input is the same image tile, shifted, of x (N, H, W, C), which one descriptor load brings to shared memory as a
  (pixels, channels) operand; what it loads from outside is zero, and that is the padding. With stride 2 the descriptor
  sees (N, H / 2, 2, W / 2, 2 C), so that a tap's rows and columns of one parity lie side by side. An input to be
  enlarged stays small: the output's pixels of one parity read an image tile of it.
- gather, for everything else: `conv2d_gather`.

The main loop goes over blocks of channels, and over the taps of each: a step is divided by the number of taps alone,
which is a constant, and so multiplied.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.geometry import conv2d_output_size
from ldmq_kernels.kernels.triton.tile_choice import Problem


@dataclass(frozen=True)
class ConvShape:
    """The sizes of one convolution: x is (N, C, H, W) and the output (N, K, P, Q)."""

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
    ) -> ConvShape:
        """The sizes that these arguments of an op ask for.

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
    def m(self) -> int:
        """The rows of the GEMM: output pixels of all samples."""
        return self.samples * self.out_size[0] * self.out_size[1]

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """The output's shape (N, K, P, Q)."""
        return (self.samples, self.out_channels, *self.out_size)

    @property
    def group_channels(self) -> int:
        """The input channels of one group."""
        return self.channels // self.groups

    @property
    def group_out_channels(self) -> int:
        """The output channels of one group."""
        return self.out_channels // self.groups

    @property
    def fits_tma_tiles(self) -> bool:
        """Whether descriptors can express how the taps step over the input."""
        is_even = self.size[0] % 2 == 0 and self.size[1] % 2 == 0
        is_strided = self.stride == (2, 2) and is_even and self.upsample == 1
        return self.groups == 1 and (self.stride == (1, 1) or is_strided)

    def image_tile(self, pixels: int) -> tuple[int, int, int]:
        """Samples, rows and columns of an image tile of so many pixels, with the least waste at the output's edges."""
        return _image_tile(pixels, self._covered)

    def image_tiles(self, image_tile: tuple[int, int, int]) -> int:
        """How many image tiles cover the output."""
        return _tiles(self._covered, image_tile) * self.upsample**2

    @property
    def _covered(self) -> tuple[int, int, int]:
        """Samples, rows and columns that image tiles cover: the output's pixels of one parity."""
        height, width = self.out_size
        return self.samples, -(-height // self.upsample), -(-width // self.upsample)

    def tile_options(self, image_tile: tuple[int, int, int]) -> dict[str, int]:
        """The compile-time arguments of the tma_tiled kernels."""
        return {
            "S": self.kernel_size[1],
            "TAPS": self.kernel_size[0] * self.kernel_size[1],
            "DILATION_H": self.dilation[0],
            "DILATION_W": self.dilation[1],
            "STRIDE": self.stride[0],
            "UPSAMPLE": self.upsample,
            "BLOCK_H": image_tile[1],
            "BLOCK_W": image_tile[2],
        }

    def tile_sizes(self) -> tuple[int, ...]:
        """The sizes that the tma_tiled kernels take, from `samples` to `left`."""
        return (self.samples, *self.out_size, self.channels, self.out_channels, self.padding[0], self.padding[2])

    def image_descriptor(self, x: Tensor, image_tile: tuple[int, int, int], block_k: int) -> TensorDescriptor:
        """A descriptor that loads an image tile of `block_k` channels from x (N, C, H, W), channels_last."""
        (height, width), channels = self.size, self.channels
        if self.stride == (1, 1):
            shape = [self.samples, height, width, channels]
            strides = [height * width * channels, width * channels, channels, 1]
            return TensorDescriptor(x, shape, strides, [*image_tile, block_k])
        row = width * channels
        shape = [self.samples, height // 2, 2, width // 2, 2 * channels]
        strides = [height * row, 2 * row, row, 2 * channels, 1]
        return TensorDescriptor(x, shape, strides, [image_tile[0], image_tile[1], 1, image_tile[2], block_k])

    def weight_descriptor(self, weight: Tensor, block_n: int, block_k: int) -> TensorDescriptor:
        """A descriptor that loads (block_n, 1, block_k) from a weight (K, R, S, C)."""
        taps = weight.view(weight.shape[0], -1, weight.shape[-1])
        return TensorDescriptor(taps, list(taps.shape), list(taps.stride()), [block_n, 1, block_k])

    def flat_weight_descriptor(self, weight: Tensor, block_n: int, block_k: int) -> TensorDescriptor | None:
        """A descriptor that loads (block_n, block_k) from a weight (K, R * S * C), or None where that would be wrong.

        A block that goes beyond a tap's channels has the next tap's weights, where the image tile's channels are
        zero; with stride 2 they are another pixel's.
        """
        if self.stride != (1, 1) and self.channels % block_k:
            return None
        flat = weight.view(weight.shape[0], -1)
        return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [block_n, block_k])

    @property
    def problem(self) -> Problem:
        """The GEMM that the choice of a tile depends on."""
        k = self.kernel_size[0] * self.kernel_size[1] * self.group_channels
        return Problem(self.m, self.group_out_channels, k, self.groups)

    def output(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for the output (N, K, P, Q), channels_last."""
        return torch.empty(self.out_shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)

    def gather_sizes(self) -> tuple[int, ...]:
        """The sizes that the gather kernel takes, from `m` to `dilation_w`."""
        return (
            self.m,
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


def _tiles(covered: tuple[int, int, int], image_tile: tuple[int, int, int]) -> int:
    return -(-covered[0] // image_tile[0]) * -(-covered[1] // image_tile[1]) * -(-covered[2] // image_tile[2])


@functools.lru_cache(maxsize=4096)
def _image_tile(pixels: int, covered: tuple[int, int, int]) -> tuple[int, int, int]:
    shapes = [
        (pixels // (h * w), h, w) for h in (1, 2, 4, 8, 16, 32) for w in (4, 8, 16, 32, 64) if pixels % (h * w) == 0
    ]

    def waste(shape: tuple[int, int, int]) -> tuple[int, int]:
        return _tiles(covered, shape), shape[1] + shape[2]  # neighbours read the same edges: squares share most

    return min(shapes, key=waste)


@triton.jit
def image_tile_start(
    tile: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    UPSAMPLE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """First sample, row and column of an image tile, among the output's pixels of one parity, and that parity."""
    across = tl.cdiv(tl.cdiv(out_width, UPSAMPLE), BLOCK_W)
    down = tl.cdiv(tl.cdiv(out_height, UPSAMPLE), BLOCK_H)
    w = (tile % across) * BLOCK_W
    h = (tile // across) % down * BLOCK_H
    rest = tile // (across * down)
    parities: tl.constexpr = UPSAMPLE * UPSAMPLE
    return rest // parities * BLOCK_S, h, w, rest % parities


@triton.jit
def load_image_tile(
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
    """The (BLOCK_M, BLOCK_K) input values of an image tile under one tap, zero in the padding.

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
def pixels_of_tile(
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
    """Output row (int64), sample and mask of an image tile's pixels, (BLOCK_M,) each."""
    index = tl.arange(0, BLOCK_M)
    n = sample + index // (BLOCK_H * BLOCK_W)
    p = (h + index // BLOCK_W % BLOCK_H) * UPSAMPLE + parity // UPSAMPLE
    q = (w + index % BLOCK_W) * UPSAMPLE + parity % UPSAMPLE
    row = (n.to(tl.int64) * out_height + p) * out_width + q
    return row, n, (n < samples) & (p < out_height) & (q < out_width)
