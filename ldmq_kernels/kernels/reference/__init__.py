"""Plain torch: the definition of every op, right on any device and fast on none."""

from __future__ import annotations

import torch

from ldmq_kernels.kernels.reference.conv2d_w4a8 import conv2d_w4a8
from ldmq_kernels.kernels.reference.conv2d_w8a8 import conv2d_w8a8
from ldmq_kernels.kernels.reference.conv2d_w8a16 import conv2d_w8a16
from ldmq_kernels.kernels.reference.geglu_quantize import geglu_quantize
from ldmq_kernels.kernels.reference.group_norm_silu_quantize import group_norm_silu_quantize
from ldmq_kernels.kernels.reference.layer_norm_quantize import layer_norm_quantize
from ldmq_kernels.kernels.reference.linear_static_w8a8 import linear_static_w8a8
from ldmq_kernels.kernels.reference.linear_w4a8 import linear_w4a8
from ldmq_kernels.kernels.reference.linear_w4a16 import linear_w4a16
from ldmq_kernels.kernels.reference.linear_w8a8 import linear_w8a8
from ldmq_kernels.kernels.reference.linear_w8a16 import linear_w8a16
from ldmq_kernels.kernels.reference.quantize_per_sample import quantize_per_sample
from ldmq_kernels.kernels.reference.quantize_per_token import quantize_per_token
from ldmq_kernels.kernels.reference.quantize_static import quantize_static
from ldmq_kernels.kernels.reference.silu_quantize import silu_quantize

__all__ = [
    "conv2d_w4a8",
    "conv2d_w8a8",
    "conv2d_w8a16",
    "geglu_quantize",
    "group_norm_silu_quantize",
    "layer_norm_quantize",
    "linear_static_w8a8",
    "linear_w4a8",
    "linear_w4a16",
    "linear_w8a8",
    "linear_w8a16",
    "quantize_per_sample",
    "quantize_per_token",
    "quantize_static",
    "serves",
    "silu_quantize",
]


def serves(device: torch.device) -> bool:
    """Any device."""
    return True
