"""y = H (x * inv_smooth); scale = max(absmax(y), floor) / 127 for each token; q = clamp(rint(y * (1 / scale)))."""

from __future__ import annotations

from torch import Tensor

from ldmq_kernels.kernels.cpu.quantize_per_token import quantize_per_token
from ldmq_kernels.kernels.cpu.rotated import rotated
from ldmq_kernels.kernels.geometry import check_channels


def rotate_quantize_per_token(x: Tensor, inv_smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rotate the channels, and quantize each row with the scale of its own largest value."""
    check_channels(x.shape[-1], inv_smooth)
    return quantize_per_token(rotated(x, inv_smooth), None)
