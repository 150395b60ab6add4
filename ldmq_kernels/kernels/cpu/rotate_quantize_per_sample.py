"""y = H (x * inv_smooth); the rotation as the definition has it, and this backend's quantization of each sample."""

from __future__ import annotations

from torch import Tensor

from ldmq_kernels.kernels.cpu.quantize_per_sample import quantize_per_sample
from ldmq_kernels.kernels.geometry import check_channels
from ldmq_kernels.numerics.hadamard import rotate


def rotate_quantize_per_sample(x: Tensor, inv_smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rotate the channels, and quantize each picture of a batch with the scale of its own largest value."""
    check_channels(x.shape[1], inv_smooth)
    pixels = x.permute(0, 2, 3, 1).float()
    rotated = rotate(pixels if inv_smooth is None else pixels * inv_smooth)
    return quantize_per_sample(rotated.permute(0, 3, 1, 2), None)
