"""Whether two backends' results of an op are the same but for what rounding allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldmq_kernels.numerics.formats.float8 import FLOAT8

# of the largest output: float16 and bfloat16 round once at the end, float32 in the order of its sums
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Agreement:
    """How near the results of two backends must come.

    Attributes:
        integer_steps: that quantized values may be apart: 1 where a float sum, in another order, turns a tie over.
        scale_tolerance: of a measured scale, as a share of the largest one.
        sum_tolerance: of a product's output, as a share of the largest one, where that is more than its rounding; and
            of values that a product's epilogue quantized, where that is more than the steps.
    """

    integer_steps: int = 0
    scale_tolerance: float = 0.0
    sum_tolerance: float = 0.0

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
            steps = (_on_steps(got) - _on_steps(wanted)).abs()
            if self.sum_tolerance and wanted.dtype in (torch.int8, FLOAT8):
                near = (got.float() - wanted.float()).abs() <= self.sum_tolerance * wanted.float().abs().max()
                steps = steps.masked_fill(near, 0)
            error = float(steps.max()) if got.numel() else 0.0
            allowed = self._allowed(wanted, is_alone=len(wanteds) == 1)
            if not error <= allowed:
                return f"differs by up to {error:.3g}, {allowed:.3g} is allowed"
        return ""

    def _allowed(self, wanted: Tensor, is_alone: bool) -> float:
        if wanted.dtype in (torch.int8, FLOAT8):
            return float(self.integer_steps)
        share = max(TOLERANCE[wanted.dtype], self.sum_tolerance) if is_alone else self.scale_tolerance
        return share * float(wanted.abs().max()) if wanted.numel() else 0.0


EXACT = Agreement()
AFTER_FLOAT_SUMS = Agreement(integer_steps=1, scale_tolerance=1e-4)  # a norm's float32 sums come before the rounding
# Hopper's tensor cores keep about 14 bits of a sum of FP8 products (DeepSeek-V3, arXiv 2412.19437, section 3.3.2);
# what is cut off adds up along K
FLOAT8_SUMS = Agreement(sum_tolerance=2.0**-7)
AFTER_FLOAT8_SUMS = Agreement(integer_steps=1, sum_tolerance=2.0**-5)  # of a product of two such sums


def _on_steps(values: Tensor) -> Tensor:
    """Values as floats whose distance is counted as the dtype has it: of e4m3 in steps, of which NaN is none."""
    if values.dtype != FLOAT8:
        return values.float()
    bits = values.view(torch.int8).int()
    return torch.where(bits < 0, -(bits & 127), bits).float().masked_fill(values.float().isnan(), torch.nan)


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
