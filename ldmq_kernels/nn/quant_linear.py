"""A linear layer that computes in the scheme that a plan gives it."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn

from ldmq_kernels import ops
from ldmq_kernels.kernels.cpu.packing import pack_linear, unpack_linear
from ldmq_kernels.nn.quantized import QuantizedLayer
from ldmq_kernels.numerics.affine import divide_multiplier, fold_multiplier
from ldmq_kernels.numerics.packing import pack_int4, unpack_int4


class QuantLinear(QuantizedLayer, nn.Linear):
    """Drop-in for nn.Linear. Constructed directly it is an ordinary float layer; see `from_float`.

    Shape: (..., in_features) -> (..., out_features), in the input's dtype.
    """

    kind = "linear"

    @staticmethod
    def to_channels_last(weight: Tensor) -> Tensor:
        """(N, K), as it is."""
        return weight

    @classmethod
    def structure_of(cls, module: Any) -> Self:
        """A float QuantLinear on the meta device, shaped as `module`."""
        return cls(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            device="meta",
            dtype=module.weight.dtype if module.weight.is_floating_point() else None,
        )

    def _pack(self, weight: Tensor) -> Tensor:
        if self.multiplier is not None:
            weight = fold_multiplier(unpack_int4(weight, self.in_features), self.multiplier)
        return pack_linear(weight)

    def _unpack(self, packed: Tensor) -> Tensor:
        weight = unpack_linear(packed)
        return weight if self.multiplier is None else pack_int4(divide_multiplier(weight, self.multiplier))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize the input as the scheme says, multiply in integers, scale back."""
        scheme = self.scheme
        if not scheme.quantizes:
            return nn.Linear.forward(self, x)
        if scheme.format.activation_bits == 16:
            if scheme.format.weight_bits == 8:
                return ops.linear_w8a16(x, self.weight, self.weight_scale, self.bias)
            return ops.linear_w4a16(x, self.weight, self.group_scale, self.bias)
        if scheme.is_static:
            x_q, x_scale = ops.quantize_static(x, self.input_reciprocal, -1), self.input_scale
        else:
            x_q, x_scale = ops.quantize_per_token(x, self.smoothing)
        return self.linear(x_q, x_scale, x.dtype)

    def linear(self, x_q: Tensor, x_scale: Tensor, out_dtype: Any) -> Tensor:
        """The integer product alone, of an input that is quantized already."""
        if self.multiplier is None:
            return ops.linear_w8a8(x_q, x_scale, self.kernel_weight, self.weight_scale, self.bias, None, out_dtype)
        return ops.linear_w4a8(
            x_q, x_scale, self.kernel_weight, self.multiplier, self.weight_scale, self.bias, None, out_dtype
        )
