"""scale = max(absmax(y), floor) / 127 for each token; q = clamp(rint(y * (1 / scale)), -127, 127)."""

from __future__ import annotations

from torch import Tensor

from ldmq_kernels.kernels.geometry import check_channels
from ldmq_kernels.kernels.reference.quantize_static import round_to_int8

ABSMAX_FLOOR = 1e-12  # of a token that is all zero, so that its scale is positive


def dynamic_scale(absmax: Tensor) -> Tensor:
    """The scale for values up to `absmax`, float32."""
    return absmax.clamp_min(ABSMAX_FLOOR) / absmax.new_tensor(127)  # a GPU multiplies by 1 / 127 for a plain 127


def quantize_per_token(x: Tensor, inv_smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantize each row with the scale of its own largest value."""
    check_channels(x.shape[-1], inv_smooth)
    y = x.contiguous().float()
    if inv_smooth is not None:
        y = y * inv_smooth
    scale = dynamic_scale(y.abs().amax(-1)) if y.numel() else y.new_empty(y.shape[:-1])
    return round_to_int8(y * (1 / scale).unsqueeze(-1)), scale
