"""What the producers share: the arguments that say how their result becomes int8 or FP8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import extension
from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.reference.producers import no_scale


def factors(inv_scale: Tensor | None, inv_smooth: Tensor | None, x: Tensor, channels: int) -> dict[str, Any]:
    """The binding's keyword arguments for a calibrated inverse scale, or for a smoothing vector where it is measured.

    Raises:
        Unsupported: another dtype, device, layout or count.
    """
    chosen, name = (inv_smooth, "inv_smooth") if inv_scale is None else (inv_scale, "inv_scale")
    arguments = {"inv_scale": 0, "inv_scale_count": 0, "inv_smooth": 0}
    if chosen is not None:
        extension.check_factors(chosen, name, x, channels)
        arguments[name] = chosen.data_ptr()
    if inv_scale is not None:
        arguments["inv_scale_count"] = inv_scale.numel()
    return arguments


def vector(name: str, operand: Tensor | None, x: Tensor, channels: int) -> dict[str, Any]:
    """The binding's keyword arguments for a floating vector over the channels, which may be None.

    Raises:
        Unsupported: another dtype, device, layout or shape.
    """
    if operand is None:
        return {name: 0, f"{name}_dtype": "float32"}
    dtype = extension.DTYPES.get(operand.dtype)
    if dtype is None or operand.device != x.device or not operand.is_contiguous():
        raise Unsupported(
            f"the {name} is {operand.dtype} on {operand.device}, must be contiguous floating on {x.device}"
        )
    if operand.shape != (channels,):
        raise Unsupported(f"the {name} is {tuple(operand.shape)}, must be ({channels},)")
    return {name: operand.data_ptr(), f"{name}_dtype": dtype}


def run_on_rows(
    op: str,
    x: Tensor,
    channels: int,
    inv_scale: Tensor | None,
    inv_smooth: Tensor | None,
    q_dtype: torch.dtype | None,
    **more: Any,
) -> tuple[Tensor, Tensor]:
    """Run an op of the binding that quantizes each row of what it computes.

    Args:
        op: "geglu_quantize" or "gelu_quantize".
        x: (..., C of the input) floating; copied where it is not contiguous.
        channels: of the result.
        inv_scale: (1,) or (channels,) float32, or None where the scale of each row is measured.
        inv_smooth: (channels,) float32 or None, for a measured scale.
        q_dtype: int8 or None for it, or float8_e4m3fn.
        more: the op's own arguments.

    Returns:
        q (..., channels) of `q_dtype`, and the scales (...) float32, none with an inv_scale.

    Raises:
        Unsupported: another dtype, device or size of an operand, FP8 for a GPU that has none, or too many channels for
            a scale of each row.
    """
    x = x.contiguous()
    arguments = extension.source(x, torch.contiguous_format) | extension.dependent_target(x) | more
    arguments |= factors(inv_scale, inv_smooth, x, channels)
    q = torch.empty((*x.shape[:-1], channels), dtype=extension.quantized(x, q_dtype), device=x.device)
    scale = no_scale(x) if inv_scale is not None else x.new_empty(x.shape[:-1], dtype=torch.float32)
    if q.numel() == 0:
        return q, scale
    binding = extension.binding()
    try:
        getattr(binding, op)(
            **arguments,
            **extension.stored_in(q),
            scale=scale.data_ptr(),
            rows=q.numel() // channels,
            channels=channels,
        )
    except binding.Refusal as refusal:
        raise Unsupported(str(refusal)) from None
    return q, scale
