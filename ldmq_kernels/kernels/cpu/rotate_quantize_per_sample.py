"""y = H (x * inv_smooth); scale = max(absmax(y), floor) / 127 for each sample; q = clamp(rint(y * (1 / scale)))."""

from __future__ import annotations

from torch import Tensor

from ldmq_kernels.kernels.cpu.quantize_per_sample import quantize_per_sample
from ldmq_kernels.kernels.cpu.rotated import rotated
from ldmq_kernels.kernels.geometry import check_channels


def rotate_quantize_per_sample(x: Tensor, inv_smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rotate the channels, and quantize each picture of a batch with the scale of its own largest value."""
    check_channels(x.shape[1], inv_smooth)
    turned = rotated(x.permute(0, 2, 3, 1), inv_smooth)
    return quantize_per_sample(turned.permute(0, 3, 1, 2), None)
