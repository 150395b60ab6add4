"""Whether two backends' results of an op are the same but for what rounding allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# of the largest output: float16 and bfloat16 round once at the end, float32 in the order of its sums
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Agreement:
    """How near the results of two backends must come.

    Attributes:
        integer_steps: that quantized integers may be apart: 1 where a float sum, in another order, turns a tie over.
        scale_tolerance: of a measured scale, as a share of the largest one.
    """

    integer_steps: int = 0
    scale_tolerance: float = 0.0

    def difference(self, result: Any, expected: Any) -> str:
        """Compare what two backends give for a call; floating outputs must agree to the last rounding.

        Args:
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
            allowed = self._allowed(wanted, is_alone=len(wanteds) == 1)
            if not error <= allowed:
                return f"differs by up to {error:.3g}, {allowed:.3g} is allowed"
        return ""

    def _allowed(self, wanted: Tensor, is_alone: bool) -> float:
        if wanted.dtype == torch.int8:
            return float(self.integer_steps)
        share = TOLERANCE[wanted.dtype] if is_alone else self.scale_tolerance
        return share * float(wanted.abs().max()) if wanted.numel() else 0.0


EXACT = Agreement()
AFTER_FLOAT_SUMS = Agreement(integer_steps=1, scale_tolerance=1e-4)  # a norm's float32 sums come before the rounding


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
