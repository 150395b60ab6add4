"""oneDNN's int8 on a CPU, reached through `torch.ops.onednn`; the rest is plain torch, block by block.

oneDNN takes int8 activations as uint8 with zero point 128 and gives float32 or bfloat16, with scales
and bias applied. Without VNNI it saturates silently, so a self-check decides whether it may be used.
"""

from __future__ import annotations

import torch

from ldmq_kernels.kernels.cpu.conv2d_w4a8 import conv2d_w4a8
from ldmq_kernels.kernels.cpu.conv2d_w8a8 import conv2d_w8a8
from ldmq_kernels.kernels.cpu.conv2d_w8a16 import conv2d_w8a16
from ldmq_kernels.kernels.cpu.geglu_quantize import geglu_quantize
from ldmq_kernels.kernels.cpu.group_norm_silu_quantize import group_norm_silu_quantize
from ldmq_kernels.kernels.cpu.layer_norm_quantize import layer_norm_quantize
from ldmq_kernels.kernels.cpu.linear_static_w8a8 import linear_static_w8a8
from ldmq_kernels.kernels.cpu.linear_w4a8 import linear_w4a8
from ldmq_kernels.kernels.cpu.linear_w4a16 import linear_w4a16
from ldmq_kernels.kernels.cpu.linear_w8a8 import linear_w8a8
from ldmq_kernels.kernels.cpu.linear_w8a16 import linear_w8a16
from ldmq_kernels.kernels.cpu.quantize_per_sample import quantize_per_sample
from ldmq_kernels.kernels.cpu.quantize_per_token import quantize_per_token
from ldmq_kernels.kernels.cpu.quantize_static import quantize_static
from ldmq_kernels.kernels.cpu.self_check import is_exact
from ldmq_kernels.kernels.cpu.silu_quantize import silu_quantize

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
    """Whether `device` is a CPU whose oneDNN int8 products are exact."""
    return device.type == "cpu" and is_exact()
