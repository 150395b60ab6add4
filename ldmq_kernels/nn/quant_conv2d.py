"""A 2-D convolution that computes in the scheme that a plan gives it."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from ldmq_kernels import ops
from ldmq_kernels.nn.quantized import ACTIVATION_DTYPES, QuantizedLayer
from ldmq_kernels.nn.straight_through import is_differentiated, straight_through

GEOMETRY = ("stride", "padding", "dilation", "padding_mode", "_reversed_padding_repeated_twice")
CONVOLUTION = nn.Conv2d._conv_forward


def _pair(value: Any) -> tuple[int, int]:
    """(rows, columns) of an attribute that is an integer or a pair."""
    if isinstance(value, int):
        return (value, value)
    rows, columns = value
    return (rows, columns)


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """Drop-in for nn.Conv2d. Constructed directly it is an ordinary float layer; see `from_float`.

    Shape: (N, C, H, W) or (C, H, W) -> the same rank with K channels, in the input's dtype,
    channels_last in memory. A 1x1 convolution without stride and padding is computed as a linear,
    with a scale for each token where activations are dynamic; others take one for each sample.
    """

    kind = "conv2d"
    channel_axis = -3

    @staticmethod
    def to_channels_last(weight: Tensor) -> Tensor:
        """(K, C, R, S) to (K, R, S, C)."""
        return weight.permute(0, 2, 3, 1).contiguous()

    @staticmethod
    def from_channels_last(weight: Tensor) -> Tensor:
        """(K, R, S, C) to (K, C, R, S)."""
        return weight.permute(0, 3, 1, 2)

    @classmethod
    def structure_of(cls, module: Any) -> Self:
        """A float QuantConv2d on the meta device, shaped as `module`."""
        layer = cls(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            groups=module.groups,
            bias=module.bias is not None,
            device="meta",
            dtype=module.weight.dtype if module.weight.is_floating_point() else None,
        )
        for name in GEOMETRY:  # as they are now: they may have been set after construction
            setattr(layer, name, getattr(module, name))
        return layer

    @property
    def is_pointwise(self) -> bool:
        """Whether this is a linear over pixels."""
        return (
            self.kernel_size == (1, 1)
            and self.groups == 1
            and _pair(self.stride) == (1, 1)
            and (self.padding in ("same", "valid") or _pair(self.padding) == (0, 0))
        )

    @property
    def zero_padding(self) -> tuple[int, int, int, int]:
        """Zeros at (top, bottom, left, right) that the op adds itself; other modes pad the input first."""
        if self.padding_mode != "zeros" or self.padding == "valid":
            return (0, 0, 0, 0)
        if self.padding != "same":
            rows, columns = _pair(self.padding)
            return (rows, rows, columns, columns)
        total = [d * (size - 1) for d, size in zip(_pair(self.dilation), self.kernel_size, strict=True)]
        return (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)

    @property
    def weight_channels(self) -> int:
        """Input channels of one group."""
        return self.in_channels // self.groups

    @property
    def has_own_convolution(self) -> bool:
        """Whether someone has replaced `_conv_forward`, of this layer or of every nn.Conv2d."""
        return "_conv_forward" in self.__dict__ or nn.Conv2d._conv_forward is not CONVOLUTION

    def forward(self, input: Tensor) -> Tensor:
        """Quantize the input as the scheme says, convolve in integers, scale back.

        Where `_conv_forward` is replaced, as tiling does, that is called with the dequantized weight.
        """
        x = input  # which nn.Conv2d calls so, and some models pass by its name
        if not self.scheme.quantizes or self.has_own_convolution:
            return nn.Conv2d.forward(self, x)
        shape = x.shape
        if shape[-3] != self.in_channels or x.dtype not in ACTIVATION_DTYPES:
            self.refuse(x, self.in_channels)
        if len(shape) == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if self.padding_mode != "zeros":
            x = nn.functional.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return straight_through(self, x) if is_differentiated(self, x) else self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """The convolution by its integers, of an input (N, C, H, W) that is padded where padding is not of zeros."""
        if not self.scheme.quantizes_activations:
            product = getattr(ops, self.scheme.format.products["conv2d"])
            return product(x, self.plain_weight, *self.operands(), self.bias, *self.geometry())
        x_q, x_scale = self.quantize(x)
        low = self.convolve(self.low_part(x, x_q, 1), None, x.dtype, second=True) if self.scheme.is_split else None
        return self.convolve(x_q, x_scale, x.dtype, residual=low)

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """(N, K, P, Q) to (N, C, H, W)."""
        top, bottom, left, right = self.zero_padding
        size = (*shape[:2], shape[2] + top + bottom, shape[3] + left + right)
        geometry = _pair(self.stride), (0, 0), _pair(self.dilation), self.groups
        padded = conv2d_input(size, weight, gradient, *geometry)
        return padded[:, :, top : size[2] - bottom, left : size[3] - right]

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (N, C, H, W) as the scheme says: int8, and the scales of a dynamic one, (N, H, W) where pointwise."""
        activations = self.scheme.activations
        if activations.is_calibrated:
            return getattr(ops, activations.quantize_static)(x, self.input_inv_scale, 1), None
        if not self.is_pointwise:
            return getattr(ops, activations.quantize_per_sample)(x, self.smoothing)
        x_q, x_scale = getattr(ops, activations.quantize_per_token)(x.permute(0, 2, 3, 1), self.smoothing)
        return x_q.permute(0, 3, 1, 2), x_scale

    def geometry(self, padding: tuple[int, int, int, int] | None = None, upsample: int = 1) -> tuple[Any, ...]:
        """What the convolution ops take, from the kernel's size to the enlargement of the input."""
        padding = self.zero_padding if padding is None else padding
        return (self.kernel_size, _pair(self.stride), padding, _pair(self.dilation), self.groups, upsample)

    def convolve(
        self,
        x_q: Tensor,
        x_scale: Tensor | None,
        out_dtype: Any,
        sample_bias: Tensor | None = None,
        residual: Tensor | None = None,
        padding: tuple[int, int, int, int] | None = None,
        upsample: int = 1,
        second: bool = False,
    ) -> Tensor:
        """The integer convolution alone, of an input that is quantized already.

        Args:
            x_q: (N, C, H, W) int8.
            x_scale: (N,) float32, or (N, H, W) where the layer is pointwise; not needed by a static scheme.
            out_dtype: float16, bfloat16 or float32.
            sample_bias: (N, K) floating, added to every position in the epilogue; not where pointwise.
            residual: (N, K, P, Q) floating, added in the epilogue.
            padding: zeros at (top, bottom, left, right) in place of the layer's own.
            upsample: factor of nearest-neighbour enlargement of the input, 1 or 2.
            second: these are the second values of pairs: scaled down, and without the bias.
        """
        if self.is_pointwise:
            pixels = None if residual is None else residual.permute(0, 2, 3, 1)
            return self.linear(x_q.permute(0, 2, 3, 1), x_scale, out_dtype, pixels, second=second).permute(0, 3, 1, 2)
        scale, bias = self.scale_and_bias(x_scale, second)
        product = getattr(ops, self.scheme.format.products["conv2d"])
        operands = (self.kernel_weight(False), *self.operands(), bias, sample_bias, residual)
        return product(x_q, scale, *operands, *self.geometry(padding, upsample), out_dtype)

    def linear(
        self,
        x_q: Tensor,
        x_scale: Tensor | None,
        out_dtype: Any,
        residual: Tensor | None = None,
        *,
        second: bool = False,
    ) -> Tensor:
        """A pointwise layer's product over (..., C) int8, as QuantLinear.linear."""
        scale, bias = self.scale_and_bias(x_scale, second)
        operands = [operand.flatten(1) if operand.dim() > 1 else operand for operand in self.operands()]
        product = getattr(ops, self.scheme.format.products["linear"])
        return product(x_q, scale, self.kernel_weight(True), *operands, bias, residual, out_dtype)
