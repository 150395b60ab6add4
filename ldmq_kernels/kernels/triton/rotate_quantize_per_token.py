"""y = H (x * inv_smooth), in registers; then as `quantize_per_token`, in the same launches."""

from __future__ import annotations

from torch import Tensor

from ldmq_kernels.kernels.triton.quantize_per_token import quantize_rows
from ldmq_kernels.numerics.hadamard import block_size


def rotate_quantize_per_token(x: Tensor, inv_smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rotate the channels, and quantize each row with the scale of its own largest value.

    Raises:
        Unsupported: x is not float16, bfloat16 or float32, or K is above 16384.
    """
    return quantize_rows(x, inv_smooth, block_size(x.shape[-1]))
