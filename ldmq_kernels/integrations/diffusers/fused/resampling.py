"""Upsampling and downsampling with their enlargement or padding inside the convolution."""

from __future__ import annotations

from typing import Any

from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor

from ldmq_kernels.integrations.diffusers.fused.eligibility import takes_quantized, wants_gradients

FAR_SIDES = (0, 1, 0, 1)  # diffusers pads one row and one column after the last


class FusedUpsample2D(Upsample2D):
    """Upsample2D that quantizes the small input and never makes the enlarged one."""

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Take and return what the forward of Upsample2D does."""
        conv: Any = getattr(self, "conv" if self.name == "conv" else "Conv2d_0", None)
        is_plain = self.use_conv and self.interpolate and not self.use_conv_transpose and self.norm is None
        is_double = output_size is None or tuple(output_size) == tuple(2 * side for side in hidden_states.shape[2:])
        is_fusible = is_plain and is_double and _convolves(conv) and not wants_gradients(self, hidden_states)
        if args or kwargs or not is_fusible:
            return super().forward(hidden_states, output_size, *args, **kwargs)
        return conv.convolve(*conv.quantize(hidden_states), hidden_states.dtype, upsample=2)


class FusedDownsample2D(Downsample2D):
    """Downsample2D that pads inside the convolution."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Take and return what the forward of Downsample2D does."""
        pads = self.use_conv and self.padding == 0 and self.norm is None
        is_fusible = pads and _convolves(self.conv) and not any(self.conv.zero_padding)
        if args or kwargs or not is_fusible or wants_gradients(self, hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        return self.conv.convolve(*self.conv.quantize(hidden_states), hidden_states.dtype, padding=FAR_SIDES)


def _convolves(conv: Any) -> bool:
    return takes_quantized(conv) and not conv.is_pointwise and conv.padding_mode == "zeros"
