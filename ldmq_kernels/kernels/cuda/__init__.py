"""Calls into the compiled CUDA extension (csrc/), where the package was built with it."""

from __future__ import annotations

import torch

from ldmq_kernels.kernels.cuda.conv2d_w8a8 import conv2d_w8a8
from ldmq_kernels.kernels.cuda.extension import runs_on
from ldmq_kernels.kernels.cuda.geglu_quantize import geglu_quantize
from ldmq_kernels.kernels.cuda.group_norm_silu_quantize import group_norm_silu_quantize
from ldmq_kernels.kernels.cuda.linear_static_w8a8 import linear_static_w8a8
from ldmq_kernels.kernels.cuda.linear_w4a8 import linear_w4a8
from ldmq_kernels.kernels.cuda.linear_w8a8 import linear_w8a8
from ldmq_kernels.kernels.cuda.quantize_per_sample import quantize_per_sample
from ldmq_kernels.kernels.cuda.quantize_per_token import quantize_per_token
from ldmq_kernels.kernels.cuda.quantize_static import quantize_static

__all__ = [
    "conv2d_w8a8",
    "geglu_quantize",
    "group_norm_silu_quantize",
    "linear_static_w8a8",
    "linear_w4a8",
    "linear_w8a8",
    "quantize_per_sample",
    "quantize_per_token",
    "quantize_static",
    "serves",
]


def serves(device: torch.device) -> bool:
    """A CUDA device that the extension holds code for; False where it was not built."""
    return device.type == "cuda" and runs_on(torch.cuda.get_device_capability(device))
