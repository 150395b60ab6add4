"""Residual block: [GroupNorm + SiLU + quantize], convolution + time embedding, the same again, convolution + skip."""

from __future__ import annotations

from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ldmq_kernels import ops
from ldmq_kernels.integrations.diffusers.fused.bare import is_bare, is_inactive, quantized_norm, takes_int8
from ldmq_kernels.nn import QuantConv2d


class FusedResnetBlock2D(ResnetBlock2D):
    """ResnetBlock2D whose quantized convolutions take their input from a fused norm and add in their epilogue."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """As ResnetBlock2D's."""
        if args or kwargs or not self._is_fusible():
            return super().forward(input_tensor, temb, *args, **kwargs)
        vector = None if self.time_emb_proj is None or temb is None else self._embed(temb)
        hidden = self._convolve(self.norm1, self.conv1, input_tensor, vector, None)
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return self._convolve(self.norm2, self.conv2, hidden, None, shortcut)

    def _is_fusible(self) -> bool:
        plain = self.upsample is None and self.downsample is None and self.time_embedding_norm == "default"
        return (
            plain
            and self.output_scale_factor == 1
            and is_bare(self.nonlinearity, nn.SiLU)
            and is_inactive(self.dropout)
            and (takes_int8(self.conv1) or takes_int8(self.conv2))
        )

    def _embed(self, temb: Tensor) -> Tensor:
        """The time embedding's share of each channel, (N, K)."""
        projection = self.time_emb_proj
        if self.skip_time_act:
            return projection(temb)
        if not takes_int8(projection):
            return projection(self.nonlinearity(temb))
        x_q, scale = ops.silu_quantize(temb, projection.input_reciprocal, projection.smoothing)
        return projection.linear(x_q, scale, temb.dtype)

    def _convolve(
        self, norm: nn.Module, conv: nn.Module, x: Tensor, vector: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """conv(silu(norm(x))) + vector + residual, fused as far as its parts allow."""
        if isinstance(conv, QuantConv2d) and takes_int8(conv) and _has_room(conv) and is_bare(norm, nn.GroupNorm):
            x_q, scale = quantized_norm(norm, x, conv, silu=True, per_token=False)  # type: ignore[arg-type]
            return conv.convolve(x_q, scale, x.dtype, vector, residual)
        out = conv(self.nonlinearity(norm(x)))
        if vector is not None:
            out = out + vector[:, :, None, None]
        return out if residual is None else out + residual


def _has_room(conv: QuantConv2d) -> bool:
    """Whether the epilogue can add a time embedding, and the norm's output needs no padding of another mode."""
    return not conv.is_pointwise and conv.padding_mode == "zeros"
