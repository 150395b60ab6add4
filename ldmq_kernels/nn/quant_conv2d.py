"""A 2-D convolution that computes in the scheme that a plan gives it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ldmq_kernels import ops
from ldmq_kernels.nn.convolution import QuantConvolution
from ldmq_kernels.nn.quantized import ACTIVATION_DTYPES
from ldmq_kernels.nn.straight_through import is_differentiated, straight_through


def _pair(value: Any) -> tuple[int, int]:
    """(rows, columns) of an attribute that is an integer or a pair."""
    if isinstance(value, int):
        return (value, value)
    rows, columns = value
    return (rows, columns)


class QuantConv2d(QuantConvolution, nn.Conv2d):
    """Drop-in for nn.Conv2d. Constructed directly it is an ordinary float layer; see `from_float`.

    Shape: (N, C, H, W) or (C, H, W) -> the same rank with K channels, in the input's dtype,
    channels_last in memory. A 1x1 convolution without stride and padding is computed as a linear,
    with a scale for each token where activations are dynamic; others take one for each sample.
    """

    kind = "conv2d"
    channel_axis = -3
    float_kind = nn.Conv2d

    @staticmethod
    def to_channels_last(weight: Tensor) -> Tensor:
        """(K, C, R, S) to (K, R, S, C)."""
        return weight.permute(0, 2, 3, 1).contiguous()

    @staticmethod
    def from_channels_last(weight: Tensor) -> Tensor:
        """(K, R, S, C) to (K, C, R, S)."""
        return weight.permute(0, 3, 1, 2)

    @property
    def taps(self) -> tuple[int, ...]:
        """(R, S)."""
        return self.kernel_size

    @property
    def zero_padding(self) -> tuple[int, int, int, int]:
        """Zeros at (top, bottom, left, right) that the op adds itself; other modes pad the input first."""
        (top, bottom), (left, right) = self.zeros
        return (top, bottom, left, right)

    def forward(self, input: Tensor) -> Tensor:
        """Quantize the input as the scheme says, convolve in integers, scale back.

        Where `_conv_forward` is replaced, as tiling does, that is called with the dequantized weight.
        """
        x = input  # which nn.Conv2d calls so, and some models pass by its name
        if not self.scheme.quantizes or self.has_own_convolution:
            return nn.Conv2d.forward(self, x)
        shape = x.shape
        if not 3 <= len(shape) <= 4 or shape[-3] != self.in_channels or x.dtype not in ACTIVATION_DTYPES:
            self.refuse(x, self.in_channels)
        if len(shape) == 3:
            return QuantConv2d.forward(self, x.unsqueeze(0)).squeeze(0)
        x = self.padded(x)
        return straight_through(self, x) if is_differentiated(self, x) else self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """The convolution by its integers, of an input (N, C, H, W) that is padded where padding is not of zeros."""
        if not self.scheme.quantizes_activations:
            product = getattr(ops, self.scheme.format.products["conv2d"])
            return product(x, self.plain_weight, *self.operands(), self.bias, *self.geometry())
        x_q, x_scale = self.quantize(x)
        low = self.convolve(self.low_part(x, x_q, 1), None, x.dtype, second=True) if self.scheme.is_split else None
        return self.convolve(x_q, x_scale, x.dtype, residual=low)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (N, C, H, W) as the scheme says: int8, and the scales of a dynamic one, (N, H, W) where pointwise."""
        activations = self.scheme.activations
        if activations.is_calibrated:
            return getattr(ops, activations.quantize_static)(x, self.input_inv_scale, 1, *activations.op_dtype), None
        if not self.is_pointwise:
            return getattr(ops, activations.quantize_per_sample)(x, self.smoothing, *activations.op_dtype)
        x_q, x_scale = getattr(ops, activations.quantize_per_token)(
            x.permute(0, 2, 3, 1), self.smoothing, *activations.op_dtype
        )
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
