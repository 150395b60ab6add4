"""out = conv(x_q, weight) * x_scale * weight_scale + bias + sample_bias + residual, in exact integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldmq_kernels.kernels.backend import Unsupported
from ldmq_kernels.kernels.cpu import onednn, products, widened
from ldmq_kernels.kernels.cpu.blocks import as_rows, finish_rows
from ldmq_kernels.kernels.cpu.compiled import Epilogue
from ldmq_kernels.kernels.cpu.linear_w8a8 import WRITTEN_BY_ONEDNN
from ldmq_kernels.kernels.cpu.packing import (
    is_packed,
    lay_out_conv2d,
    pack_conv2d,
    pack_conv2d_of_groups,
    unpack_conv2d,
)
from ldmq_kernels.kernels.geometry import conv2d_output_size, enlarged_and_padded


def _finish(accumulator: Tensor, epilogue: Epilogue, out_dtype: torch.dtype) -> Tensor:
    """The epilogue of a convolution, of (N, K, H, W) float32 in channels_last."""
    out = accumulator if out_dtype == torch.float32 else torch.empty_like(accumulator, dtype=out_dtype)
    finish_rows(as_rows(accumulator), epilogue, as_rows(out))
    return out


def is_wrong_in_onednn(
    size: Sequence[int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    pads: tuple[int, int],
    dilation: tuple[int, int],
) -> bool:
    """Whether oneDNN's int8 result is not to be trusted: geometries around those where it was found wrong.

    Outputs that see only padding are left as they were in memory, and strided convolutions whose output is one pixel
    wide are wrong.
    """
    for length, kernel, pad, step in zip(size, kernel_size, pads, dilation, strict=True):
        if pad > step * (kernel - 1) or (kernel > 1 and step > length):
            return True
    width = conv2d_output_size(size, kernel_size, stride, (pads[0], pads[0], pads[1], pads[1]), dilation, 1)[1]
    return width == 1 and tuple(stride) != (1, 1)


def _held_as(packed: Tensor, outputs: int, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """A weight in another form than packing, which sees no geometry, chose; kept on the tensor from its first call."""
    kept = getattr(packed, "_ldmq_held_as", {})
    if pack not in kept:
        kept[pack] = pack(unpack_conv2d(packed, outputs))
        packed._ldmq_held_as = kept  # type: ignore[attr-defined]
    return kept[pack]


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
    packed = weight if is_packed(weight) else pack_conv2d(weight)
    if groups > 1 and products.is_packed(packed):
        packed = _held_as(packed, weight_scale.shape[0], pack_conv2d_of_groups)
    is_ours = products.is_packed(packed)
    is_in_onednn = packed.dtype == torch.int8 and not is_ours
    if is_in_onednn and is_wrong_in_onednn(x_q.shape[2:], kernel_size, stride, pads, dilation):
        packed = _held_as(packed, weight_scale.shape[0], widened.pack_conv2d)
    x_q = x_q.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        if residual.shape[1] != weight_scale.shape[0]:
            raise Unsupported(f"residual has {residual.shape[1]} columns, the output {weight_scale.shape[0]}")
        residual = residual.contiguous(memory_format=torch.channels_last)
    is_widened = packed.dtype == torch.float32
    epilogue = Epilogue(x_scale, weight_scale if is_ours or is_widened else None, bias, sample_bias, residual)
    if is_ours:
        return products.conv2d(x_q, packed, epilogue, weight_scale.shape[0], stride, pads, dilation, out_dtype)
    parts = packed.shape[0] // weight_scale.shape[0] if is_widened else 1
    if parts > 1 and groups > 1:
        raise Unsupported(f"sums of a convolution in {groups} groups are too large to be exact in float32")
    geometry = (stride, pads, dilation, groups * parts)
    lay_out_conv2d(packed, *geometry, x_q.shape)
    if is_widened:
        accumulator = widened.conv2d(x_q, packed, *geometry, parts)
        return _finish(accumulator, epilogue, out_dtype)
    is_shared = sample_bias is None or samples == 1
    if x_scale.numel() == 1 and is_shared and residual is None and out_dtype in WRITTEN_BY_ONEDNN:
        shift = None if bias is None else bias.float()
        if sample_bias is not None:
            own = sample_bias[0].float()
            shift = own if shift is None else own + shift
        return onednn.conv2d(x_q, float(x_scale), packed, weight_scale, shift, *geometry, out_dtype)
    accumulator = onednn.conv2d(x_q, 1.0, packed, weight_scale, None, *geometry, torch.float32)
    return _finish(accumulator, epilogue, out_dtype)
