"""Arguments for one call of every op, small and odd in every size, for `ldmq doctor`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldmq_kernels.numerics import affine
from ldmq_kernels.numerics.packing import pack_int4

TOKENS, CHANNELS, OUT = 17, 68, 37
GROUPS, EPS = 4, 1e-5
KERNEL, GEOMETRY = (3, 3), ((1, 1), (1, 1, 1, 1), (1, 1), 1, 1)


class Cases:
    """Random operands from one seed, made on the CPU so that every device gets the same."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
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
        weight, scale = affine.quantize_weight_int8(self._normal(*shape))
        return weight.to(self.device), scale.to(self.device)

    def _grouped_weight(self, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
        grouped = affine.quantize_weight_w4a8(self._normal(*shape))
        found = (pack_int4(grouped.integers), grouped.multiplier, grouped.scale)
        return tuple(tensor.to(self.device) for tensor in found)  # type: ignore[return-value]

    def _quantized_tokens(self) -> tuple[Tensor, Tensor]:
        return self._int8(TOKENS, CHANNELS).to(self.device), self._positive(TOKENS)

    def _quantized_image(self) -> tuple[Tensor, Tensor]:
        return self._image(self._int8(2, CHANNELS, 9, 7)), self._positive(2)

    def quantize_static(self) -> tuple[Any, ...]:
        """Tokens, with one reciprocal for each channel."""
        return self._float(TOKENS, CHANNELS), 1 / self._positive(CHANNELS), -1

    def quantize_per_token(self) -> tuple[Any, ...]:
        """Tokens, smoothed."""
        return self._float(TOKENS, CHANNELS), self._positive(CHANNELS)

    def quantize_per_sample(self) -> tuple[Any, ...]:
        """A feature map of odd height and width."""
        return self._image(self._float(2, CHANNELS, 9, 7)), None

    def _norm(self) -> tuple[Tensor, Tensor]:
        return self._float(CHANNELS), self._float(CHANNELS)

    def group_norm_silu_quantize(self) -> tuple[Any, ...]:
        """A feature map of odd height and width, calibrated and smoothed."""
        x, reciprocal = self._image(self._float(2, CHANNELS, 9, 7)), 1 / self._positive(CHANNELS)
        return x, *self._norm(), GROUPS, EPS, True, reciprocal, None, False

    def layer_norm_quantize(self) -> tuple[Any, ...]:
        """Tokens, calibrated and smoothed."""
        return self._float(TOKENS, CHANNELS), *self._norm(), EPS, 1 / self._positive(CHANNELS), None

    def geglu_quantize(self) -> tuple[Any, ...]:
        """Tokens, calibrated."""
        return self._float(TOKENS, 2 * CHANNELS), 1 / self._positive(1), None

    def silu_quantize(self) -> tuple[Any, ...]:
        """Tokens, calibrated."""
        return self._float(TOKENS, CHANNELS), 1 / self._positive(1), None

    def linear_static_w8a8(self) -> tuple[Any, ...]:
        """A smoothed input, bias and residual."""
        scales = 1 / self._positive(CHANNELS), self._positive(1)
        added = self._float(OUT), self._float(TOKENS, OUT)
        return self._float(TOKENS, CHANNELS), *scales, *self._int8_weight(OUT, CHANNELS), *added

    def linear_w8a8(self) -> tuple[Any, ...]:
        """Dynamic scales, bias and residual."""
        weight = self._int8_weight(OUT, CHANNELS)
        return *self._quantized_tokens(), *weight, self._float(OUT), self._float(TOKENS, OUT), self.dtype

    def linear_w4a8(self) -> tuple[Any, ...]:
        """A last group that is short."""
        return *self._quantized_tokens(), *self._grouped_weight(OUT, CHANNELS), self._float(OUT), None, self.dtype

    def linear_w8a16(self) -> tuple[Any, ...]:
        """Float tokens."""
        return self._float(TOKENS, CHANNELS), *self._int8_weight(OUT, CHANNELS), self._float(OUT)

    def linear_w4a16(self) -> tuple[Any, ...]:
        """A last group that is short."""
        integers, scale = affine.quantize_weight_w4a16(self._normal(OUT, CHANNELS))
        weight = pack_int4(integers).to(self.device)
        return self._float(TOKENS, CHANNELS), weight, scale.to(self.device), self._float(OUT)

    def conv2d_w8a8(self) -> tuple[Any, ...]:
        """3x3 with padding, a time embedding and a residual."""
        weight = self._int8_weight(OUT, *KERNEL, CHANNELS)
        added = (self._float(OUT), self._float(2, OUT), self._image(self._float(2, OUT, 9, 7)))
        return *self._quantized_image(), *weight, *added, KERNEL, *GEOMETRY, self.dtype

    def conv2d_w4a8(self) -> tuple[Any, ...]:
        """3x3 with padding."""
        weight = self._grouped_weight(OUT, *KERNEL, CHANNELS)
        return *self._quantized_image(), *weight, self._float(OUT), None, None, KERNEL, *GEOMETRY, self.dtype

    def conv2d_w8a16(self) -> tuple[Any, ...]:
        """3x3 with padding."""
        weight = self._int8_weight(OUT, *KERNEL, CHANNELS)
        return self._image(self._float(2, CHANNELS, 9, 7)), *weight, self._float(OUT), KERNEL, *GEOMETRY

    def of(self, op: str) -> tuple[Any, ...]:
        """Arguments of an op by its name."""
        case: Callable[[], tuple[Any, ...]] = getattr(self, op)
        return case()
