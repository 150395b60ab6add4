"""y = H (x * inv_smooth), in registers; then as `quantize_per_sample`, in the same launches."""

from __future__ import annotations

from torch import Tensor

from ldmq_kernels.kernels.triton.quantize_per_sample import quantize_pictures
from ldmq_kernels.numerics.hadamard import block_size


def rotate_quantize_per_sample(x: Tensor, inv_smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rotate the channels, and quantize each picture of a batch with the scale of its own largest value.

    Raises:
        Unsupported: x is not float16, bfloat16 or float32.
    """
    return quantize_pictures(x, inv_smooth, block_size(x.shape[1]))
