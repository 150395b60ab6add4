"""out = conv(x_q, weight) * x_scale * weight_scale + bias + sample_bias + residual, in oneDNN's int8."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldmq_kernels.kernels.backend import Unsupported
from ldmq_kernels.kernels.cpu import onednn
from ldmq_kernels.kernels.cpu.blocks import as_rows, finish_rows
from ldmq_kernels.kernels.cpu.linear_w8a8 import WRITTEN_BY_ONEDNN
from ldmq_kernels.kernels.cpu.packing import lay_out_conv2d, pack_conv2d
from ldmq_kernels.kernels.geometry import conv2d_output_size, enlarged_and_padded


def _shifts(bias: Tensor | None, sample_bias: Tensor | None, samples: int) -> list[Tensor | None]:
    """What is added to every position of each sample: (K,) float32, or None."""
    shared = None if bias is None else bias.float()
    if sample_bias is None:
        return [shared] * samples
    own = sample_bias.float()
    return list(own if shared is None else own + shared)


def why_wrong(
    size: Sequence[int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    pads: tuple[int, int],
    dilation: tuple[int, int],
) -> str:
    """Why oneDNN's result is not to be trusted: geometries around those where it was found wrong; empty elsewhere."""
    for length, kernel, pad, step in zip(size, kernel_size, pads, dilation, strict=True):
        if pad > step * (kernel - 1) or (kernel > 1 and step > length):
            return "oneDNN leaves outputs that see only padding as they were in memory"
    width = conv2d_output_size(size, kernel_size, stride, (pads[0], pads[0], pads[1], pads[1]), dilation, 1)[1]
    if width == 1 and tuple(stride) != (1, 1):
        return "oneDNN is wrong in strided convolutions whose output is one pixel wide"
    return ""


def conv2d_w8a8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    sample_bias: Tensor | None,
    residual: Tensor | None,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    upsample: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Convolution on int8 activations and int8 weights, zero padding.

    A plain weight is packed anew in each call; a layer holds it packed by `packing.pack_conv2d`.
    """
    samples = x_q.shape[0]
    if not samples:
        size = conv2d_output_size(x_q.shape[2:], kernel_size, stride, padding, dilation, upsample)
        shape = (0, weight_scale.shape[0], *size)
        # oneDNN takes no empty batch
        return torch.empty(shape, dtype=out_dtype, device=x_q.device, memory_format=torch.channels_last)
    x_q, pads = enlarged_and_padded(x_q, padding, upsample)
    if why := why_wrong(x_q.shape[2:], kernel_size, stride, pads, dilation):
        raise Unsupported(why)
    x_q = x_q.contiguous(memory_format=torch.channels_last)
    geometry = (stride, pads, dilation, groups)
    packed = weight if weight.is_mkldnn else pack_conv2d(weight)
    lay_out_conv2d(packed, *geometry, x_q.shape)
    shifts = _shifts(bias, sample_bias, samples)
    is_static, is_shared = x_scale.numel() == 1, sample_bias is None or samples == 1
    if is_static and is_shared and residual is None and out_dtype in WRITTEN_BY_ONEDNN:
        return onednn.conv2d(x_q, float(x_scale), packed, weight_scale, shifts[0], *geometry, out_dtype)
    accumulator = onednn.conv2d(x_q, 1.0, packed, weight_scale, None, *geometry, torch.float32)
    out = torch.empty_like(accumulator, dtype=out_dtype)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    if is_shared:
        pixels = accumulator.shape[2] * accumulator.shape[3]
        row_scale = x_scale.reshape(1) if is_static else x_scale.repeat_interleave(pixels).unsqueeze(1)
        added = None if residual is None else as_rows(residual)
        finish_rows(as_rows(accumulator), row_scale, shifts[0], added, as_rows(out))
        return out
    scales = x_scale.reshape(-1).expand(samples)
    for sample in range(samples):
        one = slice(sample, sample + 1)
        added = None if residual is None else as_rows(residual[one])
        finish_rows(as_rows(accumulator[one]), scales[one], shifts[sample], added, as_rows(out[one]))
    return out
