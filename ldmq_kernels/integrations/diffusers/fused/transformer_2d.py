"""The frame of the transformer blocks: [GroupNorm + quantize], projection in; projection out + skip."""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from ldmq_kernels.integrations.diffusers.fused.eligibility import (
    is_unwrapped,
    quantized_norm,
    takes_quantized,
    wants_gradients,
)
from ldmq_kernels.nn import QuantConv2d, QuantLinear


def _is_product(layer: Any) -> bool:
    """Whether a layer is a linear over pixels on int8 activations."""
    return takes_quantized(layer) and (isinstance(layer, QuantLinear) or layer.is_pointwise)


class FusedTransformer2DModel(Transformer2DModel):
    """Transformer2DModel whose projections take their input from a fused norm and add the skip in their epilogue."""

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        is_fusible = _is_product(self.proj_in) and is_unwrapped(self.norm, nn.GroupNorm)
        if not is_fusible or wants_gradients(self.proj_in, hidden_states, self.norm.weight, self.norm.bias):
            return super()._operate_on_continuous_inputs(hidden_states)
        x_q, scale = quantized_norm(self.norm, hidden_states, self.proj_in, silu=False, per_token=True)
        batch = hidden_states.shape[0]
        if not self.proj_in.scheme.is_static:
            scale = scale.flatten(1)
        tokens = x_q.permute(0, 2, 3, 1).reshape(batch, -1, x_q.shape[1])
        out = self.proj_in.linear(tokens, scale, hidden_states.dtype)
        return out, out.shape[-1]

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        layer = self.proj_out
        if not _is_product(layer) or wants_gradients(layer, hidden_states, residual):
            return super()._get_output_for_continuous_inputs(
                hidden_states=hidden_states,
                residual=residual,
                batch_size=batch_size,
                height=height,
                width=width,
                inner_dim=inner_dim,
            )
        pixels = residual.permute(0, 2, 3, 1)
        tokens = hidden_states.reshape(batch_size, height, width, inner_dim)
        if isinstance(layer, QuantConv2d):
            return layer.convolve(*layer.quantize(tokens.permute(0, 3, 1, 2)), tokens.dtype, residual=residual)
        return layer.project(tokens, pixels).permute(0, 3, 1, 2)
