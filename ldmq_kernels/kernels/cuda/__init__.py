"""Calls into the compiled CUDA extension (csrc/), where the package was built with it."""

from __future__ import annotations

import torch

from ldmq_kernels.kernels.cuda.extension import lowest_capability
from ldmq_kernels.kernels.cuda.quantize_per_sample import quantize_per_sample
from ldmq_kernels.kernels.cuda.quantize_per_token import quantize_per_token
from ldmq_kernels.kernels.cuda.quantize_static import quantize_static

__all__ = ["quantize_per_sample", "quantize_per_token", "quantize_static", "serves"]


def serves(device: torch.device) -> bool:
    """A CUDA device that the extension holds code for; False where it was not built."""
    lowest = lowest_capability()
    return lowest is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) >= lowest
