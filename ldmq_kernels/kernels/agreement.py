"""Whether two backends' results of an op are the same but for what rounding allows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# of the largest output: float16 and bfloat16 round once at the end, float32 in the order of its sums
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
PRODUCERS = ("group_norm_silu_quantize", "layer_norm_quantize", "geglu_quantize", "silu_quantize")
MEASURED_SCALE = 1e-4  # of the largest: a norm's float32 sums, in another order, come before it


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _allowed(op: str, wanted: Tensor, alone: bool) -> float:
    if wanted.dtype == torch.int8:
        return 1.0 if op in PRODUCERS else 0.0
    share = TOLERANCE[wanted.dtype] if alone else MEASURED_SCALE * (op in PRODUCERS)
    return share * float(wanted.abs().max()) if wanted.numel() else 0.0


def difference(op: str, result: Any, expected: Any) -> str:
    """Compare what two backends give for a call.

    Quantized integers and their scales must agree bit for bit. A producer's integers may be one step apart,
    where a float sum turns a tie over. Other floats agree to the last rounding.

    Args:
        op: its name.
        result: what is judged.
        expected: what is right.

    Returns:
        What is wrong, or nothing.
    """
    results, wanteds = _as_tuple(result), _as_tuple(expected)
    if len(results) != len(wanteds):
        return f"{len(results)} results instead of {len(wanteds)}"
    for got, wanted in zip(results, wanteds, strict=True):
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            return f"{got.dtype} {tuple(got.shape)} instead of {wanted.dtype} {tuple(wanted.shape)}"
        error = float((got.float() - wanted.float()).abs().max()) if got.numel() else 0.0
        allowed = _allowed(op, wanted, alone=len(wanteds) == 1)
        if not error <= allowed:
            return f"differs by up to {error:.3g}, {allowed:.3g} is allowed"
    return ""
