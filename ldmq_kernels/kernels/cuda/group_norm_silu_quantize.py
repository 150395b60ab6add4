"""q = quantize(silu(group_norm(x))), in float32 up to the last rounding; csrc/group_norm_silu_quantize.cu.

One launch: statistics, and then the quantization, which reads memory again, mostly from the second-level cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import extension
from ldmq_kernels.kernels.cuda.producers import factors, vector
from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.reference.producers import no_scale


def group_norm_silu_quantize(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    inv_scale: Tensor | None,
    inv_smooth: Tensor | None,
    per_token: bool,
    q_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Group normalization, SiLU where asked for, and the quantization of the result.

    Args:
        x: (N, C, H, W) float32, float16 or bfloat16; copied where it is not channels_last.
        norm_weight: (C,) of any of these dtypes, or None for ones.
        norm_bias: (C,) of any of these dtypes, or None for zeros.

    Raises:
        Unsupported: another dtype, device or size of an operand, groups that do not divide the channels, FP8 for a GPU
            that has none, or too many channels for a scale of each pixel.
    """
    if x.dim() != 4:
        raise Unsupported(f"x has {x.dim()} axes, must be (N, C, H, W)")
    x = x.contiguous(memory_format=torch.channels_last)
    arguments = extension.source(x, torch.channels_last) | extension.target(x)
    samples, channels, height, width = x.shape
    if num_groups < 1 or channels % num_groups:
        raise Unsupported(f"{num_groups} groups for {channels} channels")
    arguments |= vector("weight", norm_weight, x, channels) | vector("bias", norm_bias, x, channels)
    arguments |= factors(inv_scale, inv_smooth, x, channels)
    per_token = per_token and inv_scale is None
    stored = extension.quantized(x, q_dtype)
    q = torch.empty(x.shape, dtype=stored, device=x.device, memory_format=torch.channels_last)
    if inv_scale is not None:
        scale = no_scale(x)
    else:
        scale = x.new_empty((samples, height, width) if per_token else (samples,), dtype=torch.float32)
    if x.numel() == 0:
        return q, scale
    binding = extension.binding()
    sizes = {"samples": samples, "pixels": height * width, "channels": channels, "groups": num_groups}
    try:
        scratch_bytes = binding.group_norm_scratch(
            has_inv_scale=inv_scale is not None, per_token=per_token, device=arguments["device"], **sizes
        )
        scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=x.device)
        binding.group_norm_silu_quantize(
            **arguments,
            **sizes,
            eps=eps,
            silu=silu,
            per_token=per_token,
            **extension.stored_in(q),
            scale=scale.data_ptr(),
            scratch=scratch.data_ptr(),
        )
    except binding.Refusal as refusal:
        raise Unsupported(str(refusal)) from None
    return q, scale
