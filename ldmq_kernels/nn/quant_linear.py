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
        return self.project(x)

    def project(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same, and a residual (..., out_features) added: in the epilogue where activations are quantized."""
        scheme = self.scheme
        if scheme.format.activation_bits == 16:
            out = self._project_float(x)
            return out if residual is None else out + residual
        if not scheme.is_static:
            x_q, x_scale = ops.quantize_per_token(x, self.smoothing)
            return self.linear(x_q, x_scale, x.dtype, residual)
        if self.multiplier is not None:
            return self.linear(ops.quantize_static(x, self.input_reciprocal, -1), None, x.dtype, residual)
        return ops.linear_static_w8a8(
            x, self.input_reciprocal, self.input_scale, self.kernel_weight, self.weight_scale, self.bias, residual
        )

    def _project_float(self, x: Tensor) -> Tensor:
        if not self.scheme.quantizes:
            return nn.Linear.forward(self, x)
        if self.scheme.format.weight_bits == 8:
            return ops.linear_w8a16(x, self.weight, self.weight_scale, self.bias)
        return ops.linear_w4a16(x, self.weight, self.group_scale, self.bias)

    def linear(self, x_q: Tensor, x_scale: Tensor | None, out_dtype: Any, residual: Tensor | None = None) -> Tensor:
        """The integer product alone, of an input that is quantized already.

        Args:
            x_q: (..., in_features) int8.
            x_scale: (...) float32; not needed by a static scheme.
            out_dtype: float16, bfloat16 or float32.
            residual: (..., out_features) floating, added in the epilogue.
        """
        scale = self.input_scale if self.scheme.is_static else x_scale
        rest = (self.weight_scale, self.bias, residual, out_dtype)
        if self.multiplier is None:
            return ops.linear_w8a8(x_q, scale, self.kernel_weight, *rest)
        return ops.linear_w4a8(x_q, scale, self.kernel_weight, self.multiplier, *rest)
