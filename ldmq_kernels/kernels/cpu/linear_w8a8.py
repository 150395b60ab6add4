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
    shape = (*x_q.shape[:-1], weight_scale.shape[0])
    rows = x_q.reshape(-1, x_q.shape[-1]).contiguous()
    if not rows.shape[0]:
        return x_q.new_empty(shape, dtype=out_dtype)
    packed = weight if is_packed(weight) else pack_linear(weight)
    channels = _channels_of(packed)
    if channels != rows.shape[1]:
        raise Unsupported(f"the input has {rows.shape[1]} channels, the weight {channels}")
    n = weight_scale.shape[0]
    if gate is not None and (gate.shape[-1] != n or rows.shape[0] % max(1, gate.numel() // n)):
        raise Unsupported(f"a gate of shape {tuple(gate.shape)} for {rows.shape[0]} rows of {n}")
    is_plain = x_scale.numel() == 1 and residual is None and gate is None
    if packed.is_mkldnn and is_plain and out_dtype in WRITTEN_BY_ONEDNN:
        shift = None if bias is None else bias.float()
        return onednn.linear(rows, float(x_scale), packed, weight_scale, shift, out_dtype).view(shape)
    epilogue = Epilogue(
        x_scale.reshape(-1),
        None if packed.is_mkldnn else weight_scale,
        bias,
        residual=None if residual is None else residual.reshape(-1, n).contiguous(),
        gate=None if gate is None else gate.reshape(-1, n),
    )
    if products.is_packed(packed):
        return products.linear(rows, packed, epilogue, n, out_dtype).view(shape)
    if packed.dtype == torch.float32:
        accumulator = widened.linear(rows, packed)
    else:
        accumulator = onednn.linear(rows, 1.0, packed, weight_scale, None, torch.float32)
    out = accumulator if out_dtype == torch.float32 else torch.empty_like(accumulator, dtype=out_dtype)
    finish_rows(accumulator, epilogue, out)
    return out.view(shape)


def _channels_of(packed: Tensor) -> int:
    """The input channels of a packed weight."""
    if products.is_packed(packed):
        return products.channels_of(packed)
    return packed.shape[0] * packed.shape[2] if packed.dtype == torch.float32 else packed.shape[0]
