"""A linear layer that computes in the scheme that a plan gives it."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from ldmq_kernels import ops
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.nn.packed import PLAIN
from ldmq_kernels.nn.quantized import ACTIVATION_DTYPES, FIRST_TOKEN, QuantizedLayer
from ldmq_kernels.nn.straight_through import is_differentiated, straight_through
from ldmq_kernels.numerics.hadamard import block_size, rotate


class QuantLinear(QuantizedLayer, nn.Linear):
    """Drop-in for nn.Linear. Constructed directly it is an ordinary float layer; see `from_float`.

    Shape: (..., in_features) -> (..., out_features), in the input's dtype.
    """

    kind = "linear"
    geglu_op: str | None = None  # the op with GEGLU in the product's epilogue, where it is faster than two ops

    @staticmethod
    def to_channels_last(weight: Tensor) -> Tensor:
        """(N, K), as it is."""
        return weight

    @staticmethod
    def from_channels_last(weight: Tensor) -> Tensor:
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

    @property
    def weight_channels(self) -> int:
        """in_features."""
        return self.in_features

    @property
    def is_pointwise(self) -> bool:
        """True."""
        return True

    def finish(self) -> None:
        """As for every layer; whether GEGLU can be in the epilogue is asked here, and not in each call."""
        super().finish()
        op, packed = self.scheme.format.geglu_linear, self.packed_weight
        held = self._buffers.get(PLAIN) if packed is None else packed
        self.geglu_op = op if op is not None and held is not None and dispatch.is_served(op, held.device) else None

    def forward(self, input: Tensor) -> Tensor:
        """Quantize the input as the scheme says, multiply in integers, scale back."""
        if self.scheme.quantizes and is_differentiated(self, input):
            return straight_through(self, input)
        return self.project(input)

    def compute(self, x: Tensor) -> Tensor:
        """`project`."""
        return self.project(x)

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """(..., out_features) to (..., in_features)."""
        return gradient @ weight

    def project(self, x: Tensor, residual: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        """The same times a gate, and a residual added: in the epilogue where activations are quantized.

        Args:
            x: (..., in_features) floating.
            residual: (..., out_features) floating.
            gate: (G, ..., out_features) floating, that broadcasts to the output.
        """
        if not self.scheme.quantizes_activations:
            return _gated(self._project_float(x), residual, gate)
        out = self._project_quantized(x, residual, gate)
        if self.first_token:
            first = self._project_first_token(x)
            out[:, :1] = _gated(first, *(None if term is None else term[:, :1] for term in (residual, gate)))
        return out

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (..., in_features) as the scheme says: its quantized values, and the scales (...) of a dynamic one."""
        if x.shape[-1] != self.in_features or x.dtype not in ACTIVATION_DTYPES:
            self.refuse(x, self.in_features)
        activations = self.scheme.activations
        if activations.is_calibrated:
            return getattr(ops, activations.quantize_static)(x, self.input_inv_scale, -1, *activations.op_dtype), None
        return getattr(ops, activations.quantize_per_token)(x, self.smoothing, *activations.op_dtype)

    def _project_quantized(self, x: Tensor, residual: Tensor | None, gate: Tensor | None) -> Tensor:
        scheme = self.scheme
        if scheme.is_split:
            x_q, _ = self.quantize(x)
            residual = self.linear(self.low_part(x, x_q, -1), None, x.dtype, residual, second=True, gate=gate)
            return self.linear(x_q, None, x.dtype, residual, gate=gate)
        if scheme.is_static and scheme.format.fused_linear is not None:
            if x.shape[-1] != self.in_features or x.dtype not in ACTIVATION_DTYPES:
                self.refuse(x, self.in_features)
            product = getattr(ops, scheme.format.fused_linear)
            weight, operands = self.kernel_weight(True), self.operands()
            gated = () if gate is None else (gate,)
            return product(x, self.input_inv_scale, self.call_scale, weight, *operands, self.bias, residual, *gated)
        x_q, x_scale = self.quantize(x)
        return self.linear(x_q, x_scale, x.dtype, residual, gate=gate)

    def _project_first_token(self, x: Tensor) -> Tensor:
        """(B, 1, out_features) from the first token's 16-bit values and the same weight."""
        if x.dim() != 3:
            raise ValueError(f"a layer with first_token takes an input (B, T, C), this one has shape {tuple(x.shape)}")
        first = x[:, :1] if self.smoothing is None else (x[:, :1] * self.smoothing).to(x.dtype)
        if self.scheme.is_rotated:  # divided by what `first_token_scale` has: sums of 16-bit values could overflow
            first = (rotate(first.float()) / block_size(self.in_features)).to(x.dtype)
        plain = self._buffers.get(FIRST_TOKEN)
        weight = self.plain_weight if plain is None else plain
        product = getattr(ops, str(self.scheme.format.first_token_op))
        return product(first, weight, self.first_token_scale, self.bias)

    def _project_float(self, x: Tensor) -> Tensor:
        if not self.scheme.quantizes:
            return nn.Linear.forward(self, x)
        if x.shape[-1] != self.in_features or x.dtype not in ACTIVATION_DTYPES:
            self.refuse(x, self.in_features)
        product = getattr(ops, self.scheme.format.products["linear"])
        return product(x, self.plain_weight, *self.operands(), self.bias)

    def linear(
        self,
        x_q: Tensor,
        x_scale: Tensor | None,
        out_dtype: Any,
        residual: Tensor | None = None,
        *,
        second: bool = False,
        gate: Tensor | None = None,
    ) -> Tensor:
        """The integer product alone, of an input that is quantized already.

        Args:
            x_q: (..., in_features) int8.
            x_scale: (...) float32; not needed by a static scheme.
            out_dtype: float16, bfloat16 or float32.
            residual: (..., out_features) floating, added in the epilogue.
            gate: (G, ..., out_features) floating, that the product with its bias is multiplied by, in the epilogue.
            second: these are the second values of pairs: scaled down, and without the bias.
        """
        scale, bias = self.scale_and_bias(x_scale, second)
        product = getattr(ops, self.scheme.format.products["linear"])
        gated = () if gate is None else (gate,)
        return product(x_q, scale, self.kernel_weight(True), *self.operands(), bias, residual, out_dtype, *gated)

    def geglu(self, x_q: Tensor, x_scale: Tensor | None, out_dtype: Any, out_inv_scale: Tensor | None = None) -> Tensor:
        """The integer product of an input that is quantized already, and GEGLU of it, by `geglu_op`.

        Args:
            x_q: (..., in_features) 8 bit.
            x_scale: (...) float32; not needed by a static scheme.
            out_dtype: int8 or float8_e4m3fn with an `out_inv_scale`, else float16, bfloat16 or float32.
            out_inv_scale: (1,) or (out_features / 2,) float32, what the result is multiplied with to be rounded.

        Returns:
            (..., out_features / 2): the first half of the outputs, times GELU of the second.
        """
        scale, bias = self.scale_and_bias(x_scale, False)
        product = getattr(ops, str(self.geglu_op))
        return product(x_q, scale, self.kernel_weight(True), *self.operands(), bias, out_inv_scale, out_dtype)


def _gated(out: Tensor, residual: Tensor | None, gate: Tensor | None) -> Tensor:
    """out * gate + residual, as far as there are such."""
    out = out if gate is None else (out * gate).to(out.dtype)
    return out if residual is None else out + residual
