"""out = ((x_q @ weight^T) * x_scale * weight_scale + bias) * gate + residual, in exact integers."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.backend import Unsupported
from ldmq_kernels.kernels.cpu import onednn, products, widened
from ldmq_kernels.kernels.cpu.blocks import finish_rows
from ldmq_kernels.kernels.cpu.compiled import Epilogue
from ldmq_kernels.kernels.cpu.packing import is_packed, pack_linear

WRITTEN_BY_ONEDNN = (torch.float32, torch.bfloat16)  # float16 overflows there


def linear_w8a8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    gate: Tensor | None = None,
) -> Tensor:
    """Linear layer on int8 activations and int8 weights.

    A plain weight is packed anew in each call; a layer holds it packed by `packing.pack_linear`.
    """
    n = weight_scale.shape[0]
    packed = weight if is_packed(weight) else pack_linear(weight)
    if products.is_packed(packed):
        residual = None if residual is None else residual.contiguous()
        epilogue = Epilogue(x_scale, weight_scale, bias, residual=residual, gate=gate)
        return products.linear(x_q, packed, epilogue, n, out_dtype)
    shape = (*x_q.shape[:-1], n)
    rows = x_q.reshape(-1, x_q.shape[-1]).contiguous()
    if not rows.shape[0]:
        return x_q.new_empty(shape, dtype=out_dtype)
    channels = packed.shape[0] * packed.shape[2] if packed.dtype == torch.float32 else packed.shape[0]
    if channels != rows.shape[1]:
        raise Unsupported(f"the input has {rows.shape[1]} channels, the weight {channels}")
    is_plain = x_scale.numel() == 1 and residual is None and gate is None
    if packed.is_mkldnn and is_plain and out_dtype in WRITTEN_BY_ONEDNN:
        shift = None if bias is None else bias.float()
        return onednn.linear(rows, float(x_scale), packed, weight_scale, shift, out_dtype).view(shape)
    epilogue = Epilogue(
        x_scale,
        None if packed.is_mkldnn else weight_scale,
        bias,
        residual=None if residual is None else residual.contiguous(),
        gate=gate,
    )
    if packed.dtype == torch.float32:
        accumulator = widened.linear(rows, packed)
    else:
        accumulator = onednn.linear(rows, 1.0, packed, weight_scale, None, torch.float32)
    out = accumulator if out_dtype == torch.float32 else torch.empty_like(accumulator, dtype=out_dtype)
    finish_rows(accumulator, epilogue, out)
    return out.view(shape)
