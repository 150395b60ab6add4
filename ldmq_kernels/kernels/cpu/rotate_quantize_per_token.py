"""y = H (x * inv_smooth); the rotation as the definition has it, and this backend's quantization of each token."""

from __future__ import annotations

from torch import Tensor

from ldmq_kernels.kernels.cpu.quantize_per_token import quantize_per_token
from ldmq_kernels.kernels.geometry import check_channels
from ldmq_kernels.numerics.hadamard import rotate


def rotate_quantize_per_token(x: Tensor, inv_smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rotate the channels, and quantize each row with the scale of its own largest value."""
    check_channels(x.shape[-1], inv_smooth)
    y = x.float() if inv_smooth is None else x.float() * inv_smooth
    return quantize_per_token(rotate(y), None)
