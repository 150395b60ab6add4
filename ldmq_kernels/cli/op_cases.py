"""Arguments for a few calls of every op, odd in every size and in what they leave out, for `ldmq doctor`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldmq_kernels.numerics.formats.int4 import pack_int4
from ldmq_kernels.numerics.formats.int4_grouped import quantize_weight_w4a16
from ldmq_kernels.numerics.formats.int4_two_level import quantize_weight_w4a8
from ldmq_kernels.numerics.formats.int8 import quantize_weight_int8


@dataclass(frozen=True)
class Sizes:
    """The sizes of a case, of tokens for the ops on matrices and of pictures for the others.

    full: whether everything optional is there, and dynamic scales are each token's or sample's; otherwise nothing
        is, and where an op can measure its scale it does.
    """

    tokens: int
    channels: int
    out: int
    picture: tuple[int, int, int]
    full: bool = True
    kernel: int = 3
    stride: int = 1
    upsample: int = 1

    def __str__(self) -> str:
        return f"{self.tokens}x{self.channels} to {self.out}"

    @property
    def as_picture(self) -> str:
        """What a convolution takes and gives."""
        samples, height, width = self.picture
        turned = f"kernel {self.kernel}, stride {self.stride}, upsample {self.upsample}"
        return f"{samples}x{self.channels}x{height}x{width} to {self.out}, {turned}"

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Kernel size to upsampling, as convolutions take them."""
        around = (self.kernel // 2,) * 4
        return (self.kernel,) * 2, (self.stride,) * 2, around, (1, 1), 1, self.upsample

    @property
    def out_picture(self) -> tuple[int, int]:
        """Height and width of a convolution's output."""
        _, height, width = self.picture
        return (height * self.upsample - 1) // self.stride + 1, (width * self.upsample - 1) // self.stride + 1


SIZES = (
    Sizes(17, 68, 37, (2, 9, 7)),
    Sizes(63, 20, 4, (1, 5, 6), full=False, upsample=2),
    Sizes(1, 4, 320, (3, 7, 9), full=False, stride=2),
    Sizes(145, 352, 168, (2, 9, 7)),
    Sizes(63, 96, 40, (1, 5, 6), full=False, stride=2),
    Sizes(63, 320, 68, (1, 6, 5), full=False, kernel=1),
)
GROUPS, EPS = 4, 1e-5


class Cases:
    """Random operands from one seed, made on the CPU so that every device gets the same."""

    def __init__(self, device: torch.device, dtype: torch.dtype, sizes: Sizes = SIZES[0]) -> None:
        self.device, self.dtype, self.sizes = device, dtype, sizes
        self._random = torch.Generator().manual_seed(0)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random)

    def _int8(self, *shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, generator=self._random).to(torch.int8)

    def _float(self, *shape: int) -> Tensor:
        return self._normal(*shape).to(self.device, self.dtype)

    def _positive(self, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self._random) * 0.02 + 0.001).to(self.device)

    def _image(self, values: Tensor) -> Tensor:
        return values.to(self.device).contiguous(memory_format=torch.channels_last)

    def _int8_weight(self, *shape: int) -> tuple[Tensor, Tensor]:
        weight, scale = quantize_weight_int8(self._normal(*shape))
        return weight.to(self.device), scale.to(self.device)

    def _grouped_weight(self, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
        grouped = quantize_weight_w4a8(self._normal(*shape))
        found = (pack_int4(grouped.integers), grouped.multiplier, grouped.scale)
        return tuple(tensor.to(self.device) for tensor in found)  # type: ignore[return-value]

    def _tokens(self) -> Tensor:
        return self._float(self.sizes.tokens, self.sizes.channels)

    def _picture(self) -> Tensor:
        samples, height, width = self.sizes.picture
        return self._image(self._float(samples, self.sizes.channels, height, width))

    def _quantized_tokens(self) -> tuple[Tensor, Tensor]:
        count = self.sizes.tokens
        x_q = self._int8(count, self.sizes.channels).to(self.device)
        return x_q, self._positive(count if self.sizes.full else 1)

    def _quantized_picture(self) -> tuple[Tensor, Tensor]:
        samples, height, width = self.sizes.picture
        x_q = self._image(self._int8(samples, self.sizes.channels, height, width))
        return x_q, self._positive(samples if self.sizes.full else 1)

    def _linear_shape(self) -> tuple[int, int]:
        return self.sizes.out, self.sizes.channels

    def _taps(self) -> tuple[int, int, int, int]:
        return self.sizes.out, self.sizes.kernel, self.sizes.kernel, self.sizes.channels

    def _bias(self) -> Tensor | None:
        return self._float(self.sizes.out) if self.sizes.full else None

    def _residual(self) -> Tensor | None:
        return self._float(self.sizes.tokens, self.sizes.out) if self.sizes.full else None

    def _picture_added(self) -> tuple[Tensor | None, ...]:
        """Bias, a time embedding and a residual."""
        if not self.sizes.full:
            return None, None, None
        samples, out = self.sizes.picture[0], self.sizes.out
        residual = self._image(self._float(samples, out, *self.sizes.out_picture))
        return self._bias(), self._float(samples, out), residual

    def _output_scale(self) -> tuple[Tensor | None, Tensor | None]:
        """Calibrated with a smoothing; or measured, without one."""
        return (1 / self._positive(self.sizes.channels) if self.sizes.full else None), None

    def quantize_static(self) -> tuple[Any, ...]:
        """Tokens, with one reciprocal for each channel; or a picture, with one for all."""
        if self.sizes.full:
            return self._tokens(), 1 / self._positive(self.sizes.channels), -1
        return self._picture(), 1 / self._positive(1), 1

    def quantize_per_token(self) -> tuple[Any, ...]:
        """Tokens, smoothed or not."""
        return self._tokens(), self._positive(self.sizes.channels) if self.sizes.full else None

    def quantize_per_sample(self) -> tuple[Any, ...]:
        """A feature map, smoothed or not."""
        return self._picture(), None if self.sizes.full else self._positive(self.sizes.channels)

    def _norm(self) -> tuple[Tensor, Tensor]:
        return self._float(self.sizes.channels), self._float(self.sizes.channels)

    def group_norm_silu_quantize(self) -> tuple[Any, ...]:
        """A feature map; measured, its scale is each pixel's own where a linear would follow."""
        per_token = not self.sizes.full and self.sizes.kernel == 1
        return self._picture(), *self._norm(), GROUPS, EPS, not per_token, *self._output_scale(), per_token

    def layer_norm_quantize(self) -> tuple[Any, ...]:
        """Tokens."""
        return self._tokens(), *self._norm(), EPS, *self._output_scale()

    def geglu_quantize(self) -> tuple[Any, ...]:
        """Tokens, value and gate side by side."""
        return self._float(self.sizes.tokens, 2 * self.sizes.channels), *self._output_scale()

    def silu_quantize(self) -> tuple[Any, ...]:
        """Tokens."""
        return self._tokens(), *self._output_scale()

    def linear_static_w8a8(self) -> tuple[Any, ...]:
        """An input with a smoothing."""
        scales = 1 / self._positive(self.sizes.channels), self._positive(1)
        return self._tokens(), *scales, *self._int8_weight(*self._linear_shape()), self._bias(), self._residual()

    def linear_w8a8(self) -> tuple[Any, ...]:
        """Int8 tokens."""
        weight = self._int8_weight(*self._linear_shape())
        return *self._quantized_tokens(), *weight, self._bias(), self._residual(), self.dtype

    def linear_w4a8(self) -> tuple[Any, ...]:
        """A last group that is short, or the only one."""
        weight = self._grouped_weight(*self._linear_shape())
        return *self._quantized_tokens(), *weight, self._bias(), self._residual(), self.dtype

    def linear_w8a16(self) -> tuple[Any, ...]:
        """Float tokens."""
        return self._tokens(), *self._int8_weight(*self._linear_shape()), self._bias()

    def linear_w4a16(self) -> tuple[Any, ...]:
        """A last group that is short, or the only one."""
        integers, scale = quantize_weight_w4a16(self._normal(*self._linear_shape()))
        return self._tokens(), pack_int4(integers).to(self.device), scale.to(self.device), self._bias()

    def conv2d_w8a8(self) -> tuple[Any, ...]:
        """An int8 feature map."""
        weight = self._int8_weight(*self._taps())
        return *self._quantized_picture(), *weight, *self._picture_added(), *self.sizes.geometry, self.dtype

    def conv2d_w4a8(self) -> tuple[Any, ...]:
        """An int8 feature map, by packed weights."""
        weight = self._grouped_weight(*self._taps())
        return *self._quantized_picture(), *weight, *self._picture_added(), *self.sizes.geometry, self.dtype

    def conv2d_w8a16(self) -> tuple[Any, ...]:
        """A float feature map."""
        return self._picture(), *self._int8_weight(*self._taps()), self._bias(), *self.sizes.geometry

    def of(self, op: str) -> tuple[Any, ...]:
        """Arguments of an op by its name."""
        case: Callable[[], tuple[Any, ...]] = getattr(self, op)
        return case()
