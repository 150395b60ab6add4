"""What the producers share: the arguments that say how their result becomes int8."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ldmq_kernels.kernels.cuda import extension
from ldmq_kernels.kernels.dispatch import Unsupported


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
